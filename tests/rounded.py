"""Plans with bits, made of plans without, and models wide enough for groups of 32."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rankopt import Plan, Profile, make_plan, profile_model
from rankopt.layers import Bits
from rankopt.plan.plan import PlannedLayer
from tests import tiny

#: Of layers in a row: some of each, and some of none.
MIXED: tuple[Bits | None, ...] = (8, 4, None)

WIDE: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.llama(hidden_size=96, intermediate_size=128),
    "gpt2": lambda: tiny.gpt2(n_embd=96),
    "bert": lambda: tiny.bert(hidden_size=96, intermediate_size=128),
    "t5": lambda: tiny.t5(d_model=96, d_ff=128, d_kv=24),
}
#: Their names as parameters of tests; the slowest one is marked.
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "t5" else ()) for kind in WIDE]


def with_bits(plan: Plan, bits: Sequence[Bits | None] = MIXED) -> Plan:
    """The plan with bits for one layer after the other, again and again; where they can be had."""
    layers = [
        entry.model_copy(update={"bits": _possible(entry, bits[number % len(bits)])})
        for number, entry in enumerate(plan.layers)
    ]
    saved = sum(x.layer.dense_cost * x.layer.itemsize - x.bytes_in(plan.form) for x in layers)
    size = {"model_bytes": plan.size.model_bytes_dense - saved}
    changed = {"layers": tuple(layers), "size": plan.size.model_copy(update=size)}
    # Checked as a plan from a file is.
    return Plan.model_validate(plan.model_copy(update=changed).model_dump())


def _possible(entry: PlannedLayer, bits: Bits | None) -> Bits | None:
    return bits if bits is not None and entry.layer.can_round(entry.rank, bits) else None


def prepared(
    model: Any, form: str = "pairs", bits: Sequence[Bits | None] = MIXED, keep: float = 0.85
) -> tuple[Profile, Plan]:
    """A profile of a wide model, and a plan with bits; some of its layers stay dense."""
    how: dict[str, Any] = {"form": form}
    profile = profile_model(model, tiny.batches(model), **how)
    return profile, with_bits(make_plan(profile, keep=keep, rank_multiple=32), bits)
