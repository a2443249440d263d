"""Tasks of GLUE, and models fine-tuned on them: what 09 and 14 measure.

The rows come through the datasets library (nyu-mll/glue), or from a folder with NAME/train.tsv and
NAME/dev.tsv.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4
BATCH = 32
MAX_LENGTH = 128
SEED = 0
#: Of nyu-mll/glue, for the files' names.
SPLITS = {"train": "train", "dev": "validation"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: of its folder, and in nyu-mll/glue.
        text: column of the text.
        pair: column of the second text, if there is one.
        epochs: of fine-tuning.
        training: rows to fine-tune on, at equal distances over the split; None is all.
        label: column of the label in the files; the library calls it ``label``.
        classes: how many; 1 is a regression.
        left_out: one of so many training rows decides which epoch's state is taken, the one with
            the least loss on them, and is not learned from; 0 takes the last state.
    """

    name: str
    text: str
    pair: str | None
    epochs: int
    training: int | None = None
    label: str = "label"
    classes: int = 2
    left_out: int = 0

    @property
    def kind(self) -> str:
        """As rankopt names it."""
        return "regression" if self.classes == 1 else "sequence-classification"


def rows_of(task: Task, data: Path | None, split: str) -> list[Mapping[str, Any]]:
    """Rows of a split, short ones first: rows of a batch are of one length, and little is padding.

    Args:
        task: whose rows.
        data: folder with NAME/train.tsv and NAME/dev.tsv; None is the datasets library.
        split: ``train``, of which the rows to fine-tune on are taken, or ``dev``.
    """
    from rankopt.data.batches import spread
    from rankopt.data.rows import read_rows

    if data is None:
        found = read_rows(f"nyu-mll/glue:{task.name}", SPLITS[split])
    else:
        found = read_rows(str(data / task.name / f"{split}.tsv"))
    wanted = task.training if split == "train" else None
    rows = [found[number] for number in spread(len(found), wanted)]
    label = task.label if data is not None else "label"
    rows = [{**row, "label": row[label]} for row in rows]
    texts = [name for name in (task.text, task.pair) if name]
    return sorted(rows, key=lambda row: sum(len(row[name]) for name in texts))


def batches_of(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    size: int,
    examples: int | None = None,
    resample: int | None = None,
) -> list[Any]:
    """Batches of so many of the rows, at equal distances: short and long ones as they occur."""
    from rankopt.data.batches import load_batches
    from rankopt.data.rows import Columns

    return load_batches(
        task.name,
        tokenizer,
        task.kind,
        columns=Columns(task.text, task.pair, "label"),
        max_length=MAX_LENGTH,
        batch_size=size,
        examples=examples,
        rows=rows,
        resample=resample,
    )


def fine_tuned(
    task: Task, source: str, rows: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[Any, Any]:
    """The model and its tokenizer; made once, and an epoch at most is lost by an interruption.

    Args:
        task: that it learns.
        source: folder of the model to start from.
        rows: to learn from.
        folder: where both are kept.
    """
    import torch
    import transformers

    from rankopt.files import whole_folder
    from rankopt.model.loading import load_model, load_tokenizer

    made = folder / "model"
    tokenizer = load_tokenizer(source)
    if made.is_dir():
        return load_model(str(made), "float32"), tokenizer
    torch.manual_seed(SEED)
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(source, num_labels=task.classes, dtype=torch.float32)
    every = task.left_out
    learned = [row for number, row in enumerate(rows) if not every or number % every]
    batches = batches_of(task, learned, tokenizer, BATCH)
    others = batches_of(task, rows[::every], tokenizer, BATCH) if every else []
    train(model, batches, task.epochs, folder / "epochs.pt", others)
    with whole_folder(made) as whole:
        model.save_pretrained(whole)
    (folder / "epochs.pt").unlink()
    return model.eval(), tokenizer


def train(
    model: Any, batches: Sequence[Any], epochs: int, kept: Path, left_out: Sequence[Any] = ()
) -> None:
    """AdamW in float32, with linear warm-up over a tenth of the steps and linear decay.

    Args:
        model: all of its parameters learn.
        batches: to learn from.
        epochs: over them.
        kept: file with the state after each epoch, to go on from.
        left_out: batches; the state after the epoch with the least loss on them is taken, the last
            one if there are none.
    """
    import torch
    import transformers

    from rankopt import evaluate
    from rankopt.files import whole_file

    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.01, fused=True)
    steps = epochs * len(batches)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first, losses, best = 0, list[float](), None
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        first, losses, best = state["epochs"], state["losses"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, epochs):
        # Order and dropout are an epoch's own: what goes on is what was never interrupted.
        torch.manual_seed(1000 * SEED + epoch + 1)
        model.train()
        for number in torch.randperm(len(batches)).tolist():
            loss = model(**batches[number]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if left_out:
            losses.append(evaluate(model, left_out).loss)
            if losses[-1] == min(losses):
                best = copy.deepcopy(model.state_dict())
        of_others = f", loss {losses[-1]:.4f}" if left_out else ""
        print(f"{kept.parent.name}: epoch {epoch + 1} of {epochs}{of_others}", flush=True)
        with whole_file(kept) as file:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"epochs": epoch + 1, "losses": losses, "best": best, **states}, file)
    if best is not None:
        model.load_state_dict(best)
    model.eval()
