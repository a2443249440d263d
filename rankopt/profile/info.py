"""What was measured, on what, and how: the description that a profile carries.

It says all that planning needs to know of a backend, so that a profile can be planned where the
backend that made it, perhaps somebody else's, is not installed.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from rankopt.errors import OptionError, ProfileError
from rankopt.layers import Bits, Form, Layer, LeftAlone
from rankopt.schema import STRICT, Grown, first_of, parse

FORMAT_VERSION = 2

#: Costs of all ranks are counted in 64-bit integers.
MOST_PARAMETERS = 2**62

#: Names of backends and scales appear in the names of tensors, where / and . separate.
NAME = r"^[A-Za-z0-9_+-]+$"
_Name = Annotated[str, Field(pattern=NAME)]


class ScaleInfo(Grown):
    """How the losses of a backend are compared across layers.

    Attributes:
        name: ``nats``, ``sum``, ``frobenius`` or another.
        unit: of the products: ``nats per example``, ``squared weights``.
        factors: what the losses are multiplied with, one for each layer, in their order.
        valued: whether the losses are not the backend's own error, but what its factors lose under
            the Kronecker-factored Fisher information.
    """

    model_config = STRICT
    later: ClassVar[tuple[str, ...]] = ("valued",)

    name: _Name
    unit: Annotated[str, Field(min_length=1)]
    factors: tuple[Annotated[float, Field(ge=0.0, allow_inf_nan=False)], ...]
    valued: bool = False


class BackendInfo(Grown):
    """How layers were factorised, and how their losses compare.

    Attributes:
        name: as in the names of the profile's tensors and on the command line.
        source: the paper.
        loaded_from: the ``module:object`` that was named, if it was no installed backend. Planning
            finds the backend by it too; nothing is imported because it is written here.
        scales: at least one; the first is the default.
    """

    model_config = STRICT
    later: ClassVar[tuple[str, ...]] = ("loaded_from",)

    name: _Name
    source: str
    loaded_from: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] | None = None
    scales: Annotated[tuple[ScaleInfo, ...], Field(min_length=1)]

    def find_scale(self, name: str | None = None) -> ScaleInfo:
        """The scale by name, or the default.

        Raises:
            OptionError: the backend has no such scale; lists those it has.
        """
        if name is None:
            return self.scales[0]
        for scale in self.scales:
            if scale.name == name:
                return scale
        known = ", ".join(scale.name for scale in self.scales)
        raise OptionError(f"backend {self.name!r} has no scale {name!r}; known: {known}")


class SourceInfo(BaseModel):
    """One of several sources that the examples are of.

    Attributes:
        name: file or data set, as it was given.
        weight: as it was given; only their ratios count.
        examples: of this source, among those that were seen.
    """

    model_config = STRICT

    name: str
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    examples: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"{self.examples:,} of {self.name} (weight {self.weight:g})"


class ProfileInfo(Grown):
    """What was measured, on what, and how.

    Attributes:
        format_version: of the file.
        versions: of rankopt, torch and transformers.
        architecture: class of the model.
        fingerprint: hash of the architecture and of all planned layers' names, shapes, weights.
        task: the loss: ``causal-lm``, ``seq2seq-lm``, ``masked-lm``, ``token-classification``; of
            one class an example ``sequence-``, ``image-``, ``audio-`` or ``video-classification``
            or ``multiple-choice``; of several yes-or-no answers ``multi-label-classification``; of
            numbers ``regression``; ``custom`` of a loss_fn.
        estimator: ``empirical``: gradients of the loss at the given labels, squared;
            ``expected``: their expectation over the model's own prediction; ``sampled``: at labels
            drawn from it.
        estimator_reason: why this one, where none was asked for.
        unit: what one gradient belongs to, before it is squared.
        draws: labels drawn for each target, if they are sampled.
        seed: of the draws.
        examples: how many were seen.
        targets: loss terms seen (predicted tokens, or labels).
        units: divides the sums: how many units were seen.
        processes: that shared the work.
        stopped: why measuring ended before the data did; None if it did not.
        data_digest: sha256 of the batches.
        sources: of the examples, if there are several.
        again: who compressed the model for a second round over the data, if there was one.
        cross_fit: whether factors were valued on data that did not make them, too.
        model_parameters: of the whole model, tied ones counted once.
        model_bytes: the same in bytes.
        layers: the planned matrices.
        left_alone: other modules with weights, and why they are not planned.
        backends: whose losses the profile holds; the first is the default.
        form: how matrices of lower rank are kept by default; kept arrays reach to the largest
            rank that saves parameters in it.
        bits: what weights may be rounded to: losses of that were measured.
    """

    model_config = STRICT
    later: ClassVar[tuple[str, ...]] = (
        "estimator_reason", "sources", "again", "form", "cross_fit", "bits"
    )  # fmt: skip

    format_version: Literal[2] = 2
    versions: dict[str, str]
    architecture: str
    fingerprint: str
    task: str
    estimator: Literal["empirical", "expected", "sampled"] = "empirical"
    estimator_reason: str | None = None
    unit: Literal["example", "token"] = "example"
    draws: Annotated[int, Field(ge=1)] = 1
    seed: int | None = None
    examples: Annotated[int, Field(ge=1)]
    targets: Annotated[int, Field(ge=1)]
    units: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    processes: Annotated[int, Field(ge=1)] = 1
    stopped: str | None = None
    data_digest: str
    sources: tuple[SourceInfo, ...] | None = None
    again: str | None = None
    cross_fit: bool = False
    model_parameters: int
    model_bytes: int
    layers: tuple[Layer, ...]
    left_alone: tuple[LeftAlone, ...]
    backends: Annotated[tuple[BackendInfo, ...], Field(min_length=1)]
    form: Form = "pairs"
    bits: tuple[Bits, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "ProfileInfo":
        for backend in self.backends:
            for scale in backend.scales:
                if len(scale.factors) != len(self.layers):
                    raise ValueError(
                        f"scale {scale.name} of backend {backend.name} has {len(scale.factors)} "
                        f"factors for {len(self.layers)} layers"
                    )
        for what, names in (
            ("backend", [backend.name for backend in self.backends]),
            ("layer", [member for layer in self.layers for member in layer.members]),
        ):
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{what} {twice} is there twice")
        return self

    @classmethod
    def from_json(cls, text: str) -> "ProfileInfo":
        """Parse the description in a profile's header.

        Raises:
            ProfileError: of another format version; a sentence to follow the file's name.
            ValueError: not a description, or one of a model with fewer parameters than are planned.
        """
        content: Any = parse(text)
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is int and version < FORMAT_VERSION:
            raise ProfileError(
                f"was made by an older rankopt (format_version {version}; this one reads "
                f"{FORMAT_VERSION}): profile again"
            )
        if version is not None and version != FORMAT_VERSION:
            raise ProfileError(
                f"has format_version {version!r}; this rankopt reads {FORMAT_VERSION}: use the "
                "rankopt that made it, or profile again"
            )
        try:
            # From text, so that JSON's lists are accepted for tuples but no type is coerced.
            info = cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(first_of(error)) from error
        if not 0 < info.planned_parameters <= info.model_parameters <= MOST_PARAMETERS:
            raise ValueError(
                f"{info.planned_parameters} of {info.model_parameters} parameters are planned"
            )
        if info.planned_bytes > info.model_bytes:
            raise ValueError(f"{info.planned_bytes} of {info.model_bytes} bytes are planned")
        return info

    @property
    def planned_parameters(self) -> int:
        """Parameters of the planned layers, all dense; tied ones counted once."""
        return sum(layer.dense_cost for layer in self.layers)

    @property
    def planned_bytes(self) -> int:
        """The same in bytes."""
        return sum(layer.dense_cost * layer.itemsize for layer in self.layers)
