"""NaN and infinity are named where they appear, and are null in JSON, with a reason."""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from rankopt import evaluate, profile_model
from rankopt.errors import NotFiniteError, RankoptError
from rankopt.evaluation import plans
from rankopt.evaluation.comparison import measure_comparison
from rankopt.evaluation.evaluation import Evaluation
from rankopt.evaluation.search import search_plan
from rankopt.plan.compare import Strategy, compare
from rankopt.schema import finite
from tests import tiny


def spoilt(model: Any, token: int, value: float) -> Any:
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    return model


def batches_with(model: Any, token: int) -> list[dict[str, Any]]:
    """Two batches of three rows; the token stands in the second row of the second one only."""
    batches = tiny.batches(model)
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == token] = token + 1
    batches[1]["input_ids"][1, 2] = token
    return batches


def test_the_batch_and_row_of_the_first_nan_are_named() -> None:
    model = tiny.llama(tie_word_embeddings=False)
    batches = batches_with(model, 9)
    found = evaluate(spoilt(model, 9, math.nan), [*batches, *batches])
    assert math.isnan(found.loss)
    assert found.metrics == {"perplexity": None}
    assert found.notes == ("loss is NaN (batch 2, row 2: example 5)",)
    assert found.examples == 6, "measuring ended there"
    for model, task in ((tiny.bert(), {"accuracy"}), (tiny.bert(num_labels=1), None)):
        batches = batches_with(model, 9)
        found = evaluate(spoilt(model, 9, math.nan), batches)
        assert set(found.metrics) == (task or {"pearson", "spearman"})
        assert set(found.metrics.values()) == {None}
        assert found.notes == ("loss is NaN (batch 2, row 2: example 5)",)


def test_without_predictions_the_examples_of_the_batch_are_named() -> None:
    model = torch.nn.Linear(2, 1)
    batches = [torch.ones(3, 2), torch.full((2, 2), math.inf)]
    found = evaluate(model, batches, loss_fn=lambda m, b: b.sum(1))
    assert found.loss == math.inf
    assert found.notes == ("loss is inf (batch 2: examples 4 to 5)",)


def test_perplexity_is_exp_of_the_loss_or_infinite() -> None:
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = evaluate(model, tiny.batches(model))
    assert found.loss > 710
    assert found.metrics == {"perplexity": math.inf}
    assert "perplexity is infinite: exp(" in found.notes[0]
    assert json.dumps(finite(found.metrics), allow_nan=False) == '{"perplexity": null}'
    assert finite({"a": (1.5, -math.inf), "b": [{"c": math.nan}], "d": "nan", "e": 3}) == {
        "a": [1.5, None], "b": [{"c": None}], "d": "nan", "e": 3,
    }  # fmt: skip


def test_correlations_that_are_not_defined_say_why_and_nothing_warns() -> None:
    model = tiny.bert(num_labels=1)
    batches = tiny.batches(model)
    one = {name: value[:1] for name, value in batches[0].items()}
    alike = [{**batch, "labels": torch.full((3,), 2.5)} for batch in batches]
    constant = tiny.bert(num_labels=1)
    with torch.no_grad():
        constant.classifier.weight.zero_()
        constant.classifier.bias.fill_(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for subject, data, why in (
            (model, [one], "a correlation takes two rows or more"),
            (model, alike, "all labels are 2.5"),
            (constant, batches, "all predictions are 0.25"),
        ):
            found = evaluate(subject, data)
            assert math.isfinite(found.loss)
            assert found.metrics == {"pearson": None, "spearman": None}
            assert found.notes == (f"pearson and spearman are not defined: {why}",)


@pytest.fixture(scope="module")
def made() -> Any:
    model = tiny.llama(tie_word_embeddings=False)
    batches = batches_with(model, 9)
    return model, profile_model(model, tiny.batches(model)), batches


def test_a_dense_model_that_gives_nan_is_told_before_any_plan(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile, batches = made
    rows = list(compare(profile, [0.6], [Strategy("uniform")]))
    weight = model.get_input_embeddings().weight
    kept = weight.detach().clone()
    monkeypatch.setattr("rankopt.evaluation.plans.applied", None)  # nothing is applied
    said = r"the dense model's loss is NaN \(batch 2, row 2: example 5\)"
    try:
        spoilt(model, 9, math.nan)
        with pytest.raises(NotFiniteError, match=said):
            measure_comparison(model, profile, rows, batches)
        pytest.importorskip("optuna")
        with pytest.raises(NotFiniteError, match=said):
            search_plan(model, profile, batches, keep=0.6, trials=9)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_trial_without_a_finite_loss_is_said_and_counts_as_failed(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    model, profile, batches = made
    honest = plans.measured

    def fail(numbers: Iterable[int]) -> None:
        """The dense model is measured as number 0."""
        count = itertools.count()

        def measured(*given: Any, **options: Any) -> Evaluation:
            found = honest(*given, **options)
            if next(count) not in numbers:
                return found
            return dataclasses.replace(found, loss=math.nan, notes=("loss is NaN (batch 1)",))

        monkeypatch.setattr(plans, "measured", measured)

    fail((1, 2))
    found = search_plan(model, profile, batches, keep=0.6, trials=8, progress=False)
    assert [trial.loss is None for trial in found.found.trials[:3]] == [True, True, False]
    assert "8 trials, 2 of them without a finite loss" in str(found)
    assert capsys.readouterr().err.count("a trial counts as failed: its loss is NaN (batch 1)") == 2
    fail(range(1, 99))
    with pytest.raises(RankoptError, match="none of 8 measured choices has a finite loss"):
        search_plan(model, profile, batches, keep=0.6, trials=8, progress=False)
