"""Examples that are not apart, and losses that are no mean, are refused on the first batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BertForSequenceClassification

from rankopt import ModelError, profile_model
from tests import tiny
from tests.measure.exact import difference, rows_of

Batch = dict[str, Any]


class Blocks(nn.Module):
    """Examples first or second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers[1](torch.tanh(self.layers[0](x)))
        return found


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().flatten(1).sum(1)


def time_first(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.transpose(0, 1)).square().sum(2).sum(0)


def contrastive(model: nn.Module, batch: Tensor) -> Tensor:
    found = normalize(model(batch).flatten(1), dim=-1)
    return cross_entropy(5 * found @ found.roll(1, 0).T, torch.arange(len(found)), reduction="none")


def last_two(model: nn.Module, batch: Tensor) -> Tensor:
    found = losses(model, batch)
    return torch.cat([found[:-2], found[-2:-1] * found[-1:], found[-1:]])


@pytest.mark.parametrize("size", [2, 5, 9, 33])
@pytest.mark.parametrize("loss", [time_first, contrastive, last_two])
def test_examples_that_are_mixed_are_refused(
    loss: Callable[[nn.Module, Tensor], Tensor], size: int
) -> None:
    batch = torch.randn(size, size, 6, generator=torch.Generator().manual_seed(size))
    with pytest.raises(ModelError, match=r"layer layers.*which example an input belongs to"):
        profile_model(Blocks(), [batch], loss_fn=loss, progress=False)
    # One example tells nothing of it; the first batch of several does.
    with pytest.raises(ModelError, match="which example an input belongs to"):
        profile_model(Blocks(), [batch[:, :1][:1], batch], loss_fn=loss, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_examples_that_are_apart_are_measured(dtype: torch.dtype) -> None:
    batch = torch.randn(21, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = Blocks().to(dtype)
    together = profile_model(model, [batch], loss_fn=losses, progress=False, keep_bases=False)
    single = [batch[n : n + 1] for n in range(21)]
    apart = profile_model(model, single, loss_fn=losses, progress=False, keep_bases=False)
    bound = 30 * torch.finfo(dtype).eps
    assert difference(rows_of(together), rows_of(apart)) < bound


class WeightedForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    """Classes count differently."""

    def forward(self, **batch: Any) -> Any:
        output = super().forward(**batch)
        weights = torch.tensor([1.0, 9.0, 1.0])
        output.loss = cross_entropy(output.logits, batch["labels"], weight=weights)
        return output


@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 0, 1, 1, 1]], [[0], [1, 0]], [[0, 2, 0], [2, 2], [0, 1, 2]], [[1, 1], [0, 0], [0, 1]]],
)
def test_weights_of_classes_are_refused_whenever_they_show(labels: list[list[int]]) -> None:
    plain = tiny.bert(num_labels=3)
    model = WeightedForSequenceClassification(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(3, tiny.VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids[: len(each)], "labels": torch.tensor(each)} for each in labels]
    with pytest.raises(ModelError, match="not a plain mean"):
        profile_model(model, batches, progress=False)


@pytest.mark.parametrize("size", [1, 3])
def test_an_auxiliary_loss_is_refused_for_one_example_too(size: int) -> None:
    model = tiny.mixtral(output_router_logits=True)
    with pytest.raises(ModelError, match=r"not a plain mean .* an auxiliary loss is added"):
        profile_model(model, tiny.batches(model, size=size), progress=False)


def test_a_loss_of_more_terms_than_counted_is_refused_although_examples_agree() -> None:
    class OtherForTokenClassification(type(tiny.bert("TokenClassification"))):  # type: ignore[misc]
        def forward(self, **batch: Any) -> Any:
            output = super().forward(**batch)
            smoothed = cross_entropy(
                output.logits.mT, batch["labels"], label_smoothing=0.1, reduction="sum"
            )
            output.loss = smoothed / batch["labels"].numel()
            return output

    plain = tiny.bert("TokenClassification", num_labels=4)
    model = OtherForTokenClassification(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    with pytest.raises(ModelError, match="not a plain mean"):
        profile_model(model, tiny.batches(plain), progress=False)
