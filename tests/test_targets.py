"""What is counted, and the loss of it, against a count of its own by definition.

Nothing here asks rankopt what a target is: labels, masks and logits say.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt import DataError, evaluate, profile_model
from rankopt.data.digest import data_digest
from tests import tiny

Batch = dict[str, Any]
SIZE = {
    "vocab_size": tiny.VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 32,
}
ENCODER_DECODER = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}


def made(name: str, config: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def gemma3() -> Any:
    text = {**SIZE, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1}
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
    return made(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={**text, "head_dim": 8, "sliding_window": 16},
        vision_config={**seen, "num_attention_heads": 2, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=60,
    )


def xlm(*, causal: bool) -> Any:
    settings = {"vocab_size": 64, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0}
    return made(
        "XLMWithLMHeadModel", "XLMConfig", max_position_embeddings=32, causal=causal, **settings
    )


def modernbert() -> Any:
    settings = {**SIZE, "hidden_size": 16, "intermediate_size": 24, "sparse_prediction": True}
    return made("ModernBertForMaskedLM", "ModernBertConfig", **settings)


def decoder(name: str, config: str) -> Callable[[], Any]:
    return lambda: made(name, config, **ENCODER_DECODER)


#: Causal language models: heads that shift labels, and heads that do not.
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gemma3, text and pictures": gemma3,
    "bart": decoder("BartForCausalLM", "BartConfig"),
    "mbart": decoder("MBartForCausalLM", "MBartConfig"),
    "pegasus": decoder("PegasusForCausalLM", "PegasusConfig"),
    "marian": decoder("MarianForCausalLM", "MarianConfig"),
    "xlm": lambda: xlm(causal=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3, text and pictures": {"exclude": ["*vision*"]},
    "bart": {"exclude": ["*encoder_attn*"]},
    "mbart": {"exclude": ["*encoder_attn*"]},
    "pegasus": {"exclude": ["*encoder_attn*"]},
    "marian": {"exclude": ["*encoder_attn*"]},
}


def texts(padding: str) -> tuple[Batch, Tensor]:
    """A batch with omitted labels, and where a token is predicted from one before it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        start = {"left": 0, "middle": 3, "right": 5}[padding]
        mask[0, start : start + 3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return batch, (mask[:, 1:] * mask[:, :-1]).bool()


def next_tokens(model: Any, batch: Batch, counted: Tensor) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    return float(losses[counted].sum() / counted.sum()), int(counted.sum())


def accepted(model: Any, batch: Batch) -> Batch:
    """Without positions, if the model counts them itself."""
    known = inspect.signature(model.forward).parameters
    return {k: v for k, v in batch.items() if k != "position_ids" or k in known}


@pytest.mark.parametrize("padding", ["right", "left", "middle"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_predicts_the_next_token_from_one_that_is_no_padding(
    kind: str, padding: str
) -> None:
    model = CAUSAL[kind]()
    batch, counted = texts(padding)
    batch = accepted(model, batch)
    loss, targets = next_tokens(model, batch, counted)
    for given in (batch, {**batch, "labels": batch["input_ids"]}):
        found = evaluate(model, [given], progress=False)
        assert (found.task, found.targets) == ("causal-lm", targets)
        assert found.loss == pytest.approx(loss, rel=1e-5)
    if padding == "left":
        options = OPTIONS.get(kind, {})
        profile = profile_model(model, [batch], progress=False, keep_bases=False, **options)
        assert (profile.info.task, profile.info.targets) == ("causal-lm", targets)
        assert profile.info.data_digest == data_digest(model, [batch])


@pytest.mark.parametrize("kind", ["bart", "gemma3, text and pictures"])
def test_rows_are_those_of_the_next_token(kind: str) -> None:
    model = CAUSAL[kind]()
    batch, counted = texts("left")
    batch = accepted(model, batch)
    options = OPTIONS[kind]
    profile = profile_model(model, [batch], progress=False, keep_bases=False, **options)
    wanted = {name: torch.zeros(()) for name in profile.fisher_rows}
    for n in range(3):
        model.zero_grad()
        one = {k: v[n : n + 1] for k, v in batch.items()}
        logits = model(**one, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].mT, one["input_ids"][:, 1:], reduction="none")
        losses[counted[n : n + 1]].sum().backward()
        for name in wanted:
            gradient = model.get_submodule(name).weight.grad
            wanted[name] = wanted[name] + gradient.double().square().sum(0)
    for name, rows in profile.fisher_rows.items():
        assert torch.allclose(torch.from_numpy(rows), wanted[name], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bool", "float", "int32", "4-D bool", "4-D added"])
def test_masks_of_any_kind_count_alike(dtype: str) -> None:
    model = tiny.llama()
    batch, counted = texts("left")
    mask, visible = batch["attention_mask"], torch.ones(8, 8, dtype=torch.bool).tril()
    visible = (visible & (mask[:, None] != 0) | torch.eye(8, dtype=torch.bool))[:, None]
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    other = {
        "bool": mask.bool(),
        "float": mask.float(),
        "int32": mask.int(),
        "4-D bool": visible,
        "4-D added": added,
    }[dtype]
    loss, targets = next_tokens(model, batch, counted)
    found = profile_model(
        model,
        [{**batch, "attention_mask": other}],
        backends=["whitened"],
        keep_bases=False,
        progress=False,
    )
    assert found.info.targets == targets == 18
    assert {int(traces[0]) for traces in found.traces.values()} == {int(mask.sum())}
    measured = evaluate(model, [{**batch, "attention_mask": other}], progress=False)
    assert measured.loss == pytest.approx(loss, rel=1e-5)


def test_labels_that_were_shifted_for_a_head_that_does_not_are_taken_as_they_are() -> None:
    model = CAUSAL["bart"]()
    batch, counted = texts("none")
    ids = batch.pop("input_ids")
    batch = {"input_ids": ids, "labels": torch.cat([ids[:, 1:], ids[:, :1] * 0 - 100], 1)}
    loss, targets = next_tokens(model, batch, counted)
    found = evaluate(model, [batch], progress=False)
    assert found.targets == targets == 21
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_a_model_that_sees_all_tokens_is_not_taught_to_copy() -> None:
    model, (batch, _) = xlm(causal=False), texts("right")
    batch.pop("position_ids")
    for given in (batch, {**batch, "labels": batch["input_ids"]}):
        with pytest.raises(DataError, match="teach it to copy; mask tokens"):
            evaluate(model, [given], progress=False)
    labels = torch.where(torch.arange(8) % 3 == 0, 5, -100).expand(3, -1)
    found = evaluate(model, [{**batch, "labels": labels}], progress=False)
    with torch.no_grad():
        logits = model(**batch).logits
    counted = labels.masked_fill(batch["attention_mask"] == 0, -100)
    assert found.targets == int((counted != -100).sum())
    assert found.loss == pytest.approx(float(cross_entropy(logits.mT, counted)), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"estimator": "sampled"}, {"unit": "token"}])
def test_a_head_that_predicts_at_labels_only(options: dict[str, Any]) -> None:
    model, (batch, _) = modernbert(), texts("right")
    batch.pop("position_ids")
    batch["labels"] = torch.where(torch.arange(8) % 2 == 0, 5, -100).expand(3, -1)
    counted = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100) != -100
    profile = profile_model(model, [batch], progress=False, keep_bases=False, **options)
    assert profile.info.targets == int(counted.sum()) == 11
    assert profile.info.units == (11 if "unit" in options else 3)


def test_labels_of_a_decoders_padding_are_ignored() -> None:
    model = tiny.t5()
    (batch,) = tiny.batches(model, count=1)
    labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)
    careless = {**batch, "labels": labels, "decoder_attention_mask": (labels != 0).long()}
    found = evaluate(model, [careless], progress=False)
    assert found.targets == int((labels != 0).sum()) == 15
    profile = profile_model(model, [careless], progress=False, keep_bases=False)
    assert profile.info.targets == 15


def by_definition(model: Any, batch: Batch) -> tuple[float, int]:
    """Sum of the losses and number of terms of models that do not shift."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    with torch.no_grad():
        logits = model(**batch).logits
    if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif labels.is_floating_point():
        different = logits.reshape(labels.shape) - labels
        if labels.dim() > 1:
            losses = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            return float(losses), labels.numel()
        return float(different.square().sum()), len(labels)
    assert mask is None or labels.dim() == 1 or logits.shape[:-1] == labels.shape
    losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return float(losses), int((labels != -100).sum())


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_architecture_counts_what_its_loss_is_a_mean_of(kind: str) -> None:
    model = tiny.ARCHITECTURES[kind]()
    batches = tiny.batches(model)
    parts = [by_definition(model, batch) for batch in batches]
    targets = sum(count for _, count in parts)
    found = evaluate(model, batches, progress=False)
    assert found.targets == targets
    assert found.loss == pytest.approx(sum(loss for loss, _ in parts) / targets, rel=1e-5)
    profile = profile_model(model, batches, progress=False, keep_bases=False)
    assert profile.info.targets == targets


def test_several_choices_sound_and_sentences_that_follow() -> None:
    torch.manual_seed(3)
    ids = torch.randint(3, 60, (3, 4, 6))
    choice = tiny.bert("MultipleChoice"), {"input_ids": ids, "labels": torch.tensor([0, 3, 1])}
    follows = (
        tiny.bert("NextSentencePrediction"),
        {
            "input_ids": ids[:, 0],
            "labels": torch.tensor([0, 1, 1]),
        },
    )
    spectrogram = (
        made(
            "ASTForAudioClassification",
            "ASTConfig",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_length=16,
            num_mel_bins=8,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            num_labels=3,
        ),
        {"input_values": torch.randn(3, 16, 8), "labels": torch.tensor([0, 2, 1])},
    )
    tasks = ("multiple-choice", "sequence-classification", "audio-classification")
    for (model, batch), task in zip((choice, follows, spectrogram), tasks, strict=True):
        with torch.no_grad():
            wanted = cross_entropy(model(**batch).logits, batch["labels"])
        found = evaluate(model, [batch], progress=False)
        assert (found.task, found.targets) == (task, 3)
        assert found.loss == pytest.approx(float(wanted), rel=1e-5)
        profile = profile_model(model, [batch], progress=False, keep_bases=False)
        assert (profile.info.task, profile.info.targets) == (task, 3)


def test_packed_rows_are_said_to_count_as_one_example(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama()
    documents = [torch.randint(3, 60, (1, n)) for n in (5, 8, 7)]
    places = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    packed = {"input_ids": torch.cat(documents, 1), "position_ids": places}
    apart = evaluate(model, [{"input_ids": x} for x in documents], progress=False)
    found = evaluate(model, [packed], progress=False)
    # No document's first token is predicted from the one before.
    assert found.targets == apart.targets == 17
    assert found.loss == pytest.approx(apart.loss, rel=1e-5)
    assert "several documents" not in capsys.readouterr().err
    profile_model(model, [packed], progress=False, keep_bases=False)
    assert capsys.readouterr().err.count("rows hold several documents") == 1


def test_the_loss_of_a_classifier_in_bfloat16_has_more_digits_than_it_returns() -> None:
    model = tiny.bert(num_labels=3).bfloat16()
    batches = tiny.batches(model, count=8)
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            total += float(cross_entropy(logits.double(), batch["labels"], reduction="sum"))
    assert evaluate(model, batches, progress=False).loss == pytest.approx(total / 24, rel=1e-5)
