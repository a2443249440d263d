"""Fit parameters to a loss, and keep what is best on data that is not fitted.

AdamW (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019) without decay: what is
fitted starts from a good place and is not to be drawn to zero. The first steps of Adam are as large
as the learning rate whatever the gradient, so the rate rises linearly from zero; then it stays.
Gradients are clipped by their common norm.

Steps of one batch each are noisy, and where they lead is worse than the middle of where they have
been. So what is looked at and kept is the average of the pass so far, its start and the states
after each step (Polyak & Juditsky, SIAM J. Control Optim. 30, 1992); the steps themselves go on
from where they are. That does more than a falling rate, and is less particular about the rate
(experiments/LOG.md).

No one rate suits all: what mends a language model that has lost half a nat spoils a classifier that
is nearly the dense one. So a fit looks at the held-out data after an eighth, a
quarter and a half of the first pass, and at each half of the others; where that is worse than the
best so far, it goes back to the best and on from there with a quarter of the rate.

Parameters of 16 bits are copies, rounded after each step, of masters in float32: one step is
smaller than what 16 bits can tell. Losses of models in float16 are back-propagated times the
largest power of two with which no gradient overflows.

Nothing is random but the order of the batches, which the seed and the pass alone decide; a state
holds the rest. So what goes on from a state has the bits of what was never interrupted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from rankopt.errors import DataError, NotFiniteError, OptionError
from rankopt.measure.taps import largest_scale

#: After which parts of the first pass, and of the others, to look at the held-out data.
FIRST = (0.125, 0.25, 0.5, 1.0)
LATER = (0.5, 1.0)
#: Fewer steps than these say nothing: the rate is still rising.
SOONEST = 4
#: What the rate is divided by after a look that was worse; so many in a row are the end.
SLOWER = 4.0
PATIENCE = 4
_WIDE = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to fit.

    Attributes:
        learning_rate: the largest.
        passes: over the batches that are fitted.
        warm_up: share of the steps in which the learning rate rises.
        clip: largest norm of the gradient.
        seed: of the order of the batches.

    Raises:
        OptionError: a number out of range.
    """

    learning_rate: float = 1e-4
    passes: int = 1
    warm_up: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise OptionError(f"{name} must be a positive number, got {value}")
        if self.passes < 1:
            raise OptionError(f"passes must be at least 1, got {self.passes}")
        if not 0.0 <= self.warm_up < 1.0:
            raise OptionError(f"warm_up must be a share from 0 to below 1, got {self.warm_up}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 0, of so many."""
        rising = math.ceil(self.warm_up * steps)
        return self.learning_rate * min(1.0, (step + 1) / (rising + 1))

    def order(self, number: int, count: int) -> list[int]:
        """The order of so many batches in a pass, from 0."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        return torch.randperm(count, generator=generator).tolist()


@dataclasses.dataclass
class State:
    """How far a fit has come.

    Attributes:
        step: taken so far.
        before: held-out loss of the start.
        best: the least so far.
        kept: the step that it belongs to; 0 is the start.
        worse: checks since then.
        slowed: how often the rate was divided.
        averaged: steps that the average is of, beside where they began.
        lost: steps that were taken back, each ``(after, up to)``.
        tensors: by kind and parameter, ``kept/NAME``, ``value/NAME`` (the master's),
            ``average/NAME``, ``mean/NAME``, ``square/NAME``, ``count/NAME``; only as a file has
            them.
    """

    step: int = 0
    before: float = math.nan
    best: float = math.nan
    kept: int = 0
    worse: int = 0
    slowed: int = 0
    averaged: int = 0
    lost: tuple[tuple[int, int], ...] = ()
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Fit:
    """A fit of parameters to batches.

    Args:
        parameters: by name; those without a gradient stay.
        count: of the batches.
        loss: number of a batch -> its loss, with its graph.
        held_out: the loss of the held-out data.
        recipe: how.
        state: to go on from.

    Attributes:
        steps: in all.
        state: how far it has come.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        count: int,
        loss: Callable[[int], Tensor],
        held_out: Callable[[], float],
        recipe: Recipe,
        state: State | None = None,
    ) -> None:
        self.steps = recipe.passes * count
        self._parameters, self._count, self._loss = dict(parameters), count, loss
        self._held_out, self._recipe = held_out, recipe
        self._order = functools.cache(lambda number: recipe.order(number, count))
        self._half = any(p.dtype == torch.float16 for p in parameters.values())
        self._masters = {
            name: p.detach() if p.dtype in _WIDE else p.detach().float()
            for name, p in parameters.items()
        }
        self._checks = {
            number * count + math.ceil(part * count)
            for number in range(recipe.passes)
            for part in (LATER if number else FIRST)
            if part == 1.0 or number or math.ceil(part * count) >= SOONEST
        }
        self._averages = {name: master.clone() for name, master in self._masters.items()}
        self._optimizer = torch.optim.AdamW(self._masters.values(), weight_decay=0.0)
        self._kept = self._copies()
        if state is None:
            before = held_out()
            if not math.isfinite(before):
                raise NotFiniteError(f"the held-out loss is {before} before the first step")
            state = State(before=before, best=before)
        else:
            try:
                self._restore(state)
            except (KeyError, ValueError) as error:
                raise DataError(
                    f"the checkpoint lacks {error}: delete it to start again"
                ) from error
        self.state = dataclasses.replace(state, tensors={})

    def run(self) -> Iterator[int]:
        """Fit; yields after each step how many have been taken, and ends with the best state.

        Raises:
            NotFiniteError: a loss or a gradient is NaN or infinite; names the batch.
        """
        state = self.state
        while state.step < self.steps and state.worse < PATIENCE:
            self._take(self._batch(state.step))
            state.step += 1
            if state.step in self._checks:
                self._exchange()
                found = self._held_out()
                if better := found < state.best:
                    state.best, state.kept, state.worse = found, state.step, 0
                    self._kept = self._copies()
                self._exchange()
                if not better:
                    state.worse, state.slowed = state.worse + 1, state.slowed + 1
                    state.lost = (*state.lost, (state.kept, state.step))
                    self._return()
            yield state.step
        self._put(self._kept)

    def seen(self) -> set[int]:
        """Numbers of the batches that the kept state has been fitted to."""
        lost = {step for after, to in self.state.lost for step in range(after, to)}
        steps = set(range(self.state.kept)) - lost
        return set(map(self._batch, steps))

    def _batch(self, step: int) -> int:
        """The number of the batch that a step, from 0, is taken with."""
        number, place = divmod(step, self._count)
        return self._order(number)[place]

    def saved(self) -> State:
        """The state with all that it takes to go on."""
        tensors = {f"kept/{name}": value for name, value in self._kept.items()}
        for name, master in self._masters.items():
            tensors[f"value/{name}"] = master
            tensors[f"average/{name}"] = self._averages[name]
            held = self._optimizer.state.get(master, {})
            for kind, key in _MOMENTS.items():
                if key in held:
                    tensors[f"{kind}/{name}"] = held[key]
        return dataclasses.replace(self.state, tensors=tensors)

    def _restore(self, state: State) -> None:
        held: dict[int, dict[str, Tensor]] = {}
        for place, (name, master) in enumerate(self._masters.items()):
            master.copy_(state.tensors[f"value/{name}"])
            self._averages[name].copy_(state.tensors[f"average/{name}"])
            self._kept[name].copy_(state.tensors[f"kept/{name}"])
            moments = {
                key: state.tensors[f"{kind}/{name}"]
                for kind, key in _MOMENTS.items()
                if f"{kind}/{name}" in state.tensors
            }
            if moments:
                held[place] = moments
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": held, "param_groups": groups})
        self._put(self._masters)

    def _take(self, number: int) -> None:
        if self.state.step % self._count == 0:
            self._begin()
        scale = self._backward(number)
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            master = self._masters[name]
            master.grad = None if gradient is None else gradient.to(master.dtype).div_(scale)
        torch.nn.utils.clip_grad_norm_(self._masters.values(), self._recipe.clip)
        for group in self._optimizer.param_groups:
            rate = self._recipe.rate(self.state.step, self.steps)
            group["lr"] = rate / SLOWER**self.state.slowed
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average()
        self._put(self._masters)

    def _backward(self, number: int) -> float:
        """Gradients of a batch's loss; what they are multiplied with."""

        def fits(scale: float) -> bool:
            for parameter in self._parameters.values():
                parameter.grad = None
            loss = self._loss(number)
            if not bool(torch.isfinite(loss)):
                raise NotFiniteError(
                    f"the loss of batch {number + 1} is {loss.item()} after {self.state.step} "
                    "steps: take a smaller learning_rate"
                )
            torch.autograd.backward(loss * scale)
            found = (p.grad for p in self._parameters.values() if p.grad is not None)
            return all(bool(torch.isfinite(gradient).all()) for gradient in found)

        scale = largest_scale(fits) if self._half else 1.0 if fits(1.0) else None
        if scale is None:
            remedy = "bfloat16 or float32, or " if self._half else ""
            raise NotFiniteError(
                f"a gradient of batch {number + 1} is NaN or infinite: take {remedy}a smaller "
                "learning_rate"
            )
        return scale

    @torch.no_grad()
    def _begin(self) -> None:
        """The average begins where the steps are."""
        for name, average in self._averages.items():
            average.copy_(self._masters[name])
        self.state.averaged = 0

    @torch.no_grad()
    def _average(self) -> None:
        self.state.averaged += 1
        share = 1.0 / (self.state.averaged + 1.0)
        for name, average in self._averages.items():
            average.lerp_(self._masters[name], share)

    @torch.no_grad()
    def _exchange(self) -> None:
        """The average is where the model was, and the other way round."""
        for name, master in self._masters.items():
            held = master.clone()
            master.copy_(self._averages[name])
            self._averages[name].copy_(held)
        self._put(self._masters)

    @torch.no_grad()
    def _return(self) -> None:
        """To the best state; what is known of the gradients stays."""
        for name, master in self._masters.items():
            master.copy_(self._kept[name])
        self._begin()
        self._put(self._masters)

    def _copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            # A master of 32 bits is the parameter's own memory.
            if parameter.data_ptr() != values[name].data_ptr():
                parameter.copy_(values[name])


#: Kind of a state's tensor -> what AdamW calls it.
_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq", "count": "step"}
