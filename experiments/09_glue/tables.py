"""What the measured plans say, and as markdown.

GLUE's metric of a task: accuracy (SST-2, RTE), F1 (MRPC), Matthews correlation (CoLA), mean of
Pearson's and Spearman's correlation (STS-B); in points, times 100. An average over tasks has an
interval by Student's t over the differences of the tasks.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

METRICS = {"mrpc": ("f1",), "cola": ("matthews",), "stsb": ("pearson", "spearman")}
DEFAULT, BASELINE = "exact@kronecker", "uniform/pairs@fwsvd"
#: Of the inference and similarity tasks, for the thesis.
RELATED = ("mrpc", "stsb", "rte")


def score(task: str, metrics: Mapping[str, float | None]) -> float | None:
    """GLUE's metric in points; None where it is not defined."""
    names = METRICS.get(task, ("accuracy",) if "accuracy" in metrics else ("pearson", "spearman"))
    values = [metrics.get(name) for name in names]
    mean = _mean(values)
    return None if mean is None else 100 * mean


def summed_up(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Plain figures of every task.

    Args:
        kept: task -> name -> Results; ``learned`` is plain.
    """
    from rankopt.results import prediction, summarise

    tasks: dict[str, Any] = {}
    for task, files in kept.items():
        results = {name: each for name, each in files.items() if name != "learned"}
        if not results:
            continue
        dense = next(iter(results.values())).dense
        tasks[task] = {"dense": {"loss": dense.loss, "score": score(task, dense.metrics)}}
        for name, each in results.items():
            tasks[task][name] = lines(task, each)
        if "auto" in results and dense.loss is not None:
            predicted = prediction(summarise(results["auto"]), dense.loss)
            tasks[task]["predicted"] = {k: dataclasses.asdict(v) for k, v in predicted.items()}
        if "learned" in files:
            tasks[task]["learned"] = [
                {**row, "score": score(task, row)} for row in files["learned"]["rows"]
            ]
    return {"tasks": tasks}


def merged(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Results with those parts of the earlier ones that were not measured now.

    Args:
        earlier: what results.json holds; nothing is taken of another protocol or other versions.
        found: what the folder has.
    """
    if earlier.get("settings") != found["settings"]:
        return dict(found)
    before, now = earlier["tasks"], found["tasks"]
    tasks = {name: {**before.get(name, {}), **now.get(name, {})} for name in {**before, **now}}
    return {**found, "tasks": tasks}


def lines(task: str, results: Any) -> list[dict[str, Any]]:
    """A dictionary for each strategy and budget."""
    from rankopt.results import summarise

    strategies = {row.strategy for row in results.plans}
    against = next((s for s in (DEFAULT, BASELINE) if s in strategies), None)
    return [
        line.to_dict() | {"score": score(task, line.metrics)}
        for line in summarise(results, against)
    ]


def interval(values: Sequence[float]) -> str:
    """Mean, with half of its interval by Student's t."""
    from rankopt.results.summary import interval_of

    mean, half_width = interval_of(values)
    return f"{mean:+.1f}" if half_width is None else f"{mean:+.1f} ± {half_width:.1f}"


def _mean(values: Iterable[float | None]) -> float | None:
    from rankopt.results.summary import mean_of

    return mean_of(list(values))


def table(found: Mapping[str, Any]) -> str:
    """All tables."""
    tasks = found["tasks"]
    dense = (f"{task} {_points(each['dense']['score'])}" for task, each in tasks.items())
    text = [f"Dense: {', '.join(dense)}."]
    if any("auto" in each for each in tasks.values()):
        text += _average(tasks)
        text += _divergences(tasks)
        text += _predictions(tasks)
    if any("thesis" in each for each in tasks.values()):
        text += _thesis(tasks)
    if any("empirical" in each for each in tasks.values()):
        text += _estimators(tasks)
    if any("learned" in each for each in tasks.values()):
        text += _learned(tasks)
    if any("search" in each for each in tasks.values()):
        text += _search(tasks)
    for task, each in tasks.items():
        if "auto" in each:
            text += _task(task, each)
    return "\n".join(text) + "\n"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _keeps(lines: Iterable[Mapping[str, Any]]) -> list[float]:
    return sorted({line["keep"] for line in lines}, reverse=True)


def _scores(
    tasks: Mapping[str, Any], part: str, strategy: str, keep: float, what: str = "score"
) -> dict[str, float]:
    """Task -> score of a strategy, or another figure, of those that have one."""
    return {
        task: line[what]
        for task, each in tasks.items()
        for line in each.get(part, [])
        if (line["strategy"], line["keep"]) == (strategy, keep) and line[what] is not None
    }


def _apart(these: Mapping[str, float], those: Mapping[str, float]) -> list[float]:
    return [these[task] - those[task] for task in these if task in those]


def _average(tasks: Mapping[str, Any]) -> list[str]:
    def cell(strategy: str, keep: float) -> str:
        ours = _scores(tasks, "auto", strategy, keep)
        apart = _apart(ours, _scores(tasks, "auto", DEFAULT, keep))
        shown = _points(_mean(ours.values()))
        return shown if strategy == DEFAULT or not apart else f"{shown} ({interval(apart)})"

    count = sum("auto" in each for each in tasks.values())
    return [
        "",
        "## Average",
        "",
        f"Mean score over {count} tasks, closed form (difference to `{DEFAULT}`).",
        *_of_all(tasks, cell),
    ]


def _of_all(tasks: Mapping[str, Any], cell: Callable[[str, float], str]) -> list[str]:
    """A row for each strategy in closed form, a column for each budget."""
    every = [line for each in tasks.values() for line in each.get("auto", [])]
    keeps = _keeps(every)
    strategies = dict.fromkeys(line["strategy"] for line in every)
    rows = ([name, *(cell(name, keep) for keep in keeps)] for name in strategies)
    return _rows(["strategy", *(f"kept {keep:g}" for keep in keeps)], rows)


def _divergences(tasks: Mapping[str, Any]) -> list[str]:
    def cell(strategy: str, keep: float) -> str:
        ours, theirs = (
            _scores(tasks, "auto", name, keep, "divergence") for name in (strategy, DEFAULT)
        )
        logs = [math.log(ours[task] / theirs[task]) for task in ours if task in theirs]
        return _factor(logs) if strategy != DEFAULT else "1"

    return [
        "",
        "## Divergence from the dense model",
        "",
        f"KL on the dev split (of the regression the squared distance) over that of `{DEFAULT}`: "
        "geometric mean over the tasks, and its interval by Student's t over their logarithms.",
        *_of_all(tasks, cell),
    ]


def _factor(logs: Sequence[float]) -> str:
    """The mean factor, and the ends of its interval."""
    from rankopt.results.summary import interval_of

    mean, half_width = interval_of(logs)
    if mean is None:
        return "-"
    ends = () if half_width is None else (mean - half_width, mean + half_width)
    low_high = ", ".join(f"{math.exp(end):.3g}" for end in ends)
    return f"{math.exp(mean):.3g}" + (f" [{low_high}]" if ends else "")


def _predictions(tasks: Mapping[str, Any]) -> list[str]:
    backends = dict.fromkeys(name for each in tasks.values() for name in each.get("predicted", ()))
    rows = [
        [name, *(_correlation(each.get("predicted", {}).get(name)) for each in tasks.values())]
        for name in backends
    ]
    return [
        "",
        "## Predicted against measured",
        "",
        "Spearman's correlation of predicted increase and measured divergence from the dense model "
        "over strategies and budgets, with the interval of a bootstrap over them.",
        *_rows(["backend", *tasks], rows),
    ]


def _correlation(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else "{rho:.2f} [{low:.2f}, {high:.2f}]".format_map(found)


def _thesis(tasks: Mapping[str, Any]) -> list[str]:
    every = [line for each in tasks.values() for line in each.get("thesis", [])]
    keeps, rows = _keeps(every), []
    strategies = dict.fromkeys(line["strategy"] for line in every)
    for which, chosen in {
        "all": tasks,
        "related": {t: tasks[t] for t in tasks if t in RELATED},
    }.items():
        for strategy in strategies:
            solver, _, rest = strategy.partition("/pairs")
            if solver == "uniform" or not chosen:
                continue
            apart = {
                keep: _apart(
                    _scores(chosen, "thesis", strategy, keep),
                    _scores(chosen, "thesis", f"uniform/pairs{rest}", keep),
                )
                for keep in keeps
            }
            over = [statistics.fmean(each) for each in zip(*apart.values(), strict=True)]
            cells = [interval(each) if each else "-" for each in (*apart.values(), over)]
            rows.append([which, strategy, *cells])
    head = ["tasks", "strategy", *(f"kept {keep:g}" for keep in keeps), "all budgets"]
    return [
        "",
        "## The thesis",
        "",
        "Pairs of factors, ranks planned on the backend's own error: score over that of `uniform`, "
        f"all tasks and those of inference and similarity ({', '.join(RELATED)}).",
        *_rows(head, rows),
    ]


def _estimators(tasks: Mapping[str, Any]) -> list[str]:
    names = ("auto", "empirical", "sampled")
    every = [line for each in tasks.values() for line in each.get("empirical", [])]
    rows = []
    for strategy in dict.fromkeys(line["strategy"] for line in every):
        for name in names:
            scores = (_scores(tasks, name, strategy, keep) for keep in _keeps(every))
            of_classifiers = [
                _mean(v for t, v in each.items() if "empirical" in tasks[t]) for each in scores
            ]
            rows.append([strategy, name, *map(_points, of_classifiers)])
    head = ["strategy", "estimator", *(f"kept {keep:g}" for keep in _keeps(every))]
    return ["", "## Estimators", "", "Mean score of the classifiers.", *_rows(head, rows)]


def _learned(tasks: Mapping[str, Any]) -> list[str]:
    every = [row for each in tasks.values() for row in each.get("learned", [])]
    dense = _mean(each["dense"]["score"] for each in tasks.values() if "learned" in each)
    rows = []
    for keep in _keeps(every):
        for strategy in dict.fromkeys(row["strategy"] for row in every):
            same = [r for r in every if (r["strategy"], r["keep"]) == (strategy, keep)]
            by_how = {how: [r["score"] for r in same if r["how"] == how] for how in HOW}
            rows.append([f"{keep:g}", strategy, *(_points(_mean(x)) for x in by_how.values())])
    return [
        "",
        "## Factors that learn",
        "",
        f"Mean score; dense {_points(dense)}. Refined on 1,024 rows of the task's training rows; "
        "one epoch on all of them.",
        *_rows(["kept", "strategy", *HOW.values()], rows),
    ]


HOW = {"closed": "closed form", "refined": "refined", "tuned": "one epoch"}


def _search(tasks: Mapping[str, Any]) -> list[str]:
    rows = []
    for task, each in tasks.items():
        for line in each.get("search", []):
            (default,) = _scores({task: each}, "auto", DEFAULT, line["keep"]).values()
            rows.append([task, f"{line['keep']:g}", _points(line["score"]), _points(default)])
    return ["", "## Search", *_rows(["task", "kept", "search", DEFAULT], rows)]


def _task(task: str, each: Mapping[str, Any]) -> list[str]:
    """Score and divergence of every strategy; bold beyond what chance explains."""
    keeps, rows = _keeps(each["auto"]), []
    for strategy in dict.fromkeys(line["strategy"] for line in each["auto"]):
        by_keep = {x["keep"]: x for x in each["auto"] if x["strategy"] == strategy}
        cells = []
        for line in (by_keep.get(keep) for keep in keeps):
            if line is None:
                cells.append("")
                continue
            shown = f"{_points(line['score'])} / {line['divergence']:.4f}"
            sure = line["against"] is not None and line["against"]["corrected"] < 0.05
            cells.append(f"**{shown}**" if sure else shown)
        rows.append([strategy, *cells])
    return [
        "",
        f"## {task}",
        "",
        f"Score / divergence from the dense model; bold where the score (of a regression the "
        f"loss) differs from that of `{DEFAULT}` (p below .05 after Holm's correction).",
        *_rows(["strategy", *(f"kept {keep:g}" for keep in keeps)], rows),
    ]
