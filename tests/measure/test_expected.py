"""All labels at once: the expectation by definition, in few passes, chosen where it serves."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rankopt import ModelError, OptionError, Profile, profile_model
from rankopt.backends import BUILT_IN
from rankopt.backends.statistics import STATISTICS
from rankopt.measure.accumulate import Gathered, gather
from rankopt.measure.collector import Collector
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.likelihood import fisher_roots
from rankopt.model.selection import find_layers
from rankopt.model.tasks import task_of
from tests import tiny
from tests.measure.exact import difference, in_double, one_by_one, rows_of
from tests.measure.test_estimators import Alone, SmoothedForSequenceClassification, few

Batch = dict[str, Any]
Sums = dict[str, dict[str, Tensor]]
#: Logits of one example -> what may happen: its chance, and the loss then.
Outcomes = Callable[[Tensor], list[tuple[float, Tensor]]]


def classes(logits: Tensor) -> list[tuple[float, Tensor]]:
    logs = logits.flatten().log_softmax(-1)
    return [(log.exp().item(), -log) for log in logs]


def answers(logits: Tensor) -> list[tuple[float, Tensor]]:
    logits, found = logits.flatten(), []
    for given in itertools.product([0.0, 1.0], repeat=len(logits)):
        labels = logits.new_tensor(given)
        loss = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        found.append((math.exp(-loss.item()), loss))
    return found


def numbers(logits: Tensor) -> list[tuple[float, Tensor]]:
    """Two points have the mean and the variance 1/2 that a normal distribution has."""
    logits, found = logits.flatten(), []
    for signs in itertools.product([-1.0, 1.0], repeat=len(logits)):
        labels = logits.detach() + 0.5**0.5 * logits.new_tensor(signs)
        found.append((0.5 ** len(logits), (logits - labels).square().sum()))
    return found


def choices(model: Any, _: int = 0) -> list[Batch]:
    batch = tiny.batches(model, count=1, size=6)[0]
    apart = {k: x.reshape(2, 3, -1) for k, x in batch.items() if k != "labels"}
    return [{**apart, "labels": torch.tensor([2, 0])}]


def several(model: Any) -> list[Batch]:
    batches = tiny.batches(model)
    for batch in batches:
        batch["labels"] = torch.rand(3, 3, generator=torch.Generator().manual_seed(3)).round()
    return batches


YES_OR_NO = {"num_labels": 3, "problem_type": "multi_label_classification"}
NUMBERS = {"num_labels": 3, "problem_type": "regression"}
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[Batch]], Outcomes]] = {
    "two classes": (tiny.bert, tiny.batches, classes),
    "four classes": (lambda: tiny.bert(num_labels=4), tiny.batches, classes),
    "shared layers": (lambda: tiny.albert(num_labels=3), tiny.batches, classes),
    "pictures": (tiny.vit, tiny.batches, classes),
    "choices": (lambda: tiny.bert("MultipleChoice"), choices, classes),
    "yes or no": (lambda: tiny.bert(**YES_OR_NO), several, answers),
    "a number": (lambda: tiny.bert(num_labels=1), tiny.batches, numbers),
    "numbers": (lambda: tiny.bert(**NUMBERS), several, numbers),
}


def small(kind: str) -> tuple[Any, list[Batch], Outcomes]:
    build, batches_of, outcomes = KINDS[kind]
    model = in_double(build())
    batches = batches_of(model)
    for batch in batches:
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
        if batch["labels"].is_floating_point():
            batch["labels"] = batch["labels"].double()
    return model, batches, outcomes


def by_definition(model: Any, batches: list[Batch], outcomes: Outcomes) -> Sums:
    """Every statistic, from gradients of each outcome of each example by itself."""
    modules = find_layers(model).modules
    total: Sums = {name: {} for name in modules}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, []).append((args[0].detach(), output))

        return look

    def add(name: str, kind: str, value: Tensor) -> None:
        total[name][kind] = total[name].get(kind, torch.zeros(())) + value

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    model.requires_grad_(True)
    for example in one_by_one(batches):
        seen.clear()
        logits = model(**{k: x for k, x in example.items() if k != "labels"}).logits
        mask = example.get("attention_mask")
        inputs = {name: torch.cat([x.flatten(0, -2) for x, _ in seen[name]]) for name in modules}
        for name, x in inputs.items():
            weight = modules[name].weight.detach()
            repeated = len(x) // (1 if mask is None else mask.numel())
            real = x if mask is None else x[mask.bool().flatten().repeat(repeated)]
            made = real if weight.shape[1] <= weight.shape[0] else real @ weight.T
            add(name, "second", made.T @ made)
            add(name, "positions", torch.tensor(len(real), dtype=torch.float64))
            add(name, "input_energy", real.square().sum())
        for chance, loss in outcomes(logits):
            outputs = [y for name in modules for _, y in seen[name]]
            found = iter(torch.autograd.grad(loss, outputs, retain_graph=True))
            for name, x in inputs.items():
                weight = modules[name].weight.detach()
                g = torch.cat([next(found).flatten(0, -2) for _ in seen[name]])
                squares = chance * (g.T @ x).square()
                add(name, "rows", squares.sum(0))
                add(name, "columns", squares.sum(1))
                add(name, "elements", squares)
                small = g if weight.shape[0] <= weight.shape[1] else g @ weight
                add(name, "gradient", chance * (small.T @ small))
                add(name, "gradient_energy", chance * g.square().sum())
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return total


def measured(model: Any, batches: list[Batch], unit: Any = "example") -> Gathered:
    loss = ModelLoss(task_of(model), Estimator("expected", unit))
    return gather(model, find_layers(model).modules, batches, loss, STATISTICS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_statistic_is_the_expectation_over_the_models_own_labels(kind: str) -> None:
    model, batches, outcomes = small(kind)
    wanted, found = by_definition(model, batches, outcomes), measured(model, batches)
    assert found.units == found.seen.examples == sum(len(batch["labels"]) for batch in batches)
    for name, sums in wanted.items():
        statistics = found.statistics(name)
        for what, value in (
            ("rows", statistics.rows),
            ("columns", statistics.columns),
            ("elements", statistics.elements),
            ("second", statistics.second_moment),
            ("gradient", statistics.gradient_moment),
            ("positions", torch.tensor(statistics.positions, dtype=torch.float64)),
            ("input_energy", torch.tensor(statistics.input_energy, dtype=torch.float64)),
            ("gradient_energy", torch.tensor(statistics.gradient_energy, dtype=torch.float64)),
        ):
            assert value is not None
            apart = float((value - sums[what]).norm() / sums[what].norm())
            assert apart < 1e-9, f"{name} {what}"
    # What was added by each batch is what is resampled for its certainty.
    rows = torch.stack([found.sums[name].rows.sum() for name in found.names])
    assert torch.allclose(torch.stack(found.seen.totals).sum(0), rows, rtol=1e-10)


@pytest.mark.parametrize("kind", ["yes or no", "numbers"])
def test_independent_labels_have_one_sum_whatever_the_unit(kind: str) -> None:
    model, batches, _ = small(kind)
    whole, apart = measured(model, batches), measured(model, batches, "token")
    assert apart.units == 3 * whole.units == apart.seen.targets
    for name in whole.names:
        assert torch.equal(whole.sums[name].rows, apart.sums[name].rows)


@pytest.mark.parametrize(
    ("kind", "passes"), [("two classes", 1), ("four classes", 3), ("yes or no", 3), ("a number", 1)]
)
def test_there_is_one_pass_fewer_than_classes(
    kind: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, _ = small(kind)
    calls, backward = [], Collector.backward

    def counts(self: Collector, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        backward(self, *args, **kwargs)

    monkeypatch.setattr(Collector, "backward", counts)
    measured(model, batches)
    assert len(calls) == passes * len(batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "four classes",
        pytest.param("yes or no", marks=pytest.mark.slow),
        pytest.param("numbers", marks=pytest.mark.slow),
    ],
)
def test_labels_that_are_drawn_often_enough_give_the_same(kind: str) -> None:
    model, batches, _ = small(kind)
    options: dict[str, Any] = {"keep_bases": False, "include": few(model)}
    wanted = rows_of(profile_model(model, batches, estimator="expected", **options))
    errors = []
    for draws in (20, 500):
        found = rows_of(
            profile_model(model, batches, estimator="sampled", draws=draws, seed=1, **options)
        )
        errors.append(difference({n: rows / draws for n, rows in found.items()}, wanted))
    # 25 times the draws: a fifth of the error.
    assert errors[1] < 0.12 and errors[1] < errors[0]


def test_an_interruption_changes_no_bit(tmp_path: Path) -> None:
    model = tiny.bert(num_labels=4)
    batches = tiny.batches(model, count=5)

    def interrupted() -> Iterator[Batch]:
        yield from batches[:3]
        raise KeyboardInterrupt

    def profile(given: Any, **options: Any) -> Profile:
        return profile_model(model, given, backends=BUILT_IN, estimator="expected", **options)

    how: dict[str, Any] = {"checkpoint": tmp_path / "partial", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        profile(interrupted(), **how)
    resumed, whole = profile(batches, **how), profile(batches)
    assert resumed.digest() == whole.digest() and resumed.info == whole.info
    assert whole.info.draws == 1 and whole.info.seed is None
    for name in BUILT_IN:
        assert all(curve.losses[0] > 0.0 for curve in whole.curves[name].values())


def test_processes_add_up() -> None:
    model, batches, _ = small("four classes")
    modules, loss = find_layers(model).modules, ModelLoss(task_of(model), Estimator("expected"))
    whole = measured(model, batches)
    shares = [
        gather(model, modules, batches, loss, STATISTICS, processes=Alone(rank, 2)).sums
        for rank in range(2)
    ]
    for name in modules:
        for kind, total in whole.sums[name].tensors().items():
            parts = [share[name].tensors()[kind] for share in shares]
            assert torch.allclose(parts[0] + parts[1], total, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_are_enough(dtype: torch.dtype) -> None:
    model = tiny.bert(num_labels=4)
    batches = tiny.batches(model)
    found, wanted = (
        rows_of(profile_model(each, batches, keep_bases=False, estimator="expected"))
        for each in (copy.deepcopy(model).to(dtype), model)
    )
    assert difference(found, wanted) < 0.15


EXTREMES = [[0.0], [3.0, -1.0], [2000.0, -2000.0, 0.0], [1e4, -1e4], [50.0, 0.0, 49.0, -900.0]]


@pytest.mark.parametrize("row", [*EXTREMES, [-math.inf, 1.0, 0.5], [1.0, 0.5, -math.inf]])
def test_the_squares_add_up_to_the_covariance_of_a_class(row: list[float]) -> None:
    logits = torch.tensor([row, row[::-1]], dtype=torch.float64)
    roots = list(fisher_roots("sequence-classification", logits))
    assert len(roots) == max(len(row) - 1, 1)
    found = sum(root.unsqueeze(2) * root.unsqueeze(1) for root in roots)
    chances = logits.softmax(-1)
    wanted = torch.diag_embed(chances) - chances.unsqueeze(2) * chances.unsqueeze(1)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_a_chance_that_rounds_to_one_still_has_a_variance() -> None:
    """p (1 - p) is e^-40 for a logit of 40 in either direction, whatever 1 - p rounds to."""
    small = math.exp(-40.0)
    (yes,) = fisher_roots("multi-label-classification", torch.tensor([[40.0], [-40.0]]))
    assert yes.square().flatten().tolist() == pytest.approx([small, small], rel=1e-6)
    (first,) = fisher_roots("sequence-classification", torch.tensor([[40.0, 0.0], [0.0, 40.0]]))
    assert first.square().flatten().tolist() == pytest.approx([small] * 4, rel=1e-6)


def test_outputs_without_any_chance_are_no_obstacle() -> None:
    class MaskedForSequenceClassification(type(tiny.bert())):  # type: ignore[misc]
        def forward(self, **batch: Any) -> Any:
            output = super().forward(**{k: x for k, x in batch.items() if k != "labels"})
            output.logits = output.logits.index_fill(1, torch.tensor([1]), -math.inf)
            output.loss = cross_entropy(output.logits, batch["labels"])
            return output

    plain = tiny.bert(num_labels=3)
    model = MaskedForSequenceClassification(plain.config)
    model.load_state_dict(plain.state_dict())
    batches = tiny.batches(plain)
    for batch in batches:
        batch["labels"] = batch["labels"].clamp_max(0)
    without = tiny.bert(num_labels=2)
    without.load_state_dict(
        {k: x[[0, 2]] if k.startswith("classifier") else x for k, x in plain.state_dict().items()}
    )
    found, wanted = (
        rows_of(profile_model(each, batches, keep_bases=False, estimator="expected"))
        for each in (model.eval(), without)
    )
    assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("build", [tiny.llama, tiny.t5, lambda: tiny.bert("TokenClassification")])
def test_labels_at_every_position_are_too_many(build: Callable[[], Any]) -> None:
    model = build()
    with pytest.raises(OptionError, match="at every position: use the sampled estimator"):
        profile_model(model, tiny.batches(model), estimator="expected")


def smoothed() -> Any:
    plain = tiny.bert(num_labels=3)
    model = SmoothedForSequenceClassification(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def test_what_cannot_be_enumerated_is_refused() -> None:
    model = tiny.bert()
    batches = tiny.batches(model)
    with pytest.raises(OptionError, match="draws=2 with all labels"):
        profile_model(model, batches, estimator="expected", draws=2)
    with pytest.raises(OptionError, match="labels cannot be drawn"):
        profile_model(model, batches, estimator="expected", loss_fn=lambda m, b: m(**b).loss)
    with pytest.raises(ModelError, match="labels cannot be drawn"):
        profile_model(smoothed(), tiny.batches(smoothed()), estimator="expected")
