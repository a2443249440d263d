"""Offloaded, compiled and wrapped models give the profile and the logits of the plain model."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from rankopt import (
    ModelError,
    Plan,
    Profile,
    applied,
    apply_plan,
    evaluate,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.model.offloaded import offload_hook, read_again
from rankopt.model.selection import find_layers
from rankopt.model.size import model_size
from rankopt.model.weights import device_of, unwrapped
from tests import tiny

CPU = torch.device("cpu")
Wrap = Callable[[Any], Any]


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[Any, Profile, Plan]]:
    """Architecture -> plain model, its profile and plan; not to be changed."""
    made: dict[str, tuple[Any, Profile, Plan]] = {}

    def build(kind: str) -> tuple[Any, Profile, Plan]:
        if kind not in made:
            model = tiny.MODELS[kind]()
            profile = profile_model(model, tiny.batches(model))
            made[kind] = (model, profile, make_plan(profile, keep=0.5))
        return made[kind]

    return build


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.batches(unwrapped(model))[0]).logits
    return found


def require_same_profile(found: Profile, wanted: Profile) -> None:
    assert found.info == wanted.info
    assert found.digest() == wanted.digest()


def offloaded(model: Any, folder: Path | None) -> Any:
    """With its weights in a dictionary, or in files of a folder."""
    accelerate = pytest.importorskip("accelerate")
    if folder is None:
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, str(folder), CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("to_disk", [False, True], ids=["cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "albert"])
def test_an_offloaded_model_is_measured_and_compressed_like_the_plain_one(
    kind: str, to_disk: bool, plain: Any, tmp_path: Path
) -> None:
    model, profile, plan = plain(kind)
    batches = tiny.batches(model)
    away = offloaded(tiny.MODELS[kind](), tmp_path / "weights" if to_disk else None)
    assert device_of(away) == CPU
    assert model_size(away) == model_size(model)
    require_same_profile(profile_model(away, batches), profile)
    assert evaluate(away, batches) == evaluate(model, batches)
    with applied(model, plan, profile), applied(away, plan, profile):
        assert evaluate(away, batches) == evaluate(model, batches)
        wanted = logits(model)
        assert torch.equal(logits(away), wanted)
    assert torch.equal(logits(away), logits(model))
    assert all(parameter.is_meta for parameter in away.parameters())
    apply_plan(away, plan, profile)
    save_model(away, tmp_path / "model")
    found, report = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.allclose(logits(found), wanted, atol=1e-5)


class Lent(Mapping[str, Tensor]):
    """What a hook of accelerate's reads from: copies, of which is known how many are in memory."""

    def __init__(self, weights: Any, alive: "list[weakref.ref[Any]]") -> None:
        self.weights, self.alive = weights, alive

    def __getitem__(self, name: str) -> Tensor:
        # A tensor's memory keeps the array that it is from.
        array = self.weights[name].numpy().copy()
        self.alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def lent(model: Any) -> "list[weakref.ref[Any]]":
    alive: list[weakref.ref[Any]] = []
    for module in model.modules():
        hook = offload_hook(module)
        if hook is not None:
            hook.weights_map = Lent(hook.weights_map, alive)
    return alive


def gradient(model: Any, alive: "list[weakref.ref[Any]]") -> tuple[Tensor, int]:
    """Of a loss with respect to the embedded tokens; and weights in memory before backward."""
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loss = model(inputs_embeds=states).logits.square().sum()
    kept = sum(each() is not None for each in alive)
    loss.backward()
    assert states.grad is not None
    return states.grad, kept


def test_weights_that_are_elsewhere_are_not_kept_for_the_backward_pass() -> None:
    wanted, _ = gradient(tiny.llama(), [])
    away = offloaded(tiny.llama(), None)
    alive = lent(away)
    found, kept = gradient(away, alive)
    assert torch.equal(found, wanted) and kept >= 14  # what autograd does by itself
    alive.clear()
    with read_again(away):
        found, kept = gradient(away, alive)
    assert torch.equal(found, wanted) and kept == 0
    assert not away._forward_hooks and len(alive) > 14


def test_changes_in_place_are_noticed_though_weights_are_read_again() -> None:
    away = offloaded(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), None)
    with read_again(away):
        x = torch.ones(2, 4, requires_grad=True)
        y = x * 2.0
        z = (y * y).sum()
        y.mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()


def test_an_offloaded_head_is_untied_like_the_plain_one() -> None:
    options = {"include": ["lm_head"], "untie": True}
    model, away = tiny.llama(), offloaded(tiny.llama(), None)
    assert find_layers(away, **options).layers == find_layers(model, **options).layers
    batches = tiny.batches(model)
    profile = profile_model(model, batches, **options)
    require_same_profile(profile_model(away, batches, **options), profile)
    plan = make_plan(profile, keep=0.5)
    for each in (model, away):
        apply_plan(each, plan, profile)
    assert torch.equal(logits(away), logits(model))


def test_weights_that_are_nowhere_are_still_refused() -> None:
    away = offloaded(tiny.llama(), None)
    module = away.model.layers[1].mlp.up_proj
    del module._hf_hook
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: .*not loaded"):
        find_layers(away)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: Any) -> Any:
    """With eager kernels: what matters here is the wrapper and its guards, not the code."""
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def used(model: Any) -> Any:
    logits(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [compiled, lambda model: used(compiled(model))],
    ids=["compiled", "compiled and used"],
)
def test_a_compiled_model_is_measured_and_compressed_like_the_plain_one(
    wrap: Wrap, plain: Any
) -> None:
    model, profile, plan = plain("llama")
    batches = tiny.batches(model)
    wrapped = wrap(tiny.llama())
    require_same_profile(profile_model(wrapped, batches), profile)
    assert evaluate(wrapped, batches) == evaluate(model, batches)
    with applied(model, plan, profile):
        wanted = logits(model)
    with applied(wrapped, plan, profile) as inside:
        assert inside is wrapped
        assert torch.equal(logits(wrapped), wanted)
    assert torch.equal(logits(wrapped), logits(model))
    assert apply_plan(wrapped, plan, profile) is wrapped
    assert torch.equal(logits(wrapped), wanted)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        lambda model: compiled(DistributedDataParallel(model)),
        lambda model: DistributedDataParallel(compiled(model)),
    ],
    ids=["DDP", "compiled DDP", "DDP of compiled"],
)
def test_a_model_in_ddp_is_measured_like_the_plain_one(wrap: Wrap, plain: Any) -> None:
    model, profile, plan = plain("bert-classification")
    batches = tiny.batches(model)
    wrapped = wrap(tiny.bert())
    assert unwrapped(wrapped) is not wrapped and type(unwrapped(wrapped)) is type(model)
    require_same_profile(profile_model(wrapped, batches), profile)
    with applied(model, plan, profile), applied(wrapped, plan, profile):
        assert evaluate(wrapped, batches) == evaluate(model, batches)
    with pytest.raises(ModelError, match=r"apply the plan to model\.module"):
        apply_plan(wrapped, plan, profile)
    assert torch.equal(logits(unwrapped(wrapped)), logits(model))


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("whole", [True, False])
def test_a_sharded_model_is_not_evaluated(whole: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = tiny.llama(), init_device_mesh("cpu", (1,))
    for module in [model] if whole else model.model.layers:
        fully_shard(module, mesh=mesh)
    with pytest.raises(ModelError, match="FSDP keeps only a part of each weight"):
        evaluate(model, tiny.batches(tiny.llama()))


def test_a_block_is_compiled_in_place_or_not_at_all() -> None:
    model, plain = tiny.llama(), tiny.llama()
    batches = tiny.batches(model)
    torch.compiler.reset()
    model.model.layers[0].compile(backend="eager")
    require_same_profile(profile_model(model, batches), profile_model(plain, batches))
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(ModelError, match=r"model\.layers\.1 is wrapped .* compile it in place"):
        profile_model(model, batches)


def test_data_parallel_is_refused_also_inside_a_compiled_model() -> None:
    with pytest.raises(ModelError, match=r"profile model\.module"):
        unwrapped(compiled(nn.DataParallel(tiny.llama())))


def test_a_module_under_several_names_is_replaced_under_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(1)

    model, x = Twice(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    profile = profile_model(model, [x], loss_fn=losses)
    assert [layer.name for layer in profile.info.layers] == ["first"]
    apply_plan(model, make_plan(profile, keep=0.8), profile)
    assert model.first is model.second
    assert sum(p.numel() for p in model.parameters()) < 64
