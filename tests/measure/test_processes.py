"""Two processes measure what one does, and say so when they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankopt import profile_model
from rankopt.backends.statistics import STATISTICS
from rankopt.measure.accumulate import gather
from rankopt.measure.estimators import Estimator
from rankopt.measure.loss import ModelLoss
from rankopt.measure.processes import Processes
from rankopt.model.selection import find_layers
from tests import tiny
from tests.measure.exact import in_double
from tests.measure.two import in_two_processes

#: What every process does; the parent does the same alone.
WORK = """
    import json, sys
    from pathlib import Path
    import torch
    from rankopt import DataError, profile_model
    from rankopt.model.selection import find_layers
    from rankopt.measure.estimators import Estimator
    from rankopt.measure.loss import ModelLoss
    from rankopt.measure.accumulate import gather
    from rankopt.plan.stability import Stability
    from rankopt.measure.processes import Processes
    from rankopt.backends.statistics import STATISTICS
    from tests import tiny
    from tests.measure.exact import in_double
    from tests.measure.test_processes import BACKENDS, OPTIONS, data, refusal, summed

    out, processes = Path(sys.argv[1]), Processes.join()
    said, tensors = {"count": processes.count, "rank": processes.rank}, {}
    model = in_double(tiny.llama())
    for name, options in OPTIONS.items():
        tensors |= {f"{name}/{k}": v for k, v in summed(model, options, processes).items()}
    profile = profile_model(model, data(model), backends=BACKENDS, progress=False)
    said["digest"], said["processes"] = profile.digest(), profile.info.processes
    profile.save(out / f"{processes.rank}.safetensors")
    parts = profile_model(
        model, data(model), backends=BACKENDS, layers_at_a_time=5, progress=False
    )
    said["in parts"] = parts.digest()
    crossed = profile_model(model, data(model), backends=BACKENDS, cross_fit=True, progress=False)
    crossed.save(out / f"crossed-{processes.rank}.safetensors")
    stable = Stability(tolerance=0.9)
    stopped = profile_model(model, data(model, 9), stop=stable, progress=False)
    said["stopped"], said["batches"] = stopped.info.stopped, len(stopped.batch_units)
    # Interrupted where one process has passed a check and the other has not come to it.
    partial = out / "partial"
    mine = Path(f"{partial}.{processes.rank}")
    resumable = {"stop": stable, "checkpoint": partial, "checkpoint_every": 1}
    for count in (3, 6):
        profile_model(model, data(model, 9)[:count], **resumable, progress=False)
        Path(f"{mine}.after{count}").write_bytes(mine.read_bytes())
    if processes.rank == 1:
        mine.write_bytes(Path(f"{mine}.after3").read_bytes())
    resumed = profile_model(model, data(model, 9), **resumable, progress=False)
    said["resumed"] = resumed.digest() == stopped.digest()
    said["few"] = refusal(model, data(model, 1))
    said["different"] = refusal(model, data(model, 4)[processes.rank :][:3])
    said["more"] = refusal(model, data(model, 3 + processes.rank))
    torch.save(tensors, out / f"{processes.rank}.pt")
    (out / f"{processes.rank}.json").write_text(json.dumps(said))
"""

BACKENDS = ("kronecker", "fwsvd_two_sided")
OPTIONS: dict[str, dict[str, Any]] = {
    "empirical": {},
    "sampled": {"kind": "sampled", "draws": 2, "seed": 5},
    "token": {"unit": "token"},
}


def data(model: Any, count: int = 5) -> list[dict[str, Any]]:
    return tiny.batches(model, count=count)


def summed(model: Any, options: dict[str, Any], processes: Processes) -> dict[str, Tensor]:
    """Every raw sum, record and count."""
    objective = ModelLoss("causal-lm", Estimator(**options))
    modules = find_layers(model).modules
    found = gather(
        model, modules, data(model), objective, STATISTICS, processes=processes, progress=False
    )
    tensors = {f"{n}/{k}": t for n, s in found.sums.items() for k, t in s.tensors().items()}
    counts = [found.units, found.seen.batches, found.seen.examples, found.seen.targets]
    counts += [found.seen.loss, found.seen.entropy, found.seen.weighed]
    tensors["totals"] = torch.stack(found.seen.totals)
    tensors["units"] = torch.tensor(found.seen.units, dtype=torch.float64)
    tensors["counts"] = torch.tensor(counts, dtype=torch.float64)
    tensors["seen"] = torch.tensor([found.sums[name].seen for name in modules]).double()
    return tensors


def refusal(model: Any, batches: list[dict[str, Any]]) -> str:
    from rankopt import DataError

    try:
        profile_model(model, batches, progress=False)
    except DataError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what they found."""
    return in_two_processes(tmp_path_factory.mktemp("two"), WORK)


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_add_up_to_one(of_two: Path, name: str) -> None:
    alone = summed(in_double(tiny.llama()), OPTIONS[name], Processes())
    both = [torch.load(of_two / f"{rank}.pt") for rank in range(2)]
    prefix = f"{name}/"
    for found in both:
        shared = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        assert shared.keys() == alone.keys() and len(alone) > 50
        for key, tensor in alone.items():
            away = float((shared[key] - tensor).norm())
            assert away <= 1e-12 * float(tensor.norm()), key
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


@pytest.mark.slow
def test_two_processes_have_one_profile_which_is_that_of_one(of_two: Path) -> None:
    from rankopt import Profile

    first, second = said(of_two)
    assert (first["count"], first["rank"], second["rank"]) == (2, 0, 1)
    assert first["digest"] == second["digest"] and first["processes"] == 2
    # Layers that are measured in another pass have the same bits, except for what is summed first.
    assert first["in parts"] == second["in parts"] == first["digest"]
    model = in_double(tiny.llama())
    alone = profile_model(model, data(model), backends=BACKENDS)
    profiles = [Profile.load(of_two / f"{rank}.safetensors") for rank in range(2)]
    for shared in profiles:
        assert shared.info.data_digest == alone.info.data_digest
        assert shared.info.units == alone.info.units == 15
        for backend in BACKENDS:
            for name, curve in alone.curves[backend].items():
                found, losses = shared.curves[backend][name].losses, curve.losses
                assert abs(found - losses).max() <= 1e-12 * losses[0]
        assert shared.batch_fisher == pytest.approx(alone.batch_fisher, rel=1e-12)
        assert shared.batch_units.tolist() == alone.batch_units.tolist() == [3.0] * 5
    # Every process decomposed a share of the layers, and all have what all kept.
    for backend in BACKENDS:
        for name in alone.fisher_rows:
            kept = [profile.kept(backend, name) for profile in (*profiles, alone)]
            assert kept[0].keys() == kept[1].keys() == kept[2].keys() and kept[0]
            for kind in kept[0]:
                assert (kept[0][kind] == kept[1][kind]).all()
                assert kept[0][kind].shape == kept[2][kind].shape


@pytest.mark.slow
def test_halves_of_the_data_are_those_of_one_process(of_two: Path) -> None:
    """Each of two processes sees batches of one half only."""
    from rankopt import Profile

    model = in_double(tiny.llama())
    alone = profile_model(model, data(model), backends=BACKENDS, cross_fit=True)
    for rank in range(2):
        shared = Profile.load(of_two / f"crossed-{rank}.safetensors")
        for backend in BACKENDS:
            assert shared.valued[backend].keys() == alone.valued[backend].keys() != set()
            for name, curve in alone.valued[backend].items():
                away = abs(shared.valued[backend][name].losses - curve.losses).max()
                assert away <= 1e-11 * curve.losses[0]


@pytest.mark.slow
def test_all_processes_stop_together(of_two: Path) -> None:
    first, second = said(of_two)
    assert first["stopped"] == second["stopped"] and "ranks have settled" in first["stopped"]
    assert first["batches"] == second["batches"] == 8


@pytest.mark.slow
def test_processes_that_were_interrupted_at_different_places_go_on_together(of_two: Path) -> None:
    assert [found["resumed"] for found in said(of_two)] == [True, True]


@pytest.mark.slow
def test_what_processes_cannot_share_is_refused_by_all_of_them(of_two: Path) -> None:
    for found in said(of_two):
        assert "1 batches for 2 processes" in found["few"]
        for what in ("different", "more"):
            assert "the processes were given different batches" in found[what]


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join()
    assert alone == Processes() and alone.takes(0) and alone.takes(1)
    table = {"a": 1}
    assert alone.together(table) is table and alone.agree(3) == 3
    assert alone.latest(4, [1.0]) == (4, [1.0])
    assert not torch.distributed.is_initialized()
