"""Paired tests: against scipy, against what is known by construction, and in many trials."""

import itertools

import numpy as np
import pytest

from rankopt.results import Measured
from rankopt.results.paired import difference, holm

stats = pytest.importorskip("scipy.stats")


def measured(losses: object, targets: object = None, correct: object = None) -> Measured:
    losses = tuple(map(float, np.asarray(losses)))
    counts = (1,) * len(losses) if targets is None else tuple(map(int, np.asarray(targets)))
    return Measured(
        loss=sum(losses) / sum(counts),
        metrics={},
        examples=len(losses),
        targets=sum(counts),
        example_losses=losses,
        example_targets=counts,
        example_correct=None if correct is None else tuple(map(int, np.asarray(correct))),
    )


def test_the_difference_is_that_of_the_losses_of_targets() -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(1, 50, 40)
    this, that = (measured(generator.gamma(2.0, targets), targets) for _ in range(2))
    found = difference([this], [that], "loss")
    assert found is not None and this.loss is not None and that.loss is not None
    assert found.mean == pytest.approx(this.loss - that.loss)
    assert found.low < found.mean < found.high and found.test == "bootstrap"
    other = difference([that], [this], "loss")
    assert other is not None
    assert (other.mean, other.p) == pytest.approx((-found.mean, found.p))
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low))


def test_the_interval_is_that_of_scipy() -> None:
    generator = np.random.default_rng(1)
    apart = generator.normal(0.3, 1.0, 60)
    found = difference([measured(apart + 5.0)], [measured(np.full(60, 5.0))], "loss")
    wanted = stats.bootstrap((apart,), np.mean, method="percentile", rng=generator)
    assert found is not None
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.02)


def test_mcnemar_looks_at_those_that_one_alone_gets_right() -> None:
    this = measured(np.zeros(20), correct=[1] * 12 + [0] * 8)
    that = measured(np.zeros(20), correct=[1] * 3 + [0] * 9 + [1] + [0] * 7)
    found = difference([this], [that], "accuracy")
    assert found is not None and found.test == "McNemar"
    # Nine are this one's alone, one is the other's: two tails of ten fair coins.
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert found.mean == pytest.approx(8 / 20)
    same = difference([this], [this], "accuracy")
    assert same is not None and (same.p, same.mean) == (1.0, 0.0)


def test_several_labels_or_calibrations_are_bootstrapped() -> None:
    several = measured(np.zeros(6), targets=[2] * 6, correct=[2, 1, 2, 0, 1, 2])
    other = measured(np.zeros(6), targets=[2] * 6, correct=[1, 1, 2, 0, 1, 1])
    found = difference([several], [other], "accuracy")
    assert found is not None and found.test == "bootstrap"
    assert found.mean == pytest.approx(2 / 12)
    one = measured(np.zeros(4), correct=[1, 0, 1, 1]), measured(np.zeros(4), correct=[0, 0, 1, 1])
    found = difference(one, one[::-1], "accuracy")
    assert found is not None and (found.test, found.mean, found.p) == ("bootstrap", 0.0, 1.0)


def test_equal_models_differ_as_often_as_they_should() -> None:
    """p below .05 in about one trial of twenty, and always where they do differ."""
    generator = np.random.default_rng(2)
    found = []
    for _ in range(120):
        this, that = generator.normal(3.0, 1.0, (2, 80))
        each = difference([measured(this)], [measured(that)], "loss")
        assert each is not None
        found.append(each.p)
    assert np.mean(np.array(found) < 0.05) < 0.12
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.17)
    shifted = generator.normal(3.0, 1.0, 80)
    sure = difference([measured(shifted + 0.5)], [measured(shifted)], "loss")
    assert sure is not None and sure.p == pytest.approx(2 / 10_000)


def test_what_was_not_measured_for_each_example_is_not_compared() -> None:
    bare = Measured(loss=None, metrics={}, examples=3, targets=3)
    assert difference([bare], [measured([1, 2, 3])], "loss") is None
    assert difference([measured([1, 2, 3])], [bare], "loss") is None
    assert difference([measured([1, 2, 3])], [measured([1, 2, 3])], "accuracy") is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_holm(order: tuple[int, ...]) -> None:
    values, wanted = [0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]
    found = holm([values[k] for k in order])
    assert found == pytest.approx([wanted[k] for k in order])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
