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
from rankopt.errors import ModelError as ModelError
from rankopt.errors import PlanError as PlanError
from rankopt.errors import ProfileError as ProfileError
from rankopt.errors import RankoptError as RankoptError
from rankopt.layers import Layer as Layer
from rankopt.plan import Plan as Plan
from rankopt.planning import make_plan as make_plan
from rankopt.profile import Profile as Profile

if TYPE_CHECKING:
    from rankopt.checkpoint import save_model as save_model
    from rankopt.data import load_batches as load_batches
    from rankopt.data import text_batches as text_batches
    from rankopt.evaluation import Evaluation as Evaluation
    from rankopt.evaluation import evaluate as evaluate
    from rankopt.lowrank import LowRankLinear as LowRankLinear
    from rankopt.measure import profile_model as profile_model
    from rankopt.searching import search_plan as search_plan
    from rankopt.surgery import applied as applied
    from rankopt.surgery import apply_plan as apply_plan

#: Public names that need torch, and the module each lives in.
_TORCH = {
    "Evaluation": "rankopt.evaluation",
    "LowRankLinear": "rankopt.lowrank",
    "applied": "rankopt.surgery",
    "apply_plan": "rankopt.surgery",
    "evaluate": "rankopt.evaluation",
    "load_batches": "rankopt.data",
    "profile_model": "rankopt.measure",
    "save_model": "rankopt.checkpoint",
    "search_plan": "rankopt.searching",
    "text_batches": "rankopt.data",
}


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
