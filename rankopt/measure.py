"""From a model and batches to a profile."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt._version import __version__
from rankopt.backends import find_backend, projection
from rankopt.discover import Found, find_layers, fingerprint, model_size, weight_of
from rankopt.errors import DataError, ModelError
from rankopt.fisher import RowFisher
from rankopt.profile import BasisArray, FloatArray, Profile, ProfileInfo
from rankopt.progress import bar
from rankopt.tasks import Batch, check_loss, loss_terms, mean_loss, prepare, task_of

#: Bases are kept while they fit in this many bytes; beyond, ``apply_plan`` decomposes again.
BASES_LIMIT = 2 * 2**30


def profile_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    backends: Sequence[str] = ("fwsvd",),
    keep_bases: bool = True,
    progress: bool | None = None,
) -> Profile:
    """Measure what every rank of every layer retains.

    Runs each batch forward and backward once (no gradients of weights, eval mode; the model is left
    as it was), then decomposes every layer once for each backend.

    Args:
        model: a transformers model with a head and its own loss, weights loaded.
        batches: dictionaries of tensors as the model takes them, ``(B, T)`` inputs and labels.
            Causal language models shift labels themselves: give ``labels`` equal to ``input_ids``,
            or leave them out. Labels of padding are ignored.
        backends: whose spectra to compute, ``fwsvd`` and ``svd``.
        keep_bases: store singular vectors too, so that applying a plan is fast.
        progress: a bar on stderr; by default if it is a terminal.

    Raises:
        ModelError: no plannable layers, an unknown kind of loss, or a layer that saw no gradient.
        DataError: no batches, or batches without labels or targets.
        BudgetError: an unknown backend.
    """
    for name in backends:
        find_backend(name)
    if not backends:
        raise DataError("at least one backend is needed")
    model = _unwrapped(model)
    task = task_of(model)
    found = find_layers(model)
    device = next(model.parameters()).device
    digest, examples, targets = hashlib.sha256(), 0, 0
    with RowFisher(model, found.modules) as fisher:
        for batch in bar(batches, "Fisher", "batch", progress):
            ready = prepare(task, batch, device)
            if not examples:
                _warn_of_padding(model, ready)
                check_loss(model, task, ready)
            _update(digest, ready)
            terms = loss_terms(task, ready["labels"])
            fisher.begin(len(terms), _tokens(ready))
            loss, _ = mean_loss(model, ready)
            fisher.backward(loss * terms.sum())
            examples += len(terms)
            targets += int(terms.sum())
    if not examples:
        raise DataError("no batches were given")
    silent = [layer.name for layer in found.layers if layer.name not in fisher.rows]
    if silent:
        raise ModelError(
            f"{len(silent)} planned layers never took part in the loss ({', '.join(silent[:3])}): "
            "their Fisher information is unknown"
        )
    energies, bases = _decompose(found, fisher.rows, examples, backends, keep_bases, progress)
    size, architecture = model_size(model), type(model).__name__
    info = ProfileInfo(
        versions={"rankopt": __version__, "torch": torch.__version__}
        | {"transformers": version("transformers")},
        architecture=architecture,
        fingerprint=fingerprint(architecture, found.layers),
        task=task,
        examples=examples,
        targets=targets,
        data_digest=digest.hexdigest(),
        model_parameters=size.model,
        model_bytes=size.model_bytes,
        layers=found.layers,
        left_alone=found.left_alone,
    )
    rows = {name: fisher.rows[name].cpu().numpy() for name in found.modules}
    return Profile(info, rows, energies, _bases=bases)


def _decompose(
    found: Found,
    rows: dict[str, Tensor],
    examples: int,
    backends: Sequence[str],
    keep_bases: bool,
    progress: bool | None,
) -> tuple[dict[str, dict[str, FloatArray]], dict[str, BasisArray]]:
    stored = sum(4 * min(x.out_features, x.in_features) * x.largest_rank for x in found.layers)
    keep = keep_bases and stored * len(backends) <= BASES_LIMIT
    energies: dict[str, dict[str, FloatArray]] = {name: {} for name in backends}
    bases: dict[str, BasisArray] = {}
    for layer in bar(found.layers, "Spectra", "layer", progress):
        weight = weight_of(found.modules[layer.name])
        for name in backends:
            weights = find_backend(name).input_weights(rows[layer.name] / examples)
            spectrum, basis = projection.decompose(weight, weights)
            energies[name][layer.name] = spectrum.cpu().numpy()
            if keep:
                useful = basis[:, : layer.largest_rank].float().contiguous()
                bases[f"{layer.name}/basis.{name}"] = useful.cpu().numpy()
    return energies, bases


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.DataParallel):
        raise ModelError("DataParallel replicas race in hooks: profile model.module")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError("DDP averages gradients before they can be squared: profile model.module")
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _tokens(batch: Batch) -> int:
    ids = batch.get("input_ids")
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def _warn_of_padding(model: nn.Module, batch: Batch) -> None:
    pad, ids = getattr(model.config, "pad_token_id", None), batch.get("input_ids")
    eos = getattr(model.config, "eos_token_id", None)
    if pad is None or pad == eos or ids is None or "attention_mask" in batch:
        return
    if bool((ids == pad).any()):
        tqdm.write(
            "warning: the batches hold padding but no attention_mask: it is learnt from",
            file=sys.stderr,
        )


def data_digest(model: nn.Module, batches: Iterable[Batch]) -> str:
    """The digest that a profile of these batches has, without measuring."""
    task, device = task_of(model), next(model.parameters()).device
    digest = hashlib.sha256()
    for batch in batches:
        _update(digest, prepare(task, batch, device))
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", batch: Batch) -> None:
    for name in sorted(batch):
        if isinstance(batch[name], Tensor):
            array = batch[name].detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.view(torch.uint8).numpy().tobytes())
