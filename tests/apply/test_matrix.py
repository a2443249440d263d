"""What users do with a compressed folder, for four architectures in both forms.

Reloaded in a process of its own, fine-tuned, with adapters, exported. ``pytest -s`` ends with a
table of what was found.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, pipeline

from rankopt import apply_plan, make_plan, profile_model, save_model
from rankopt.layers import FORMS
from tests import tiny
from tests.apply.test_reload import low_rank, require_same_weights, run

pytestmark = pytest.mark.slow

MODELS = {kind: tiny.MODELS[kind] for kind in ("bert-classification", "llama", "t5", "gpt2")}
CASES = [(kind, form) for kind in MODELS for form in FORMS]
#: Of the largest output: sums in another order.
CLOSE = 1e-4

Shown = dict[tuple[str, str], dict[str, str]]


class Saved(NamedTuple):
    model: Any
    batch: dict[str, Tensor]
    folder: Path


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    """Case -> column -> what was found; printed at the end."""
    found: Shown = defaultdict(dict)
    yield found
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    table = Table("model", "form", *columns)
    for case, row in found.items():
        table.add_row(*case, *(row.get(column, "") for column in columns))
    Console(width=160).print("\n", table)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """Case -> compressed model, a batch and the folder; made once, not to be changed."""
    made: dict[tuple[str, str], Saved] = {}

    def build(kind: str, form: str) -> Saved:
        if (kind, form) not in made:
            model = MODELS[kind]()
            batches = tiny.batches(model)
            profile = profile_model(model, batches)
            plan = make_plan(profile, keep=0.5, form=form)
            folder = tmp_path_factory.mktemp(kind) / form
            apply_plan(model, plan, profile)
            save_model(model, folder, plan=plan, tokenizer=tiny.tokenizer())
            made[kind, form] = Saved(model, batches[0], folder)
        return made[kind, form]

    return build


def load(case: Saved, folder: Path | None = None, **options: Any) -> Any:
    found, report = type(case.model).from_pretrained(
        folder or case.folder, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    assert low_rank(found) == low_rank(case.model) != {}
    return found


def outputs(case: Saved, model: Any) -> Any:
    # Of a copy, as weights in a mapped file lie at odd addresses: see test_reload.
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**case.batch)


def factors_of(model: Any) -> list[str]:
    """Names of the linear layers that are the factors."""
    return [f"{name}.{factor}" for name in low_rank(model) for factor in ("down", "up")]


def shapes(of: Iterable[Iterable[int]]) -> Counter[tuple[int, ...]]:
    """How many there are of each shape, transposed or not."""
    return Counter(tuple(sorted(shape)) for shape in of)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


_FRESH = """
import copy, sys
import rankopt, torch, transformers
from safetensors.torch import load_file, save_file
for argument in sys.argv[1:]:
    name, folder = argument.split("|")
    model = copy.deepcopy(getattr(transformers, name).from_pretrained(folder)).eval()
    with torch.no_grad():
        found = model(**load_file(folder + ".batch")).logits
    save_file({"logits": found}, folder + ".logits")
"""


def test_logits_of_a_fresh_process_are_the_same_to_the_bit(
    saved: Callable[[str, str], Saved], shown: Shown
) -> None:
    cases = {case: saved(*case) for case in CASES}
    for each in cases.values():
        save_file(each.batch, f"{each.folder}.batch")
    run(_FRESH, *(f"{type(x.model).__name__}|{x.folder}" for x in cases.values()))
    for case, each in cases.items():
        found = load_file(f"{each.folder}.logits")["logits"]
        wanted = outputs(each, each.model).logits
        assert torch.equal(found, wanted), case
        shown[case] |= {
            "low rank": f"{len(low_rank(each.model))} layers",
            "reloaded": f"{distance(found, wanted):.1g}",
        }


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_trainer_trains_the_factors(
    kind: str, form: str, saved: Callable[[str, str], Saved], shown: Shown, tmp_path: Path
) -> None:
    case = saved(kind, form)
    model = load(case)
    size = len(case.batch["labels"])
    rows = [{name: column[n] for name, column in case.batch.items()} for n in range(size)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=10,
        per_device_train_batch_size=size,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = float(outputs(case, model).loss)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    after = float(outputs(case, model).loss)
    assert after < before
    for name in factors_of(model):
        factor = f"{name}.weight"
        assert not torch.equal(model.get_parameter(factor), case.model.get_parameter(factor)), name
    trainer.save_model(tmp_path / "trained")
    found = load(case, tmp_path / "trained")
    require_same_weights(found, model)
    assert float(outputs(case, found).loss) == after
    shown[kind, form]["Trainer, loss"] = f"{before:.3f} -> {after:.3f}"


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_lora_goes_on_the_factors(
    kind: str, form: str, saved: Callable[[str, str], Saved], shown: Shown, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    case = saved(kind, form)
    torch.manual_seed(0)
    targets = factors_of(case.model)
    model = peft.get_peft_model(load(case), peft.LoraConfig(r=2, target_modules=targets))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    model(**case.batch).loss.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    found = peft.PeftModel.from_pretrained(load(case), tmp_path)
    before, after, again = (outputs(case, x).logits for x in (case.model, model, found))
    assert torch.equal(again, after) and not torch.equal(after, before)
    shown[kind, form]["LoRA"] = f"{len(targets)} adapters"


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_the_factors_are_exported(
    kind: str, form: str, saved: Callable[[str, str], Saved], shown: Shown, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case = saved(kind, form)
    # torch.onnx cannot translate fused attention of T5, dense or not: see below.
    model = load(case, attn_implementation="eager" if kind == "t5" else None).eval()
    inputs = dict(case.batch)
    labels = inputs.pop("labels")
    if kind == "t5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        wanted = model(**inputs).logits
        program = torch.export.export(model, (), {**inputs, "use_cache": False})
        exported = distance(program.module()(**inputs, use_cache=False).logits, wanted)
    torch.onnx.export(program, f=tmp_path / "model.onnx", verbose=False)
    constants = onnx.load(tmp_path / "model.onnx").graph.initializer
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    arrays = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    assert set(arrays) == set(inputs)
    translated = distance(torch.from_numpy(session.run(None, arrays)[0]), wanted)
    assert exported <= CLOSE and translated <= CLOSE
    # Nobody has multiplied the factors.
    factors = [case.model.get_parameter(f"{name}.weight") for name in factors_of(case.model)]
    assert shapes(x.shape for x in factors) <= shapes(x.dims for x in constants)
    shown[kind, form] |= {
        "torch.export": f"{exported:.1g}",
        "ONNX": f"{translated:.1g}",
    }


def test_fused_attention_of_t5_is_not_translated_dense_or_not(tmp_path: Path) -> None:
    """When this fails, torch has learnt it: the test above can do without the exception."""
    pytest.importorskip("onnxscript")
    model = tiny.t5()
    inputs = dict(tiny.batches(model)[0])
    labels = inputs.pop("labels")
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    program = torch.export.export(model, (), {**inputs, "use_cache": False})
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="Cannot view a tensor"):
        torch.onnx.export(program, f=tmp_path / "model.onnx", verbose=False)


def test_a_pipeline_takes_the_folder(saved: Callable[[str, str], Saved], shown: Shown) -> None:
    case = saved("bert-classification", "pivoted")
    classify = pipeline("text-classification", model=str(case.folder), top_k=None)
    assert low_rank(classify.model) == low_rank(case.model)
    text = "the cat sees a small bird"
    with torch.no_grad():
        wanted = case.model(**tiny.tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0]
    found = {each["label"]: each["score"] for each in classify([text])[0]}
    assert [found[f"LABEL_{n}"] for n in range(len(wanted))] == pytest.approx(wanted.tolist())
    shown["bert-classification", "pivoted"]["pipeline"] = "same scores"
