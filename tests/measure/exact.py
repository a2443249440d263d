"""What tests compare with: gradients of single examples, taken one by one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from rankopt import Profile, profile_model
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.model.selection import find_layers
from rankopt.model.tasks import task_of
from rankopt.model.weights import is_conv1d

Batch = dict[str, Any]
Rows = dict[str, Tensor]


def summed_loss(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as textbooks have it, summed over its terms; nothing of rankopt or transformers."""
    if task == "regression":
        return mse_loss(logits.flatten(), labels.to(logits.dtype), reduction="sum")
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def one_by_one(batches: list[Batch]) -> list[Batch]:
    return [
        {name: value[n : n + 1] for name, value in batch.items()}
        for batch in batches
        for n in range(len(batch["labels"]))
    ]


def weight_gradients(model: Any, batch: Batch, **options: Any) -> Rows:
    """Gradients of the batch's summed loss with respect to the planned weights, (out, in).

    Modules that share a weight have each the gradient of its own uses.
    """
    task, modules = task_of(model), find_layers(model, **options).modules
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def loss(weights: Rows) -> Tensor:
        values = {**parameters, **weights}
        output = torch.func.functional_call(
            model, values, kwargs={**batch, **extra}, tie_weights=False
        )
        return summed_loss(task, output.logits, batch["labels"])

    weights = {f"{name}.weight": module.weight.detach() for name, module in modules.items()}
    found = torch.func.grad(loss)(weights)
    turned = {n for n, module in modules.items() if is_conv1d(module) or is_embedding(module)}
    return {n: found[f"{n}.weight"].T if n in turned else found[f"{n}.weight"] for n in modules}


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def squares(model: Any, batches: list[Batch], **options: Any) -> Rows:
    """The Fisher information of each weight, (out, in)."""
    total: Rows = {}
    for example in one_by_one(batches):
        for name, gradient in weight_gradients(model, example, **options).items():
            total[name] = total.get(name, torch.zeros(())) + gradient.double().square()
    return total


def brute_force(model: Any, batches: list[Batch]) -> Rows:
    return {name: elements.sum(0) for name, elements in squares(model, batches).items()}


def rows_of(profile: Profile) -> Rows:
    return {name: torch.from_numpy(rows) for name, rows in profile.fisher_rows.items()}


def columns_of(profile: Profile) -> Rows:
    return {name: torch.from_numpy(found) for name, found in profile.fisher_columns.items()}


def elements_of(model: Any, batches: list[Batch]) -> Rows:
    modules = find_layers(model).modules
    found = gather(model, modules, batches, ModelLoss(task_of(model), Estimator()), {"elements"})
    return {name: found.sums[name].elements for name in modules}


def measured(model: Any, batches: list[Batch]) -> Rows:
    return rows_of(profile_model(model, batches, keep_bases=False, estimator="empirical"))


def difference(found: Rows, wanted: Rows) -> float:
    """The largest relative error of a layer."""
    assert found.keys() == wanted.keys()
    with torch.no_grad():
        return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def three_sums(model: Any, batches: list[Batch]) -> tuple[Profile, dict[str, Rows]]:
    profile = profile_model(
        model, batches, backends=["fwsvd_two_sided"], keep_bases=False, estimator="empirical"
    )
    found = {"rows": rows_of(profile), "columns": columns_of(profile)}
    return profile, {**found, "elements": elements_of(model, batches)}


def in_double(model: Any) -> Any:
    """In float64 throughout: transformers' own causal loss goes through float32."""
    if task_of(model) == "causal-lm":
        model.loss_function = lambda logits, labels, *_, **__: (
            summed_loss("causal-lm", logits, labels) / (labels[:, 1:] != -100).sum()
        )
    if hasattr(model, "set_experts_implementation"):
        # Grouped products know no float64.
        model.set_experts_implementation("eager")
    return model.double()


def wide(batch: Batch) -> Batch:
    """Pictures, sound and scores in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def targets_by_hand(model: Any, batches: list[Batch]) -> int:
    skipped = 1 if task_of(model) == "causal-lm" else 0
    labels = [batch["labels"] for batch in batches]
    if labels[0].dim() == 2:
        labels = [each[:, skipped:] for each in labels]
    return sum(int((each != -100).sum()) for each in labels)
