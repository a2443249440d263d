"""A model that FSDP2 has spread over two processes is measured like the plain one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from rankopt import (
    Compressed,
    DataError,
    ModelError,
    OptionError,
    Profile,
    Stability,
    apply_plan,
    evaluate,
    profile_model,
)
from tests import tiny
from tests.measure.exact import in_double
from tests.measure.two import in_two_processes

#: What every process does; the parent does the same alone.
WORK = """
    import json, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from rankopt import profile_model
    from rankopt.measure.processes import Processes
    from tests.measure.test_sharded import CASES, data, plain, refused, sharded

    out, processes = Path(sys.argv[1]), Processes.join()
    said = {}
    for name, (kind, options) in CASES.items():
        model = sharded(kind)
        before = [(type(x).__name__, x.training) for x in model.modules()]
        wants = [p.requires_grad for p in model.parameters()]
        profile = profile_model(model, data(kind), progress=False, **options)
        profile.save(out / f"{name}-{processes.rank}.safetensors")
        same = before == [(type(x).__name__, x.training) for x in model.modules()]
        same &= wants == [p.requires_grad for p in model.parameters()]
        same &= all(p.grad is None for p in model.parameters())
        said[name] = [same, profile.digest()]
    # It trains as before: all gradients are there.
    model = sharded("llama")
    profile_model(model, data("llama"), progress=False)
    model(**data("llama")[0]).loss.backward()
    said["trains"] = all(p.grad is not None for p in model.parameters())
    for name, given in (("more", 3 + processes.rank), ("few", 1)):
        said[name] = refused(lambda: profile_model(sharded("llama"), data("llama")[:given]))
    said["half mesh"] = refused(lambda: profile_model(sharded("llama", half=True), data("llama")))
    (out / f"{processes.rank}.json").write_text(json.dumps(said))
"""

#: name -> kind of model, options; five batches for two processes, of different sizes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"backends": ("kronecker", "fwsvd_two_sided")}),
    "crossed": ("llama", {"cross_fit": True}),
    "parts": ("llama", {"layers_at_a_time": 5}),
    "sampled": ("llama", {"estimator": "sampled", "draws": 2, "seed": 5}),
    "bert": ("bert", {}),
    "gpt2": ("gpt2", {"backends": ("fwsvd",), "moments": False}),
    "t5": ("t5", {}),
}


def plain(kind: str) -> Any:
    return in_double(tiny.MODELS.get(kind, tiny.bert)())


def data(kind: str) -> list[dict[str, Any]]:
    """Five batches; the last is smaller, the first has no padding."""
    made = tiny.batches(plain(kind), count=5)
    made[-1] = {name: tensor[:2] for name, tensor in made[-1].items()}
    if kind != "t5":
        made[0] = {name: tensor[1:] for name, tensor in made[0].items()}
    return made


def sharded(kind: str, *, half: bool = False) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain(kind)
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count, 1), mesh_dim_names=("all", "one"))
    mesh = mesh["one" if half else "all"]
    # Inner ones first: what is sharded already belongs to no other unit.
    for blocks in [x for x in model.modules() if isinstance(x, torch.nn.ModuleList)][::-1]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def refused(call: Any) -> str:
    try:
        call()
    except (DataError, ModelError) as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what they found."""
    return in_two_processes(tmp_path_factory.mktemp("sharded"), WORK)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_has_the_profile_of_the_plain_one(of_two: Path, name: str) -> None:
    kind, options = CASES[name]
    alone = profile_model(plain(kind), data(kind), **options)
    said = [json.loads((of_two / f"{rank}.json").read_text())[name] for rank in range(2)]
    assert said[0] == said[1] == [True, said[0][1]]
    for rank in range(2):
        found = Profile.load(of_two / f"{name}-{rank}.safetensors")
        described = found.info.model_dump(exclude={"processes", "backends"})
        assert described == alone.info.model_dump(exclude={"processes", "backends"})
        for layer, rows in alone.fisher_rows.items():
            assert abs(found.fisher_rows[layer] - rows).max() <= 1e-12 * rows.max()
        for backend, curves in alone.curves.items():
            for layer, curve in curves.items():
                for wanted, got in (
                    (curve, found.curves[backend][layer]),
                    *(
                        (x[backend][layer], y[backend][layer])
                        for x, y in [(alone.valued, found.valued)]
                        if backend in x
                    ),
                ):
                    away = abs(got.losses - wanted.losses).max()
                    # Cross-fitted losses go through inverses of moments.
                    assert away <= (1e-11 if name == "crossed" else 1e-12) * wanted.losses[0]
            for member in alone.fisher_rows:
                kept = found.kept(backend, member)
                assert kept.keys() == alone.kept(backend, member).keys()
        assert found.batch_fisher == pytest.approx(alone.batch_fisher, rel=1e-12)


@pytest.mark.slow
def test_a_sharded_model_trains_as_before(of_two: Path) -> None:
    for rank in range(2):
        assert json.loads((of_two / f"{rank}.json").read_text())["trains"]


@pytest.mark.slow
def test_a_model_on_a_part_of_the_processes_is_refused(of_two: Path) -> None:
    for rank in range(2):
        said = json.loads((of_two / f"{rank}.json").read_text())["half mesh"]
        assert "is sharded over 1 of 2 processes: shard the model over all of them" in said


@pytest.mark.slow
def test_batches_that_processes_cannot_share_are_refused_by_all(of_two: Path) -> None:
    for rank in range(2):
        said = json.loads((of_two / f"{rank}.json").read_text())
        assert "the processes were given different batches" in said["more"]
        assert "1 batches for 2 processes" in said["few"]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process")
def test_one_process_measures_a_sharded_model_to_the_bit() -> None:
    found = profile_model(sharded("llama"), data("llama"))
    assert found.digest() == profile_model(plain("llama"), data("llama")).digest()


@pytest.mark.usefixtures("process")
def test_what_a_sharded_model_cannot_have_is_refused(tmp_path: Path) -> None:
    model, batches = sharded("llama"), data("llama")
    for options in (
        {"checkpoint": tmp_path / "partial"},
        {"stop": Stability()},
        {"again": Compressed()},
    ):
        with pytest.raises(OptionError, match="a sharded model takes no stop, no checkpoint"):
            profile_model(model, batches, **options)
    assert not (tmp_path / "partial").exists()
    with pytest.raises(ModelError, match="profile_model alone takes it sharded"):
        evaluate(model, batches)
    profile = profile_model(model, batches)
    from rankopt import make_plan

    with pytest.raises(ModelError, match="take the model before it is sharded"):
        apply_plan(model, make_plan(profile, keep=0.5), profile)


@pytest.mark.usefixtures("process")
def test_halves_are_refused_where_they_are_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny.llama().half()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModelError, match="is in float16, where each process tries for itself"):
        profile_model(model, tiny.batches(tiny.llama()))
