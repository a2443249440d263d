"""The proven optimum of a sum: branch and bound over convex hulls and dynamic programming."""

from rankopt_solvers.exact.branch_and_bound import solve_exact as solve_exact
