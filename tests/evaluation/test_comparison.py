"""The measured comparison: what is in the file is not measured again, whatever stopped it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankopt import profile_model
from rankopt.apply.apply import applied
from rankopt.errors import ModelError, OptionError, RankoptError, ResultsError
from rankopt.evaluation import plans as measuring
from rankopt.evaluation.comparison import measure_comparison
from rankopt.evaluation.evaluation import evaluate
from rankopt.evaluation.plans import measure_rows
from rankopt.plan.compare import Strategy, compare
from rankopt.results import Results, summarise
from tests import tiny
from tests.evaluation.test_evaluation import apart

STRATEGIES = tuple(map(Strategy.parse, ("uniform", "exact", "exact/maxmin")))


@pytest.fixture(scope="module")
def made() -> Any:
    model = tiny.llama()
    batches = tiny.batches(model, count=5)
    samples = {"one": batches[:2], "two": batches[1:3]}
    profiles = {name: profile_model(model, each) for name, each in samples.items()}
    rows = [row for each in profiles.values() for row in compare(each, [0.7, 0.5], STRATEGIES)]
    return model, profiles, rows, batches[3:]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many models have been measured since it was asked last."""
    calls: list[Any] = []
    honest = measuring.measured
    monkeypatch.setattr(
        measuring, "measured", lambda *a, **k: (calls.append(a), honest(*a, **k))[1]
    )

    def count() -> int:
        found = len(calls)
        calls.clear()
        return found

    return count


def test_every_row_has_the_loss_of_its_model(made: Any) -> None:
    model, profiles, rows, batches = made
    found = measure_comparison(model, profiles, rows, batches)
    assert found.dense.loss == pytest.approx(evaluate(model, batches).loss)
    assert [plan.strategy for plan in found.plans] == [str(row.strategy) for row in rows]
    by_digest = {profile.digest(): profile for profile in profiles.values()}
    for row, plan in zip(rows, found.plans, strict=True):
        with applied(model, row.plan, by_digest[row.plan.profile_digest]) as compressed:
            wanted = evaluate(compressed, batches, per_example=True)
        assert plan.measured is not None
        assert plan.measured.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert plan.measured.example_losses == pytest.approx(wanted.example_losses)
    assert [each.name for each in found.calibrations] == ["one", "two"]
    assert {len(line.plans) for line in summarise(found)} == {2}


def test_what_was_interrupted_goes_on_and_adds(
    made: Any, counted: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profiles, rows, batches = made
    file = tmp_path / "r.json"
    whole = measure_comparison(model, profiles, rows, batches)
    models = counted() - 1
    assert models == len({plan.model for plan in whole.plans})
    honest = Results.save

    def stopped(self: Results, path: Any) -> None:
        honest(self, path)
        if len(self.plans) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_comparison(model, profiles, rows, batches, file=file)
    assert len(Results.load(file).plans) == 3
    monkeypatch.setattr(Results, "save", honest)
    before = counted() - 1
    found = measure_comparison(model, profiles, rows, batches, file=file)
    assert before + counted() == models and found.plans == whole.plans
    assert Results.load(file) == found
    # Asked again, and for less: nothing is measured, and nothing is lost.
    again = measure_comparison(model, profiles["two"], rows[-2:], batches, file=file)
    assert counted() == 0
    assert {plan.asked for plan in again.plans} == {plan.asked for plan in whole.plans}
    assert again.plans[:2] == whole.plans[-2:]
    third = profile_model(model, batches)
    more = list(compare(third, [0.7], STRATEGIES[:1]))
    added = measure_comparison(model, {"three": third}, more, batches, file=file)
    assert counted() == 1 and len(added.plans) == len(whole.plans) + 1
    assert [each.name for each in added.calibrations] == ["one", "two", "three"]


def test_results_of_something_else_are_not_gone_on_with(made: Any, tmp_path: Path) -> None:
    model, profiles, rows, batches = made
    file = tmp_path / "r.json"
    measure_comparison(model, profiles, rows[:1], batches, file=file)
    kept = file.read_bytes()
    with pytest.raises(ResultsError, match="the held-out data was another"):
        measure_comparison(model, profiles, rows[:1], batches[:1], file=file)
    with pytest.raises(ResultsError, match="the data of other domains was another"):
        measure_comparison(model, profiles, rows[:1], batches, also={"x": batches}, file=file)
    other = tiny.llama(hidden_size=16)
    profile = profile_model(other, batches)
    with pytest.raises(ResultsError, match="the model was another"):
        measure_comparison(
            other, profile, list(compare(profile, [0.7], STRATEGIES[:1])), batches, file=file
        )
    assert file.read_bytes() == kept
    (tmp_path / "mine.json").write_text('{"a": 1}')
    with pytest.raises(RankoptError, match="not replaced"):
        measure_comparison(model, profiles, rows[:1], batches, file=tmp_path / "mine.json")


def test_profiles_must_be_of_one_model_and_rows_of_one_of_them(made: Any) -> None:
    model, profiles, rows, batches = made
    other = profile_model(tiny.llama(hidden_size=16), batches)
    with pytest.raises(ModelError, match="a and b are profiles of different models"):
        measure_comparison(model, {"a": profiles["one"], "b": other}, [], batches)
    with pytest.raises(OptionError, match="a and b are the same profile"):
        measure_comparison(model, {"a": profiles["one"], "b": profiles["one"]}, [], batches)
    with pytest.raises(OptionError, match=r"uniform at 0\.7 is of none of the profiles given"):
        measure_comparison(model, profiles["two"], rows, batches)


def test_classifiers_say_which_examples_they_get_right(made: Any) -> None:
    model = tiny.bert(num_labels=3)
    batches = tiny.batches(model)
    profile = profile_model(model, batches)
    rows = list(compare(profile, [0.5], STRATEGIES[:2]))
    found = measure_comparison(model, profile, rows, batches)
    for each in (found.dense, *(plan.measured for plan in found.plans)):
        assert each is not None and each.example_correct is not None
        assert sum(each.example_correct) / each.targets == pytest.approx(each.metrics["accuracy"])
    (line, _) = summarise(found, "exact")
    assert line.against is not None and line.against.test == "McNemar"
    assert dataclasses.asdict(line.against)["what"] == "accuracy"


@pytest.mark.parametrize("name", ["bert-classification", "bert-regression", "bert-tokens"])
def test_the_divergence_from_the_dense_model_is_measured(name: str, tmp_path: Path) -> None:
    dense, model = tiny.MODELS[name]().eval(), tiny.MODELS[name]()
    batches = tiny.batches(model, count=5)
    profile = profile_model(model, batches[:2], form="pivoted")
    rows = list(compare(profile, [0.7, 0.3], STRATEGIES))
    file, also = tmp_path / "r.json", {"other": batches[3:]}
    measure_comparison(model, profile, rows[:2], batches[2:3], also=also, file=file)
    found = measure_comparison(model, profile, rows, batches[2:3], also=also, file=file)
    assert "divergence" not in found.dense.metrics
    for row, plan in zip(rows, found.plans, strict=True):
        with applied(model, row.plan, profile) as compressed:
            wanted = apart(compressed.eval(), dense, batches[2:3])
            of_other = apart(compressed, dense, batches[3:])
        assert plan.measured is not None and wanted > 0
        assert plan.measured.metrics["divergence"] == pytest.approx(wanted, rel=1e-4, abs=1e-8)
        divergence = plan.measured.of_others["divergence of other"]
        assert divergence == pytest.approx(of_other, rel=1e-4, abs=1e-8)
    ((_, alone),) = measure_rows(model, profile, rows[:1], batches[2:3])
    assert alone.metrics["divergence"] == found.plans[0].measured.metrics["divergence"]  # type: ignore[union-attr]


def test_language_models_have_a_loss_only(made: Any) -> None:
    model, profiles, rows, batches = made
    found = measure_comparison(model, profiles, rows[:1], batches)
    assert found.plans[0].measured is not None
    assert set(found.plans[0].measured.metrics) == {"perplexity"}
