"""TFWSVD: what its iterations gain on the Fisher information they minimise, and on other text's.

SmolLM2-135M, eight matrices, windows of 256 tokens. The element-wise Fisher information of every
other window is minimised for, that of the windows between is only looked at.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from models import summed_loss
from torch import Tensor

from rankopt.backends import tfwsvd
from rankopt.layers import largest_rank
from rankopt.measure.collector import Collector

Row = dict[str, Any]

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCKS = (2, 20)
WINDOWS = (16, 64)
SHARES = (0.25, 0.5, 0.75)
ITERATIONS = (1, 2, 3, 5, 20)


def study() -> list[Row]:
    """A row for each number of windows, matrix and rank.

    Raises:
        MissingExtraError: SmolLM2 is not installed.
    """
    from rankopt.data.batches import text_batches
    from rankopt.demo import help_texts, smollm2
    from rankopt.model.loading import load_model, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source = str(smollm2(Path(folder) / "model"))
        model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    names = [f"model.layers.{block}.{kind}" for block in BLOCKS for kind in KINDS]
    modules = {name: model.get_submodule(name) for name in names}
    found = []
    for windows in WINDOWS:
        batches = text_batches(help_texts()[0], tokenizer, 256, 1, 2 * windows)
        fitted, other = (_elements(model, modules, batches[k::2]) for k in (0, 1))
        for name, module in modules.items():
            weight = module.weight.detach()
            limit = largest_rank(*weight.shape)
            for share in SHARES:
                found.append(
                    {
                        "windows": windows,
                        "matrix": name,
                        **_gain(weight, fitted[name], other[name], int(share * limit)),
                    }
                )
    return found


def _elements(model: Any, modules: dict[str, Any], batches: Any) -> dict[str, Tensor]:
    with Collector(model, modules, {"elements"}) as collector:
        for batch in batches:
            ids = batch["input_ids"]
            collector.begin(*ids.shape)
            collector.backward(summed_loss(model, ids, ids))
    return {name: sums.elements / len(batches) for name, sums in collector.sums.items()}


def _gain(weight: Tensor, fitted: Tensor, other: Tensor, rank: int) -> Row:
    """Errors after so many iterations, as parts of those of the start."""

    def errors(iterations: int) -> tuple[float, float, float]:
        started = time.process_time()
        up, down = tfwsvd.factors(weight, fitted, rank, iterations)
        taken = time.process_time() - started
        product = up @ down
        own, others = (tfwsvd.weighted_error(weight, product, f) for f in (fitted, other))
        return own, others, taken

    own, others, taken = errors(0)
    after = {count: errors(count) for count in ITERATIONS}
    return {
        "out": weight.shape[0],
        "in": weight.shape[1],
        "rank": rank,
        "start_seconds": taken,
        "seconds": {count: found[2] for count, found in after.items()},
        "own": {count: found[0] / own for count, found in after.items()},
        "other": {count: found[1] / others for count, found in after.items()},
    }
