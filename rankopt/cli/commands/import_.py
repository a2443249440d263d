"""The command ``rankopt import``."""

from pathlib import Path
from typing import Annotated, cast

import typer

from rankopt.cli.options import (
    BackendOption,
    ForceOption,
    JsonOption,
    ProfileArgument,
    ScaleOption,
    note,
    show,
)
from rankopt.errors import PlanError
from rankopt.files import PLAN, is_format, require_file
from rankopt.layers import Form
from rankopt.plan.exchange import imported_plan
from rankopt.plan.plan import LARGEST_FILE
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile

EXAMPLES = """\b
Examples:
  rankopt import profile.safetensors ranks.csv
  rankopt import profile.safetensors adapter_config.json -o eva.json
  rankopt import profile.safetensors asvd/config.json -o asvd.json

Read are a mapping or table of ranks, adapter_config.json of PEFT (LoRA, EVA,
AdaLoRA), config.json of ASVD4LLM and Palu, and SVD-LLM's ratio; what it is, is
seen in the file. Layers that it does not name stay dense. Beside the plan
stands what the exact plan of the same parameters is expected to lose.
"""


def import_(
    profile: ProfileArgument,
    file: Annotated[Path, typer.Argument(help="Ranks of another tool, or your own.")],
    form: Annotated[
        str | None,
        typer.Option(
            help="pairs or pivoted: how a low rank is kept; of a plan its own, else pairs."
        ),
    ] = None,
    backend: BackendOption = None,
    scale: ScaleOption = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan to write.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the ranks of another tool as a plan, and say how it compares."""
    if output is not None:
        require_file(output, is_format(PLAN), overwrite=force, apart_from=(profile, file))
    loaded, text = Profile.load(profile), _text(file)
    try:
        made = imported_plan(
            loaded, text, form=cast("Form | None", form), backend=backend, scale=scale
        )
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error
    if output is not None:
        made.save(output)
        note(f"plan written to {output}")
    show(made.to_json() if as_json else str(made))
    best = make_plan(
        loaded, max_params=made.size.planned, form=made.form, backend=backend, scale=scale
    )
    lost, least = made.certificate.loss, best.certificate.loss
    note(
        f"at as many parameters in {made.form} the exact plan is expected to lose "
        + (f"{least / lost:.1%} of that" if lost > 0.0 else "nothing either")
    )


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise PlanError(f"{file} is too large to be a list of ranks: give JSON or CSV")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{file} is not text in UTF-8: give JSON or CSV") from error
    except OSError as error:
        raise PlanError(f"cannot read {file}: {error.strerror or error}") from error
