"""A profile that was interrupted anywhere goes on to the same bits, and with nothing else."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankopt import DataError, OptionError, Profile, profile_model
from rankopt.measure import resume
from rankopt.measure.collector import Collector
from rankopt.measure.resume import Seen, load, save
from rankopt.plan.stability import Stability
from tests import tiny

ROOT = Path(__file__).parents[2]
KILLED_IN = ("empirical", "sampled")
OPTIONS: dict[str, dict[str, Any]] = {
    "empirical": {},
    "sampled": {"estimator": "sampled", "draws": 2, "backends": ["kronecker"]},
    "token": {"unit": "token", "draws": 2, "backends": ["fwsvd_two_sided", "whitened"]},
    "elements": {"backends": ["tfwsvd"]},
}


def measured(count: int = 6, **options: Any) -> Profile:
    model = tiny.llama()
    return profile_model(model, tiny.batches(model, count=count), progress=False, **options)


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Stop a profile inside the so-manieth backward pass: in the middle of a batch, or of draws."""
    calls, backward = [], Collector.backward

    def fails(self: Collector, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        # The passes before a batch that check the data are no measurements.
        backward(self, *args, **kwargs)
        if sum(each is self for each in calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "backward", fails)
        with pytest.raises(KeyboardInterrupt):
            measured(**options)


@pytest.mark.parametrize("call", [4, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_profile_has_the_bits_of_an_uninterrupted_one(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS[name], "checkpoint": tmp_path / "partial", "checkpoint_every": 2}
    interrupted_at(call, monkeypatch, **options)
    assert (tmp_path / "partial").exists() == (call > 4 or "draws" not in options)
    found, wanted = measured(**options), measured(**OPTIONS[name])
    assert found.digest() == wanted.digest()
    assert found.info == wanted.info and found.examples == 18
    # Nothing is measured any more, and nothing has changed.
    monkeypatch.setattr(Collector, "backward", None)
    assert measured(**options).digest() == wanted.digest()


@pytest.mark.parametrize("call", [4, 5, 8])
def test_when_ranks_settle_does_not_depend_on_interruptions(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"count": 12, "stop": Stability(tolerance=0.9)}
    wanted = measured(**options)
    assert wanted.info.stopped and len(wanted.batch_units) == 8
    for every in (1, 4):
        resumable = {**options, "checkpoint": tmp_path / f"{every}", "checkpoint_every": every}
        interrupted_at(call, monkeypatch, **resumable)
        assert measured(**resumable).digest() == wanted.digest()
        assert measured(**resumable).digest() == wanted.digest()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rankopt import profile_model
    from rankopt.measure.collector import Collector
    from tests import tiny
    from tests.measure.test_resume import KILLED_IN, OPTIONS, deadly

    tiny.llama()
    for name in KILLED_IN:
        options = OPTIONS[name]
        # Children: each is killed, and nothing was back-propagated before it was born.
        child = os.fork()
        if child == 0:
            model = tiny.llama()
            batches = tiny.batches(model, count=6)
            if name == "empirical":
                batches = deadly(batches, 4)
            else:
                add = Collector._add

                def dies(self, *args, seen=[]):
                    seen.append(1)
                    add(self, *args)
                    if len(seen) == 90:
                        os.kill(os.getpid(), signal.SIGKILL)

                Collector._add = dies
            path = Path(sys.argv[1]) / name
            profile_model(
                model, batches, checkpoint=path, checkpoint_every=1, progress=False, **options
            )
            os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def deadly(batches: list[Any], number: int) -> Iterator[Any]:
    for k, batch in enumerate(batches):
        if k == number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split("\n")[:-1] == [f"{name} -9" for name in KILLED_IN], done.stderr
    for name in KILLED_IN:
        path, options = tmp_path / name, OPTIONS[name]
        assert path.exists(), "it was killed before anything was saved"
        found = measured(checkpoint=path, **options)
        assert found.digest() == measured(**options).digest()


def test_a_run_that_goes_on_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "partial"
    measured(checkpoint=path, checkpoint_every=4)
    assert "going on" not in capsys.readouterr().err
    measured(checkpoint=path, checkpoint_every=4)
    assert f"going on after 4 batches ({path})" in capsys.readouterr().err


def test_more_data_than_before_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    measured(count=3, checkpoint=path, checkpoint_every=1)
    assert measured(count=5, checkpoint=path).digest() == measured(count=5).digest()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"estimator": "sampled"}, "kind"),
        ({"unit": "token"}, "unit"),
        ({"unit": "token", "draws": 2}, "unit, another draws"),
        ({"backends": ["fwsvd_two_sided"]}, "needs"),
        ({"stop": Stability()}, "stop"),
        ({"exclude": ["*.mlp.*"]}, "model"),
    ],
)
def test_other_settings_are_refused_naming_them(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "partial"
    measured(checkpoint=path, checkpoint_every=2)
    with pytest.raises(DataError, match=rf"measured with another {named}: give the same .* delete"):
        measured(checkpoint=path, **changed)


def test_another_seed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    measured(checkpoint=path, checkpoint_every=2, estimator="sampled", seed=1)
    with pytest.raises(DataError, match="another seed"):
        measured(checkpoint=path, estimator="sampled", seed=2)


def summed(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).logits.square().sum((1, 2))


def half(model: Any, batch: Any) -> torch.Tensor:
    return summed(model, batch) / 2


def test_another_loss_is_refused(tmp_path: Path) -> None:
    options = {"checkpoint": tmp_path / "partial", "checkpoint_every": 2}
    first = measured(loss_fn=summed, **options)
    with pytest.raises(DataError, match="another loss_fn"):
        measured(loss_fn=half, **options)
    assert measured(loss_fn=summed, **options).digest() == first.digest()


def test_another_model_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "partial", tiny.llama()
    batches = tiny.batches(model)
    profile_model(model, batches, checkpoint=path, checkpoint_every=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(DataError, match="measured with another model"):
        profile_model(model, batches, checkpoint=path)
    other = tiny.llama(num_hidden_layers=1)
    with pytest.raises(DataError, match="measured with another model"):
        profile_model(other, batches, checkpoint=path)
    half = tiny.llama().to(torch.bfloat16)
    path.unlink()
    profile_model(half, batches, checkpoint=path, checkpoint_every=1)
    with pytest.raises(DataError, match="another dtype"):
        profile_model(half.float(), batches, checkpoint=path)


@pytest.mark.parametrize("change", ["a word", "order", "fewer", "longer batches"])
def test_other_data_are_refused(change: str, tmp_path: Path) -> None:
    path, model = tmp_path / "partial", tiny.llama()
    batches = tiny.batches(model, count=4)
    profile_model(model, batches, checkpoint=path, checkpoint_every=2)
    if change == "a word":
        batches[1]["input_ids"][1, 2] += 1
    elif change == "order":
        batches[0], batches[1] = batches[1], batches[0]
    elif change == "fewer":
        batches = batches[:2]
    else:
        batches = [
            {k: torch.cat([b[k] for b in batches[n : n + 2]]) for k in batches[0]} for n in (0, 2)
        ]
    with pytest.raises(DataError, match=rf"{path}.*measured with other data.*delete"):
        profile_model(model, batches, checkpoint=path)


def test_texts_and_arrays_that_a_loss_function_reads_are_data(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 5))
    words = {"one": 1.0, "two": 2.0, "three": 3.0}

    def loss(model: Any, batch: Any) -> torch.Tensor:
        values = torch.tensor([words[word] for word in batch["text"]])
        out: torch.Tensor = model(values[:, None].expand(-1, 6))
        return out.square().sum(1)

    def run(*texts: str) -> Profile:
        batches = [{"text": [text, "one"]} for text in texts]
        return profile_model(model, batches, loss_fn=loss, checkpoint=path, checkpoint_every=1)

    first = run("one", "two")
    with pytest.raises(DataError, match="other data"):
        run("one", "three")
    assert run("one", "two").digest() == first.digest()


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "header", "nonsense", "another file", "a count", "sums"]
)
def test_a_damaged_checkpoint_says_delete(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "partial"
    profile = measured(checkpoint=path, checkpoint_every=2)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        content[content.index(b"about") + 20] ^= 0xFF
        path.write_bytes(content)
    elif damage == "a count":
        assert content.count(b'examples\\": 18') == 1
        path.write_bytes(content.replace(b'examples\\": 18', b'examples\\": 19'))
    elif damage == "nonsense":
        path.write_bytes(b"this is no checkpoint" * 20)
    elif damage == "another file":
        path.unlink()
        profile.save(path)
    else:
        content[-40] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} cannot be read .*: delete it to start again"):
        measured(checkpoint=path)


def resealed(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change what a checkpoint says, and its sha256 with it."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(header["about"])
    change(about, tensors)
    header["about"] = json.dumps(about)
    header["sha256"] = resume._digest(header["about"], tensors)
    save_file(tensors, path, header)


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda about, _: about["seen"].update(batches=-1), r"seen\.batches: .*greater than"),
        (lambda about, _: about["seen"].update(batches=[2]), r"seen\.batches: .*integer"),
        (lambda about, _: about["seen"].update(numbers=[1, 0, 2]), "contradict each other"),
        (lambda about, _: about["seen"].pop("chain"), r"seen\.chain: Field required"),
        (lambda about, _: about["seen"].update(more=1), r"seen\.more: Extra"),
        (lambda about, _: about.update(seen=None), "seen: "),
        (lambda about, _: about["layers"]["owners"].update(other="other"), "not those of the mod"),
        (lambda about, _: about["layers"]["seen"].update({LAYER: "1"}), "layers.seen"),
        (lambda _, tensors: tensors.pop(f"{LAYER}/rows"), f"{LAYER}/rows is not there"),
        (lambda _, tensors: tensors.update({f"{LAYER}/rows": torch.ones(3)}), "another shape"),
        (lambda _, tensors: tensors[f"{LAYER}/rows"].mul_(float("nan")), "no finite number"),
        (lambda _, tensors: tensors.pop("seen.units"), "seen.units"),
        (lambda _, tensors: tensors["seen.units"].zero_(), "contradict each other"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_says_delete(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None],
    complaint: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "partial"
    measured(checkpoint=path, checkpoint_every=1)
    resealed(path, change)
    with pytest.raises(DataError, match=rf"cannot be read \(.*{complaint}.*delete it") as caught:
        measured(checkpoint=path, checkpoint_every=1)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_is_no_error_and_what_was_saved_is_read_back(tmp_path: Path) -> None:
    assert load(tmp_path / "none", {}) is None
    seen = Seen(3, 5, 7, "abc", [torch.tensor([0.1, 0.2])], [2.0], [1], None, [4.0])
    sums = {"a/rows": torch.rand(4, dtype=torch.float64)}
    layers = {"owners": {"a": "a"}, "seen": {"a": 1}}
    save(tmp_path / "it", seen, sums, layers, {"kind": "sampled", "draws": 2})
    found = load(tmp_path / "it", {"kind": "sampled", "draws": 2})
    assert found is not None
    assert dataclass_equal(found[0], seen) and found[2] == {**layers, "odd": {}}
    assert torch.equal(found[1]["a/rows"], sums["a/rows"])


def test_a_file_of_before_there_were_packages_is_gone_on_from(tmp_path: Path) -> None:
    """What was found at the last check had another name in it."""
    seen = Seen(3, 5, 7, "abc", [torch.tensor([0.1, 0.2])], [2.0], [1], None, [4.0])
    save(tmp_path / "new", seen, {}, {}, {})
    with safe_open(tmp_path / "new", framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["about"] = header["about"].replace('"last_check"', '"looked"')
    header["sha256"] = resume._digest(header["about"], tensors)
    save_file(tensors, tmp_path / "old", header)
    found = load(tmp_path / "old", {})
    assert found is not None and dataclass_equal(found[0], seen)


def dataclass_equal(a: Seen, b: Seen) -> bool:
    left, right = dict(vars(a)), dict(vars(b))
    totals = zip(left.pop("totals"), right.pop("totals"), strict=True)
    return left == right and all(torch.equal(x, y) for x, y in totals)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"layers_at_a_time": 3, "checkpoint": "partial"}, "layers_at_a_time"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        measured(**options)


def test_a_stop_that_is_a_function_is_named_with_its_module(tmp_path: Path) -> None:
    """Another module's function of the same name is another stop."""

    def stop(profile: Profile, before: Any) -> tuple[list[float], str | None]:
        raise KeyboardInterrupt

    def elsewhere(profile: Profile, before: Any) -> tuple[list[float], str | None]:
        return [], None

    elsewhere.__module__, elsewhere.__qualname__ = "elsewhere", stop.__qualname__
    model = tiny.llama()
    how = {"checkpoint": tmp_path / "it", "checkpoint_every": 1, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        profile_model(model, tiny.batches(model, count=5), stop=stop, **how)
    with pytest.raises(DataError, match="another stop"):
        profile_model(model, tiny.batches(model, count=5), stop=elsewhere, **how)
