"""Paired timing: candidates interleaved in one process, one thread, CPU time.

CPU time of one thread hardly moves when others keep the machine busy, but clock and caches do:
within a round all candidates meet the same ones, so what is kept is each round's ratio to the
first candidate, and of these the median.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one run of each that is not counted.

    Args:
        ways: candidates by name.
        rounds: each starts with another candidate.
        clock: seconds.
    """
    for run in ways.values():
        run()
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                started = clock()
                ways[name]()
                seconds[name].append(clock() - started)
            gc.collect()
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of the ratio of two candidates."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
