"""Layer after layer in closed form, each given what the compressed ones before it make of the data.

With X' what a layer of the compressed model is given, X the dense one's inputs on the same data,

    S = X' X'^T = R R^T,   C = (1 - beta) X' X'^T + beta X X'^T,
    [U, Sigma, V] = SVD_r(W C R^-T),   up = U,   down = Sigma V^T R^-1

minimises ||W X - W' X'||^2 over rank r for beta = 1, anchored to the dense outputs, and
||W X' - W' X'||^2 for beta = 0, which only follows the shift (AA-SVD, Sinha & Fleuret, arXiv
2604.02119; MPIFA and SAES-SVD take a beta between them).

Our completion, where the papers say less:

- Ridge: lambda, a share of S's mean diagonal, is added to the diagonals of S and of C, so that it
  pulls towards W and not to zero: ||W X - W' X'||^2 + lambda ||W - W'||^2 for beta = 1. At full
  rank an unchanged prefix gives W back. (MPIFA's ridge pulls there too, with a larger lambda.)
- Layers that are given the same tensor (query, key, value) have the same moments and are replaced
  together. Positions of padding are in no moment. The bias stays what it is.

Left out: the refinement of whole blocks that AA-SVD has after it (see rankopt.refinement.blocks),
and a beta for each layer.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from calibration import (
    RIDGE,
    Factors,
    layout_of,
    linear,
    positions,
    prepared,
    put,
    ridge_of,
    root_of,
    watched,
)
from torch import Tensor, nn

from rankopt.errors import ModelError
from rankopt.layers import Form
from rankopt.measure.layout import Layout
from rankopt.model.tasks import Batch, in_eval
from rankopt.model.weights import weight_of
from rankopt.refinement.activations import Activations
from rankopt.refinement.walk import Walk, repeated


def anchored(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Any],
    ranks: Mapping[str, int | None],
    form: Form,
    beta: float,
    ridge: float = RIDGE,
) -> None:
    """Replace layers one after the other, in place, each given what those before it make.

    In memory are the moments of one input and, by batch, what goes into and out of one block of
    either model (beyond 2 GiB on disk). An error leaves the model compressed in part.

    Args:
        model: a copy of the dense one.
        dense: left as it was.
        batches: as for profile_model.
        ranks: layer name -> rank, None stays dense; ``plan.ranks``.
        form: how factors are kept.
        beta: 0 is shift-aware, 1 anchored (arXiv 2604.02119).
        ridge: share of the mean diagonal that is added to moments.

    Raises:
        ModelError: a layer is none of nn.Linear or Conv1D, outside of the repeated blocks, used
            other than once in a run, or its moment is singular.
    """
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    modules = {name: linear(dense, name) for name in chosen}
    if any(linear(model, name) is module for name, module in modules.items()):
        raise ModelError("model and dense share their layers: give a copy as the model")
    task, ready = prepared(dense, batches)
    layouts = [layout_of(dense, task, batch) for batch in ready]
    blocks = _blocks(dense, chosen, ready[0])
    left = set(chosen)
    with (
        torch.no_grad(),
        in_eval(model),
        in_eval(dense),
        Activations(Path(tempfile.gettempdir())) as store,
    ):

        def stored(kind: str) -> Iterator[Any]:
            return (store.get(kind, number) for number in range(len(ready)))

        ours = Walk(model, blocks, ready, store, "compressed")
        theirs = Walk(dense, blocks, ready, store, "dense")
        for name in blocks:
            if not left:
                break
            inside = {n: module for n, module in modules.items() if n.startswith(f"{name}.")}
            for number in range(len(ready)):
                store.put("ours", number, ours.given(name, number))
                store.put("theirs", number, theirs.given(name, number))
            block, reference = model.get_submodule(name), dense.get_submodule(name)
            for group in _groups(reference, inside, store.get("theirs", 0)):
                shifted, cross = _moments(
                    _inputs(block, model.get_submodule(group[0]), stored("ours")),
                    _inputs(reference, modules[group[0]], stored("theirs")),
                    layouts,
                )
                target = (1.0 - beta) * shifted + beta * cross
                factors: dict[str, Factors | None] = {
                    n: closed_form(n, weight_of(modules[n]), shifted, target, chosen[n], ridge)
                    for n in group
                }
                put(model, factors, form)
            left -= inside.keys()
            for number, (own, other) in enumerate(
                zip(stored("ours"), stored("theirs"), strict=True)
            ):
                ours.passed(name, number, _called(block, own))
                theirs.passed(name, number, _called(reference, other))


def closed_form(
    name: str, weight: Tensor, shifted: Tensor, target: Tensor, rank: int, ridge: float = RIDGE
) -> Factors:
    """The best factors of a rank (arXiv 2604.02119), in the weight's precision or float32.

    Args:
        name: of the layer, for errors.
        weight: W, shape ``(out, in)``.
        shifted: X' X'^T, shape ``(in, in)``.
        target: C, shape ``(in, in)``.
        rank: r.
        ridge: share of the mean diagonal that is added to moments.
    """
    own = torch.promote_types(weight.dtype, torch.float32)
    root = root_of(name, shifted, ridge)
    pulled = target + ridge_of(shifted, ridge)
    aimed = torch.linalg.solve_triangular(root, (weight.double() @ pulled).T, upper=False).T
    u, s, v = torch.linalg.svd(aimed, full_matrices=False)
    scaled = s[:rank, None] * v[:rank]
    down = torch.linalg.solve_triangular(root, scaled, upper=False, left=False)
    return u[:, :rank].to(own), down.to(own)


def _blocks(model: nn.Module, names: Iterable[str], ready: Batch) -> dict[str, str]:
    """The model's blocks, all of the layers being in one."""
    with in_eval(model):
        blocks = repeated(model, ready)
    for name in names:
        if not any(name.startswith(f"{block}.") for block in blocks):
            raise ModelError(f"layer {name} is in no repeated block (nn.ModuleList): not covered")
    return blocks


def _groups(block: nn.Module, modules: Mapping[str, nn.Module], given: Any) -> list[list[str]]:
    """Layers in the order in which they run, those together that are given the same tensor."""
    # The tensors are held, so that none takes the id of another that is gone.
    seen: dict[tuple[int, int], tuple[Tensor, list[str]]] = {}

    def look(name: str, x: Tensor) -> None:
        seen.setdefault((id(x), x._version), (x, []))[1].append(name)

    with watched(modules, look):
        _called(block, given)
    groups = [names for _, names in seen.values()]
    ran = [name for names in groups for name in names]
    for name in modules:
        if ran.count(name) != 1:
            raise ModelError(f"layer {name} runs {ran.count(name)} times in its block, not once")
    return groups


def _moments(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], layouts: Iterable[Layout]
) -> tuple[Tensor, Tensor]:
    """X' X'^T and X X'^T, shapes ``(in, in)``, float64."""
    shifted = cross = torch.zeros((), dtype=torch.float64)
    for own, reference, layout in zip(ours, theirs, layouts, strict=True):
        x = positions(own, layout)
        shifted = shifted.to(x) + x.T @ x
        cross = cross.to(x) + positions(reference, layout).to(x).T @ x
    return shifted, cross


class _ReachedError(Exception):
    """The layer has been reached, and nothing after it matters."""


def _inputs(block: nn.Module, layer: nn.Module, given: Iterable[Any]) -> Iterator[Tensor]:
    """What a layer of a block is given, batch by batch."""
    found: list[Tensor] = []

    def look(_: str, x: Tensor) -> None:
        found.append(x)
        raise _ReachedError

    for each in given:
        with watched({"": layer}, look), contextlib.suppress(_ReachedError):
            _called(block, each)
        yield found.pop()


def _called(block: nn.Module, given: tuple[Any, Any]) -> Any:
    args, kwargs = given
    return block(*args, **kwargs)
