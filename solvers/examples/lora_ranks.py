"""LoRA ranks: which layers deserve larger adapters.

EVA (Paischer et al. 2024, arXiv:2410.07170) starts an adapter from the principal components of the
layer's inputs and gives rank to the layers where components explain most variance. A rank of an
(n, m) layer costs n + m parameters, so ranks of wide layers are dearer: a knapsack, in which EVA's
count of ranks becomes a budget of parameters. Loss: the share of variance left unexplained.

Query, key and value of a block are to have the same rank here, as trainers that fuse them need:
``shared_choice`` makes the three one group.
"""

import json
from pathlib import Path

import numpy as np

from rankopt_solvers import Group, Problem, shared_choice, solve, verify

data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
uniform = 8

blocks: dict[str, list[Group]] = {}
for name, layer in data["layers"].items():
    explained = np.concatenate(([0.0], np.cumsum(layer["explained"])))
    ranks = np.arange(explained.size)
    group = Group(name, ranks * sum(layer["shape"]), 1.0 - explained)
    block, part = name.split(".", 1)
    fused = part in ("attention.self.query", "attention.self.key", "attention.self.value")
    blocks.setdefault(f"{block}.qkv" if fused else name, []).append(group)
groups = tuple(shared_choice(name, members) for name, members in blocks.items())

alike = [uniform] * len(groups)
problem = Problem(groups, budget=sum(int(group.cost[uniform]) for group in groups))
solution = solve(problem)
verify(problem, solution)

print("adapters           parameters   unexplained variance, summed over the layers")
print(f"rank {uniform} everywhere  {problem.budget:10,d}   {problem.loss_of(alike):.4f}")
print(f"allocated ranks    {solution.cost:10,d}   {solution.loss:.4f}")
print(f"of which at most {solution.gap:.0e} could be avoided; ranks, first block to last:")
for kind in ("qkv", "attention.output.dense", "intermediate.dense", "output.dense"):
    names = [f"{block}.{kind}" for block in range(6)]
    chosen = [j for g, j in zip(groups, solution.choice, strict=True) if g.name in names]
    print(f"  {kind:24s} {' '.join(map(str, chosen))}")
assert solution.cost <= problem.budget
assert solution.loss < problem.loss_of(alike)
