"""rankopt: how many ranks each layer of a neural network deserves.

Three nouns: a Profile says what every rank of every layer costs and retains, a solver chooses under
a budget, a Plan is the choice with its certificate. Importing rankopt is light: torch, transformers
and cvxpy are imported by the functions that need them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rankopt import _register
from rankopt._version import __version__ as __version__
from rankopt.errors import BudgetError as BudgetError
from rankopt.errors import DataError as DataError
from rankopt.errors import InfeasibleBudgetError as InfeasibleBudgetError
from rankopt.errors import MissingExtraError as MissingExtraError
from rankopt.errors import ModelError as ModelError
from rankopt.errors import OptionError as OptionError
from rankopt.errors import PlanError as PlanError
from rankopt.errors import ProfileError as ProfileError
from rankopt.errors import RankoptError as RankoptError
from rankopt.errors import ResultsError as ResultsError
from rankopt.layers import Layer as Layer
from rankopt.plan.budget import Budget as Budget
from rankopt.plan.budget import Limit as Limit
from rankopt.plan.compare import ComparedPlan as ComparedPlan
from rankopt.plan.compare import Strategy as Strategy
from rankopt.plan.compare import compare as compare
from rankopt.plan.exchange import export_ranks as export_ranks
from rankopt.plan.exchange import imported_plan as imported_plan
from rankopt.plan.latency import LatencyTable as LatencyTable
from rankopt.plan.lora import LoraPlan as LoraPlan
from rankopt.plan.lora import make_lora_plan as make_lora_plan
from rankopt.plan.plan import Plan as Plan
from rankopt.plan.planner import make_plan as make_plan
from rankopt.plan.stability import Stability as Stability
from rankopt.profile.profile import Profile as Profile
from rankopt.profile.spilled import SpilledArrays as SpilledArrays
from rankopt.results import Results as Results
from rankopt.results import summarise as summarise

if TYPE_CHECKING:
    from rankopt.apply.apply import applied as applied
    from rankopt.apply.apply import apply_plan as apply_plan
    from rankopt.apply.compressed import Compressed as Compressed
    from rankopt.apply.saving import save_model as save_model
    from rankopt.data.batches import load_batches as load_batches
    from rankopt.data.batches import text_batches as text_batches
    from rankopt.data.rows import Columns as Columns
    from rankopt.evaluation.comparison import measure_comparison as measure_comparison
    from rankopt.evaluation.evaluation import Evaluation as Evaluation
    from rankopt.evaluation.evaluation import evaluate as evaluate
    from rankopt.evaluation.plans import measure_rows as measure_rows
    from rankopt.evaluation.search import SearchedPlan as SearchedPlan
    from rankopt.evaluation.search import search_plan as search_plan
    from rankopt.measure.measure import profile_model as profile_model
    from rankopt.model.lowrank import LowRank as LowRank
    from rankopt.model.lowrank import LowRankLinear as LowRankLinear
    from rankopt.model.tasks import LossFunction as LossFunction
    from rankopt.refinement.refinement import Refined as Refined
    from rankopt.refinement.refinement import refine as refine

#: Public names that need torch, and the module each lives in.
_TORCH = {
    "Columns": "rankopt.data.rows",
    "Compressed": "rankopt.apply.compressed",
    "Evaluation": "rankopt.evaluation.evaluation",
    "LossFunction": "rankopt.model.tasks",
    "LowRank": "rankopt.model.lowrank",
    "LowRankLinear": "rankopt.model.lowrank",
    "Refined": "rankopt.refinement.refinement",
    "SearchedPlan": "rankopt.evaluation.search",
    "applied": "rankopt.apply.apply",
    "apply_plan": "rankopt.apply.apply",
    "evaluate": "rankopt.evaluation.evaluation",
    "load_batches": "rankopt.data.batches",
    "measure_comparison": "rankopt.evaluation.comparison",
    "measure_rows": "rankopt.evaluation.plans",
    "profile_model": "rankopt.measure.measure",
    "refine": "rankopt.refinement.refinement",
    "save_model": "rankopt.apply.saving",
    "search_plan": "rankopt.evaluation.search",
    "text_batches": "rankopt.data.batches",
}

__all__ = [
    "Budget",
    "BudgetError",
    "Columns",
    "ComparedPlan",
    "Compressed",
    "DataError",
    "Evaluation",
    "InfeasibleBudgetError",
    "LatencyTable",
    "Layer",
    "Limit",
    "LoraPlan",
    "LossFunction",
    "LowRank",
    "LowRankLinear",
    "MissingExtraError",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileError",
    "RankoptError",
    "Refined",
    "Results",
    "ResultsError",
    "SearchedPlan",
    "SpilledArrays",
    "Stability",
    "Strategy",
    "applied",
    "apply_plan",
    "compare",
    "evaluate",
    "export_ranks",
    "imported_plan",
    "load_batches",
    "make_lora_plan",
    "make_plan",
    "measure_comparison",
    "measure_rows",
    "profile_model",
    "refine",
    "save_model",
    "search_plan",
    "summarise",
    "text_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module 'rankopt' has no attribute {name!r}")
    try:
        module = importlib.import_module(_TORCH[name])
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            from rankopt.errors import MissingExtraError

            raise MissingExtraError(f"rankopt.{name}", error.name, "torch") from error
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_TORCH})


_register.register()
