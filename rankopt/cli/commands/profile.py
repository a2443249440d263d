"""The command ``rankopt profile``."""

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli.data import DataOptions, with_data
from rankopt.cli.given import refuse_with, require_with
from rankopt.cli.options import (
    DryRunOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    note,
    show,
    show_json,
)
from rankopt.errors import RankoptError
from rankopt.files import CHECKPOINT, PROFILE, is_format, partial_of, require_file

EXAMPLES = """\b
Examples:
  rankopt profile ./model --data train.txt -o profile.safetensors
  rankopt profile ./model --data train.txt --backend fwsvd kronecker -o p.st
  rankopt profile ./model --data train.txt --until-stable -o p.st
  rankopt profile ./model --data wiki.txt --data help.jsonl --weight 3 1 \\
    -o p.st
  rankopt profile ./bert-sst2 --data train.tsv --text-column sentence -o p.st
  rankopt profile ./bert-sst2 --data train.tsv --bits 8 4 -o p.st
  rankopt profile gpt2 --data Salesforce/wikitext:wikitext-2-raw-v1 \\
    --examples 64 -o p.st
  torchrun --nproc-per-node 4 -m rankopt profile ./model \\
    --data train.txt -o p.st

The same command goes on where a pass over the data was interrupted; decomposing begins again.
"""


@with_data(examples=256, mixed=True)
def profile(
    ctx: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write.")],
    asked: DataOptions,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="kronecker (default), fwsvd, fwsvd_two_sided, svd, tfwsvd, whitened, "
            "module:object of your own; or several."
        ),
    ] = None,
    moments: Annotated[
        bool,
        typer.Option(
            help="Value what any backend's factors lose with the Kronecker-factored Fisher, which "
            "takes two moments for each layer; or plan each on its own error."
        ),
    ] = True,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Globs of layers to plan, instead of those inside the blocks."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Globs of layers to leave alone.")
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help="8, 4 or both: measure what rounding weights loses, too, for `rankopt plan "
            "--bits`."
        ),
    ] = None,
    untie: Annotated[
        bool, typer.Option(help="Plan a head and an embedding that share their weight.")
    ] = False,
    estimator: Annotated[
        str,
        typer.Option(
            help="empirical (given labels), expected (over all labels, as the model predicts "
            "them), sampled (labels drawn from it), or auto: what suits the task."
        ),
    ] = "auto",
    unit: Annotated[
        str, typer.Option(help="What is squared as one: example or token.")
    ] = "example",
    draws: Annotated[int, typer.Option(help="Of labels or signs, for each example.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    form: Annotated[
        str, typer.Option(help="How a low rank is kept: pivoted, or pairs (of factors).")
    ] = "pivoted",
    until_stable: Annotated[
        bool, typer.Option(help="Stop when twice the data would hardly move the ranks.")
    ] = False,
    stable_keep: Annotated[
        float, typer.Option(help="until-stable: budget whose ranks are watched.")
    ] = 0.8,
    stable_tolerance: Annotated[
        float, typer.Option(help="until-stable: share of the budget that may move.")
    ] = 0.01,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="2 sees the data once more, on the model that a plan of the first round would "
            "leave, and takes the mean: better ranks and factors for twice the time. Default: 2, "
            "or 1 with --until-stable, --layers-at-a-time or --device-map."
        ),
    ] = None,
    round_keep: Annotated[
        float,
        typer.Option(
            help="rounds 2: budget of that plan, as --keep: yours, if you know it; not far below."
        ),
    ] = 0.8,
    cross_fit: Annotated[
        bool | None,
        typer.Option(
            help="Value factors on data that did not make them, too: better ranks and predictions, "
            "for twice the memory and three times the decomposing. Default: yes, but with "
            "--no-moments.",
            show_default=False,
        ),
    ] = None,
    layers_at_a_time: Annotated[
        int | None,
        typer.Option(help="Several passes over the data, so many layers each: less memory."),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Save OUTPUT.partial every so many batches; 0: never.")
    ] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Layers to decompose at a time; as many as cores.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="For models larger than a GPU: auto; than the memory: disk, which reads each "
            "weight when it is needed. Both need accelerate."
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    bases: Annotated[
        bool | None,
        typer.Option(
            help="Keep singular vectors: a larger file, a faster apply; by default up to 2 GiB."
        ),
    ] = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what every rank of every layer retains."""
    first = partial_of(output)
    partials = [first, first.with_name(f"{first.name}.again")]
    resumable = checkpoint_every > 0 and layers_at_a_time is None
    read = (model, *asked.data)
    require_file(output, is_format(PROFILE), overwrite=force, apart_from=read)
    if resumable:
        for partial in partials:
            require_file(partial, is_format(CHECKPOINT), apart_from=read)
    if estimator != "sampled" and (unit == "example" or estimator == "expected"):
        require_with(ctx, ["draws", "seed"], "--estimator sampled or --unit token")
    if not until_stable:
        require_with(ctx, ["stable_keep", "stable_tolerance"], "--until-stable")
    if dry_run:
        refuse_with(ctx, "as_json", "--dry-run", "which has no figures yet")
    once = until_stable or layers_at_a_time is not None
    twice = not once and device_map is None if rounds is None else rounds == 2
    if rounds not in (None, 1, 2):
        raise RankoptError(f"--rounds is 1 or 2, not {rounds}")
    if not twice:
        require_with(ctx, ["round_keep"], "--rounds 2")
    elif once:
        raise RankoptError(
            "--rounds 2 sees all data and layers twice: it does not go with --until-stable or "
            "--layers-at-a-time"
        )
    if layers_at_a_time is not None and checkpoint_every > 0:
        refuse_with(ctx, "checkpoint_every", "--layers-at-a-time", "which saves no checkpoints")
    source = asked.read(model)
    from rankopt.apply.compressed import Compressed
    from rankopt.backends import find_backends
    from rankopt.cli.tables import profile_summary
    from rankopt.measure.decompose import left_out_bytes
    from rankopt.measure.measure import profile_model
    from rankopt.measure.processes import Processes
    from rankopt.plan.stability import Stability
    from rankopt.profile.spilled import SpilledArrays

    if not (0.0 < stable_keep <= 1.0 and 0.0 < stable_tolerance < 1.0):
        raise RankoptError("--stable-keep and --stable-tolerance are shares between 0 and 1")
    processes = Processes.join()
    loaded, batches = source.load(dtype, device_map)
    options: dict[str, Any] = {
        "backends": tuple(backend or ["kronecker"]),
        "moments": moments,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "untie": untie,
        "estimator": estimator,
        "unit": unit,
        "draws": draws,
        "seed": seed,
        "again": Compressed(round_keep, needed=rounds is not None) if twice else None,
        "cross_fit": moments if cross_fit is None else cross_fit,
        "form": form,
        "bits": tuple(bits or ()),
        "layers_at_a_time": layers_at_a_time,
    }
    if dry_run:
        from rankopt.cli.preview import profile_preview

        text = profile_preview(loaded, batches, options)
        if processes.rank == 0:
            show(text)
        return
    with SpilledArrays(output.absolute().parent) as store:
        found = profile_model(
            loaded,
            batches,
            **options,
            stop=Stability(stable_keep, stable_tolerance) if until_stable else None,
            keep_bases=bases,
            store=store,
            checkpoint=partials[0] if resumable else None,
            checkpoint_every=max(checkpoint_every, 1),
            workers=workers,
            progress=None if processes.rank == 0 else False,
        )
        if processes.rank == 0:
            found.save(output)
    for partial in partials if resumable else ():
        with contextlib.suppress(FileNotFoundError):
            # Measured and written: nothing to go on with.
            os.unlink(partial if processes.count == 1 else f"{partial}.{processes.rank}")
    if processes.rank == 0:
        if as_json:
            show_json(found.info.model_dump(mode="json"), indent=None)
        else:
            show(profile_summary(found))
        note(f"profile written to {output} ({output.stat().st_size / 2**20:.1f} MiB)")
        measured = find_backends(found.backends).values()
        left_out = left_out_bytes(found.info.layers, measured, found.info.form, bases)
        if left_out:
            note(
                f"singular vectors are not in it, {left_out / 2**30:.1f} GiB: apply decomposes "
                "again; --bases keeps them"
            )
