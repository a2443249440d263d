"""Bit widths: how many bits each layer of a sentence encoder deserves.

Every layer offers five options, 2 to 8 bits for each of its weights. What an option costs is the
bits it occupies; what it loses was measured once, layer by layer: how far the sentence embeddings
move when only this layer is rounded (measure.py says how). From here on no model is needed.

The losses are added up as if layers did not disturb one another. That is a prediction; it is what
mixed-precision tools optimise, and it wants checking on the model once the widths are chosen.
"""

import json
from pathlib import Path

from rankopt_solvers import Group, Problem, solve, verify

data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
bits = data["bits"]

groups = []
for name, layer in data["layers"].items():
    rows, columns = layer["shape"]
    groups.append(Group(name, [rows * columns * b for b in bits], layer["loss"]))
weights = sum(int(group.cost[0]) // bits[0] for group in groups)

print("bits per weight   error, all alike   error, allocated   avoidable at most")
for width in (3, 4, 6):
    problem = Problem(tuple(groups), budget=width * weights)
    solution = solve(problem)
    verify(problem, solution)

    alike = problem.loss_of([bits.index(width)] * len(groups))
    print(f"{width:15d}   {alike:16.6f}   {solution.loss:16.6f}   {solution.gap:17.1e}")
    assert solution.cost <= width * weights
    assert solution.loss < alike

print("\nlayers at six bits per weight on average:")
for b in bits:
    names = [g.name for g, j in zip(groups, solution.choice, strict=True) if bits[j] == b]
    print(f"{b} bits: {len(names):2d} layers {', '.join(names[:2])}{', ...' * (len(names) > 2)}")
