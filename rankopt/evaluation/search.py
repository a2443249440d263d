"""Search for the ranks with the smallest measured loss of the model itself.

The torch shell around rankopt_solvers.search: a choice becomes a plan, the plan is applied, the
model evaluated and restored. The strategies that only use the profile are measured first, so
that the search ends no worse than the best of them, on the data it was given. That data is what the
ranks are fitted to: measure the result on other data.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from rankopt.backends import find_backend
from rankopt.data.digest import data_digest
from rankopt.errors import BudgetError, MissingExtraError, OptionError, RankoptError
from rankopt.evaluation.evaluation import Evaluation
from rankopt.evaluation.plans import PlanEvaluator
from rankopt.layers import Form
from rankopt.model.tasks import Batch
from rankopt.plan.allocation import Objective, allocation
from rankopt.plan.assemble import plan_of
from rankopt.plan.budget import find_budget
from rankopt.plan.compare import Strategy
from rankopt.plan.pins import Pins, pinned
from rankopt.plan.plan import Plan
from rankopt.plan.planner import choose
from rankopt.profile.profile import Profile
from rankopt.progress import bar
from rankopt_solvers import certify
from rankopt_solvers.registry import Solver, UnknownSolverError
from rankopt_solvers.search import (
    SAMPLERS,
    Choice,
    Measured,
    OtherStudyError,
    SearchError,
    SearchResult,
    search,
    without_password,
)

#: Measured before anything is searched; the search cannot end worse than the best of them.
PLANS = ("uniform", "proportional", "threshold", "greedy", "exact", "exact/layerwise")


@dataclasses.dataclass(frozen=True)
class SearchedPlan:
    """The best plan that was measured.

    Attributes:
        plan: its solver is ``search``; the certificate is that of the profile's losses.
        found: all that was measured.
        dense: the model without any plan, on the same data.
    """

    plan: Plan
    found: SearchResult
    dense: Evaluation

    def __str__(self) -> str:
        found = self.found
        above = found.plan_loss - self.dense.loss
        share = f", {found.improvement / above:.1%} of its distance to dense" if above > 0 else ""
        early = ": no new ranks were proposed after that" if found.exhausted else ""
        failed = sum(measured.loss is None for measured in found.trials)
        without = f", {failed} of them without a finite loss" if failed else ""
        better = (
            f"{found.improvement:.6g} less than the best of the other plans "
            f"({found.best_plan}, {found.plan_loss:.6g}){share}"
        )
        if math.isinf(found.plan_loss):
            better = "and none of the other plans has a finite one"
        return (
            f"search: measured loss {found.loss:.6g} (dense {self.dense.loss:.6g}), {better}; "
            f"{len(found.trials)} trials{without}{early}"
        )


class OtherSearchError(RankoptError):
    """The storage holds a search with another profile, data or budget.

    Attributes:
        found: where, and what differs.
    """

    def __init__(self, storage: Any, difference: str) -> None:
        self.found = f"{without_password(str(storage))} holds a search with {difference}"
        super().__init__(f"{self.found}: another storage or study_name starts a new one")


def search_plan(
    model: nn.Module,
    profile: Profile,
    batches: Sequence[Batch],
    *,
    trials: int = 40,
    keep: float | None = None,
    keep_total: float | None = None,
    max_params: int | None = None,
    objective: Objective = "total",
    rank_multiple: int = 1,
    form: Form | None = None,
    backend: str | None = None,
    scale: str | None = None,
    pins: Pins | None = None,
    plans: Sequence[str] = PLANS,
    sampler: Any = "cmaes",
    storage: Any = None,
    study_name: str = "rankopt",
    seed: int = 0,
    solver: str | Solver = "exact",
    solver_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> SearchedPlan:
    """Measure ``trials`` plans within the budget on the model, and return the best.

    Args:
        model: the dense model that was profiled; it is left as it was.
        profile: what every rank retains.
        batches: what the loss is measured on; not the data of the profile.
        trials: plans to measure in all, those of ``plans`` included, and what earlier or other
            processes have measured in the same storage.
        keep: budget as a share of the planned layers' parameters.
        keep_total: budget as a share of the whole model's parameters.
        max_params: budget as a number of parameters for the planned layers.
        objective: ``total`` or ``layerwise``: the losses that a trial reweights.
        rank_multiple: offer only multiples of it (and dense).
        form: see make_plan.
        backend: whose losses to use; by default the profile's first.
        scale: how layers compare, one of the backend's; by default its first.
        pins: see make_plan.
        plans: strategies, as ``Strategy.parse`` takes them, measured first.
        sampler: ``cmaes``, ``tpe``, ``thompson``, ``gp``, ``random``, or a sampler of Optuna's.
        storage: a journal file or a database's URL; the same call goes on where it was stopped,
            and several processes share the work. None keeps nothing.
        study_name: name in the storage.
        seed: of the sampler.
        solver: solves the reweighted problems.
        solver_options: passed to it.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        BudgetError: see make_plan.
        InfeasibleBudgetError: no ranks fit.
        OptionError: see make_plan; an unknown sampler or solver; ``maxmin``, which is no sum.
        OtherSearchError: the storage holds a search with another profile, data or budget.
        RankoptError: too few trials, or the storage is damaged.
        MissingExtraError: Optuna is not installed.
        DataError: no batches.
        NotFiniteError: the dense model's loss is NaN or infinite.
    """
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise OptionError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if objective == "maxmin":
        raise OptionError(
            "a search reweights losses that are added up: it takes the objective total or "
            "layerwise, not maxmin"
        )
    if backend is not None and ":" in backend:
        find_backend(backend)
    budget = find_budget(profile.info, keep, keep_total, max_params)
    if budget is None:
        raise BudgetError("a budget is needed: keep, keep_total or max_params")
    offered = allocation(profile, backend, scale, objective, rank_multiple, form)
    offered = pinned(offered, pins or {})
    named: dict[str, Choice] = {}
    for text in plans:
        strategy = Strategy.parse(text)
        if strategy.backend not in (None, offered.backend, profile.backend(backend).loaded_from):
            raise OptionError(
                f"plan {text}: every trial of a search has the backend {offered.backend}"
            )
        if strategy.form not in (None, offered.form):
            raise OptionError(f"plan {text}: every trial of a search has the form {offered.form}")
        seen, chosen = choose(
            profile,
            budget,
            solver=strategy.solver,
            objective=strategy.objective,
            rank_multiple=rank_multiple,
            form=offered.form,
            backend=offered.backend,
            scale=offered.scale,
            min_retained=strategy.min_retained,
            pins=pins,
        )
        # A floor leaves some options out.
        pairs = zip(offered.ranks, seen.ranks, chosen.choice, strict=True)
        named[text] = tuple(int((every == few[j]).argmax()) for every, few, j in pairs)
    problem = offered.problem(budget.parameters)

    def planned(choice: Choice) -> Plan:
        return plan_of(profile, offered, certify(problem, choice, "search"), budget)

    measure = PlanEvaluator(model, profile, batches, progress=False)
    dense = measure.dense()
    # The problem's digest covers the last of them, too: here they are named.
    about = {
        "profile": profile.digest()[:16],
        "data set": data_digest(model, batches)[:16],
        "budget": str(budget),
        "objective": objective,
        "rank multiple": str(rank_multiple),
    }
    if offered.pinned:
        about["pins"] = str(pins)
    if offered.form != "pairs":
        about["form"] = offered.form
    last = max(len(offered.layers) - 1, 1)
    with bar(range(trials), "Search", "trial", progress) as shown:

        def show(measured: Measured, done: int) -> None:
            shown.update(done - shown.n)
            loss = math.nan if measured.loss is None else measured.loss
            shown.set_postfix_str(f"{measured.source} {loss:.4f}")

        def loss_of(choice: Choice) -> float:
            measured = measure(planned(choice))
            if not math.isfinite(measured.loss):
                tqdm.write(f"a trial counts as failed: its {measured.notes[0]}", file=sys.stderr)
            return measured.loss

        try:
            found = search(
                problem,
                loss_of,
                trials=trials,
                kinds=[layer.kind for layer in offered.layers],
                depths=[index / last for index in range(len(offered.layers))],
                sampler=sampler,
                plans=named,
                origin=dense.loss,
                storage=storage,
                study_name=study_name,
                label=about,
                seed=seed,
                solver=solver,
                solver_options=solver_options,
                progress=show,
            )
        except UnknownSolverError as error:
            raise OptionError(str(error)) from error
        except OtherStudyError as error:
            raise OtherSearchError(storage, error.difference) from error
        except SearchError as error:
            raise RankoptError(str(error)) from error
        except ImportError as error:
            if error.name not in ("optuna", "cmaes", "scipy"):
                raise
            raise MissingExtraError("search", error.name, "search") from error
    return SearchedPlan(planned(found.solution.choice), found, dense)
