"""What people read: nothing that matters is left out, and nothing is said that is not so."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rankopt import make_plan, profile_model
from rankopt.apply.apply import applied
from rankopt.cli.tables import SURE, comparison, profile_summary
from rankopt.evaluation.evaluation import evaluate
from rankopt.evaluation.plans import measure_rows
from rankopt.layers import LeftAlone
from rankopt.plan.compare import Strategy, compare
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.results import MeasuredPlan, lines_of
from tests import tiny
from tests.synthetic import full_profile, synthetic_profile


def printed(rows: Any) -> list[list[str]]:
    """Cells of a comparison, the header first."""
    console = Console(width=250)
    layers = synthetic_profile().info.layers
    with console.capture() as caught:
        console.print(comparison(lines_of(layers, map(MeasuredPlan.of, rows))))
    lines = [line for line in caught.get().splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-:")]


def described(profile: Profile, **changes: Any) -> Profile:
    return dataclasses.replace(profile, info=profile.info.model_copy(update=changes))


def with_batches(spread: float, batches: int = 16) -> Profile:
    """Batches of equal size; the third layer varies by ``spread``, the others by a tenth of it."""
    made = synthetic_profile()
    sign = np.where(np.arange(batches) % 2, 1.0, -1.0)[:, None]
    fisher = 1.0 + sign * spread * np.array([0.1, 0.1, 1.0, 0.1])
    return dataclasses.replace(made, batch_fisher=fisher, batch_units=np.ones(batches))


def test_backends_have_a_column_where_there_are_several() -> None:
    profile = synthetic_profile()
    one = printed(list(compare(profile, [0.5], [Strategy("exact"), Strategy("uniform")])))
    assert "backend" not in one[0]
    wanted = [Strategy.parse(text) for text in ("exact", "exact@svd")]
    several = printed(list(compare(profile, [0.5], wanted)))
    column = several[0].index("backend")
    assert [row[column] for row in several[1:]] == ["fwsvd", "svd"]
    assert [row[0] for row in several[1:]] == ["exact", "exact@svd"]
    assert {len(row) for row in several} == {len(several[0])}
    assert several[0][:1] + several[0][2:] == one[0]


def test_summary_says_how_it_was_measured() -> None:
    text = profile_summary(full_profile())
    for part in (
        "SyntheticForCausalLM, causal-lm: empirical Fisher per example from 7 examples, 70 targets",
        "fwsvd, Hsu et al., ICLR 2022; scales: nats (nats per example), sum (row sums)",
        "svd, Eckart & Young 1936; scales: frobenius (squared weights)",
        "4 layers, 2,374 of 3,374 parameters (70.4%)",
    ):
        assert part in text
    assert "stopped" not in text and "drawn" not in text and "estimator" not in text
    chosen = described(full_profile(), estimator="expected", estimator_reason="2 outputs: all")
    text = profile_summary(chosen)
    assert (
        "expected Fisher per example" in text and "  estimator   expected: 2 outputs: all" in text
    )
    sampled = described(
        full_profile(), estimator="sampled", unit="token", draws=3, seed=11, stopped="time is up"
    )
    text = profile_summary(sampled)
    assert "sampled Fisher per token" in text
    assert "drawn 3x from the model's prediction, seed 11" in text
    assert "time is up" in text


def test_summary_says_how_sure_it_is_and_what_more_data_would_do() -> None:
    sure = with_batches(0.05)
    errors = sure.standard_errors()
    assert max(errors.values()) == errors["block.2.proj"] < SURE
    text = profile_summary(sure)
    assert f"{errors['block.2.proj']:.1%} (block.2.proj), from 16 batches" in text
    assert f"{errors['block.0.proj']:.1%} (median)" in text
    assert "more data is not needed" in text

    unsure = with_batches(0.8)
    largest = unsure.standard_errors()["block.2.proj"]
    assert largest > 2 * SURE
    text = profile_summary(unsure)
    assert "more data is advisable" in text and "not needed" not in text
    (enough,) = [int(w.replace(",", "")) for w in text.split("about ")[1].split()[:1]]
    # A standard error falls with the root of the number of examples.
    assert largest * (unsure.examples / enough) ** 0.5 <= SURE
    assert largest * (unsure.examples / (0.9 * enough - 1)) ** 0.5 > SURE

    for unknown in (synthetic_profile(), with_batches(0.8, batches=1)):
        assert "unknown: it takes two batches" in profile_summary(unknown)


def test_uncovered_weights_inside_the_blocks_come_first_and_largest_first() -> None:
    covered = synthetic_profile()
    assert "NOT COVERED" not in profile_summary(covered)
    experts = [
        LeftAlone(
            name=f"model.layers.{n}.mlp.experts",
            module="Experts",
            parameters=500_000,
            reason="not a plain nn.Linear or Conv1D",
        )
        for n in range(12)
    ]
    gates = [
        LeftAlone(name=f"model.layers.{n}.gate", module="Gate", parameters=7, reason="small")
        for n in range(12)
    ]
    outside = [
        LeftAlone(name=name, module="Embedding", parameters=size, reason="embedding")
        for name, size in (("positions", 10), ("embed", 900_000))
    ]
    info = covered.info
    parameters = info.planned_parameters + 6_000_084 + 900_010
    text = profile_summary(
        described(
            covered,
            left_alone=(*gates, *outside, *experts),
            model_parameters=parameters,
        )
    )
    lines = text.splitlines()
    (header,) = [n for n, line in enumerate(lines) if "NOT COVERED" in line]
    assert "6,000,084 parameters inside the blocks (100.0% of the matrices there)" in lines[header]
    assert "model.layers.*.mlp.experts (Experts, 12 x, 6,000,000): not a" in lines[header + 1]
    assert "model.layers.*.gate (Gate, 12 x, 84): small" in lines[header + 2]
    assert "6,900,094 parameters in all" in lines[header + 3]
    assert "embed (Embedding, 900,000)" in lines[header + 4]
    assert "positions (Embedding, 10)" in lines[header + 5]
    assert len(lines) == header + 6


def test_what_is_not_listed_is_counted() -> None:
    many = tuple(
        LeftAlone(name=f"m{'x' * n}", module="M", parameters=10 * n, reason="r") for n in range(20)
    )
    text = profile_summary(described(synthetic_profile(), left_alone=many))
    assert text.count("(M, ") == 8
    assert f"and 12 more kinds ({sum(10 * n for n in range(12)):,})" in text


def test_plans_of_different_backends_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where their ranks are the same; plans with the same backend and ranks only once."""
    from rankopt.evaluation import plans

    model = tiny.llama()
    batches = tiny.batches(model)
    profile = profile_model(model, batches, backends=("fwsvd", "svd"))
    rows = list(
        compare(profile, [0.5], [Strategy.parse(x) for x in ("uniform", "uniform@svd", "uniform")])
    )
    assert rows[0].plan.ranks == rows[1].plan.ranks
    calls: list[Any] = []
    honest = plans.measured
    monkeypatch.setattr(plans, "measured", lambda *a, **k: (calls.append(a), honest(*a, **k))[1])
    found = list(measure_rows(model, profile, rows, batches))
    assert len(calls) == 2
    for row, measured_loss in found:
        with applied(model, row.plan, profile) as compressed:
            loss = evaluate(compressed, batches).loss
        assert measured_loss.loss == pytest.approx(loss, rel=1e-6)
    assert found[0][1] != found[1][1]
    assert found[0][1] == found[2][1]


def test_certificate_speaks_the_profiles_unit(tmp_path: Path) -> None:
    plan = make_plan(synthetic_profile(), keep=0.5, scale="sum")
    plan.save(tmp_path / "plan.json")
    assert " row sums, at least " in str(Plan.load(tmp_path / "plan.json"))
