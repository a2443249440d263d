"""Apply a plan: replace layers by low-rank or rounded ones, all or nothing."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankopt.apply.marking import attach, detach, require_unquantised
from rankopt.apply.surgery import low_rank, replace, round_factors, rounded_linear
from rankopt.backends import find_backend
from rankopt.backends.base import Backend, recomputable
from rankopt.backends.statistics import Statistics
from rankopt.errors import ModelError, OptionError, PlanError, few, require_a
from rankopt.layers import Bits
from rankopt.model.lowrank import LowRank
from rankopt.model.matrices import NOT_SELECTED
from rankopt.model.rounding import require_roundable
from rankopt.model.selection import Selection, find_planned
from rankopt.model.weights import tensor_of, unwrapped, weight_of
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.progress import bar

#: (backend, layer or partner) -> arrays from which the backend makes factors of any rank.
FactorCache = MutableMapping[tuple[str, str], Mapping[str, Tensor]]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    *,
    allow_other_weights: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Replace the planned layers by low-rank ones, in place, and round what the plan says.

    All factors are computed before the first layer is replaced: an error leaves the model whole.
    Rounded are the factors of a layer, or the weight of one that stays dense, by torchao; a Conv1D
    becomes an nn.Linear. Rounded weights do not learn.

    Args:
        model: the dense model that was profiled; compiled by torch.compile it may be.
        plan: made from the profile.
        profile: for the Fisher information that weights the factorisation.
        allow_other_weights: accept a model of the same layers whose weights differ (fine-tuned
            since, say); the profile's Fisher information is then used on the model's own weights.
            Of backends that need more than it (kronecker, whitened), the directions that were best
            for the profiled weights are kept of the others: near the best if those moved little.
        progress: a bar on stderr; by default if it is a terminal.

    Returns:
        The same model object; ``save_pretrained`` and ``rankopt.save_model`` write it reloadably.

    Raises:
        PlanError: the plan is of another profile, or of another model; names the first layers that
            differ.
        ModelError: the model cannot be factorised (already low rank, quantised, not loaded), or a
            layer not rounded.
        MissingExtraError: the plan rounds weights, and torchao is not installed.
        OptionError: the plan's backend is not installed, and was not named in this process.
    """
    inner = unwrapped(model)
    if any(isinstance(each, nn.parallel.DistributedDataParallel) for each in model.modules()):
        raise ModelError(
            "DDP would go on averaging the dense weights' gradients: apply the plan to "
            "model.module and wrap that again"
        )
    replacements = _replacements(inner, plan, profile, allow_other_weights, None, progress)
    replace(inner, replacements)
    attach(inner, plan)
    return model


@contextmanager
def applied(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    cache: FactorCache | None = None,
    *,
    progress: bool | None = None,
) -> Iterator[nn.Module]:
    """The model under a plan inside the ``with``, the dense model again after it.

    Args:
        model: the dense model that was profiled.
        plan: made from the profile.
        profile: see apply_plan.
        cache: pass one dictionary to several calls to decompose every layer only once.
        progress: a bar on stderr; by default if it is a terminal.
    """
    inner = unwrapped(model)
    replacements = _replacements(inner, plan, profile, False, cache, progress)
    dense = replace(inner, replacements)
    ties = attach(inner, plan)
    try:
        yield model
    finally:
        replace(inner, dense)
        detach(inner, ties)


def _replacements(
    model: nn.Module,
    plan: Plan,
    profile: Profile,
    allow_other_weights: bool,
    cache: FactorCache | None,
    progress: bool | None,
) -> dict[str, nn.Module]:
    subject = Planned.of(model, plan, profile, allow_other_weights)
    replacements: dict[str, nn.Module] = {}
    made: FactorCache = {} if cache is None else cache
    for name in bar(subject.ranks, "Factors", "layer", progress):
        key = (plan.backend, name)
        kept = made[key] if key in made else subject.kept(name)
        if cache is not None:
            cache[key] = kept
        replacements[name] = subject.low_rank(name, kept)
    return replacements | {name: subject.rounded(name) for name in subject.only_rounded}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan and the model that it is for, which has been held against each other.

    Attributes:
        plan: that is applied.
        profile: that it was made from.
        modules: layer or partner -> the dense module.
        ranks: likewise -> its rank, of those that do not stay dense.
        largest: likewise -> the largest rank that its profile offers.
        bits: layer -> what its weights are rounded to, of those that are.
        backend: the plan's.
        same: whether the weights are those that were profiled.
    """

    plan: Plan
    profile: Profile
    modules: Mapping[str, nn.Module]
    ranks: Mapping[str, int]
    largest: Mapping[str, int]
    bits: Mapping[str, Bits]
    backend: Backend
    same: bool

    @classmethod
    def of(
        cls, model: nn.Module, plan: Plan, profile: Profile, allow_other_weights: bool
    ) -> "Planned":
        """Of a model that is as apply_plan wants it; see there for the errors."""
        require_a(Plan, plan, PlanError, "read it with rankopt.Plan.load")
        require_a(Profile, profile, PlanError, "read it with rankopt.Profile.load")
        if plan.profile_digest != profile.digest():
            raise PlanError(
                "the plan was made from another profile: give the profile that it was made from, "
                "or plan again"
            )
        found = find_planned(model, [entry.layer for entry in plan.layers])
        require_unquantised(model)
        known = {entry.name for entry in profile.info.left_alone}
        _require_same(found, plan, allow_other_weights, known)
        bits = plan.bits
        for name in bits:
            require_roundable(name, found.modules[name], "a plan that rounds weights")
        layers = {layer.name: layer for layer in found.layers}
        low = [entry for entry in plan.layers if entry.rank is not None]
        return cls(
            plan,
            profile,
            found.modules,
            {member: entry.rank or 0 for entry in low for member in entry.layer.members},
            {
                member: entry.layer.largest_rank(profile.info.form)
                for entry in low
                for member in entry.layer.members
            },
            bits,
            backend_of(plan, profile),
            all(e.layer.digest == layers[e.layer.name].digest for e in plan.layers),
        )

    @property
    def only_rounded(self) -> list[str]:
        """Layers that are rounded and stay dense."""
        return [name for name in self.bits if name not in self.ranks]

    def rounded(self, name: str) -> nn.Linear:
        """The module to stand in the place of one that is rounded and stays dense."""
        return rounded_linear(self.modules[name], self.bits[name])

    def is_stored(self, member: str) -> bool:
        """Whether the profile has what its factors need, and for these weights."""
        stored = self.profile.kept(self.plan.backend, member)
        return bool(stored) and (self.same or not recomputable(self.backend))

    @torch.no_grad()
    def kept(self, member: str) -> Mapping[str, Tensor]:
        """What the backend's factors need: from the profile, or decomposed again."""
        weight = weight_of(self.modules[member])
        name, backend, profile = self.plan.backend, self.backend, self.profile
        if self.is_stored(member):
            stored = profile.kept(name, member)
            # Arrays that are mapped from disk cannot be written, which torch does not know.
            own = {k: a if a.flags.writeable else a.copy() for k, a in stored.items()}
            return {kind: torch.from_numpy(array).to(weight.device) for kind, array in own.items()}
        if not recomputable(backend):
            raise PlanError(
                f"layer {member}: the profile was saved without what it needs, and {name} cannot "
                "decompose it again without the data: profile this model"
            )
        columns = profile.fisher_columns.get(member)
        statistics = Statistics(
            profile.units,
            torch.from_numpy(profile.fisher_rows[member]).to(weight.device),
            None if columns is None else torch.from_numpy(columns).to(weight.device),
        )
        return backend.decompose(weight, statistics, self.largest[member]).kept

    @torch.no_grad()
    def low_rank(self, member: str, kept: Mapping[str, Tensor]) -> LowRank:
        """The module to stand in a dense one's place, from what its factors need."""
        module = self.modules[member]
        bias = getattr(module, "bias", None)
        if bias is not None and bias.is_meta:
            bias = tensor_of(module, "bias")
        up, down = self.backend.factors(weight_of(module), kept, self.ranks[member])
        low = low_rank(module, down, up, bias, self.plan.form)
        if member in self.bits:
            round_factors(low, self.bits[member])
        return low


def backend_of(plan: Plan, profile: Profile) -> Backend:
    """The plan's backend, which must be there before a model is loaded for it.

    Raises:
        OptionError: it is not found; says where the profile's came from.
        ProfileError: the profile has no such backend.
    """
    name = plan.backend
    try:
        return find_backend(name)
    except OptionError as error:
        where = profile.backend(name).loaded_from
        if where is None:
            raise
        raise OptionError(
            f"the profile's backend {name!r} was {where}, which is not loaded because a file says "
            f"so: name it, with rankopt.backends.find_backend({where!r}) before, or --backend "
            f"{where} on the command line; or install it under the entry point group "
            f"rankopt.backends ({error})"
        ) from error


def _require_same(
    found: Selection, plan: Plan, allow_other_weights: bool, known: Collection[str]
) -> None:
    """Refuse a model whose layers are not the plan's; ``known`` are those that it leaves alone."""
    have = {layer.name: layer for layer in found.layers}
    reasons = {entry.name: entry.reason for entry in found.left_alone}
    differences: list[str] = []
    other_weights: list[str] = []
    for entry in plan.layers:
        want, got = entry.layer, have.get(entry.layer.name)
        if got is None and want.name not in reasons:
            differences.append(f"{want.name} is missing")
        elif got is None and want.partners:
            differences.append(f"{want.name} is not tied to {', '.join(want.partners)} as planned")
        elif got is None:
            differences.append(f"{want.name} cannot be planned ({reasons[want.name]})")
        elif (got.out_features, got.in_features) != (want.out_features, want.in_features):
            differences.append(
                f"{want.name} is {got.out_features} x {got.in_features}, planned "
                f"{want.out_features} x {want.in_features}"
            )
        elif got.digest != want.digest and not allow_other_weights:
            other_weights.append(f"{want.name} has other weights")
    # Another structure explains other weights, not the other way round: it is named first.
    more_layers = [n for n, why in reasons.items() if why == NOT_SELECTED and n not in known]
    differences += [f"{name} is not in the plan" for name in more_layers] + other_weights
    if differences:
        raise PlanError(
            f"the plan is for another model ({plan.architecture}): {few(differences, between='; ')}"
        )
