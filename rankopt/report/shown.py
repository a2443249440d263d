"""What a report shows of plans: those that were given, and those that results measured.

Both are the rank of every layer, with a backend and a form. Only a plan's file knows how sure each
rank is; only results know what a plan measured.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from rankopt.errors import PlanError, ResultsError
from rankopt.layers import Form
from rankopt.plan.plan import Plan
from rankopt.profile.profile import Profile
from rankopt.results.results import MeasuredPlan, Results


@dataclasses.dataclass(frozen=True)
class Shown:
    """The ranks that somebody chose.

    Attributes:
        name: as a reader chooses it.
        given: whether it is a plan of its own, rather than a row of results.
        backend: whose factors are made.
        scale: how layers were compared.
        form: of low ranks.
        ranks: of each layer of the profile, None for dense.
        parameters: of the planned layers under it.
        margins: how sure each rank is; None where nobody knows.
        retained: share of each layer's Fisher information; None where nobody knows.
        measured: its loss on held-out data; None where it was not measured.
    """

    name: str
    given: bool
    backend: str
    scale: str
    form: Form
    ranks: tuple[int | None, ...]
    parameters: int
    margins: tuple[float | None, ...] | None = None
    retained: tuple[float, ...] | None = None
    measured: float | None = None


def shown_plans(profile: Profile, plans: Mapping[str, Plan]) -> list[Shown]:
    """Plans as a report shows them.

    Raises:
        PlanError: one is of another model or of another profile.
    """
    for name, plan in plans.items():
        if plan.fingerprint != profile.info.fingerprint:
            raise PlanError(
                f"{name} is a plan of another model ({plan.architecture}) than the profile's "
                f"({profile.info.architecture}), or of the same with other weights: give the "
                "profile that it was made from"
            )
        layers = tuple(entry.layer for entry in plan.layers)
        if plan.profile_digest != profile.digest() or layers != profile.info.layers:
            raise PlanError(
                f"{name} was made from another profile of this model: give that profile, or plan "
                "again from this one"
            )
    return [
        Shown(
            name=name,
            given=True,
            backend=plan.backend,
            scale=plan.scale,
            form=plan.form,
            ranks=tuple(entry.rank for entry in plan.layers),
            parameters=plan.size.planned,
            margins=tuple(entry.margin for entry in plan.layers),
            retained=tuple(entry.retained for entry in plan.layers),
        )
        for name, plan in plans.items()
    ]


def shown_results(profile: Profile, results: Results) -> list[Shown]:
    """The rows of results as a report shows them; those that were not measured are left out.

    Raises:
        ResultsError: they are of another model.
    """
    layers = [(x.members, x.out_features, x.in_features) for x in profile.info.layers]
    theirs = [(x.members, x.out_features, x.in_features) for x in results.layers]
    if results.fingerprint != profile.info.fingerprint or layers != theirs:
        raise ResultsError(
            f"the results are of another model ({results.architecture}) than the profile's "
            f"({profile.info.architecture}), or of the same with other weights: give a profile of "
            "the model that was measured"
        )
    rows = [row for row in results.plans if row.measured is not None]
    return [
        Shown(
            name=name,
            given=False,
            backend=row.backend,
            scale=row.scale,
            form=row.form,
            ranks=row.ranks,
            parameters=row.parameters,
            measured=None if row.measured is None else row.measured.loss,
        )
        for name, row in zip(_names(results, rows), rows, strict=True)
    ]


def _names(results: Results, rows: Sequence[MeasuredPlan]) -> list[str]:
    """Strategy and budget, and what else it takes to tell rows apart."""
    calibrations = {each.digest: each.name for each in results.calibrations}
    backends, forms = {row.backend for row in rows}, {row.form for row in rows}
    scales = {row.scale for row in rows if row.backend == rows[0].backend}
    multiples = {row.rank_multiple for row in rows}
    names = []
    for row in rows:
        more = [row.backend] if len(backends) > 1 and f"@{row.backend}" not in row.strategy else []
        more += [row.form] if len(forms) > 1 and f"/{row.form}" not in row.strategy else []
        more += [f"calibrated on {calibrations[row.calibration]}"] if len(calibrations) > 1 else []
        more += [f"scale {row.scale}"] if len(scales) > 1 else []
        more += [f"multiples of {row.rank_multiple}"] if len(multiples) > 1 else []
        names.append(", ".join([f"{row.strategy} at {row.keep:g}", *more]))
    twice = Counter(names)
    return [
        name if twice[name] == 1 else f"{name} (row {number})"
        for number, name in enumerate(names, start=1)
    ]
