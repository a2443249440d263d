"""Which estimator a task has if none is asked for, and when given labels say too little."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rankopt import Profile, profile_model
from rankopt.measure.estimators import FEW_OUTPUTS
from rankopt.model.inputs import IGNORED
from rankopt.model.likelihood import draw_labels, entropies, term_losses
from rankopt.model.tasks import Batch
from tests import tiny
from tests.measure.test_expected import smoothed

CHOSEN: dict[str, tuple[Callable[[], Any], str, str]] = {
    "two classes": (tiny.bert, "expected", "2 outputs: every label is weighed"),
    "as many as are few": (
        lambda: tiny.bert(num_labels=FEW_OUTPUTS),
        "expected",
        f"{FEW_OUTPUTS} outputs",
    ),
    "many classes": (
        lambda: tiny.bert(num_labels=FEW_OUTPUTS + 1),
        "sampled",
        f"{FEW_OUTPUTS + 1} outputs, more than {FEW_OUTPUTS}",
    ),
    "a number": (lambda: tiny.bert(num_labels=1), "expected", "1 output:"),
    "tokens": (lambda: tiny.bert("TokenClassification"), "sampled", "a label at every position"),
    "causal": (tiny.llama, "empirical", "language model"),
    "masked": (lambda: tiny.bert("MaskedLM"), "empirical", "language model"),
    "encoder and decoder": (tiny.t5, "empirical", "language model"),
    "no likelihood": (smoothed, "empirical", "no likelihood"),
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_the_task_chooses_the_estimator_and_the_profile_says_why(kind: str, tmp_path: Path) -> None:
    build, estimator, why = CHOSEN[kind]
    model = build()
    batches = tiny.batches(model)
    profile = profile_model(model, batches, keep_bases=False)
    assert profile.info.estimator == estimator
    assert profile.info.estimator_reason is not None and why in profile.info.estimator_reason
    profile.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").info == profile.info
    asked = profile_model(model, batches, keep_bases=False, estimator=estimator)  # type: ignore[arg-type]
    assert asked.info.estimator_reason is None
    assert "estimator_reason" not in asked.info.model_dump()
    assert (asked.batch_fisher == profile.batch_fisher).all()


def test_a_loss_of_ones_own_is_taken_at_given_labels() -> None:
    def own(model: Any, batch: Batch) -> Tensor:
        logits = model(**{k: x for k, x in batch.items() if k != "labels"}).logits
        return cross_entropy(logits, batch["labels"], reduction="none")

    model = tiny.bert()
    profile = profile_model(model, tiny.batches(model), keep_bases=False, loss_fn=own)
    assert profile.info.estimator == "empirical" and profile.info.estimator_reason


@pytest.mark.parametrize("task", ["causal-lm", "token-classification", "sequence-classification"])
def test_entropies_are_what_losses_are_on_average(task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 5) if task == "sequence-classification" else (2, 4, 5)
    logits = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits[..., 3] = -math.inf
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    if labels.dim() == 2:
        labels[1, 2:] = IGNORED
    found = entropies(task, logits, labels)
    losses = [term_losses(task, logits, labels.where(labels == IGNORED, k)) for k in range(5)]
    wanted = sum((-loss).exp() * loss for k, loss in enumerate(losses) if k != 3)
    assert found.shape == losses[0].shape
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_entropies_of_answers_are_those_of_two_classes() -> None:
    logits = torch.tensor([[0.0, 2.0, -700.0]])
    pairs = torch.stack([logits, torch.zeros_like(logits)], -1)
    found = entropies("multi-label-classification", logits, torch.zeros(1, 3))
    wanted = entropies("sequence-classification", pairs[0], torch.zeros(3, dtype=torch.long))
    assert torch.allclose(found, wanted.T.double(), atol=1e-6)


def fitted(*, right: bool) -> tuple[Any, list[Batch]]:
    """A classifier that is sure of itself, and labels that it predicts, or that it would draw."""
    model = tiny.bert(num_labels=3)
    batches = tiny.batches(model, count=4, size=16)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        spread = torch.cat([model(**batch).logits for batch in batches]).std()
        model.classifier.weight.mul_(5.0 / spread)
        for batch in batches:
            logits = model(**batch).logits
            drawn = draw_labels("sequence-classification", logits, batch["labels"], generator)
            batch["labels"] = logits.argmax(1) if right else drawn
    return model, batches


def test_labels_that_are_predicted_are_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, batches = fitted(right=True)
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    chances = logits.softmax(1)
    loss = float(-chances.max(1).values.log().mean())
    entropy = float(torch.special.entr(chances).sum(1).mean())
    assert loss < 0.6 * entropy
    options: dict[str, Any] = {"keep_bases": False, "estimator": "empirical"}
    path = tmp_path / "partial"
    for count, said in ((3, False), (4, True)):
        # Goes on in the middle of the data: what was seen before counts, too.
        profile_model(model, batches[:count], checkpoint=path, checkpoint_every=1, **options)
        text = capsys.readouterr().err
        numbers = f"is {loss:.3g} nats per target, far below the {entropy:.3g}"
        assert (numbers in text) == said and "--estimator expected" in text
    for other in ({"estimator": "expected"}, {"estimator": "sampled"}, {}):
        profile_model(model, batches, **{"keep_bases": False, **other})
        assert "warning" not in capsys.readouterr().err
    model, batches = fitted(right=False)
    profile_model(model, batches, **options)
    assert "warning" not in capsys.readouterr().err
