"""Tiny models of transformers' own architectures go all the way: thirty, and the rest on request.

What a walk is: tests/sweep. What came of each: experiments/07_architectures/results.json.
"""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankopt import ModelError, Profile
from tests.sweep import walk as walking
from tests.sweep.heads import heads
from tests.sweep.inputs import likelihood, terms_by_hand
from tests.sweep.walk import walk

RESULTS = Path(__file__).parents[1] / "experiments" / "07_architectures" / "results.json"
#: One for each manner of layers, sharing, masks or heads.
SAMPLE = (
    "AlbertForSequenceClassification",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "ConvNextForImageClassification",
    "DebertaV2ForTokenClassification",
    "DeepseekV3ForCausalLM",
    "DistilBertForSequenceClassification",
    "ElectraForTokenClassification",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "HubertForSequenceClassification",
    "LayoutLMForTokenClassification",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "LongformerForMaskedLM",
    "Mamba2ForCausalLM",
    "MixtralForCausalLM",
    "ModernBertForMaskedLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "RobertaForSequenceClassification",
    "SwinForImageClassification",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "XLNetForSequenceClassification",
)
#: A few that stay with the fast tests.
QUICK = (
    "RobertaForSequenceClassification",
    "ViTForImageClassification",
    "XLNetForSequenceClassification",
    "BartForConditionalGeneration",
)
HEADS = heads()
REST = [name for name in HEADS if name not in SAMPLE]


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in QUICK else pytest.param(name, marks=(pytest.mark.slow, pytest.mark.sweep))
        for name in SAMPLE
    ],
)
def test_a_sample_goes_all_the_way(architecture: str) -> None:
    found = walk(architecture, HEADS[architecture])
    assert found.outcome == "ok", f"{found.stage}: {found.reason}"
    assert found.layers > 0 and found.targets > 0


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """Outcomes of the experiment; none if it was made with another transformers."""
    if not RESULTS.is_file():
        return {}
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    same = found["settings"]["transformers"] == version("transformers")
    outcomes: dict[str, dict[str, Any]] = found["architectures"] if same else {}
    return outcomes


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("architecture", REST)
def test_the_rest_do_as_recorded(architecture: str, recorded: dict[str, dict[str, Any]]) -> None:
    """What was ok is, and nothing else ends otherwise than with an error of rankopt's."""
    found = walk(architecture, HEADS[architecture])
    assert found.outcome != "FAULT", f"{found.stage}: {found.reason}"
    if recorded.get(architecture, {}).get("outcome") == "ok":
        assert found.outcome == "ok", f"{found.stage}: {found.reason}"


def test_targets_by_hand() -> None:
    batch = {
        "labels": torch.tensor([[5, 6, 7, -100], [5, -100, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]),
    }
    assert terms_by_hand("next", batch).tolist() == [2, 1]
    assert terms_by_hand("token", batch).tolist() == [3, 2]
    assert terms_by_hand("text", batch).tolist() == [3, 3]
    assert terms_by_hand("example", {"labels": torch.tensor([1, 0])}).tolist() == [1, 1]


def test_likelihood_by_hand() -> None:
    """Of logits that say nothing, every term costs the logarithm of the classes."""
    batch = {"labels": torch.tensor([[5, 6, 7, -100], [5, -100, 7, 8]])}
    logits = torch.zeros(2, 4, 16)
    assert torch.allclose(
        likelihood("next", logits, batch), torch.tensor([2.0, 2.0]).double() * np.log(16)
    )
    assert torch.allclose(
        likelihood("text", logits, batch), torch.tensor([3.0, 3.0]).double() * np.log(16)
    )
    # The label of a place is predicted one place before.
    logits[0, 0, 6] = logits[0, 1, 7] = 100.0
    assert float(likelihood("next", logits, batch)[0]) < 1e-9


def test_a_wrong_number_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = walking.profile_model

    def wrong(*given: Any, **options: Any) -> Profile:
        profile = measure(*given, **options)
        rows = {name: 1.01 * values for name, values in profile.fisher_rows.items()}
        return dataclasses.replace(profile, fisher_rows=rows)

    monkeypatch.setattr(walking, "profile_model", wrong)
    found = walk("LlamaForCausalLM", "CAUSAL_LM")
    assert (found.outcome, found.stage) == ("FAULT", "profile")
    assert "off by 0.01" in found.reason


def test_an_error_of_rankopts_is_a_refusal_and_any_other_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ModelError("not this one")

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("what is this")

    for function, outcome in ((refuses, "refused"), (fails, "FAULT")):
        monkeypatch.setattr(walking, "profile_model", function)
        found = walk("LlamaForCausalLM", "CAUSAL_LM")
        assert (found.outcome, found.stage) == (outcome, "profile")
