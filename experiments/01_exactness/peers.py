"""Published allocation heuristics, written again from their descriptions, on the same tables.

Each takes a Case and returns one option per layer, or None if it finds none within the budget.
Where a method asks a model how sensitive a layer is (perplexity, accuracy), the layer's exact loss
answers here: without noise, which flatters the method. Ranks are rounded down to those on offer.
"""

from collections.abc import Callable, Iterable

import numpy as np
from cases import Case, IntArray

Choice = IntArray

#: Ratios of a layer's parameters on offer in ASVD, AIMET and ModelOpt; the last one is dense.
RATIOS = np.arange(1, 11) / 10


def cost_of(case: Case, choice: Iterable[int]) -> int:
    """Parameters of a choice."""
    return sum(int(cost[j]) for cost, j in zip(case.costs, choice, strict=True))


def _largest_affordable(case: Case, choose: Callable[[float], Choice]) -> Choice | None:
    """Bisect a knob in [0, 1] that makes choices dearer; the dearest choice within the budget."""
    low, high = 0.0, 1.0
    best = choose(low)
    if cost_of(case, best) > case.budget:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        choice = choose(middle)
        if cost_of(case, choice) > case.budget:
            high = middle
        else:
            low, best = middle, choice
    return best


def _nearest_below(case: Case, ranks: np.ndarray) -> Choice:
    """The largest rank on offer that is at most the one asked for, else the smallest one."""
    picked = [
        max(int(np.searchsorted(offered[:-1], rank, side="right")) - 1, 0)
        for offered, rank in zip(case.ranks, ranks, strict=True)
    ]
    return np.array(picked)


def uniform(case: Case) -> Choice | None:
    """The same ratio of parameters everywhere: the usual baseline.

    Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022,
    arXiv 2207.00112.
    """
    full = np.array([layer.dense / layer.step for layer in case.instance.layers])
    return _largest_affordable(case, lambda ratio: _nearest_below(case, ratio * full))


def threshold(case: Case) -> Choice | None:
    """The smallest option that retains a common share of each layer's own information.

    Hofstee, thesis, University of Twente 2024 (method 2, from its abstract); the share is bisected
    to meet the budget.
    """
    spectra = case.instance.spectra
    falling = [-loss / s.sum() for loss, s in zip(case.losses, spectra, strict=True)]

    def choose(share: float) -> Choice:
        return np.array([int(np.searchsorted(f, share - 1.0)) for f in falling])

    return _largest_affordable(case, choose)


def ladder(case: Case) -> list[IntArray]:
    """For each layer the ten options nearest below RATIOS of its parameters, the last one dense."""
    rungs = []
    for layer, offered in zip(case.instance.layers, case.ranks, strict=True):
        asked = RATIOS[:-1] * layer.dense / layer.step
        below = np.searchsorted(offered[:-1], asked, side="right") - 1
        rungs.append(np.append(np.maximum(below, 0), offered.size - 1))
    return rungs


def asvd(case: Case) -> Choice | None:
    """Sensitivity-based truncation rank searching (STRS).

    Truncate one layer at a time to each ratio, sort the pairs (layer, ratio) by the damage, worst
    first, and search the cut by bisection: each layer takes the smallest ratio behind the cut, and
    stays dense if none is there. Yuan et al., "ASVD: Activation-aware singular value decomposition
    for compressing large language models", 2023, arXiv 2312.05821, section on STRS.
    """
    rungs = ladder(case)
    damage = np.concatenate(
        [loss[rung[:-1]] for loss, rung in zip(case.losses, rungs, strict=True)]
    )
    truncations = RATIOS.size - 1
    order = np.argsort(-damage, kind="stable")
    layer, ratio = order // truncations, order % truncations

    def choose(cut: int) -> Choice:
        smallest = np.full(len(rungs), truncations)
        np.minimum.at(smallest, layer[cut:], ratio[cut:])
        return np.array([rung[k] for rung, k in zip(rungs, smallest, strict=True)])

    # A later cut leaves fewer truncations behind it, so the cost grows with the cut.
    return _largest_affordable(case, lambda knob: choose(round(knob * order.size)))


def aimet(case: Case) -> Choice | None:
    """Greedy selection by a common score.

    Score each layer at each ratio (here: minus its loss), then bisect the score: each layer takes
    its smallest ratio that scores at least as much. The search stops within 0.1 % of the budget, or
    when its interval is 1e-4 of the score's range. Qualcomm AIMET, "Greedy compression ratio
    selection" (user guide; GreedyCompRatioSelectAlgo at commit c51b284b).
    """
    rungs = ladder(case)
    tables = [loss[rung] for loss, rung in zip(case.losses, rungs, strict=True)]
    low, high = 0.0, max(float(table[0]) for table in tables)
    resolution = 1e-4 * high

    def choose(worst: float) -> Choice:
        first = (int(np.argmax(table <= worst)) for table in tables)
        return np.array([rung[k] for rung, k in zip(rungs, first, strict=True)])

    best = choose(high)
    if cost_of(case, best) > case.budget:
        return None
    while high - low > resolution and cost_of(case, best) < (1 - 1e-3) * case.budget:
        middle = (low + high) / 2
        choice = choose(middle)
        if cost_of(case, choice) > case.budget:
            low = middle
        else:
            high, best = middle, choice
    return best


def _sorted_steps(case: Case, density: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Choice:
    """Sort all single rank steps by a density of (gain, cost) and take the longest prefix."""
    start = sum(int(cost[0]) for cost in case.costs)
    gains = [-np.diff(loss[:-1]) for loss in case.losses]
    steps = [np.diff(cost[:-1]) for cost in case.costs]
    group = np.repeat(np.arange(len(steps)), [step.size for step in steps])
    gain, step = np.concatenate(gains), np.concatenate(steps)
    order = np.argsort(-density(gain, step), kind="stable")
    affordable = int(np.searchsorted(np.cumsum(step[order]), case.budget - start, side="right"))
    return np.bincount(group[order[:affordable]], minlength=len(steps))


def sort_by_gain_per_cost(case: Case) -> Choice | None:
    """One global sort of squared singular values over their cost; no layer is left dense.

    The water filling of uniform-cost allocators, as in EVA's redistribution of ranks (Paischer et
    al., "One initialization to rule them all", 2024, arXiv 2410.07170), with each layer's cost.
    """
    return _sorted_steps(case, lambda gain, step: gain / step)


def sort_by_gain(case: Case) -> Choice | None:
    """One global sort of squared singular values, whatever they cost; no layer is left dense.

    EVA's redistribution of ranks as published: Paischer et al. 2024, arXiv 2410.07170.
    """
    return _sorted_steps(case, lambda gain, step: gain)


def d_rank(case: Case) -> Choice | None:
    """Ranks in proportion to sqrt(effective rank / cost of a rank), clipped and redistributed.

    The effective rank is exp(entropy) of the normalised squared singular values; minimising
    sum R_eff / k under a linear cost gives the square root by a Lagrange multiplier. Mi et al.,
    "Layer-wise dynamic rank for compressing large language models", 2025, arXiv 2509.25622; its
    later shift of ranks from queries and keys to values is left out.
    """
    weights, caps = [], []
    for layer, spectrum in zip(case.instance.layers, case.instance.spectra, strict=True):
        p = spectrum[spectrum > 0] / spectrum.sum()
        weights.append(np.sqrt(np.exp(-(p * np.log(p)).sum()) / layer.step))
        caps.append(layer.break_even)
    largest = max(cap / weight for cap, weight in zip(caps, weights, strict=True))
    asked = largest * np.array(weights)
    # Clipping inside the bisection is the redistribution: the others grow until the budget is met.
    return _largest_affordable(case, lambda c: _nearest_below(case, np.minimum(c * asked, caps)))


PEERS: dict[str, Callable[[Case], Choice | None]] = {
    "uniform": uniform,
    "threshold": threshold,
    "asvd-strs": asvd,
    "aimet-greedy": aimet,
    "sort by gain/cost": sort_by_gain_per_cost,
    "sort by gain": sort_by_gain,
    "d-rank": d_rank,
}
