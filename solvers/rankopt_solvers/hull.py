"""Lower convex hulls, the linear relaxation and the Lagrangian bound.

For a multiplier lam >= 0 the Lagrangian function

    L(lam) = sum_g min_j (loss_gj + lam * cost_gj) - lam * budget

is a lower bound on the sum objective, whatever lam is; its maximum over lam is the optimum of the
linear relaxation, reached at the slope of the hull edge at which the budget runs out (Sinha &
Zoltners 1979; Dyer 1984). That slope is found exactly, by selection instead of sorting.

A layer's pairs of factors are convex in their cost, but "keep it dense" adds a jump at the end: the
hull replaces the last of them by one long edge to dense. In the pivoted form the cost is concave in
the rank, and there are dents besides. Slopes are rounded; the bound is evaluated at the slope from
all options, so a wrong slope could only make it weaker.

Of a large table only the options near the break are looked at one by one: runs of options go by the
cost of their first and the loss of their last, which none of them falls below.
"""

import dataclasses
import math

import numpy as np

from rankopt_solvers.table import (
    BLOCK,
    EPS,
    RUN,
    BoolArray,
    FloatArray,
    IntArray,
    Table,
    ranges,
)

#: Options from which on the break is looked for in a sample first.
LARGE = 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Hulls:
    """Vertices of the lower convex hull of every row, cheapest first; E edges in all.

    Attributes:
        start: shape ``(G+1,)``; the vertices of row g are ``start[g]:start[g+1]``.
        vertex: positions in the table, shape ``(G+E,)``.
        slope: loss saved per unit of cost from a vertex to the next of its row, strictly
            decreasing inside a row; -1 at a row's last vertex. Shape ``(G+E,)``.
    """

    start: IntArray
    vertex: IntArray
    slope: FloatArray


def _slopes(table: Table, vertex: IntArray, last: BoolArray) -> FloatArray:
    """Loss saved per cost from each vertex to the next; -1 at the last of a row."""
    slope = np.full(vertex.size, -1.0)
    saved = -np.diff(table.loss[vertex])
    extra = np.diff(table.cost[vertex])
    inner = np.flatnonzero(~last[:-1])
    slope[inner] = saved[inner] / extra[inner]
    return slope


def _before_last_edge(table: Table) -> BoolArray:
    """Leaves out what lies above the last edge of a row: for a layer, the jump to dense.

    The last edge is the tangent from the last option. Looking for it first spares the general
    method thousands of rounds, each of which would take one option off the end of the edge.
    """
    starts, ends = table.start[:-1], table.start[1:] - 1
    gained = table.loss - table.spread(table.loss[ends])
    extra = table.spread(table.cost[ends]) - table.cost
    extra[ends] = 1
    slope = gained / extra
    slope[ends] = np.inf
    # The first position that reaches the minimum; everything after it but the end goes.
    hits = np.flatnonzero(slope == table.spread(np.minimum.reduceat(slope, starts)))
    tangent = hits[np.searchsorted(hits, starts)]
    keep: BoolArray = np.arange(table.cost.size) <= table.spread(tangent)
    keep[ends] = True
    return keep


def lower_hulls(table: Table) -> Hulls:
    """The lower hull of every row."""
    vertices, slopes, sizes = [], [], [np.zeros(1, dtype=np.int64)]
    for first, block in table.blocks():
        found = _hulls(block)
        vertices.append(found.vertex + table.start[first])
        slopes.append(found.slope)
        sizes.append(np.diff(found.start))
    vertex = np.concatenate(vertices)
    del vertices
    return Hulls(np.cumsum(np.concatenate(sizes)), vertex, np.concatenate(slopes))


def _hulls(table: Table) -> Hulls:
    """The hulls of a block.

    An option on or above the chord of any two options around it is not a vertex, so many can go at
    once; the few places that need many rounds (kinks) are followed in a linked list.
    """
    vertex = np.flatnonzero(_before_last_edge(table))
    start = np.searchsorted(vertex, table.start)
    while True:
        last = np.zeros(vertex.size, dtype=np.bool_)
        last[start[1:] - 1] = True
        slope = _slopes(table, vertex, last)
        inner = ~last
        inner[start[:-1]] = False
        above = np.zeros(vertex.size, dtype=np.bool_)
        above[1:] = inner[1:] & (slope[:-1] <= slope[1:])
        removed = int(above.sum())
        if removed == 0:
            return Hulls(start, vertex, slope)
        keep = ~above if removed * 64 >= vertex.size else _unlinked(table, vertex, inner, above)
        vertex = vertex[keep]
        start = np.searchsorted(vertex, table.start)


def _unlinked(table: Table, vertex: IntArray, inner: BoolArray, above: BoolArray) -> BoolArray:
    """Which vertices stay when the ones above a chord go, and what that uncovers, and so on."""
    before = np.arange(-1, vertex.size - 1)
    after = np.arange(1, vertex.size + 1)
    alive = np.ones(vertex.size, dtype=np.bool_)
    cost, loss = table.cost[vertex], table.loss[vertex]
    work = np.flatnonzero(above)
    while work.size:
        # Of neighbours only the first goes in this round, so that relinking is simple.
        now = work[np.concatenate(([True], before[work[1:]] != work[:-1]))]
        alive[now] = False
        after[before[now]] = after[now]
        before[after[now]] = before[now]
        near = np.zeros(vertex.size, dtype=np.bool_)
        for places in (before[now], after[now], work):
            near[places] = True
        touched = np.flatnonzero(near & alive & inner)
        left, right = before[touched], after[touched]
        steep = (loss[left] - loss[touched]) / (cost[touched] - cost[left])
        flat = (loss[touched] - loss[right]) / (cost[right] - cost[touched])
        work = touched[steep <= flat]
    return alive


@dataclasses.dataclass(frozen=True, eq=False)
class Relaxation:
    """The linear relaxation of a table under a budget, at its break slope.

    Attributes:
        multiplier: lam, the slope of the edge at which the budget runs out; 0 if all edges fit.
        position: the vertex of each row up to which all edges are taken, shape ``(G,)``.
        room: budget left over by these vertices, >= 0.
        edge: row and next vertex of the edge that does not fit; None if all fit.
    """

    multiplier: float
    position: IntArray
    room: int
    edge: tuple[int, int] | None


def _break_slope(slope: FloatArray, weight: IntArray, room: int) -> float:
    """Largest s such that the edges with slope >= s weigh more than room; 0 if there is none.

    A weighted selection: a sample brackets the slope, the edges outside the bracket are settled. A
    few long edges can hold most of the weight, so the sample only guesses; whole sums decide.
    """
    settled = 0
    while slope.size > 2048:
        step = slope.size // 512
        order = np.argsort(-slope[::step], kind="stable")
        sample = slope[::step][order]
        filled = settled + np.cumsum(weight[::step][order].astype(np.float64)) * step
        guess = int(np.searchsorted(filled, room))
        # Above sample[low] fits, above sample[high] does not; the ends of the list are virtual.
        low, high, before = -1, sample.size, settled
        probe = guess - 16
        while high - low > 1:
            probe = min(max(probe, low + 1), high - 1)
            above = settled + int(weight.sum(where=slope > sample[probe]))
            if above <= room:
                low, before = probe, above
                probe = (low + high) // 2 if probe > guess else guess + 16
            else:
                high = probe
                probe = (low + high) // 2
        inside = np.ones(slope.size, dtype=np.bool_)
        if low >= 0:
            inside &= slope <= sample[low]
        if high < sample.size:
            inside &= slope > sample[high]
        if inside.all():
            break
        slope, weight, settled = slope[inside], weight[inside], before
    order = np.argsort(-slope, kind="stable")
    over = np.flatnonzero(settled + np.cumsum(weight[order]) > room)
    return max(float(slope[order[over[0]]]), 0.0) if over.size else 0.0


def _taken(hulls: Hulls, multiplier: float) -> IntArray:
    """For each row the index of the vertex up to which its edges are steeper than lam >= 0."""
    # At the end of a row the slope is -1: the last vertex is never counted as an edge.
    steeper = (hulls.slope > multiplier).view(np.int8)
    index: IntArray = hulls.start[:-1] + np.add.reduceat(steeper, hulls.start[:-1], dtype=np.int64)
    return index


def relax(table: Table, hulls: Hulls, budget: int) -> Relaxation:
    """Solve the linear relaxation.

    Args:
        table: the options.
        hulls: of the table.
        budget: at least the cost of the cheapest choice.
    """
    ends = hulls.start[1:] - 1
    room = budget - int(table.cost[hulls.vertex[hulls.start[:-1]]].sum())
    cost = table.cost[hulls.vertex]
    weight = np.empty_like(cost)
    np.subtract(cost[1:], cost[:-1], out=weight[:-1])
    del cost
    weight[ends] = 0
    lam = _break_slope(hulls.slope, weight, room)
    index = _taken(hulls, lam)
    position = hulls.vertex[index]
    room = budget - int(table.cost[position].sum())
    edge = None
    if lam > 0:
        # Last rows first: of identical groups the later ones take the dearer options.
        for g in np.flatnonzero(hulls.slope[index] == lam)[::-1].tolist():
            target = int(hulls.vertex[index[g] + 1])
            extra = int(table.cost[target] - table.cost[position[g]])
            if extra > room:
                edge = (g, target)
                break
            position[g] = target
            room -= extra
    return Relaxation(lam, position, room, edge)


def relax_near(table: Table, budget: int) -> Relaxation:
    """``relax`` of a large table, without the hulls far from the break.

    The relaxation of the first options of all runs says roughly where the break slope is. What is
    cheaper than the first run that reaches the Lagrangian minimum at a steeper slope, or dearer
    than the last that does at a flatter one, plays no part if the slope then found lies between.

    Args:
        table: the options.
        budget: at least the cost of the cheapest choice.
    """
    dearest = table.start[1:] - 1
    room = budget - int(table.cost[dearest].sum())
    if room >= 0:
        return Relaxation(0.0, dearest, room, None)
    if table.cost.size >= LARGE:
        assert table.runs.option is not None
        sample = table.at(table.runs.option)
        hulls = lower_hulls(sample)
        rough = relax(sample, hulls, budget).multiplier
        for width in (2.0**-6, 2.0**-3):
            steep, flat = rough * (1 + width), rough * (1 - width)
            part = table.between(
                _reaching(table, sample, hulls, steep)[0], _reaching(table, sample, hulls, flat)[1]
            )
            if int(part.cost[part.start[:-1]].sum()) > budget:
                continue
            found = relax(part, lower_hulls(part), budget)
            if flat < found.multiplier < steep:
                assert part.option is not None
                edge = found.edge and (found.edge[0], int(part.option[found.edge[1]]))
                return Relaxation(found.multiplier, part.option[found.position], found.room, edge)
    return relax(table, lower_hulls(table), budget)


def _reaching(
    table: Table, sample: Table, hulls: Hulls, multiplier: float
) -> tuple[IntArray, IntArray]:
    """From where to where in each row the Lagrangian function can be as small as in the sample."""
    at = hulls.vertex[_taken(hulls, multiplier)]
    runs = table.runs
    assert runs.option is not None
    least = reduced_losses(runs, multiplier, sample.cost[at], sample.loss[at], 8 * EPS)
    near = np.flatnonzero(least <= 0.0)
    first = near[np.searchsorted(near, runs.start[:-1])]
    last = near[np.searchsorted(near, runs.start[1:]) - 1]
    return runs.option[first], table.run_end[last]


def reduced_losses(
    table: Table, multiplier: float, cost: IntArray, loss: FloatArray, rounding: float = EPS
) -> FloatArray:
    """What each option adds to the Lagrangian function, relative to one point for each row.

    Args:
        table: the options.
        multiplier: lam.
        cost: cost* of each row, shape ``(G,)``.
        loss: loss* of each row, shape ``(G,)``.
        rounding: by how much of its terms the sum is rounded down.

    Returns:
        ``(loss - loss*) + lam (cost - cost*)``, rounded down, shape ``(N,)``.
    """
    paid = (table.cost - table.spread(cost)).astype(np.float64)
    reduced = table.loss - table.spread(loss)
    with np.errstate(over="ignore", invalid="ignore"):
        paid *= multiplier
        error = np.abs(reduced)
        reduced += paid
        np.abs(paid, out=paid)
        error += paid
        error *= rounding
        reduced -= error
    if not np.isfinite(reduced.max()):
        # Too dear for a float: no choice has them.
        reduced[~np.isfinite(reduced)] = np.inf
    return reduced


def options_within(
    table: Table, multiplier: float, position: IntArray, gap: float
) -> tuple[IntArray, FloatArray]:
    """The options whose reduced losses, relative to one position in each row, are at most ``gap``.

    Returns:
        Their positions, in order, and their reduced losses.
    """
    cost, loss = table.cost[position], table.loss[position]
    runs = table.runs
    assert runs.option is not None
    # The options' own rounding must not take them below their run's.
    near = np.flatnonzero(reduced_losses(runs, multiplier, cost, loss, 8 * EPS) <= gap)
    positions, losses = [], []
    for few in np.array_split(near, near.size * RUN // BLOCK + 1):
        part = table.at(ranges(runs.option[few], table.run_end[few]))
        reduced = reduced_losses(part, multiplier, cost, loss)
        within = reduced <= gap
        assert part.option is not None
        positions.append(part.option[within])
        losses.append(reduced[within])
    return np.concatenate(positions), np.concatenate(losses)


def lower_bound(table: Table, relaxation: Relaxation) -> float:
    """L(lam) over all options, rounded down: no choice within the budget loses less."""
    near, reduced = options_within(table, relaxation.multiplier, relaxation.position, 0.0)
    # Every row has its own position, at 0.
    least = np.minimum.reduceat(reduced, np.searchsorted(near, table.start[:-1]))
    correction = [0.0, *least[least < 0].tolist()]
    taken = table.loss[relaxation.position].tolist()
    unspent = relaxation.multiplier * relaxation.room
    if unspent == 0.0 and len(correction) == 1:
        return math.fsum(taken)
    bound = math.fsum([*taken, *correction, -unspent, -2 * EPS * unspent])
    floor = math.fsum(table.loss[table.start[1:] - 1].tolist())
    return max(math.nextafter(bound, -math.inf), floor)
