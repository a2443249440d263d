"""The table of architectures in rankopt/README.md, made by going all the way with each.

``python -m tests.architectures`` writes it anew; test_architectures compares it.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankopt import (
    LowRank,
    ModelError,
    Plan,
    Profile,
    apply_plan,
    evaluate,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.model.size import model_size
from tests import tiny

DOCUMENT = Path(__file__).parent.parent / "rankopt" / "README.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"
STEPS = ("profile", "plan", "apply", "save", "reload", "evaluate")


class Blocks(nn.Module):
    """A module of nobody's library, with blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(B, T, 12)`` -> ``(B, 4)``."""
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        found: Tensor = self.head(x.mean(1))
        return found


def sequential() -> nn.Sequential:
    """Layers in a row, and no blocks."""
    torch.manual_seed(14)
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 4))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example, as a user would write it."""
    x, labels = batch
    return cross_entropy(model(x), labels, reduction="none")


def plain_batches() -> list[tuple[Tensor, Tensor]]:
    """Two batches of six examples for the plain modules."""
    generator = torch.Generator().manual_seed(15)
    return [
        (torch.randn(6, 5, 12, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(2)
    ]


#: Name in the table -> builder.
ROWS: dict[str, Callable[[], Any]] = {
    "BERT": tiny.bert,
    "RoBERTa": tiny.roberta,
    "DistilBERT": tiny.distilbert,
    "ALBERT": tiny.albert,
    "T5": tiny.t5,
    "GPT-2": tiny.gpt2,
    "Llama": tiny.llama,
    "Mistral": tiny.mistral,
    "Qwen3": tiny.qwen,
    "Mixtral": tiny.mixtral,
    "ViT": tiny.vit,
    "DINOv2": tiny.dinov2,
    "Whisper": tiny.whisper,
    "module with an `nn.ModuleList`": Blocks,
    "`nn.Sequential`": sequential,
}


class Journey:
    """One architecture, step by step; each returns its cell, and raises if it does not hold."""

    def __init__(self, build: Callable[[], Any], folder: Path) -> None:
        self.build, self.folder = build, folder
        self.model = build()
        self.ours = hasattr(self.model, "config")
        self.batches = tiny.batches(self.model) if self.ours else plain_batches()
        self.options: dict[str, Any] = {} if self.ours else {"loss_fn": losses}
        self.measured: Profile
        self.planned: Plan
        self.reloaded: Any

    def outputs(self, model: Any) -> Tensor:
        """Of the first batch; from a copy, whose weights are aligned in memory."""
        aligned = copy.deepcopy(model).eval()
        with torch.no_grad():
            if not self.ours:
                found: Tensor = aligned(self.batches[0][0])
                return found
            logits: Tensor = aligned(**self.batches[0]).logits
            return logits

    def profile(self) -> str:
        """Measured, written and read again."""
        self.measured = profile_model(self.model, self.batches, progress=False, **self.options)
        self.measured.save(self.folder / "profile.safetensors")
        read = Profile.load(self.folder / "profile.safetensors")
        assert read.digest() == self.measured.digest()
        return "yes"

    def plan(self) -> str:
        """Optimal, within the budget, written and read again."""
        self.planned = make_plan(self.measured, keep=0.5)
        assert self.planned.certificate.status == "optimal"
        assert 0 < self.planned.size.planned <= self.planned.size.planned_dense // 2
        self.planned.save(self.folder / "plan.json")
        assert Plan.load(self.folder / "plan.json") == self.planned
        return "yes"

    def apply(self) -> str:
        """Exactly as many parameters as planned, and another function."""
        before = self.outputs(self.model)
        apply_plan(self.model, self.planned, self.measured, progress=False)
        assert model_size(self.model).model == self.planned.size.model
        assert model_size(self.model).planned == self.planned.size.planned
        assert any(isinstance(module, LowRank) for module in self.model.modules())
        assert not torch.allclose(self.outputs(self.model), before, atol=1e-4)
        return "yes"

    def save(self) -> str:
        """As a transformers folder; or, of other modules, the weights alone."""
        if self.ours:
            save_model(self.model, self.folder / "model", plan=self.planned)
            return "yes"
        with contextlib.suppress(ModelError):
            save_model(self.model, self.folder / "model")
            raise AssertionError("it was saved")
        torch.save(self.model.state_dict(), self.folder / "weights.pt")
        return "`state_dict`"

    def reload(self) -> str:
        """The same to the bit; other modules are made anew, given the ranks, and filled."""
        if self.ours:
            self.reloaded = type(self.model).from_pretrained(self.folder / "model")
        else:
            self.reloaded = self.build()
            with torch.no_grad():
                for parameter in self.reloaded.parameters():
                    parameter.normal_()
            apply_plan(self.reloaded, self.planned, self.measured, allow_other_weights=True)
            self.reloaded.load_state_dict(torch.load(self.folder / "weights.pt"))
        assert torch.equal(self.outputs(self.reloaded), self.outputs(self.model))
        return "yes" if self.ours else "`state_dict`"

    def evaluate(self) -> str:
        """The model that came back, and its size, are what was planned."""
        found = evaluate(self.reloaded, self.batches, progress=False, **self.options)
        wanted = evaluate(self.model, self.batches, progress=False, **self.options)
        assert abs(found.loss - wanted.loss) <= 1e-5 * wanted.loss
        assert found.planned_parameters == self.planned.size.planned
        return "yes"


def row(name: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        journey = Journey(ROWS[name], Path(folder))
        cells = [getattr(journey, step)() for step in STEPS]
        task = journey.measured.info.task
    return f"| {name} | {task} | {' | '.join(cells)} |\n"


def header() -> str:
    """The first two lines of the table."""
    return f"| architecture | task | {' | '.join(STEPS)} |\n|{' --- |' * (2 + len(STEPS))}\n"


def documented() -> str:
    """The table as it is in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def document(table: str) -> None:
    """Put the table in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(before + table + after, encoding="utf-8")


def _rows() -> Iterator[str]:
    for name in ROWS:
        line = row(name)
        print(line, end="")
        yield line


if __name__ == "__main__":
    document(header() + "".join(_rows()))
