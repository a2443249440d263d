"""Where a layer stands in the heat map: its block, by depth, and its kind.

``model.layers.7.mlp.up_proj`` is of block 7 and of the kind ``mlp.up_proj``. The block is the first
number in the name; layers without one stand in a column of their own. Where one kind occurs under
several stems (the encoder and the decoder of T5), the stem is said before it. Layers that still
share a cell (the experts of one block) are counted together.
"""

import dataclasses
from collections.abc import Sequence

from rankopt.layers import Layer

#: The column of layers that have no number.
NO_BLOCK = "none"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        block: the column.
        kind: the row.
    """

    block: str
    kind: str


def places_of(layers: Sequence[Layer]) -> list[Place]:
    """The place of each layer."""
    split = [_split(layer.name) for layer in layers]
    stems: dict[str, set[str]] = {}
    for layer, (stem, _) in zip(layers, split, strict=True):
        stems.setdefault(layer.kind, set()).add(stem)
    return [
        Place(block, f"{stem}: {layer.kind}" if stem and len(stems[layer.kind]) > 1 else layer.kind)
        for layer, (stem, block) in zip(layers, split, strict=True)
    ]


def blocks_of(places: Sequence[Place]) -> list[str]:
    """The columns, by depth; that of layers without a number is the first."""
    found = {place.block for place in places}
    numbered = sorted((block for block in found if block != NO_BLOCK), key=int)
    return [NO_BLOCK, *numbered] if NO_BLOCK in found else numbered


def kinds_of(places: Sequence[Place]) -> list[str]:
    """The rows, in the order in which the model has them."""
    return list(dict.fromkeys(place.kind for place in places))


def _split(name: str) -> tuple[str, str]:
    """What is before the first number, and the number."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) < 10:
            return ".".join(parts[:position]), str(int(part))
    return "", NO_BLOCK
