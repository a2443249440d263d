"""The integer program, any number of budgets, and constraints on the choice; cvxpy and HiGHS."""

from rankopt_solvers.knapsack.solve import solve_knapsack as solve_knapsack
