"""Every class with a head whose loss rankopt reads, by transformers' own lists."""

from transformers.models.auto import modeling_auto

#: Lists of transformers, and what their heads predict; the first that names a class decides.
LISTS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "generation",
    "SPEECH_SEQ_2_SEQ": "generation",
    "IMAGE_TEXT_TO_TEXT": "generation",
    "CAUSAL_LM": "next-token",
    "MASKED_LM": "token",
    "TOKEN_CLASSIFICATION": "token",
    "SEQUENCE_CLASSIFICATION": "example",
    "IMAGE_CLASSIFICATION": "example",
    "AUDIO_CLASSIFICATION": "example",
    "VIDEO_CLASSIFICATION": "example",
    "MULTIMODAL_LM": "generation",
}


def heads() -> dict[str, str]:
    """Class name -> the list that names it."""
    found: dict[str, str] = {}
    for name in LISTS:
        table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
        for given in table.values():
            for architecture in given if isinstance(given, list | tuple) else (given,):
                found.setdefault(architecture, name)
    return found
