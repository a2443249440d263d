"""Padding is left out of second moments at every layer, by what the layer sees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankopt import Profile, profile_model
from tests import tiny

Batch = dict[str, Any]


def positions(profile: Profile) -> dict[str, int]:
    return {name: int(traces[0]) for name, traces in profile.traces.items()}


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)


@pytest.mark.parametrize("loss_fn", [own_loss, None])
@pytest.mark.parametrize("length", [8, 7])
@pytest.mark.parametrize("first", ["no padding", "padding"])
def test_source_and_target_of_one_length_keep_their_masks(
    loss_fn: Callable[..., Tensor] | None, length: int, first: str
) -> None:
    model = tiny.t5()
    generator = torch.Generator().manual_seed(0)

    def batch(source: int, target: int) -> Batch:
        ids = torch.randint(3, tiny.VOCABULARY, (3, 8), generator=generator)
        labels = torch.randint(3, tiny.VOCABULARY, (3, length), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(8) < source).long().expand(3, -1),
            "labels": labels.masked_fill(torch.arange(length) >= target, -100),
            "decoder_input_ids": labels,
            "decoder_attention_mask": (torch.arange(length) < target).long().expand(3, -1),
        }

    batches, extra = [batch(4, 6)], 0
    if first == "no padding":
        batches, extra = [batch(8, length), *batches], 1
    found = positions(
        profile_model(model, batches, loss_fn=loss_fn, backends=["kronecker"], progress=False)
    )
    of_source, of_target = 3 * 4 + extra * 3 * 8, 3 * 6 + extra * 3 * length
    for name, count in found.items():
        cross = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        encoder = name.startswith("encoder.") or cross
        assert count == (of_source if encoder else of_target), name


def speech(**changes: Any) -> Any:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 8),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "num_labels": 2,
        "classifier_proj_size": 16,
    }
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**{**settings, **changes})
    return transformers.Wav2Vec2ForSequenceClassification(config).eval()


def sound(samples: list[int]) -> Batch:
    mask = torch.stack([(torch.arange(200) < each).long() for each in samples])
    values = torch.randn(len(samples), 200, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(len(samples)) % 2
    return {"input_values": values * mask, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_frames_of_sound_are_masked_where_their_samples_are(
    norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = speech(feat_extract_norm=norm)
    found = profile_model(model, [sound([200, 100, 60])], backends=["whitened"], progress=False)
    # A convolution of 8 samples every 4, twice.
    frames = [((each - 8) // 4 + 1 - 8) // 4 + 1 for each in (200, 100, 60)]
    assert set(positions(found).values()) == {sum(frames)}
    assert "warning" not in capsys.readouterr().err


def test_padding_that_no_mask_tells_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    settings = speech().config.to_dict()
    known = {k: settings[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.SEWConfig(
        **known,
        num_attention_heads=2,
        squeeze_factor=2,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )
    model = transformers.SEWForSequenceClassification(config).eval()
    options: dict[str, Any] = {"keep_bases": False, "progress": False}
    profile_model(model, [sound([200, 100])] * 2, backends=["whitened"], **options)
    said = capsys.readouterr().err
    assert said.count("padding enters its second moments") == 1
    assert "sew.encoder.layers.0" in said
    profile_model(model, [sound([200, 200])], backends=["whitened"], **options)
    profile_model(model, [sound([200, 100])], backends=["fwsvd"], moments=False, **options)
    assert "padding" not in capsys.readouterr().err


def test_choices_have_masks_of_their_own() -> None:
    model = tiny.bert("MultipleChoice")
    ids = torch.randint(3, tiny.VOCABULARY, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 3, 1])}
    found = profile_model(model, [batch], backends=["whitened"], progress=False)
    assert set(positions(found).values()) == {int(mask.sum())}
