"""What is drawn has the right expectation, depends on the seed alone, and is refused elsewhere."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification

from rankopt import ModelError, OptionError, profile_model
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.measure.processes import Processes
from rankopt.model.likelihood import draw_labels, term_losses
from rankopt.model.selection import find_layers
from rankopt.model.tasks import (
    IGNORED,
    loss_terms,
    mean_loss,
    prepare,
    task_of,
)
from tests import tiny
from tests.measure.exact import difference, in_double, one_by_one, rows_of

Batch = dict[str, Any]
Rows = dict[str, Tensor]


#: Some layers near the loss: draws are many.
FEW = ["*.1.mlp.*_proj", "*.layer.1.*.dense"]


def few(model: Any) -> list[str]:
    return FEW[:1] if task_of(model) == "causal-lm" else FEW[1:]


def gradients(model: Any, loss: Tensor) -> Rows:
    modules = find_layers(model, include=few(model)).modules
    weights = [module.weight for module in modules.values()]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    return dict(zip(modules, found, strict=True))


@torch.no_grad()
def added(total: Rows, gradient: Rows, chance: float = 1.0) -> None:
    for name, each in gradient.items():
        total[name] = total.get(name, torch.zeros(())) + chance * each.square().sum(0)


def answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and labels where labels are, one after the other, of one example."""
    task, logits = task_of(model), model(**batch).logits
    labels = batch["labels"]
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return logits[labels != IGNORED], labels[labels != IGNORED]


def expectation(model: Any, batches: list[Batch]) -> Rows:
    """Over all labels that the model can draw, each term by itself: terms are independent."""
    total: Rows = {}
    for example in one_by_one(batches):
        logits, _ = answers(model, example)
        for at, label in itertools.product(range(len(logits)), range(logits.shape[1])):
            chances = logits[at].softmax(-1)
            gradient = gradients(model, -chances[label].log())
            added(total, gradient, chances[label].item())
    return total


def jointly(model: Any, batches: list[Batch]) -> Rows:
    """Over all combinations of labels of an example: the unit of an example by definition."""
    total: Rows = {}
    for example in one_by_one(batches):
        logits, _ = answers(model, example)
        logs = logits.log_softmax(-1)
        each = [[gradients(model, -log) for log in logs[at]] for at in range(len(logs))]
        for labels in itertools.product(range(logits.shape[1]), repeat=len(logits)):
            picked = [each[at][label] for at, label in enumerate(labels)]
            chance = float(sum(logs[at, label].item() for at, label in enumerate(labels)))
            added(total, {n: sum(g[n] for g in picked) for n in picked[0]}, math.exp(chance))
    return total


def each_token(model: Any, batches: list[Batch]) -> Rows:
    total: Rows = {}
    for example in one_by_one(batches):
        logits, labels = answers(model, example)
        for loss in cross_entropy(logits, labels, reduction="none"):
            added(total, gradients(model, loss))
    return total


def small(kind: str) -> tuple[Any, list[Batch]]:
    """A model in float64 with few labels, trainable."""
    if kind == "llama":
        model = tiny.llama(vocab_size=5, pad_token_id=None, tie_word_embeddings=False)
        ids = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[0, 3] = IGNORED
        batches = [{"input_ids": ids, "labels": labels}]
    elif kind == "bert-tokens":
        model = tiny.bert("TokenClassification", num_labels=3)
        batches = [{k: v[:, :5] for k, v in tiny.batches(model, count=1, tokens=8)[0].items()}]
        batches[0]["labels"][2, 2:] = IGNORED
    else:
        model = tiny.bert(num_labels=3)
        batches = tiny.batches(model)
        with torch.no_grad():
            # Given labels that the model would hardly draw.
            model.classifier.weight.mul_(3.0)
            for batch in batches:
                batch["labels"] = model(**batch).logits.argmin(1)
    return in_double(model).requires_grad_(True), batches


def measured(model: Any, batches: list[Batch], **options: Any) -> Rows:
    profile = profile_model(model, batches, keep_bases=False, include=few(model), **options)
    found = rows_of(profile)
    assert profile.info.units == options["draws"] * (
        profile.info.targets if options.get("unit") == "token" else profile.examples
    )
    model.requires_grad_(True)
    return {name: rows / options["draws"] for name, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        pytest.param("bert-classification", marks=pytest.mark.slow),
        pytest.param("bert-tokens", marks=pytest.mark.slow),
    ],
)
def test_labels_drawn_from_the_model_have_the_true_fisher_as_expectation(kind: str) -> None:
    model, batches = small(kind)
    wanted = expectation(model, batches)
    errors = [
        difference(measured(model, batches, estimator="sampled", draws=draws, seed=seed), wanted)
        for draws, seed in ((40, 1), (40, 2), (1000, 3))
    ]
    # 25 times the draws: a fifth of the error.
    assert errors[2] < 0.12 and errors[2] < min(errors[:2])
    empirical = profile_model(
        model, batches, keep_bases=False, include=few(model), estimator="empirical"
    )
    assert difference(rows_of(empirical), wanted) > 0.3


def test_terms_are_independent_so_that_examples_and_tokens_have_one_expectation() -> None:
    model, batches = small("llama")
    batches = [{k: v[:1, :3] for k, v in batches[0].items()}]
    assert difference(jointly(model, batches), expectation(model, batches)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", pytest.param("bert-tokens", marks=pytest.mark.slow)])
def test_random_signs_take_tokens_apart(kind: str) -> None:
    model, batches = small(kind)
    wanted = each_token(model, batches)
    errors = [
        difference(
            measured(model, batches, estimator="empirical", unit="token", draws=draws, seed=seed),
            wanted,
        )
        for draws, seed in ((40, 1), (40, 2), (1000, 3))
    ]
    assert errors[2] < 0.1 and errors[2] < min(errors[:2])
    together = profile_model(
        model, batches, keep_bases=False, include=few(model), estimator="empirical"
    )
    assert difference(rows_of(together), wanted) > 0.3


def test_all_signs_together_are_exact() -> None:
    """The mean over all 2^terms signs is the sum over tokens: nothing but the draw is random."""
    model, batches = small("llama")
    example = one_by_one(batches)[1]
    logits, labels = answers(model, example)
    terms = cross_entropy(logits, labels, reduction="none")
    total: Rows = {}
    for signs in itertools.product([-1.0, 1.0], repeat=len(terms)):
        added(total, gradients(model, terms @ torch.tensor(signs).double()), 0.5 ** len(terms))
    assert difference(total, each_token(model, [example])) < 1e-10


@pytest.mark.parametrize("options", [{"estimator": "sampled"}, {"unit": "token"}])
def test_the_seed_and_the_place_in_the_data_decide_and_nothing_else(
    options: dict[str, Any],
) -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=3)

    def digest(seed: int, given: list[Batch] = batches) -> str:
        return profile_model(model, given, keep_bases=False, seed=seed, **options).digest()

    torch.manual_seed(1)
    first = digest(7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert digest(7) == first != digest(8)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert digest(7, batches[::-1]) != first


@pytest.mark.parametrize("options", [{"estimator": "sampled"}, {"unit": "token"}])
def test_the_same_batch_again_is_drawn_anew(options: dict[str, Any]) -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=1)
    once = profile_model(model, batches, keep_bases=False, **options).batch_fisher
    twice = profile_model(model, batches * 2, keep_bases=False, **options).batch_fisher
    assert (twice[0] == once[0]).all()
    assert (abs(twice[1] - twice[0]) > 1e-3 * twice[0]).all()


@pytest.mark.parametrize("options", [{"kind": "sampled"}, {"unit": "token", "draws": 2}])
def test_what_is_drawn_does_not_depend_on_who_draws(options: dict[str, Any]) -> None:
    model = in_double(tiny.llama())
    batches, modules = tiny.batches(model, count=4), find_layers(model).modules
    objective = ModelLoss("causal-lm", Estimator(**options))
    whole = gather(model, modules, batches, objective, ()).sums
    shares = [
        gather(model, modules, batches, objective, (), processes=Alone(rank, 2)).sums
        for rank in range(2)
    ]
    for name in modules:
        together = shares[0][name].rows + shares[1][name].rows
        assert torch.allclose(together, whole[name].rows, rtol=1e-12, atol=0.0)


@dataclasses.dataclass(frozen=True)
class Alone(Processes):
    """Takes its share and hears nothing of the others."""

    def add_up(self, tensors: Any) -> None:
        pass

    def together(self, mine: Any) -> Any:
        return mine

    def latest(self, batches: int, found: list[float]) -> tuple[int, list[float]]:
        return batches, found


LABELLED = {
    "causal-lm": tiny.llama,
    "seq2seq-lm": tiny.t5,
    "token-classification": lambda: tiny.bert("TokenClassification", num_labels=4),
    "sequence-classification": lambda: tiny.bert(num_labels=3),
    "image-classification": tiny.vit,
    "regression": lambda: tiny.bert(num_labels=1),
    "several numbers": lambda: tiny.bert(num_labels=3, problem_type="regression"),
    "yes or no": lambda: tiny.bert(num_labels=8, problem_type="multi_label_classification"),
    "masked-lm": lambda: tiny.bert("MaskedLM"),
}


def labelled(kind: str) -> tuple[Any, list[Batch]]:
    model = LABELLED[kind]()
    batches = tiny.batches(model)
    generator = torch.Generator().manual_seed(3)
    for batch in batches:
        if kind == "several numbers":
            batch["labels"] = torch.randn(3, 3, generator=generator)
        elif kind == "yes or no":
            # As many labels as positions: they are no labels of positions.
            batch["labels"] = (torch.rand(3, 8, generator=generator) < 0.5).float()
            assert batch["labels"].shape == batch["attention_mask"].shape
    return model, batches


@pytest.mark.parametrize("kind", LABELLED)
def test_the_terms_are_those_of_the_models_own_loss(kind: str) -> None:
    model, batches = labelled(kind)
    task = task_of(model)
    assert task == {"several numbers": "regression", "yes or no": "multi-label-classification"}.get(
        kind, kind
    )
    for batch in batches:
        ready = prepare(task, batch, torch.device("cpu"))
        # Labels of padding are left out already, and labels of examples are none of positions.
        assert torch.equal(ready["labels"], batch["labels"])
        with torch.no_grad():
            loss, output = mean_loss(model, ready)
        terms = term_losses(task, output.logits, ready["labels"])
        assert terms.shape[0] == 3
        counts = loss_terms(task, ready["labels"])
        assert torch.allclose(terms.sum() / counts.sum(), loss, rtol=1e-5)
        live = (terms != 0.0).sum(1)
        assert torch.equal(live, counts)


@pytest.mark.parametrize("kind", LABELLED)
def test_every_task_can_be_sampled_and_taken_apart(kind: str) -> None:
    model, batches = labelled(kind)
    given = rows_of(profile_model(model, batches, keep_bases=False, estimator="empirical"))
    for options in ({"estimator": "sampled"}, {"estimator": "empirical", "unit": "token"}):
        profile = profile_model(model, batches, keep_bases=False, **options)
        found = rows_of(profile)
        assert all(bool(torch.isfinite(rows).all()) for rows in found.values())
        if kind in ("causal-lm", "seq2seq-lm", "yes or no") or "unit" not in options:
            assert difference(found, given) > 1e-3
        assert profile.info.units == (profile.info.targets if "unit" in options else 6)


@pytest.mark.parametrize("kind", LABELLED)
def test_drawn_labels_are_where_labels_are_and_of_their_kind(kind: str) -> None:
    model, batches = labelled(kind)
    task = task_of(model)
    ready = prepare(task, batches[0], torch.device("cpu"))
    with torch.no_grad():
        logits = model(**ready).logits
    labels = ready["labels"]
    drawn = draw_labels(task, logits, labels, torch.Generator().manual_seed(0))
    assert drawn.shape == labels.shape
    if task == "regression":
        assert drawn.is_floating_point()
        return
    assert drawn.dtype == labels.dtype
    if task == "causal-lm":
        assert torch.equal(drawn[:, :1], labels[:, :1])
    if labels.is_floating_point():
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        return
    assert torch.equal(drawn == IGNORED, labels == IGNORED)
    assert drawn[drawn != IGNORED].min() >= 0 and drawn.max() < logits.shape[-1]
    assert not torch.equal(drawn, labels)


@pytest.mark.parametrize("kind", ["regression", "several numbers", "yes or no"])
def test_numbers_and_answers_are_drawn_from_the_likelihood_that_the_loss_states(
    kind: str,
) -> None:
    model, batches = labelled(kind)
    task = task_of(model)
    labels = batches[0]["labels"][:1].repeat(20000, *[1] * (batches[0]["labels"].dim() - 1))
    with torch.no_grad():
        logits = model(**{k: v[:1] for k, v in batches[0].items()}).logits
    logits = logits.repeat(20000, 1)
    drawn = draw_labels(task, logits, labels, torch.Generator().manual_seed(0)).reshape(20000, -1)
    if task == "regression":
        # exp(-(y - mean)^2) is a normal distribution of variance 1/2.
        assert torch.allclose(drawn.mean(0), logits[0], atol=0.03)
        assert torch.allclose(drawn.var(0), torch.full_like(logits[0], 0.5), atol=0.03)
    else:
        assert torch.allclose(drawn.mean(0), logits[0].sigmoid(), atol=0.02)
    # The score has mean zero under the model's own distribution.
    logits.requires_grad_(True)
    (score,) = torch.autograd.grad(term_losses(task, logits, drawn).sum() / 20000, logits)
    assert float(score.sum(0).abs().max()) < 0.05


class SmoothedForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    def forward(self, **batch: Any) -> Any:
        output = super().forward(**batch)
        output.loss = cross_entropy(output.logits, batch["labels"], label_smoothing=0.2)
        return output


@pytest.mark.parametrize(
    "options", [{"estimator": "sampled"}, {"estimator": "empirical", "unit": "token"}]
)
def test_a_loss_that_is_no_likelihood_is_not_drawn_from(options: dict[str, Any]) -> None:
    plain = tiny.bert(num_labels=3)
    model = SmoothedForSequenceClassification(plain.config)
    model.load_state_dict(plain.state_dict())
    batches = tiny.batches(plain)
    with pytest.raises(ModelError, match="labels cannot be drawn"):
        profile_model(model, batches, **options)
    assert profile_model(model, batches).examples == 6, "given labels are no problem"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"draws": 2}, "draws=2 with given labels"),
        ({"draws": 0}, "at least 1"),
        ({"estimator": "exact"}, "unknown estimator 'exact'; known: auto, empirical"),
        ({"unit": "word"}, "unknown unit 'word'; known: example, token"),
        ({"estimator": "sampled", "loss_fn": lambda m, b: m(**b).loss}, "labels cannot be drawn"),
        ({"unit": "token", "loss_fn": lambda m, b: m(**b).loss}, "tokens taken apart"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, Any], complaint: str
) -> None:
    model = tiny.bert()
    with pytest.raises(OptionError, match=complaint):
        profile_model(model, tiny.batches(model), **options)
