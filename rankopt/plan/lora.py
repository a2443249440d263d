"""LoRA ranks: which layers deserve wider adapters, under a budget of trainable parameters.

LoRA (Hu et al., ICLR 2022, section 4.1) adds B A to a frozen weight W (out, in), B (out, r) and
A (r, in): r (out + in) parameters are trained, none at rank 0. What a rank gains is not what
truncating W to it would keep, but the same numbers say it. With G = E[gg^T] of the output gradients
and C = E[xx^T] of the inputs, the Kronecker-factored Fisher information (see backends.kronecker) of
a change D of W is tr(G D C D^T). The directions that a truncation keeps, W = sum_k s_k u_k v_k^T
with G^(1/2) W C^(1/2) = U S V^T, do not mix in it, and so the Fisher information of the *relative*
size of the k-th, d W = e u_k v_k^T s_k, is

    F_k = s_k^2,    R(r) = F_1 + ... + F_r = loss(0) - loss(r):

the energies of the loss curve, of whatever backend. R(r) is how much the model's prediction
responds to rescaling the r directions of the layer that it responds to most. An adapter of rank r
can turn r directions; those are offered for their price,

    maximise sum_l w_l R_l(r_l)    subject to    sum_l r_l (out_l + in_l) <= budget,

with w_l = 1 (``total``), or 1 / R_l(full), each layer's own share (``layerwise``), as EVA (Paischer
et al., 2024, arXiv 2410.07170, section 3.2) does with the variance of inputs, whatever the layers
cost. Curves are concave, but parameters are whole: the exact solver proves its optimum. It is a
heuristic in so far as it knows the model's Fisher information before the adapters learn, and in
experiments/19_lora neither objective is better than one rank for all beyond chance.

Every update is scaled by alpha / r = 1: the alpha that is exported is the layer's rank.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, Field, model_validator

from rankopt._version import __version__
from rankopt.errors import BudgetError, OptionError, PlanError, ProfileError, printable, require_a
from rankopt.files import LORA_PLAN, is_format, whole_file
from rankopt.layers import FloatArray, IntArray, Layer
from rankopt.plan.budget import whole_number
from rankopt.plan.plan import Certificate, text_of
from rankopt.plan.planner import solved
from rankopt.profile.profile import Profile
from rankopt.schema import STRICT, Count, Number, Share, read_versioned
from rankopt_solvers import Group, Problem, margins
from rankopt_solvers.registry import Solver

FORMAT_VERSION = 1

#: ``total``: largest sum of Fisher information. ``layerwise``: largest sum of each layer's share.
LoraObjective = Literal["total", "layerwise"]


class AdaptedLayer(BaseModel):
    """What a layer gets.

    Attributes:
        layer: the matrix, and the modules that share it, each of which gets an adapter of its own.
        rank: of the adapter; 0 is none.
        parameters: that are trained, in all modules together.
        reached: share of the layer's own Fisher information in the directions that the rank offers.
        margin: how sure the rank is: what the layer's next-best rank would lose more, at the
            certificate's price of a parameter and in its unit. Null where there is no other rank.
    """

    model_config = STRICT

    layer: Layer
    rank: Count
    parameters: Count
    reached: Share
    margin: Number | None = None


class LoraPlan(BaseModel):
    """The rank of every layer's adapter, and the proof.

    Attributes:
        format: always ``rankopt-lora-plan``.
        format_version: of the file.
        rankopt: version that made it.
        backend: whose loss curves were used.
        scale: how the layers were compared; the backend's name for it.
        solver: who chose.
        objective: what was maximised.
        rank_multiple: ranks are multiples of it.
        max_rank: no rank is larger, if that was asked for.
        budget: of trainable parameters.
        parameters: trained by the adapters.
        certificate: how good the choice provably is; its loss is what is not reached.
        reached_total: share of the Fisher information of all layers together.
        architecture: class of the model.
        fingerprint: of the model.
        profile_digest: of the profile.
        layers: the ranks.
    """

    model_config = STRICT

    format: Literal["rankopt-lora-plan"] = "rankopt-lora-plan"
    format_version: Literal[1] = 1
    rankopt: str
    backend: str
    scale: str
    solver: str
    objective: LoraObjective
    rank_multiple: Annotated[int, Field(ge=1)]
    max_rank: Annotated[int, Field(ge=1)] | None = None
    budget: Annotated[int, Field(ge=1)]
    parameters: Count
    certificate: Certificate
    reached_total: Share
    architecture: str
    fingerprint: str
    profile_digest: str
    layers: Annotated[tuple[AdaptedLayer, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "LoraPlan":
        names = [member for entry in self.layers for member in entry.layer.members]
        if len(set(names)) != len(names):
            raise ValueError("a layer is planned twice")
        for entry in self.layers:
            name, most = entry.layer.name, entry.layer.largest_rank()
            if entry.rank > (most if self.max_rank is None else min(most, self.max_rank)):
                raise ValueError(f"layer {name}: rank {entry.rank} is larger than is offered")
            if entry.rank % self.rank_multiple:
                raise ValueError(f"layer {name}: rank is not a multiple as claimed")
            if entry.parameters != entry.layer.cost(entry.rank):
                raise ValueError(
                    f"layer {name}: rank {entry.rank} has {entry.layer.cost(entry.rank)} "
                    f"parameters, not {entry.parameters}"
                )
        spent = sum(entry.parameters for entry in self.layers)
        if spent != self.parameters:
            raise ValueError(f"the layers have {spent} parameters, not {self.parameters}")
        if spent > self.budget:
            raise ValueError(f"the layers have {spent} parameters, over the budget")
        return self

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank of its adapter; 0 is none."""
        return {entry.layer.name: entry.rank for entry in self.layers}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a reader never sees half of it.

        Raises:
            RankoptError: something is there that is no LoRA plan, or the system refuses.
        """
        with whole_file(path, is_format(LORA_PLAN)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoraPlan":
        """Read and check a LoRA plan.

        Raises:
            PlanError: missing, not JSON, of another version, or inconsistent.
        """
        text = text_of(path, "no LoRA plan at {}: make one with `rankopt plan --for lora`")
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> "LoraPlan":
        """Parse a LoRA plan's JSON; ``source`` is named in errors."""
        return read_versioned(
            cls, text, source, "a LoRA plan", LORA_PLAN, FORMAT_VERSION, PlanError
        )

    def __str__(self) -> str:
        proof, ranks = self.certificate, sorted(entry.rank for entry in self.layers)
        adapted = sum(rank > 0 for rank in ranks)
        lines = [
            f"{self.solver} LoRA plan, objective {self.objective}, backend {self.backend}",
            f"  adapters        {self.parameters:,} trainable parameters (budget {self.budget:,})",
            f"  reached Fisher  {self.reached_total:.4%} in total",
            f"  loss            {proof.loss:.6g} {proof.unit}, at least {proof.bound:.6g} "
            f"(gap {proof.gap:.2g}, {proof.status})",
            f"  layers          {len(ranks)}: {adapted} adapted, {len(ranks) - adapted} not; ranks "
            f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}",
        ]
        return "\n".join(map(printable, lines))


def make_lora_plan(
    profile: Profile,
    *,
    max_params: int | None = None,
    like_rank: int | None = None,
    solver: str | Solver = "exact",
    objective: LoraObjective = "total",
    rank_multiple: int = 1,
    max_rank: int | None = None,
    backend: str | None = None,
    scale: str | None = None,
    **options: Any,
) -> LoraPlan:
    """Decide the rank of every layer's adapter; see the module's text.

    Args:
        profile: of the model that is to be adapted, best on data of the new task.
        max_params: budget of trainable parameters, of the adapters alone.
        like_rank: the same as what this rank costs on every layer.
        solver: a solver of rankopt_solvers, or what its ``solve`` takes.
        objective: ``total`` or ``layerwise``.
        rank_multiple: offer only multiples of it (and 0).
        max_rank: offer none that is larger. In any case none that costs as much as the dense
            matrix.
        backend: whose loss curves to use; by default the profile's first.
        scale: how layers compare under ``total``, one of the backend's; by default its first.
        options: passed to the solver, ``time_limit`` for ``exact`` and ``knapsack``.

    Raises:
        BudgetError: no or two budgets, or one below 1.
        OptionError: an unknown solver, objective or scale, an option that the solver does not take,
            or no rank on offer that the budget allows.
        ProfileError: the profile lacks the backend, or is none.
    """
    require_a(Profile, profile, ProfileError, "read it with rankopt.Profile.load")
    layers = profile.info.layers
    if objective not in get_args(LoraObjective):
        known = ", ".join(get_args(LoraObjective))
        raise OptionError(f"unknown objective {objective!r} of adapters; known: {known}")
    multiple = whole_number("rank_multiple", rank_multiple, OptionError)
    largest = None if max_rank is None else whole_number("max_rank", max_rank, OptionError)
    budget = _budget(layers, max_params, like_rank)
    measured = profile.backend(backend)
    compared = measured.find_scale(scale)
    ranks: list[IntArray] = []
    shares: list[FloatArray] = []
    weights: list[float] = []
    for layer, factor in zip(layers, compared.factors, strict=True):
        curve = profile.loss_curve(measured.name, layer.name, compared.name)
        most = min(layer.largest_rank(), budget // layer.cost(1))
        if largest is not None:
            most = min(most, largest)
        offered = curve.ranks[(curve.ranks <= most) & (curve.ranks % multiple == 0)]
        ranks.append(offered)
        lost = curve.at(offered)
        # A layer without any Fisher information gains nothing at any rank.
        shares.append(lost / curve.full if curve.full > 0 else np.zeros_like(lost))
        full = curve.full * factor
        weights.append(full if objective == "total" else float(curve.full > 0))
    if all(offered.size == 1 for offered in ranks):
        cheapest = min(layer.cost(multiple) for layer in layers)
        within = "" if largest is None else f"max_rank={largest} and "
        raise OptionError(
            f"no layer can be given an adapter: of the ranks that {measured.name} was measured at, "
            f"none is a multiple of rank_multiple={multiple} and within {within}the "
            f"budget of {budget:,} parameters; the smallest adapter has {cheapest:,}"
        )
    groups = tuple(
        Group(layer.name, layer.costs(offered), weight * share)
        for layer, offered, weight, share in zip(layers, ranks, weights, shares, strict=True)
    )
    problem = Problem(groups, budget)
    solution = solved(problem, solver, options)
    chosen = [int(offered[j]) for offered, j in zip(ranks, solution.choice, strict=True)]
    reached = [1.0 - float(share[j]) for share, j in zip(shares, solution.choice, strict=True)]
    whole = math.fsum(weights)
    gained = math.fsum(weight * share for weight, share in zip(weights, reached, strict=True))
    return LoraPlan(
        rankopt=__version__,
        backend=measured.name,
        scale=compared.name,
        solver=solution.solver,
        objective=objective,
        rank_multiple=multiple,
        max_rank=largest,
        budget=budget,
        parameters=solution.cost,
        certificate=Certificate(
            loss=solution.loss,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            unit=compared.unit if objective == "total" else "shares of a layer's Fisher",
            multiplier=solution.multiplier,
        ),
        reached_total=min(gained / whole, 1.0) if whole > 0 else 1.0,
        architecture=profile.info.architecture,
        fingerprint=profile.info.fingerprint,
        profile_digest=profile.digest(),
        layers=tuple(
            AdaptedLayer(
                layer=layer,
                rank=rank,
                parameters=layer.cost(rank),
                reached=share,
                margin=margin if math.isfinite(margin) else None,
            )
            for layer, rank, share, margin in zip(
                layers, chosen, reached, margins(problem, solution), strict=True
            )
        ),
    )


def _budget(layers: Sequence[Layer], max_params: int | None, like_rank: int | None) -> int:
    if (max_params is None) == (like_rank is None):
        given = "none" if max_params is None else "both"
        raise BudgetError(f"give one budget of adapters, max_params or like_rank, not {given}")
    if like_rank is None:
        return whole_number("max_params", max_params)
    rank = whole_number("like_rank", like_rank)
    return sum(layer.cost(rank) for layer in layers)
