"""The command ``rankopt demo``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rankopt.cli.options import JsonOption, WideOption, show, show_json

EXAMPLES = """\b
Examples:
  rankopt demo
  rankopt demo --output /tmp/demo --model ./another-causal-lm
"""


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for everything that is written.")
    ] = Path("demo"),
    model: Annotated[
        Path | None, typer.Option(help="Another causal language model's folder.")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Budgets; 0.9 and 0.8.")] = None,
    calibration: Annotated[int, typer.Option(help="Windows for the profile.")] = 32,
    held_out: Annotated[int, typer.Option(help="Windows for the measured loss.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole job on SmolLM2-135M and Python's own help texts."""
    from rankopt.cli.tables import print_comparison
    from rankopt.demo import run_demo
    from rankopt.model.loading import hide_bars
    from rankopt.results import summarise

    hide_bars()
    result = run_demo(
        output,
        model_folder=model,
        keeps=tuple(keep or (0.9, 0.8)),
        calibration=calibration,
        held_out=held_out,
        max_length=max_length,
    )
    if as_json:
        show_json(result.to_dict())
        return
    results = result.results
    print_comparison(summarise(results), results.dense, wide=wide)
    show(f"\n{result.plan}")
    for name, found in (("closed form", results.plans[-1].measured), ("dense", results.dense)):
        if found is not None and found.loss is not None:
            show(f"  {name:<15} loss {found.loss:.4f}")
    show(f"  reloaded        loss {result.reloaded.loss:.4f}, {result.label}")
    show(f"\nbefore: {result.before}\n\nafter:  {result.after}\n")
    show(f"written to {result.folder}{os.sep}: {', '.join(_written(result.folder))}")


def _written(folder: Path) -> list[str]:
    return sorted(f"{path.name}{os.sep if path.is_dir() else ''}" for path in folder.iterdir())
