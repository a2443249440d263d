"""Choose one option of every group under a budget: torch-free, certified, pluggable.

The problem is the multiple-choice knapsack (Sinha & Zoltners 1979): every group offers options
``(cost, loss)``, exactly one option of each group is taken, the costs together stay within the
budget, and the losses together (their sum, or their maximum) are as small as possible.
"""

from rankopt_solvers.frontier import Frontier as Frontier
from rankopt_solvers.frontier import frontier as frontier
from rankopt_solvers.levels import solve_with_level as solve_with_level
from rankopt_solvers.levels import within_level as within_level
from rankopt_solvers.problem import Group as Group
from rankopt_solvers.problem import InfeasibleError as InfeasibleError
from rankopt_solvers.problem import Objective as Objective
from rankopt_solvers.problem import Problem as Problem
from rankopt_solvers.problem import ProblemError as ProblemError
from rankopt_solvers.problem import SideBudget as SideBudget
from rankopt_solvers.problem import shared_choice as shared_choice
from rankopt_solvers.registry import SOLVERS as SOLVERS
from rankopt_solvers.registry import UnknownSolverError as UnknownSolverError
from rankopt_solvers.registry import solve as solve
from rankopt_solvers.solution import NoChoiceFoundError as NoChoiceFoundError
from rankopt_solvers.solution import Solution as Solution
from rankopt_solvers.solution import SolutionError as SolutionError
from rankopt_solvers.solution import certify as certify
from rankopt_solvers.solution import margins as margins
from rankopt_solvers.verify import verify as verify

__all__ = [
    "SOLVERS",
    "Frontier",
    "Group",
    "InfeasibleError",
    "NoChoiceFoundError",
    "Objective",
    "Problem",
    "ProblemError",
    "SideBudget",
    "Solution",
    "SolutionError",
    "UnknownSolverError",
    "certify",
    "frontier",
    "margins",
    "shared_choice",
    "solve",
    "solve_with_level",
    "verify",
    "within_level",
]
