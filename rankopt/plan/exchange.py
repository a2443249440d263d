"""Ranks in the formats of other tools: a plan for them, and theirs for a profile.

    json     {"LAYER": rank or null}: null stays dense; also {"ranks": {...}}
    csv      layer, rank (empty: dense), parameters, retained; only the first two are read
    peft     adapter_config.json of a LoRA as wide as the ranks, layers that stay dense without one;
             read are ``r`` and ``rank_pattern`` of LoRA, EVA and AdaLoRA
    asvd     ASVD4LLM's config.json: "truncation_ranks": {"LAYER": rank}
    palu     Palu's config.json: "head_wise_ranks": {"LAYER": [rank of each group of heads]}, of
             keys and values only
    svdllm   {"ratio": {"LAYER": share}}: SVD-LLM's scripts keep floor(m n share / (m + n)) ranks of
             a matrix and take one share for all, which is read, too; one for each layer is passed
             to the same line

A tied matrix has its rank under each of its names. Plans of adapters (see lora) are written as
json, csv and peft; what has no adapter has rank 0 in the first two.
"""

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rankopt.errors import OptionError, PlanError, few
from rankopt.files import LORA_PLAN, PLAN
from rankopt.layers import Form, Layer
from rankopt.plan.lora import LoraPlan
from rankopt.plan.pins import Pins
from rankopt.plan.plan import Plan
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile
from rankopt.schema import first_of, parse

#: Member name -> its rank; None is dense.
Ranks = Mapping[str, int | None]

_OF_PALU = ("k_proj", "v_proj")


def export_ranks(plan: Plan | LoraPlan, kind: str) -> str:
    """What another tool reads, as text that ends with a line end.

    Raises:
        OptionError: an unknown kind, or a plan that the tool has no words for.
    """
    if kind not in _WRITERS:
        raise OptionError(f"unknown format {kind!r}; known: {', '.join(_WRITERS)}")
    if isinstance(plan, LoraPlan) and kind not in _OF_LORA:
        raise OptionError(
            f"{kind} has ranks of compressed layers, and this plan has those of adapters: give "
            f"one of {', '.join(_OF_LORA)}"
        )
    if isinstance(plan, Plan) and plan.bits:
        raise OptionError(
            "the plan rounds layers, and what is exported has ranks only: plan without bits"
        )
    found = _WRITERS[kind](plan)
    return found if isinstance(found, str) else json.dumps(found, indent=1) + "\n"


def import_ranks(text: str, layers: Sequence[Layer]) -> dict[str, int | None]:
    """The rank of every layer that a tool's file says, by what is in the file.

    Args:
        text: of the file.
        layers: whose ranks are wanted; those that the file does not name stay dense.

    Returns:
        Layer name -> rank, or None.

    Raises:
        PlanError: the file is of no known kind, has no rank of any of the layers, names layers that
            are none of them, or gives a group of tied ones several ranks.
    """
    members = {member: layer for layer in layers for member in layer.members}
    given = _read(text, members)
    # Tools name modules as they wrap them.
    found = {_inner(name, members): rank for name, rank in given.items()}
    unknown = [name for name in found if name not in members and found[name] is not None]
    if unknown or found.keys().isdisjoint(members):
        what = f"{len(unknown)} layers that are not planned ({few(unknown)})" if unknown else "none"
        raise PlanError(
            f"of the profile's {len(layers)} layers (the first is {layers[0].name}) the file has "
            f"{what}: give ranks of the same model, or profile these layers, too (--include)"
        )
    ranks: dict[str, int | None] = {}
    for layer in layers:
        said = {found.get(member) for member in layer.members}
        if len(said) > 1:
            raise PlanError(
                f"layer {layer.name}: {', '.join(layer.members)} share their weight and have "
                "several ranks in the file; give them one"
            )
        ranks[layer.name] = said.pop()
    return ranks


def imported_plan(
    profile: Profile,
    text: str,
    *,
    form: Form | None = None,
    backend: str | None = None,
    scale: str | None = None,
) -> Plan:
    """The plan that a tool's file stands for: every rank is given, none chosen.

    Args:
        profile: what every rank loses.
        text: of the file.
        form: how the matrices are kept; by default that of a plan of rankopt, and pairs, which
            other tools have.
        backend: see make_plan.
        scale: see make_plan.

    Raises:
        PlanError: see import_ranks.
        OptionError: a rank that is not on offer; see make_plan.
    """
    layers = profile.info.layers
    ranks = import_ranks(text, layers)
    if form is None:
        form = Plan.from_json(text).form if _is_plan(text) else "pairs"
    cost = sum(layer.cost(ranks[layer.name], form) for layer in layers)
    pins: Pins = {name: "dense" if rank is None else rank for name, rank in ranks.items()}
    return make_plan(profile, max_params=cost, pins=pins, form=form, backend=backend, scale=scale)


def _is_plan(text: str) -> bool:
    return text.lstrip().startswith("{") and parse(text).get("format") == PLAN


def _low(plan: Plan | LoraPlan) -> dict[str, int]:
    """Member -> rank of those that do not stay as they are."""
    return {
        member: entry.rank for entry in plan.layers if entry.rank for member in entry.layer.members
    }


def _json(plan: Plan | LoraPlan) -> dict[str, Any]:
    return {name: entry.rank for entry in plan.layers for name in entry.layer.members}


def _csv(plan: Plan | LoraPlan) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    column = "retained" if isinstance(plan, Plan) else "reached"
    writer.writerow(("layer", "rank", "parameters", column))
    for entry in plan.layers:
        for name in entry.layer.members:
            writer.writerow((name, entry.rank, entry.parameters, getattr(entry, column)))
    return file.getvalue()


def _peft(plan: Plan | LoraPlan) -> dict[str, Any]:
    """One pattern for each rank: PEFT compiles each pattern for each layer."""
    low = _low(plan)
    if not low:
        raise OptionError("every layer of the plan stays as it is: there is no LoRA without ranks")
    by_rank: defaultdict[int, list[str]] = defaultdict(list)
    for name, rank in low.items():
        by_rank[rank].append(re.escape(name))
    usual = max(by_rank, key=lambda rank: (len(by_rank[rank]), -rank))
    pattern = {f"^(?:{'|'.join(names)})$": rank for rank, names in by_rank.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        # The scale of every update is alpha / r = 1.
        "lora_alpha": usual,
        "target_modules": _targets(low, plan),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _targets(low: Mapping[str, int], plan: Plan | LoraPlan) -> list[str] | str:
    """Their names; a pattern, where names alone would hit others that end like them."""
    for entry in plan.layers:
        for name in entry.layer.members if not entry.rank else ():
            parts = name.split(".")
            if any(".".join(parts[k:]) in low for k in range(1, len(parts))):
                return f"(?:{'|'.join(map(re.escape, low))})"
    return list(low)


def _palu(plan: Plan) -> dict[str, Any]:
    low = _low(plan)
    ours = {name: [rank] for name, rank in low.items() if name.endswith(_OF_PALU)}
    if len(ours) < len(low) or not ours:
        other = [name for name in low if name not in ours]
        raise OptionError(
            "Palu makes keys and values of low rank only "
            f"({', '.join(_OF_PALU)}); the plan has {few(other) or 'neither'}: profile with "
            "--include '*.k_proj' '*.v_proj'"
        )
    return {"head_wise_ranks": ours}


def _svdllm(plan: Plan) -> dict[str, Any]:
    shapes = {
        member: (entry.layer.out_features, entry.layer.in_features)
        for entry in plan.layers
        for member in entry.layer.members
    }

    def share(name: str, rank: int) -> float:
        out, into = shapes[name]
        # Half a rank more, so that rounding down finds this one.
        return (rank + 0.5) * (out + into) / (out * into)

    return {"ratio": {name: share(name, rank) for name, rank in _low(plan).items()}}


_WRITERS: dict[str, Callable[[Any], "str | dict[str, Any]"]] = {
    "json": _json,
    "csv": _csv,
    "peft": _peft,
    "asvd": lambda plan: {"truncation_ranks": _low(plan)},
    "palu": _palu,
    "svdllm": _svdllm,
}
#: Formats by name.
KINDS = tuple(_WRITERS)
#: That take a plan of adapters, too.
_OF_LORA = ("json", "csv", "peft")


def _read(text: str, members: Mapping[str, Layer]) -> Ranks:
    if text.lstrip().startswith("{"):
        try:
            content = parse(text)
        except ValueError as error:
            raise PlanError(f"the file is not JSON ({error})") from error
        assert isinstance(content, dict)
        if content.get("format") == PLAN:
            return _json(Plan.from_json(text))
        if content.get("format") == LORA_PLAN:
            return _low(LoraPlan.from_json(text))
        for key, read in _READERS.items():
            if key in content:
                return read(content, members)
        return _whole(content)
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"layer", "rank"} <= rows[0].keys():
        raise PlanError(
            f"the file is neither JSON nor CSV with the columns layer and rank; known are "
            f"{', '.join(KINDS)}"
        )
    given = [row["layer"] for row in rows]
    if len(set(given)) < len(given):
        raise PlanError(f"layer {Counter(given).most_common(1)[0][0]} has two rows")
    return _whole({row["layer"]: _number(row["rank"]) for row in rows})


def _number(text: str | None) -> Any:
    """Of a cell of a table."""
    plain = (text or "").strip()
    if plain in ("", "dense"):
        return None
    return int(plain) if plain.isdecimal() else plain


def _whole(given: Any) -> dict[str, int | None]:
    """Check ranks that a file has as they are.

    Raises:
        PlanError: something else than a whole number of 1 or more, or nothing.
    """
    for name, rank in _mapping(given).items():
        fine = rank is None or (type(rank) is int and rank >= 1)
        if not fine:
            raise PlanError(f"layer {name}: a rank of 1 or more, or none for dense, not {rank!r}")
    return dict(given)


def _mapping(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise PlanError(f"ranks are {{layer: rank}}, not {given!s:.60}")
    return given


def _from_palu(content: Mapping[str, Any], members: Mapping[str, Layer]) -> Ranks:
    """One rank for the matrix, that has at most the parameters of its groups of heads."""
    found: dict[str, int | None] = {}
    for name, ranks in _mapping(content["head_wise_ranks"]).items():
        if not isinstance(ranks, list) or not ranks:
            raise PlanError(f"layer {name}: Palu has a list of ranks, not {ranks!s:.60}")
        groups = {f"{name}, group {number}": rank for number, rank in enumerate(ranks)}
        whole = sum(rank or 0 for rank in _whole(groups).values())
        layer = members.get(_inner(name, members))
        if layer is None or len(ranks) == 1:
            found[name] = whole
            continue
        rows, columns = layer.out_features, layer.in_features
        spent = whole * columns + whole * rows / len(ranks)
        found[name] = math.floor(spent / (rows + columns))
    return _whole(found)


def _from_svdllm(content: Mapping[str, Any], members: Mapping[str, Layer]) -> Ranks:
    given = content["ratio"]
    shares = given if isinstance(given, dict) else dict.fromkeys(members, given)
    found: dict[str, int | None] = {}
    for name, share in shares.items():
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0.0 < share <= 1.0:
            raise PlanError(f"layer {name}: a share between 0 and 1 is kept, not {share!r}")
        layer = members.get(_inner(name, members))
        if layer is None:
            found[name] = 1
            continue
        out, into = layer.out_features, layer.in_features
        found[name] = max(1, int(out * into * share / (out + into)))
    return found


class _Adapter(BaseModel):
    """What is read of PEFT's adapter_config.json."""

    model_config = ConfigDict(strict=True)

    r: int | None = None
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int | list[bool]] | None = None


def _from_peft(content: Mapping[str, Any], members: Mapping[str, Layer]) -> Ranks:
    """The width of each layer's adapter; AdaLoRA has a list of what was kept of it."""
    try:
        adapter = _Adapter.model_validate(content)
    except ValidationError as error:
        raise PlanError(f"an adapter's configuration: {first_of(error)}") from error
    pattern: dict[str, int] = {}
    for key, rank in (adapter.rank_pattern or {}).items():
        name = _inner(re.sub(r"\.lora_[AE]$", "", key), members)
        pattern[name] = sum(rank) if isinstance(rank, list) else rank
    try:
        # As PEFT matches them: whole names, or their ends.
        matches = [(re.compile(rf"(.*\.)?({key})$"), rank) for key, rank in pattern.items()]
        targeted = [name for name in members if _targeted(name, adapter.target_modules)]
    except re.error as error:
        raise PlanError(f"{error.pattern!r} is no regular expression: {error}") from error
    found: dict[str, int | None] = {}
    for name in targeted:
        # EVA writes names: that is found without trying thousands of patterns for each of them.
        own = pattern.get(name)
        if own is None:
            own = next((rank for key, rank in matches if key.match(name)), adapter.r)
        found[name] = own or None
    return _whole(found)


def _targeted(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in targets or ())


def _inner(name: str, members: Mapping[str, Layer]) -> str:
    """The name without what a tool wraps models in."""
    if name in members:
        return name
    return name.removeprefix("base_model.model.").removeprefix("_orig_mod.")


#: What a file has in it -> how it is read; the first that is there.
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Layer]], Ranks]] = {
    "peft_type": _from_peft,
    "head_wise_ranks": _from_palu,
    "truncation_ranks": lambda content, members: _whole(content["truncation_ranks"]),
    "ratio": _from_svdllm,
    "ranks": lambda content, members: _whole(content["ranks"]),
}
