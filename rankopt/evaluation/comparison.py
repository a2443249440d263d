"""The measured comparison: many plans of one or several profiles, on the same held-out examples.

Plans with the same factors and the same ranks are one model and measured once. With a file, each
model is written when it is measured, and what the file has is not measured again: a comparison that
was stopped, or killed, goes on where it was, and one that asks for more adds to it.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from rankopt._version import __version__
from rankopt.data.digest import data_digest
from rankopt.errors import ModelError, OptionError, ResultsError
from rankopt.evaluation.evaluation import Evaluation
from rankopt.evaluation.plans import PlanEvaluator
from rankopt.files import RESULTS, is_format, require_file
from rankopt.model.tasks import Batch
from rankopt.plan.compare import ComparedPlan
from rankopt.profile.profile import Profile
from rankopt.progress import bar
from rankopt.results import Calibration, Measured, MeasuredPlan, Results
from rankopt.results.results import calibration_of


def measure_comparison(
    model: nn.Module,
    profiles: Profile | Mapping[str, Profile],
    rows: Sequence[ComparedPlan],
    batches: Sequence[Batch],
    *,
    also: Mapping[str, Sequence[Batch]] | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Results:
    """Measure the dense model and every plan; the loss of each example, for paired tests.

    Args:
        model: the dense model that was profiled.
        profiles: that the rows were planned from; by name if there are several, of other samples
            of the calibration data.
        rows: plans to measure, of any of the profiles.
        batches: held-out data.
        also: name -> held-out data of other domains, measured beside.
        file: results to go on with, or to begin; other rows in it stay.
        progress: a bar on stderr, one for all; by default if it is a terminal.

    Returns:
        The rows, in their order; of a file, then those that it had besides.

    Raises:
        NotFiniteError: the dense model's loss is NaN or infinite.
        ModelError: the profiles are of different models.
        OptionError: a row was planned from none of them, or rounds layers.
        ResultsError: the file holds results of another model or other data.
    """
    named = {"": profiles} if isinstance(profiles, Profile) else dict(profiles)
    _require_one_model(named)
    by_digest = {profile.digest(): profile for profile in named.values()}
    for row in rows:
        if row.plan.bits:
            raise OptionError(
                f"{row.strategy} at {row.keep:g} rounds layers, and results have ranks only: "
                "measure it with rankopt.measure_rows, or plan it without bits"
            )
        if row.plan.profile_digest not in by_digest:
            raise OptionError(f"{row.strategy} at {row.keep:g} is of none of the profiles given")
    job = _Job(model, batches, also or {}, None if file is None else Path(file))
    calibrations = tuple(calibration_of(each, name) for name, each in named.items())
    first = next(iter(named.values()))
    begun = job.begun(first, calibrations)
    known = dict(begun.measured()) if begun else {}
    plain = [MeasuredPlan.of(row) for row in rows]
    wanted: dict[str, dict[tuple[object, ...], ComparedPlan]] = {}
    for plan, row in zip(plain, rows, strict=True):
        if plan.model not in known:
            wanted.setdefault(plan.calibration, {}).setdefault(plan.model, row)
    models = sum(map(len, wanted.values()))
    with bar(range(models + (begun is None)), "Compare", "model", progress) as shown:
        if begun is None:
            begun = job.start(first, calibrations)
            shown.update()
        for digest, own in wanted.items():
            # One at a time: an evaluator keeps the factors of all layers.
            evaluator = job.evaluator(by_digest[digest])
            for key, row in own.items():
                known[key] = measured_of(evaluator(row.plan))
                job.write(begun, plain, known)
                shown.update()
    return _merged(begun, plain, known)


def measured_of(found: Evaluation) -> Measured:
    """What results hold of an evaluation: null where a number is not finite."""
    whole = math.isfinite(found.loss)
    return Measured(
        loss=found.loss if whole else None,
        metrics={
            name: value if value is not None and math.isfinite(value) else None
            for name, value in found.metrics.items()
        },
        examples=found.examples,
        targets=found.targets,
        example_losses=found.example_losses if whole else None,
        example_targets=found.example_targets if whole else None,
        example_correct=found.example_correct if whole else None,
        also={name: measured_of(each) for name, each in found.also.items()},
        notes=found.notes,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A model, its data, and the file of the results."""

    model: nn.Module
    batches: Sequence[Batch]
    also: Mapping[str, Sequence[Batch]]
    file: Path | None

    def evaluator(self, profile: Profile) -> PlanEvaluator:
        return PlanEvaluator(self.model, profile, self.batches, False, True, self.also)

    def begun(self, profile: Profile, calibrations: Sequence[Calibration]) -> Results | None:
        """What the file has, with these calibrations added; None if there is nothing."""
        if self.file is None:
            return None
        require_file(self.file, is_format(RESULTS))
        if not self.file.exists() or not self.file.stat().st_size:
            return None
        found = Results.load(self.file)
        data, also = self._digests
        for what, had, has in (
            ("the model", found.fingerprint, profile.info.fingerprint),
            ("the held-out data", found.data, data),
            ("the data of other domains", found.also, also),
        ):
            if had != has:
                raise ResultsError(
                    f"{self.file}: {what} was another when these results were measured: name "
                    "another file"
                )
        new = [each for each in calibrations if each.digest not in found.digests]
        return found.model_copy(update={"calibrations": (*found.calibrations, *new)})

    def start(self, profile: Profile, calibrations: Sequence[Calibration]) -> Results:
        """The dense model measured, and no plan."""
        info = profile.info
        data, also = self._digests
        results = Results(
            rankopt=__version__,
            architecture=info.architecture,
            fingerprint=info.fingerprint,
            task=info.task,
            data=data,
            also=also,
            layers=info.layers,
            calibrations=tuple(calibrations),
            dense=measured_of(self.evaluator(profile).dense()),
        )
        self.write(results, (), {})
        return results

    def write(
        self,
        begun: Results,
        plans: Sequence[MeasuredPlan],
        known: Mapping[tuple[object, ...], Measured],
    ) -> None:
        if self.file is not None:
            _merged(begun, plans, known).save(self.file)

    @property
    def _digests(self) -> tuple[str, dict[str, str]]:
        also = {name: data_digest(self.model, each) for name, each in self.also.items()}
        return data_digest(self.model, self.batches), also


def _require_one_model(profiles: Mapping[str, Profile]) -> None:
    (first, profile), *others = profiles.items()
    for name, other in others:
        if other.info.fingerprint != profile.info.fingerprint:
            raise ModelError(
                f"{first} and {name} are profiles of different models or of other layers: compare "
                "each with its own model"
            )
        if other.digest() == profile.digest():
            raise OptionError(f"{first} and {name} are the same profile: leave one out")


def _merged(
    begun: Results,
    plans: Sequence[MeasuredPlan],
    known: Mapping[tuple[object, ...], Measured],
) -> Results:
    """The plans whose models are measured, then what was there besides."""
    found = [
        plan.model_copy(update={"measured": known[plan.model]})
        for plan in plans
        if plan.model in known
    ]
    merged: dict[tuple[object, ...], MeasuredPlan] = {}
    for plan in (*found, *begun.plans):
        merged.setdefault(plan.asked, plan)
    return begun.model_copy(update={"plans": tuple(merged.values())})
