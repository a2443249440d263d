"""The command ``rankopt refine``."""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rankopt.cli.data import DataOptions, with_data
from rankopt.cli.given import refuse_with
from rankopt.cli.options import (
    DryRunOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    note,
    show,
    show_json,
)
from rankopt.files import REFINEMENT, is_format, partial_of, require_file, require_free
from rankopt.plan.plan import Plan

if TYPE_CHECKING:
    from rankopt.apply.refined import Method

EXAMPLES = """\b
Examples:
  rankopt refine ./smaller --dense ./model --data train.txt -o ./refined
  rankopt refine ./smaller --dense ./model --data train.txt --examples 64 \\
    --method blocks -o ./refined
  rankopt refine ./bert-smaller --dense ./bert-sst2 --data train.tsv \\
    --text-column sentence --passes 2 -o ./refined

A refinement that was interrupted goes on where it was when the same command is called again.
"""


@with_data(examples=256, batch_size=1, mixed=True)
def refine(
    ctx: typer.Context,
    compressed: Annotated[str, typer.Argument(help="A folder that rankopt apply wrote.")],
    dense: Annotated[str, typer.Option(help="The model that it was compressed from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    asked: DataOptions,
    method: Annotated[
        str, typer.Option(help="distill (from end to end) or blocks (one after the other).")
    ] = "distill",
    vectors: Annotated[
        bool, typer.Option(help="Let biases and norms learn, not the factors alone.")
    ] = True,
    learning_rate: Annotated[
        float | None, typer.Option(help="The largest; 1e-4, of blocks 2e-4.")
    ] = None,
    passes: Annotated[int | None, typer.Option(help="Over the data; 1, of blocks 3.")] = None,
    warm_up: Annotated[
        float, typer.Option(help="Share of the steps in which the learning rate rises.")
    ] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of the batches.")] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(help="Save OUTPUT.partial every so many steps; 0: never.")
    ] = 16,
    device_map: Annotated[
        str | None, typer.Option(help="For a dense model larger than a GPU: auto.")
    ] = None,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let the factors of a smaller model learn from the dense one."""
    from rankopt.model.loading import require_model

    if dry_run:
        refuse_with(ctx, "as_json", "--dry-run", "which has no figures yet")
    partial = partial_of(output)
    read = (compressed, dense, *asked.data)
    require_free(output, force, apart_from=read)
    if checkpoint_every > 0:
        require_file(partial, is_format(REFINEMENT), apart_from=read)
    require_model(dense)
    source = asked.read(compressed)
    plan = _plan_of(compressed)
    from rankopt.apply.refined import refined_on, refinements_of
    from rankopt.apply.saving import save_model
    from rankopt.model.loading import load_model, load_tokenizer
    from rankopt.refinement.refinement import refine as refined

    model, batches = source.load(dtype)
    teacher = load_model(dense, dtype, device_map)
    if dry_run:
        from rankopt.cli.preview import refine_preview

        show(refine_preview(model, teacher, batches, method, passes, vectors))
        return
    found = refined(
        model,
        teacher,
        batches,
        method=cast("Method", method),
        vectors=vectors,
        learning_rate=learning_rate,
        passes=passes,
        warm_up=warm_up,
        clip=clip,
        seed=seed,
        checkpoint=partial if checkpoint_every > 0 else None,
        checkpoint_every=max(checkpoint_every, 1),
        folder=output.absolute().parent,
    )
    what = f"loss against the dense model on {found.held_out:,} held-out {found.unit}"
    save_model(
        model,
        output,
        plan=plan,
        tokenizer=load_tokenizer(compressed),
        overwrite=force,
        measured={f"{what}, before": found.before, f"{what}, after": found.after},
        command=["rankopt", *sys.argv[1:]],
    )
    if checkpoint_every > 0:
        with contextlib.suppress(FileNotFoundError):
            # Refined and written: nothing to go on with.
            os.unlink(partial)
    if as_json:
        show_json(dataclasses.asdict(found))
    else:
        show(str(found))
    label = refinements_of(model)
    note(f"model written to {output}" + (f", {refined_on(label)}" if label else ""))


def _plan_of(folder: str) -> Plan | None:
    """The plan that lies in a model folder goes with the model.

    Raises:
        PlanError: it is damaged.
    """
    path = Path(folder) / "rankopt_plan.json"
    return Plan.load(path) if path.is_file() else None
