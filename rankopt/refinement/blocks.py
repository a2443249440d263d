"""Block by block: each gives back what the dense model's block gives back, from its own prefix.

The input X' of a block L' is what the compressed and already refined blocks before it make of the
data, the target L(X) what the dense model has there: min ||L'(X') - L(X)||^2 over factors, biases
and norms of the block (the block stage of AA-SVD, arXiv 2604.02119). So each block also mends what
those before it have left, and only one block's gradients and moments are in memory. Positions of
padding do not count. The error is a share of the target's square.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rankopt.errors import DataError
from rankopt.measure.padding import frames_of, masks_of
from rankopt.progress import bar
from rankopt.refinement.activations import Activations
from rankopt.refinement.fit import Fit
from rankopt.refinement.job import Job, Outcome, learning, put
from rankopt.refinement.state import RefinedBlock, Saved
from rankopt.refinement.walk import Walk, blocks_of, is_low_rank

#: Error and square of the target on some batch.
Errors = tuple[Tensor, Tensor]


def refine_blocks(job: Job) -> Outcome:
    """Fit the blocks one after the other; they end as their best states."""
    before, saved = job.held_out(), job.resumed()
    put(saved.values, job.parameters)
    done, fitted = list(saved.done), len(job.data.fitted)
    batches = (*job.data.fitted, *job.data.held_out)
    blocks = blocks_of(job.model, batches[0])
    names = [name for name in blocks if is_low_rank(job.model.get_submodule(name))]
    if [block.name for block in done] != names[: len(done)]:
        raise DataError("the checkpoint is of other blocks: delete it to start again")
    steps = job.recipe.passes * fitted
    start = saved.state
    with (
        Activations(job.folder) as store,
        bar(range(steps * len(names)), "Blocks", "step", job.progress) as shown,
    ):
        shown.update(steps * len(done))
        ours = Walk(job.model, blocks, batches, store, "compressed")
        theirs = Walk(job.dense, blocks, batches, store, "dense")
        for name in names[len(done) :]:
            for number in range(len(batches)):
                output = theirs.gives(name, number)
                theirs.passed(name, number, output)
                store.put("target", number, _hidden(output))
                store.put("given", number, ours.given(name, number))
            parameters = {n: p for n, p in job.parameters.items() if n.startswith(f"{name}.")}
            errors = _errors(job, name, store)
            with learning(parameters):
                fit = Fit(
                    parameters,
                    fitted,
                    lambda number: _share([errors(number)]),  # noqa: B023 (used in this turn)
                    lambda: _held_out(errors, range(fitted, len(batches))),  # noqa: B023
                    job.recipe,
                    start,
                )
                shown.update(fit.state.step)
                for step in fit.run():
                    shown.update()
                    if job.checkpoint and step % job.checkpoint.every == 0:
                        job.checkpoint.save(Saved(fit.saved(), tuple(done), _values(job, done)))
            start, state = None, fit.state
            done.append(RefinedBlock(name, state.before, state.best, state.step))
            for number in range(len(batches)):
                ours.passed(name, number, _output(job.model.get_submodule(name), store, number))
            if job.checkpoint:
                job.checkpoint.save(Saved(None, tuple(done), _values(job, done)))
    moved = any(block.after < block.before for block in done)
    return Outcome(
        before,
        job.held_out(),
        sum(block.steps for block in done),
        frozenset(range(fitted) if moved else ()),
        tuple(done),
    )


def _values(job: Job, done: Iterable[RefinedBlock]) -> dict[str, nn.Parameter]:
    inside = tuple(f"{block.name}." for block in done)
    return {name: p for name, p in job.parameters.items() if name.startswith(inside)}


@torch.no_grad()
def _output(block: nn.Module, store: Activations, number: int) -> object:
    args, kwargs = store.get("given", number)
    return block(*args, **kwargs)


def _errors(job: Job, name: str, store: Activations) -> Callable[[int], Errors]:
    """Number of a batch -> squared error of a block on it, and square of the target."""
    block = job.model.get_submodule(name)
    batches = (*job.data.fitted, *job.data.held_out)
    side = int(_in_decoder(job.model, name))

    def errors(number: int) -> Errors:
        args, kwargs = store.get("given", number)
        found, target = _hidden(block(*args, **kwargs)), store.get("target", number)
        target = target.to(found.device)
        mask = _mask(job, batches[number], side, found)
        if mask is not None:
            found, target = found[mask], target[mask]
        wide = torch.promote_types(found.dtype, torch.float32)
        found, target = found.to(wide), target.to(wide)
        return (found - target).square().sum(), target.square().sum()

    return errors


def _share(errors: Iterable[Errors]) -> Tensor:
    error, square = map(sum, zip(*errors, strict=True))
    assert isinstance(error, Tensor) and isinstance(square, Tensor)
    return error / square.clamp_min(torch.finfo(square.dtype).tiny)


@torch.no_grad()
def _held_out(errors: Callable[[int], Errors], numbers: Iterable[int]) -> float:
    doubled = [(error.double(), square.double()) for error, square in map(errors, numbers)]
    return float(_share(doubled))


def _hidden(output: object) -> Tensor:
    """What a block hands on: its output, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(each for each in values if isinstance(each, Tensor))  # type: ignore[attr-defined]


def _in_decoder(model: nn.Module, name: str) -> bool:
    """Whether a block of an encoder-decoder is the decoder's."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    decoder = getattr(model, "get_decoder", lambda: None)()
    return decoder is not None and model.get_submodule(name) in set(decoder.modules())


def _mask(job: Job, batch: object, side: int, hidden: Tensor) -> Tensor | None:
    """Which positions count, ``(B, T)``; None where the masks do not tell: all."""
    masks = masks_of(job.model, job.data.task, batch)  # type: ignore[arg-type]
    mask = masks[side]
    frames = frames_of(job.model, mask)
    if mask is not None and frames is not None and mask.shape != hidden.shape[:2]:
        mask = frames(hidden.shape[1])
    fits = mask is not None and hidden.dim() == 3 and mask.shape == hidden.shape[:2]
    return mask.to(hidden.device) if fits and mask is not None else None
