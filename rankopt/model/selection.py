"""Which matrices of a model are planned, and which are left alone and why.

Planned by default are plain ``nn.Linear`` and GPT-2's ``Conv1D`` inside the transformer blocks,
that is below an ``nn.ModuleList``: every transformers architecture keeps its repeated blocks in
one (see matrices for what else is a block). A model that has none there has no such blocks, and all
its plain ``nn.Linear`` are planned.
On request anything plain is, embeddings included.
"""

import dataclasses
import difflib
import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from rankopt.errors import ModelError, few
from rankopt.layers import Layer, LeftAlone
from rankopt.model.lowrank import LowRank
from rankopt.model.matrices import Matrix, matrices_of
from rankopt.model.weights import numel_of, weight_of

_SAMPLE = 64


@dataclasses.dataclass(frozen=True)
class Selection:
    """The planned layers of a model, their modules, and the rest.

    Attributes:
        layers: planned, in the order of ``named_modules``.
        modules: name -> module, of all members of the layers.
        left_alone: other modules with matrices.
    """

    layers: tuple[Layer, ...]
    modules: dict[str, nn.Module]
    left_alone: tuple[LeftAlone, ...]

    def without(self, reasons: Mapping[str, str]) -> "Selection":
        """The same, but for layers with a member that is named here, by the reason why.

        Raises:
            ModelError: nothing to plan is left.
        """
        gone = {
            member: next(reasons[name] for name in layer.members if name in reasons)
            for layer in self.layers
            for member in layer.members
            if not reasons.keys().isdisjoint(layer.members)
        }
        if not gone:
            return self
        found = Selection(
            tuple(layer for layer in self.layers if layer.name not in gone),
            {name: module for name, module in self.modules.items() if name not in gone},
            self.left_alone
            + tuple(_left_alone(name, self.modules[name], why) for name, why in gone.items()),
        )
        if not found.layers:
            why = "; ".join(dict.fromkeys(gone.values()))
            raise ModelError(f"nothing to plan is left: {few(gone)}: {why}")
        return found


def find_layers(
    model: nn.Module,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    untie: bool = False,
) -> Selection:
    """List what can be planned.

    Args:
        model: not wrapped (see unwrapped).
        include: patterns of module names (``*.q_proj``, ``lm_head``) that replace the default
            choice; they may name embeddings, heads and poolers.
        exclude: patterns of module names to leave alone.
        untie: let a head and an embedding that share a weight be planned, as one group of two
            matrices that share nothing any more.

    Raises:
        ModelError: weights not loaded or not finite, a plan already applied, a pattern without
            anything to plan, or nothing to plan at all.
    """
    _require_plain(model)
    matrices = matrices_of(model)
    chosen = [name for name, matrix in matrices.items() if matrix.default]
    patterns = _patterns(include)
    if patterns:
        chosen = [n for pattern in patterns for n in _included(pattern, matrices, untie)]
    out = {n for pattern in _patterns(exclude) for n in _matching(pattern, matrices)}
    left_out = [n for n in chosen if out & {n, *matrices[n].pair}]
    chosen = [n for n in chosen if n not in left_out]
    tied = [name for name, matrix in matrices.items() if matrix.pair]
    if untie and tied and not set(tied) & set(chosen):
        raise ModelError(f"untie: none of {', '.join(tied)} is included: include one of them")
    found = _found(matrices, chosen, left_out)
    if not found.layers:
        raise ModelError(f"{type(model).__name__} has nothing to plan: {_nothing(found)}")
    return found


def find_planned(model: nn.Module, layers: Sequence[Layer]) -> Selection:
    """Those of the layers that a model has, whatever selected them.

    ``left_alone`` has the reason NOT_SELECTED for what would be planned by default and is none of
    the layers.

    Raises:
        ModelError: weights not loaded or not finite, or a plan already applied.
    """
    _require_plain(model)
    matrices = matrices_of(model)
    wanted = {layer.name: layer.partners for layer in layers if layer.name in matrices}
    # A tied weight is no layer of its own, and an untied one no group: neither is what was planned.
    chosen = [
        name
        for name, partners in wanted.items()
        if matrices[name].skip_reason(True) is None and matrices[name].pair[1:] == partners
    ]
    return _found(matrices, chosen, ())


def _require_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("._orig_mod"):
            own = name.removesuffix("._orig_mod")
            raise ModelError(
                f"module {own} is wrapped by torch.compile, which renames its layers: compile it "
                "in place, module.compile(), or the whole model"
            )
        if isinstance(module, LowRank):
            raise ModelError(f"layer {name} is low rank already: use the dense model")
        _require_no_adapter(model, name, module)


def require_no_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of PEFT, which are no part of its weights.

    Raises:
        ModelError: names the first, and what to do.
    """
    for name, module in model.named_modules():
        _require_no_adapter(model, name, module)


def _require_no_adapter(model: nn.Module, name: str, module: nn.Module) -> None:
    if not type(module).__module__.startswith("peft."):
        return
    what = f"layer {name} has" if name else "the model has"
    remedy = "merge it into the weights first, model = model.merge_and_unload()"
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if prompts:
        remedy = "a prompt is no weight: profile model.get_base_model()"
    elif not hasattr(model, "merge_and_unload"):
        remedy += " of the peft.PeftModel"
    raise ModelError(f"{what} an adapter ({type(module).__name__}): {remedy}")


def _patterns(given: Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _matching(pattern: str, matrices: dict[str, Matrix]) -> list[str]:
    hits = [name for name in matrices if fnmatch.fnmatchcase(name, pattern)]
    if not hits:
        tails = {".".join(name.split(".")[-k:]): name for name in matrices for k in (1, 2)}
        close = difflib.get_close_matches(pattern.strip("*."), [*matrices, *tails], 3)
        meant = list(dict.fromkeys(x if x in matrices else f"*.{x}" for x in close))
        hint = f"did you mean {' or '.join(meant)}?" if meant else "there are " + few(matrices)
        raise ModelError(f"no module with a matrix is called {pattern!r}; {hint}")
    return hits


def _included(pattern: str, matrices: dict[str, Matrix], untie: bool) -> list[str]:
    hits = _matching(pattern, matrices)
    usable = [name for name in hits if matrices[name].skip_reason(untie) is None]
    if not usable:
        first = hits[0]
        more = f" (and {len(hits) - 1} more)" if len(hits) > 1 else ""
        raise ModelError(f"{first} cannot be planned: {matrices[first].skip_reason(untie)}{more}")
    # Of a pair it is the head that stands for both.
    return [(matrices[name].pair or (name,))[0] for name in usable]


def _nothing(found: Selection) -> str:
    if not found.left_alone:
        return "it has no plain nn.Linear or Conv1D"
    reasons = Counter(entry.reason for entry in found.left_alone)
    return "; ".join(f"{reason} ({n} modules)" for reason, n in reasons.most_common(3))


def _found(
    matrices: dict[str, Matrix], chosen: Collection[str], left_out: Collection[str]
) -> Selection:
    layers: list[Layer] = []
    modules: dict[str, nn.Module] = {}
    for name, matrix in matrices.items():
        if name in chosen:
            layer = _describe(name, matrix)
            layers.append(layer)
            modules |= {member: matrices[member].module for member in layer.members}
    left_alone = [
        _left_alone(name, matrix.module, "excluded" if name in left_out else matrix.reason())
        for name, matrix in matrices.items()
        if name not in modules
    ]
    return Selection(tuple(layers), modules, tuple(left_alone))


def _left_alone(name: str, module: nn.Module, reason: str) -> LeftAlone:
    """What computes a weight counts as the module's own."""
    own = module.parameters(recurse=parametrize.is_parametrized(module))
    return LeftAlone(
        name=name,
        module=type(module).__name__,
        parameters=sum(map(numel_of, own)),
        reason=reason,
    )


def _describe(name: str, matrix: Matrix) -> Layer:
    weight = weight_of(matrix.module)
    if weight.is_meta:
        raise ModelError(f"layer {name}: its weights are not loaded (meta device)")
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"layer {name}: its weights hold NaN or infinite values")
    stride = max(weight.numel() // _SAMPLE, 1)
    sample = weight.reshape(-1)[::stride][:_SAMPLE].float().cpu().numpy()
    return Layer(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        kind=re.split(r"(?:^|\.)\d+\.", name)[-1],
        itemsize=weight.element_size(),
        digest=hashlib.sha256(sample.tobytes()).hexdigest()[:16],
        partners=matrix.pair[1:],
    )
