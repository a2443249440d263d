"""The command ``rankopt plan``."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from rankopt.cli.data import READING, DataOptions, with_data
from rankopt.cli.given import refuse_with, require_with
from rankopt.cli.options import (
    BackendOption,
    DtypeOption,
    ForceOption,
    FormOption,
    JsonOption,
    MultipleOption,
    PinOption,
    ProfileArgument,
    ScaleOption,
    bytes_of,
    floor_of,
    flops_of,
    microseconds_of,
    naming,
    note,
    pins_of,
    show,
)
from rankopt.errors import OptionError, RankoptError
from rankopt.files import LORA_PLAN, PLAN, is_format, require_file
from rankopt.layers import Bits
from rankopt.plan.lora import LoraObjective, LoraPlan, make_lora_plan
from rankopt.plan.plan import Plan
from rankopt.plan.planner import STRATEGIES, known_solvers, make_plan
from rankopt.profile.profile import Profile

SOLVERS = ", ".join([*known_solvers(), "search"])
EXAMPLES = f"""\b
Examples:
  rankopt plan profile.safetensors --keep 0.8 -o plan.json
  rankopt plan profile.safetensors --keep-total 0.7 --rank-multiple 8
  rankopt plan profile.safetensors --keep 0.8 --min-retained 0.5
  rankopt plan profile.safetensors --keep 0.8 --max-latency 1.2ms \\
    --latency-table latencies.csv
  rankopt plan profile.safetensors --max-bytes 9MB --bits 8 4
  rankopt plan profile.safetensors --keep 0.8 --pin '*.o_proj=64'
  rankopt plan profile.safetensors --solver threshold --share 0.95
  rankopt plan profile.safetensors --for lora --max-params 2e6 -o lora.json
  rankopt plan profile.safetensors --keep 0.9 -o plan.json \\
    --solver search --model ./model --data validation.txt --trials 40

Without -o the plan is printed. Budgets of parameters, bytes, FLOPs and latency go together: ranks
meet all that are given. `rankopt export lora.json --to peft` makes ranks of adapters a LoraConfig.
Solvers: {SOLVERS}, or module:function of your own. A search goes on where it was
stopped when it is called again.
"""
#: Purposes: layers of lower rank, or adapters beside layers that stay as they are.
COMPRESS, LORA = "compress", "lora"
LIMITS = ("max_bytes", "max_flops", "max_latency", "latency_table")
#: Options of one of the two.
OF_COMPRESSING = ("keep", "keep_total", *LIMITS, "form", "pin", "share", "min_retained", "bits")
OF_LORA = ("like_rank", "max_rank")
SEARCH = ("trials", "sampler", "storage", "seed", "workers", "model", "data", *READING, "dtype")


@with_data(needed=False, about="search: validation data, as for evaluate.", mixed=True)
def plan(
    ctx: typer.Context,
    profile: ProfileArgument,
    *,
    purpose: Annotated[
        str,
        typer.Option(
            "--for",
            help="compress, or lora: ranks of adapters that are trained beside the layers, under a "
            "budget of their parameters.",
        ),
    ] = COMPRESS,
    keep: Annotated[
        float | None, typer.Option(help="Share of the planned layers' parameters to keep.")
    ] = None,
    keep_total: Annotated[
        float | None, typer.Option(help="Share of the whole model's parameters to keep.")
    ] = None,
    max_params: Annotated[
        float | None,
        typer.Option(
            help="Parameters for the planned layers, or of all adapters: 2000000 or 2e6.",
            metavar="NUMBER",
        ),
    ] = None,
    like_rank: Annotated[
        int | None,
        typer.Option(help="lora: as many parameters as this rank takes on every layer."),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="lora: no adapter is wider.")] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Bytes for the planned layers, as profiled: 200MB, 1.5GiB or a number."),
    ] = None,
    max_flops: Annotated[
        str | None,
        typer.Option(help="FLOPs of the planned layers for one token: 1.5G or a number."),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(help="Latency of the planned layers by --latency-table: microseconds, 1.2ms."),
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(help="CSV or JSON: layer, kind or shape; form; rank; microseconds."),
    ] = None,
    solver: Annotated[str, typer.Option(help=SOLVERS)] = "exact",
    objective: Annotated[
        str, typer.Option(help="total, layerwise or maxmin; lora: one of the first two.")
    ] = "total",
    rank_multiple: MultipleOption = 1,
    form: FormOption = None,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    share: Annotated[
        float | None, typer.Option(help="threshold: retained share of every layer.")
    ] = None,
    min_retained: Annotated[
        str | None,
        typer.Option(
            help="Share that every layer retains at least, or best: the largest possible."
        ),
    ] = None,
    pin: PinOption = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help="8, 4 or both: weights may be rounded to so many bits, under --max-bytes; of a "
            "profile that was made with --bits."
        ),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="exact (60) or knapsack (30): seconds.")
    ] = None,
    trials: Annotated[int, typer.Option(help="search: plans to measure in all.")] = 40,
    sampler: Annotated[
        str, typer.Option(help="search: cmaes, tpe, thompson, gp or random.")
    ] = "cmaes",
    storage: Annotated[
        str | None,
        typer.Option(help="search: journal file or database URL; OUTPUT.journal if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="search: of the sampler.")] = 0,
    workers: Annotated[int, typer.Option(help="search: processes that share the trials.")] = 1,
    model: Annotated[str | None, typer.Option(help="search: the model to measure.")] = None,
    asked: DataOptions,
    dtype: DtypeOption = "float32",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan to write.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide the rank of every layer under a budget."""
    if purpose not in (COMPRESS, LORA):
        raise OptionError(f"--for is {COMPRESS} or {LORA}, not {purpose!r}")
    journal = storage or (None if output is None else f"{output}.journal")
    if output is not None:
        read = (profile, model, *asked.data, journal, latency_table)
        ours = is_format(PLAN if purpose == COMPRESS else LORA_PLAN)
        require_file(output, ours, overwrite=force, apart_from=read)
    else:
        require_with(ctx, ["force"], "-o")
    _refuse_idle(ctx, solver, purpose)
    timed: dict[str, Any] = {} if time_limit is None else {"time_limit": time_limit}
    if purpose == LORA:
        adapters = make_lora_plan(
            Profile.load(profile),
            max_params=cast("int | None", max_params),
            like_rank=like_rank,
            solver=solver,
            objective=cast("LoraObjective", objective),
            rank_multiple=rank_multiple,
            max_rank=max_rank,
            backend=backend,
            scale=scale,
            **timed,
        )
        _written(adapters, output, as_json)
        return
    limits: dict[str, Any] = {"keep": keep, "keep_total": keep_total, "max_params": max_params}
    how: dict[str, Any] = {
        "objective": objective,
        "rank_multiple": rank_multiple,
        "form": form,
        "backend": backend,
        "scale": scale,
        "pins": pins_of(pin),
    }
    if solver != "search":
        made = make_plan(
            Profile.load(profile),
            **limits,
            max_bytes=bytes_of(max_bytes),
            max_flops=flops_of(max_flops),
            max_latency=microseconds_of(max_latency),
            latency_table=latency_table,
            **how,
            solver=solver,
            share=share,
            min_retained=floor_of(min_retained),
            bits=cast("list[Bits]", bits or []),
            **timed,
        )
    else:
        if model is None or not asked.data:
            raise RankoptError("--solver search measures a model: it needs --model and --data")
        from rankopt.cli.workers import require_storage, with_workers

        if output is not None and storage and Path(storage).resolve() == output.resolve():
            raise RankoptError(f"--storage and -o both name {output}: name two files")
        require_storage(journal)
        source = asked.read(model)
        loaded_profile = Profile.load(profile)
        from rankopt.evaluation.search import OtherSearchError, search_plan

        loaded, batches = source.load(dtype)
        try:
            with naming(asked.named), with_workers(workers, journal):
                searched = search_plan(
                    loaded,
                    loaded_profile,
                    batches,
                    **limits,
                    **how,
                    trials=trials,
                    sampler=sampler,
                    storage=journal,
                    seed=seed,
                    solver_options=timed,
                )
        except OtherSearchError as error:
            raise RankoptError(
                f"{error.found}: another --storage or -o starts a new one"
            ) from error
        made = searched.plan
        note(str(searched))
    _written(made, output, as_json)


def _written(made: Plan | LoraPlan, output: Path | None, as_json: bool) -> None:
    if output is not None:
        made.save(output)
        note(f"plan written to {output}")
    show(made.to_json() if as_json else str(made))


def _refuse_idle(ctx: typer.Context, solver: str, purpose: str) -> None:
    """Refuse options of other solvers; what one of somebody else's takes is for it to say."""
    if purpose == LORA:
        if solver in (*STRATEGIES, "search"):
            raise OptionError(
                f"--solver {solver} is for compressing: --for lora takes solvers such as exact"
            )
        require_with(ctx, OF_COMPRESSING, f"--for {COMPRESS}")
    else:
        require_with(ctx, OF_LORA, f"--for {LORA}")
    if solver != "search":
        require_with(ctx, SEARCH, "--solver search")
    if solver != "threshold":
        require_with(ctx, ["share"], "--solver threshold")
    if solver in (*STRATEGIES, "greedy", "density"):
        require_with(ctx, ["time_limit"], "--solver exact, knapsack or search")
    if solver == "search":
        for name in (*LIMITS, "bits"):
            refuse_with(ctx, name, "--solver search", "which takes one budget of parameters")
    if solver in (*STRATEGIES, "search"):
        refuse_with(ctx, "min_retained", f"--solver {solver}", "but is for solvers such as exact")
