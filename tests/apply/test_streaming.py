"""A checkpoint that is compressed a tensor at a time: the same files, resumable."""

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankopt import (
    ModelError,
    Plan,
    Profile,
    RankoptError,
    apply_plan,
    make_plan,
    profile_model,
    save_model,
)
from rankopt.apply import streaming
from rankopt.apply.shards import Shards
from rankopt.apply.streaming import apply_streamed
from rankopt.errors import WriteError
from rankopt.model.loading import leaves_on_disk, load_model
from rankopt.model.offloaded import files_of_weights
from tests import tiny
from tests.cli.test_cli import Run, done
from tests.cli.test_cli import run as run

pytestmark = pytest.mark.skipif(
    not leaves_on_disk(), reason="this transformers or accelerate does not leave all on disk"
)

COMMAND = ["rankopt", "apply"]


def loaded(folder: Path, converted: Path | None = None) -> Any:
    """With its weights left in the files."""
    return load_model(str(folder / "dense"), "auto", "disk", converted)


def prepared(
    folder: Path,
    model: Any,
    *,
    form: str = "pivoted",
    bases: bool = True,
    shards: str = "50GB",
    change: Callable[[dict[str, Tensor]], object] | None = None,
    **options: Any,
) -> tuple[Plan, Profile]:
    """``dense`` in the folder, a plan for it, and its profile as it is read from a file."""
    model.save_pretrained(folder / "dense", max_shard_size=shards)
    tiny.tokenizer(folder / "dense")
    if change is not None:
        path = folder / "dense" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    how: dict[str, Any] = {"form": form, "keep_bases": bases, **options}
    measured = load_model(str(folder / "dense"))
    profile_model(measured, tiny.batches(measured), **how).save(folder / "p.safetensors")
    profile = Profile.load(folder / "p.safetensors")
    return make_plan(profile, keep=0.6), profile


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def whole(folder: Path, plan: Plan, profile: Profile) -> dict[str, bytes]:
    """What is written by way of a model in memory."""
    model = apply_plan(load_model(str(folder / "dense")), plan, profile)
    save_model(model, folder / "whole", plan=plan, tokenizer=tiny.tokenizer(), command=COMMAND)
    return files_of(folder / "whole")


def streamed(folder: Path, plan: Plan, profile: Profile, name: str = "small") -> dict[str, bytes]:
    (folder / "converted").mkdir(exist_ok=True)
    model = loaded(folder, folder / "converted")
    how: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "command": COMMAND}
    apply_streamed(model, plan, profile, folder / name, **how)
    return files_of(folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Profile]:
    """A folder with a tiny Llama in several files, its plan and its profile; and ``whole``."""
    folder = tmp_path_factory.mktemp("made")
    plan, profile = prepared(folder, tiny.llama(), shards="20KB")
    whole(folder, plan, profile)
    return folder, plan, profile


@pytest.fixture
def wanted(made: tuple[Path, Plan, Profile]) -> dict[str, bytes]:
    """What is written of that Llama in memory."""
    return files_of(made[0] / "whole")


@pytest.fixture
def llama(made: tuple[Path, Plan, Profile], tmp_path: Path) -> tuple[Path, Plan, Profile]:
    """The same in a folder of the test's own."""
    folder, plan, profile = made
    shutil.copytree(folder / "dense", tmp_path / "dense")
    shutil.copy(folder / "p.safetensors", tmp_path)
    return tmp_path, plan, profile


BUILT: dict[str, Any] = {
    "llama-untied": (tiny.llama, {"include": ["lm_head", "*.up_proj"], "untie": True}),
    "bert": (tiny.bert, {"bases": False, "shards": "20KB"}),
    "bert-mlm": (lambda: tiny.bert("MaskedLM").bfloat16(), {"form": "pairs"}),
    "gpt2": (lambda: tiny.gpt2().bfloat16(), {"shards": "20KB"}),
    "t5": (tiny.t5, {"shards": "20KB"}),
    "mixtral": (tiny.mixtral, {}),  # transformers converts it while it loads
}
MORE: dict[str, Any] = {
    "llama-bfloat16": (lambda: tiny.llama().bfloat16(), {"form": "pairs"}),
    "llama-pairs": (tiny.llama, {"form": "pairs", "bases": False}),
    "gpt2-pairs": (tiny.gpt2, {"form": "pairs", "bases": False}),
    "t5-bfloat16": (lambda: tiny.t5().bfloat16(), {"form": "pairs"}),
    "albert": (tiny.albert, {}),
    "vit": (tiny.vit, {}),
}


@pytest.mark.parametrize(
    "kind", [*BUILT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
)
def test_the_files_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    build, options = (BUILT | MORE)[kind]
    plan, profile = prepared(tmp_path, build(), **options)
    assert any(rank is not None for rank in plan.ranks.values())
    if options.get("shards"):
        assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    wanted, found = whole(tmp_path, plan, profile), streamed(tmp_path, plan, profile)
    assert found.keys() == wanted.keys() >= {"README.md", "rankopt_plan.json", "config.json"}
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not (tmp_path / "small.partial").exists()


def test_several_files_have_the_index_of_the_whole_model(
    llama: tuple[Path, Plan, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def in_parts(self: Any, folder: Any, max_shard_size: str = "9KB", **how: Any) -> None:
        save(self, folder, max_shard_size=max_shard_size, **how)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_parts)
    wanted, found = whole(*llama), streamed(*llama)
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 2
    assert found == wanted


def test_no_more_than_a_layer_is_in_memory(
    llama: tuple[Path, Plan, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tensors that were read or made, those of the piece in hand alone are alive."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def put(self: Shards, piece: str, tensors: dict[str, Tensor]) -> None:
        nonlocal most
        alive[:] = [each for each in alive if each() is not None]
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        most = max(most, len(alive))
        monkeypatch.undo()
        self.put(piece, tensors)
        monkeypatch.setattr(Shards, "put", put)

    monkeypatch.setattr(Shards, "put", put)
    streamed(*llama)
    # Factors, their guard and the order of the pivots, and those of the piece before.
    assert 0 < most <= 8


def test_too_little_room_is_said_before(
    llama: tuple[Path, Plan, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan, profile = llama
    free = os.statvfs(folder)
    fields = list(free)
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(WriteError, match=r"the weights need .* GB, and 0\.0 GB are free"):
        apply_streamed(loaded(folder), plan, profile, folder / "small")
    assert not (folder / "small").exists()


def test_a_checkpoint_that_is_not_the_plans_leaves_nothing(
    llama: tuple[Path, Plan, Profile], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, plan, profile = llama
    other = tmp_path_factory.mktemp("other")
    prepared(other, tiny.llama(intermediate_size=32))
    with pytest.raises(RankoptError, match="the plan is for another model"):
        apply_streamed(loaded(other), plan, profile, other / "small")
    assert sorted(path.name for path in other.iterdir()) == ["dense", "p.safetensors"]


def test_a_tensor_that_would_be_lost_is_named(llama: tuple[Path, Plan, Profile]) -> None:
    folder, plan, profile = llama
    model = loaded(folder)
    del files_of_weights(model)["model.norm.weight"]
    with pytest.raises(ModelError, match=r"would be lost: model\.norm\.weight"):
        apply_streamed(model, plan, profile, folder / "small")
    assert not (folder / "small.partial").exists()


def test_a_plan_that_counts_otherwise_is_refused(llama: tuple[Path, Plan, Profile]) -> None:
    folder, plan, profile = llama
    more = {"model_dense": plan.size.model_dense + 1, "model": plan.size.model + 1}
    plan = plan.model_copy(update={"size": plan.size.model_copy(update=more)})
    with pytest.raises(ModelError, match=r"where the plan counts .*: profile this model again"):
        apply_streamed(loaded(folder), plan, profile, folder / "small")
    assert not (folder / "small.partial").exists()


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    model = tiny.llama()
    model.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(7)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.input_layernorm\.weight is 7, not 24"):
        loaded(tmp_path)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STORED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "twice": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
    "apart": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1.0}),
    "as the head": lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
}


@pytest.mark.parametrize("how", STORED)
def test_a_tie_is_what_the_files_say(how: str, tmp_path: Path) -> None:
    plan, profile = prepared(tmp_path, tiny.llama(), change=STORED[how])
    wanted = whole(tmp_path, plan, profile)
    assert streamed(tmp_path, plan, profile) == wanted
    assert (HEAD.encode() in wanted["model.safetensors"]) == (how == "apart")


@pytest.fixture
def project(llama: tuple[Path, Plan, Profile], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, plan, _ = llama
    plan.save(folder / "plan.json")
    monkeypatch.chdir(folder)
    return folder


APPLY = "apply dense plan.json --profile p.safetensors -o"


def test_the_command_line_streams_folders(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankopt.apply.apply.apply_plan", lambda *_, **__: pytest.fail("in memory"))
        done(run(*f"{APPLY} small".split()))
    monkeypatch.setattr("rankopt.model.loading.leaves_on_disk", lambda: False)
    monkeypatch.setattr("rankopt.apply.verify.builds_empty", lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "apply_streamed", lambda *_, **__: pytest.fail("streamed"))
        done(run(*f"{APPLY} whole".split()))
    wanted = files_of(project / "whole")
    # The command is in the card.
    wanted["README.md"] = wanted["README.md"].replace(b"-o whole", b"-o small")
    assert files_of(project / "small") == wanted
    code, _, err = run(*f"{APPLY} small".split())
    assert code == 2 and "exists and is not empty" in err
    done(run(*f"{APPLY} small --force".split()))
    assert not list(project.glob("*.partial")) and not list(project.glob(".rankopt*"))


def test_weights_that_are_not_safetensors_are_refused(project: Path, run: Run) -> None:
    for path in (project / "dense").glob("*.safetensors*"):
        path.unlink()
    torch.save({}, project / "dense" / "pytorch_model.bin")
    code, _, err = run(*f"{APPLY} small".split())
    assert code == 2 and "has its weights in pytorch_model.bin only" in err
    assert not (project / "small").exists() and not (project / "small.partial").exists()
