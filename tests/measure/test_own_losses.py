"""A loss of the user's own, and any module that has one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt import DataError, ModelError, profile_model
from tests import tiny
from tests.measure.exact import columns_of, difference, in_double, rows_of

Batch = dict[str, Any]


def own_loss(model: Any, batch: Batch) -> Tensor:
    """What the built-in tasks do, stated by a user."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"]
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none")
    losses = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.sum(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-classification"])
def test_a_users_loss_gives_what_the_built_in_gives(kind: str) -> None:
    model = in_double(tiny.ARCHITECTURES[kind]())
    batches = tiny.batches(model)
    backends = ["fwsvd_two_sided", "kronecker"]
    own, built_in = (
        profile_model(
            model, batches, backends=backends, keep_bases=False, estimator="empirical", **options
        )
        for options in ({"loss_fn": own_loss}, {})
    )
    assert own.info.task == "custom" and own.examples == built_in.examples == 6
    assert difference(rows_of(own), rows_of(built_in)) < 1e-10
    assert difference(columns_of(own), columns_of(built_in)) < 1e-10
    for name, traces in built_in.traces.items():
        assert own.traces[name] == pytest.approx(traces, rel=1e-10), "padding counts in one of them"
        for backend in backends:
            losses = built_in.curves[backend][name].losses
            assert own.curves[backend][name].losses == pytest.approx(losses, rel=1e-8, abs=1e-12)


class Plain(nn.Module):
    """No transformers, no config, no names; inputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.randn(4, 6, generator=generator), torch.rand(4, 5, generator=generator)


def yes_or_no(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return binary_cross_entropy_with_logits(model(x), y, reduction="none").sum(1)


def test_any_module_with_a_loss_can_be_profiled() -> None:
    model, wanted = Plain(), torch.zeros(6)
    profile = profile_model(model, pairs(), loss_fn=yes_or_no)
    for x, y in pairs():
        for n in range(4):
            loss = yes_or_no(model, (x[n : n + 1], y[n : n + 1])).sum()
            (gradient,) = torch.autograd.grad(loss, [model.body[0].weight])
            wanted = wanted + gradient.square().sum(0)
    assert torch.allclose(rows_of(profile)["body.0"].float(), wanted, rtol=1e-5)
    assert (profile.examples, profile.info.targets, profile.info.task) == (12, 12, "custom")


@pytest.mark.parametrize(
    ("loss_fn", "complaint"),
    [
        (lambda model, batch: yes_or_no(model, batch).mean(), r"shape \(\)"),
        (lambda model, batch: yes_or_no(model, batch)[:, None], r"shape \(4, 1\)"),
        (lambda model, batch: yes_or_no(model, batch).detach(), "requires_grad=False"),
        (lambda model, batch: yes_or_no(model, batch)[:0], r"shape \(0,\)"),
        (lambda model, batch: [1.0, 2.0], "it returned list"),
    ],
)
def test_a_users_loss_is_one_for_each_example(loss_fn: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        profile_model(Plain(), pairs(), loss_fn=loss_fn)


def test_losses_of_something_else_than_examples_are_refused() -> None:
    def of_tokens(model: Any, batch: Batch) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")

    model = tiny.llama()
    with pytest.raises(ModelError, match="for 24 examples"):
        profile_model(model, tiny.batches(model), loss_fn=of_tokens)


def test_models_without_a_known_loss_are_told_of_loss_fn() -> None:
    with pytest.raises(ModelError, match="loss_fn"):
        profile_model(Plain(), pairs())
