"""Pruning ratios: how much of each layer can go.

Every layer offers ten options: its smallest weights, 0 % to 90 % of them, are set to zero. An
option costs the weights that stay, and loses what was measured when only this layer was pruned: how
far the sentence embeddings move (measure.py says how). The usual baseline prunes every layer alike.

One table serves every budget: ``with_budget`` keeps what was prepared for the first solution. As
ever with losses measured one layer at a time, the sum is a prediction, to be checked on the model.
"""

import json
from pathlib import Path

from rankopt_solvers import Group, Problem, solve, verify

data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ratios = data["pruned"]

groups = []
for name, layer in data["layers"].items():
    size = layer["shape"][0] * layer["shape"][1]
    groups.append(Group(name, [size - round(ratio * size) for ratio in ratios], layer["loss"]))
problem = Problem(tuple(groups), budget=sum(int(group.cost[0]) for group in groups))

print("pruned   error, all alike   error, allocated   avoidable at most   ratios from-to")
for ratio in (0.3, 0.5, 0.7):
    alike = [ratios.index(ratio)] * len(groups)
    problem = problem.with_budget(problem.cost_of(alike))
    solution = solve(problem)
    verify(problem, solution)

    chosen = [ratios[j] for j in solution.choice]
    print(
        f"{ratio:6.0%}   {problem.loss_of(alike):16.4f}   {solution.loss:16.4f}   "
        f"{solution.gap:17.1e}   {min(chosen):.0%}-{max(chosen):.0%}"
    )
    assert solution.cost <= problem.budget
    assert solution.loss < problem.loss_of(alike)
