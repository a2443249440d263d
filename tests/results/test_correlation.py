"""Spearman's correlation is scipy's, and its interval is what a bootstrap gives."""

import numpy as np
import pytest

from rankopt.results.correlation import correlation, spearman


@pytest.mark.parametrize("levels", [3, 1000])
def test_it_is_that_of_scipy_with_and_without_ties(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(levels)
    for _ in range(5):
        these = draw.integers(0, levels, 12).astype(float).tolist()
        those = (np.array(these) + draw.integers(0, levels, 12)).tolist()
        expected = stats.spearmanr(these, those).statistic
        assert spearman(these, those) == pytest.approx(expected)
        found = correlation(these, those)
        assert found is not None and found.rho == pytest.approx(expected)
        assert found.low <= found.rho <= found.high and found.count == 12
        drawn = draw.integers(0, 12, (400, 12))
        each = [stats.spearmanr(np.take(these, d), np.take(those, d)).statistic for d in drawn]
        assert np.nanquantile(each, [0.025, 0.975]) == pytest.approx(
            [found.low, found.high], abs=0.15
        )


def test_more_pairs_are_surer() -> None:
    draw = np.random.default_rng(1)

    def width(count: int) -> float:
        these = draw.normal(size=count)
        found = correlation(these.tolist(), (these + draw.normal(size=count)).tolist())
        assert found is not None
        return found.high - found.low

    assert width(400) < 0.5 * width(20)


@pytest.mark.parametrize(
    ("these", "those"), [([1.0, 2.0], [1.0, 2.0]), ([1.0] * 4, [1.0, 2.0, 3.0, 4.0]), ([], [])]
)
def test_few_or_equal_figures_have_none(these: list[float], those: list[float]) -> None:
    assert correlation(these, those) is None


def test_one_order_is_certain_and_so_is_its_reverse() -> None:
    rising = [float(x) for x in range(9)]
    assert str(correlation(rising, [x**3 for x in rising])) == "1.00 [1.00, 1.00]"
    assert str(correlation(rising, [-x for x in rising])) == "-1.00 [-1.00, -1.00]"
