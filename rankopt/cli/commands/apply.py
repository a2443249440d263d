"""The command ``rankopt apply``."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rankopt.cli.options import (
    DryRunOption,
    DtypeOption,
    ForceOption,
    ModelArgument,
    note,
    show,
)
from rankopt.errors import OptionError, RankoptError
from rankopt.files import partial_of, require_free, told
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile

EXAMPLES = """\b
Examples:
  rankopt apply ./model plan.json --profile profile.safetensors -o ./smaller
  rankopt apply ./model plan.json --profile profile.safetensors \\
    -o ./smaller --remote-code

Load the result with transformers, after `import rankopt`; or, with --remote-code, without.
"""


def apply(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    profile: Annotated[Path, typer.Option(help="The profile that the plan was made from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model folder to write.")],
    dtype: DtypeOption = "auto",
    allow_other_weights: Annotated[
        bool, typer.Option(help="Accept the same layers with other weights (fine-tuned since).")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="module:object of the plan's backend, if it is not an installed one."),
    ] = None,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Put the code that loads it into the folder, for trust_remote_code=True where "
            "rankopt is not installed.",
        ),
    ] = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Factorise the planned layers and save the smaller model.

    That of a local folder is never in memory: one tensor is read and written after the other, into
    OUTPUT.partial, which becomes OUTPUT when it is whole. The same command goes on with it.
    """
    from rankopt.model.loading import require_model

    require_free(output, force, apart_from=(model, plan, profile))
    require_model(model)
    loaded_plan, loaded_profile = Plan.load(plan), Profile.load(profile)
    from rankopt.apply.apply import apply_plan, backend_of
    from rankopt.apply.saving import save_model
    from rankopt.apply.shards import require_partial
    from rankopt.apply.streaming import apply_streamed
    from rankopt.backends import find_backend
    from rankopt.model.loading import hide_bars, leaves_on_disk, load_model, load_tokenizer
    from rankopt.temporary import temporary_folder

    if backend is not None and find_backend(backend).name != loaded_plan.backend:
        raise OptionError(
            f"--backend {backend} is {find_backend(backend).name!r}, the plan has the backend "
            f"{loaded_plan.backend!r}"
        )
    backend_of(loaded_plan, loaded_profile)
    hide_bars()
    try:
        tokenizer = load_tokenizer(model)
    except RankoptError as error:
        tokenizer = None
        note(f"no tokenizer is saved: {error}")
    how: dict[str, Any] = {
        "tokenizer": tokenizer,
        "overwrite": force,
        "command": ["rankopt", *sys.argv[1:]],
        "remote_code": remote_code,
    }
    on_disk = Path(model).is_dir() and leaves_on_disk()
    if on_disk:
        require_partial(partial_of(output))
    if dry_run:
        from rankopt.cli.preview import apply_preview

        with temporary_folder(Path(tempfile.gettempdir())) as converted:
            loaded = load_model(model, dtype, *(("disk", converted) if on_disk else ()))
            show(apply_preview(loaded, loaded_plan, loaded_profile, allow_other_weights))
        return
    if on_disk:
        with told(output), temporary_folder(output.absolute().parent) as converted:
            loaded = load_model(model, dtype, "disk", converted)
            how["allow_other_weights"] = allow_other_weights
            apply_streamed(loaded, loaded_plan, loaded_profile, output, **how)
    else:
        loaded = load_model(model, dtype)
        apply_plan(loaded, loaded_plan, loaded_profile, allow_other_weights=allow_other_weights)
        save_model(loaded, output, plan=loaded_plan, **how)
    show(str(loaded_plan))
    note(f"model written to {output}: load it with transformers after `import rankopt`")
