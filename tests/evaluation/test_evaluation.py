"""Losses and metrics equal those computed by hand on the model's own predictions."""

import copy
import math
from typing import Any

import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy, mse_loss

from rankopt import DataError, ModelError, apply_plan, evaluate, make_plan, profile_model
from rankopt.model.likelihood import aligned
from rankopt.model.selection import find_layers
from rankopt.model.tasks import prepare, task_of
from tests import tiny

Batch = dict[str, Any]


def outputs(model: Any, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all batches."""
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    return logits, torch.cat([batch["labels"] for batch in batches])


def one_by_one(batches: list[Batch]) -> list[Batch]:
    return [
        {name: value[n : n + 1] for name, value in batch.items()}
        for batch in batches
        for n in range(len(batch["input_ids"]))
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_perplexity_is_that_of_the_next_tokens_without_padding(kind: str) -> None:
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model)
    logits, labels = outputs(model, batches)
    summed, count = 0.0, 0
    for row, truth, mask in zip(
        logits, labels, torch.cat([b["attention_mask"] for b in batches]), strict=True
    ):
        for t in range(7):
            if mask[t + 1]:
                summed -= float(row[t].double().log_softmax(0)[truth[t + 1]])
                count += 1
    found = evaluate(model, batches)
    assert found.targets == count == 2 * (4 + 7 + 7)
    assert found.examples == 6
    assert found.loss == pytest.approx(summed / count, rel=1e-5)
    assert found.metrics == {"perplexity": pytest.approx(math.exp(summed / count), rel=1e-4)}
    careless = [{**b, "labels": b["input_ids"]} for b in batches]
    assert evaluate(model, careless).loss == pytest.approx(found.loss, rel=1e-9)
    unmasked = [{"input_ids": b["input_ids"]} for b in batches]
    assert abs(evaluate(model, unmasked).loss - found.loss) > 1e-3


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_the_result_does_not_depend_on_the_batch_size(kind: str) -> None:
    model = tiny.MODELS[kind]()
    batches = tiny.batches(model)
    joined = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    wanted = evaluate(model, batches)
    for other in (one_by_one(batches), [joined]):
        found = evaluate(model, other)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-4)
        assert (found.examples, found.targets) == (wanted.examples, wanted.targets)


def test_a_mean_of_the_means_of_batches_is_another_number() -> None:
    model = tiny.llama()
    batches = one_by_one(tiny.batches(model))[:2]
    with torch.no_grad():
        means = [float(model(**batch).loss) for batch in batches]
    assert abs(sum(means) / len(means) - evaluate(model, batches).loss) > 1e-2


def test_sequence_to_sequence_loss_is_that_of_the_labels_as_they_are() -> None:
    model = tiny.t5()
    batches = tiny.batches(model)
    logits, labels = outputs(model, batches)
    wanted = float(cross_entropy(logits.flatten(0, 1), labels.flatten()))
    found = evaluate(model, batches)
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    assert found.targets == int((labels != -100).sum())


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    model = tiny.bert(num_labels=classes)
    batches = tiny.batches(model, count=8)
    logits, labels = outputs(model, batches)
    guess = logits.argmax(1)
    wanted = {"accuracy": metrics.accuracy_score(labels, guess)}
    assert 0.0 < wanted["accuracy"] < 1.0
    if classes == 2:
        wanted["f1"] = metrics.f1_score(labels, guess)
        wanted["matthews"] = metrics.matthews_corrcoef(labels, guess)
    found = evaluate(model, batches)
    assert found.metrics == pytest.approx(wanted, abs=1e-12)
    assert found.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    assert found.targets == found.examples == 24


def test_token_metrics_leave_ignored_labels_out() -> None:
    model = tiny.bert("TokenClassification", num_labels=4)
    batches = tiny.batches(model)
    logits, labels = outputs(model, batches)
    kept = labels != -100
    found = evaluate(model, batches)
    right = metrics.accuracy_score(labels[kept], logits.argmax(-1)[kept])
    assert 0.0 < right < 1.0
    assert found.metrics == {"accuracy": pytest.approx(right, abs=1e-12)}
    assert found.targets == int(kept.sum()) == 2 * (5 + 8 + 8)
    assert metrics.accuracy_score(labels.flatten(), logits.argmax(-1).flatten()) != right


def test_regression_metrics_equal_those_of_scipy() -> None:
    model = tiny.bert(num_labels=1)
    batches = tiny.batches(model)
    logits, labels = outputs(model, batches)
    guess = logits[:, 0]
    found = evaluate(model, batches)
    assert found.task == "regression"
    assert found.loss == pytest.approx(float(mse_loss(guess, labels)), rel=1e-5)
    wanted = {
        "pearson": stats.pearsonr(labels, guess).statistic,
        "spearman": stats.spearmanr(labels, guess).statistic,
    }
    assert found.metrics == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted["pearson"] - wanted["spearman"]) > 1e-3


def test_dropout_is_off_and_modes_come_back() -> None:
    model = tiny.gpt2()
    batches = tiny.batches(model)
    wanted = evaluate(model, batches)
    quiet = model.train().transformer.h[0].mlp.dropout.eval()
    assert evaluate(model, batches) == wanted
    assert all(module.training == (module is not quiet) for module in model.modules())
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate(model, [{**batches[0], "labels": torch.full((3, 8), -100)}])
    assert all(module.training == (module is not quiet) for module in model.modules())


def test_no_batches_are_refused() -> None:
    with pytest.raises(DataError, match="no batches"):
        evaluate(tiny.llama(), [])
    model = tiny.bert()
    with pytest.raises(DataError, match="labels"):
        evaluate(model, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}])


def test_the_loss_of_any_module_is_the_mean_over_its_examples() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout(0.5)).train()
    batches = [(torch.randn(size, 5), torch.randn(size, 3)) for size in (4, 1)]

    def squared(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = (model(batch[0]) - batch[1]).square().sum(1)
        return found

    found = evaluate(model, batches, loss_fn=squared)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert found.loss == pytest.approx(
        float((model[0](x) - y).detach().square().sum()) / 5, rel=1e-5
    )
    assert (found.task, found.metrics, found.examples, found.targets) == ("custom", {}, 5, 5)
    assert model.training and model[1].training
    with pytest.raises(DataError, match=r"shape \(B,\); it returned a tensor of shape \(\)"):
        evaluate(model, batches, loss_fn=lambda *both: squared(*both).sum())


def test_what_counts_as_planned_may_be_said() -> None:
    model = tiny.bert()
    layers = find_layers(model, include=["bert.pooler.dense"]).layers
    batches = tiny.batches(model, count=1)
    assert evaluate(model, batches, layers=layers).planned_parameters == 24 * 24
    assert evaluate(model, batches).planned_parameters == 2 * (4 * 24 * 24 + 2 * 24 * 40)


def smoothed(plain: Any) -> Any:
    class SmoothedForSequenceClassification(type(plain)):  # type: ignore[misc]
        def forward(self, **batch: Any) -> Any:
            output = super().forward(**batch)
            output.loss = cross_entropy(output.logits, batch["labels"], label_smoothing=0.2)
            return output

    model = SmoothedForSequenceClassification(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize("kind", [*tiny.MODELS, "smoothed", "half"])
def test_losses_of_examples_are_those_of_each_by_itself(kind: str) -> None:
    if kind == "smoothed":
        model = smoothed(tiny.bert(num_labels=3))
    else:
        model = tiny.llama().bfloat16() if kind == "half" else tiny.MODELS[kind]()
    batches = tiny.batches(model)
    found = evaluate(model, batches, per_example=True)
    assert found.example_losses is not None and found.example_targets is not None
    assert len(found.example_losses) == len(found.example_targets) == found.examples == 6
    assert sum(found.example_targets) == found.targets
    assert sum(found.example_losses) / found.targets == pytest.approx(found.loss, rel=1e-5)
    near = 0.02 if kind == "half" else 1e-4
    parts = [evaluate(model, [example]) for example in one_by_one(batches)]
    for part, loss, targets in zip(parts, found.example_losses, found.example_targets, strict=True):
        assert part.targets == targets
        assert part.loss * targets == pytest.approx(loss, rel=near)
    plain = evaluate(model, batches)
    assert plain.loss == found.loss and plain.example_losses is None


def test_losses_of_ones_own_are_handed_on() -> None:
    model = tiny.llama()

    def own(model: Any, batch: Batch) -> Tensor:
        return model(**batch).logits.float().mean((1, 2)).square()  # type: ignore[no-any-return]

    batches = tiny.batches(model)
    found = evaluate(model, batches, loss_fn=own, per_example=True)
    with torch.no_grad():
        wanted = torch.cat([own(model, batch) for batch in batches])
    assert found.example_losses == pytest.approx(wanted.tolist())
    assert found.example_targets == (1,) * 6


@torch.no_grad()
def apart(model: Any, dense: Any, batches: Any) -> float:
    """Mean KL of all targets (squared distance of numbers), in the words of torch.distributions."""
    found = []
    for batch in batches:
        ready = prepare(task_of(dense), batch, torch.device("cpu"))
        ours, theirs = (each(**ready).logits.double() for each in (model, dense))
        if task_of(dense) == "regression":
            found.append((ours - theirs).square().flatten())
            continue
        ours, labels = aligned(task_of(dense), ours, ready["labels"])
        theirs, _ = aligned(task_of(dense), theirs, ready["labels"])
        kl = kl_divergence(Categorical(logits=theirs), Categorical(logits=ours))
        found.append(kl[labels != -100].flatten())
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_divergence_from_a_dense_model_is_measured(name: str) -> None:
    dense = tiny.MODELS[name]()
    batches = tiny.batches(dense, count=4)
    model = copy.deepcopy(dense)
    profile = profile_model(model, batches[:2], form="pivoted")
    apply_plan(model, make_plan(profile, keep=0.5), profile)
    dense.train()
    found = evaluate(model, batches[2:], also={"first": batches[:1]}, dense=dense)
    assert dense.training
    dense.eval()
    kl = pytest.approx(apart(model.eval(), dense, batches[2:]), rel=1e-3, abs=1e-7)
    assert found.metrics["divergence"] == kl
    of_first = pytest.approx(apart(model, dense, batches[:1]), rel=1e-3, abs=1e-7)
    assert found.of_others["divergence of first"] == of_first
    same = evaluate(dense, batches[2:], dense=dense).metrics["divergence"]
    assert same == pytest.approx(0.0, abs=1e-12)
    assert "divergence" not in evaluate(dense, batches[2:]).metrics


def test_a_dense_model_of_something_else_is_refused() -> None:
    model, batches = tiny.bert(), tiny.batches(tiny.bert())
    others = {
        "its task is causal-lm, not sequence-classification": tiny.llama(),
        "it has 3 classes, not 2": tiny.bert(num_labels=3),
        "it has 100 tokens, not": tiny.bert(vocab_size=100),
    }
    for said, other in others.items():
        with pytest.raises(ModelError, match=f"not what the model was compressed from: {said}"):
            evaluate(model, batches, dense=other)
    with pytest.raises(ModelError, match="of a loss_fn no predictions are known"):
        evaluate(model, batches, dense=model, loss_fn=lambda model, batch: batch)
