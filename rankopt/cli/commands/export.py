"""The command ``rankopt export``."""

from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.options import note, show
from rankopt.files import LORA_PLAN, format_of, require_file, whole_file
from rankopt.plan.exchange import KINDS, export_ranks
from rankopt.plan.lora import LoraPlan
from rankopt.plan.plan import Plan

EXAMPLES = """\b
Examples:
  rankopt export plan.json --to csv
  rankopt export plan.json --to peft -o lora/adapter_config.json
  rankopt export plan.json --to asvd -o ranks.json

peft: a LoRA as wide as the planned ranks, for peft.LoraConfig.from_pretrained("lora"); of a plan of
`rankopt plan --for lora` its adapters.
Without -o the text is printed.
"""


def export(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(KINDS)}.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; none is replaced.")
    ] = None,
) -> None:
    """Write a plan's ranks as another tool reads them."""
    if output is not None:
        require_file(output, _never, apart_from=(plan,))
    kind = LoraPlan if format_of(plan) == LORA_PLAN else Plan
    text = export_ranks(kind.load(plan), to)
    if output is None:
        show(text.rstrip("\n"))
        return
    with whole_file(output, _never) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note(f"ranks written to {output}")


def _never(path: Path) -> bool:
    """What tools read is no file that says it is ours."""
    return False
