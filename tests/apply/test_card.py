"""What a compressed folder says of itself, in Markdown that no name can break."""

import copy
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rankopt import (
    Limit,
    Plan,
    RankoptError,
    apply_plan,
    make_plan,
    profile_model,
    refine,
    save_model,
)
from rankopt.apply.card import model_card
from tests import tiny
from tests.apply.test_reload import run

HOSTILE = "a`b``c\n---\n```\n# no heading | <script>\u202e \\"


@pytest.fixture(scope="module")
def compressed() -> tuple[Any, Plan]:
    """A compressed Llama and its plan, not to be changed."""
    model = tiny.llama()
    profile = profile_model(model, tiny.batches(model))
    plan = make_plan(profile, keep=0.5)
    return apply_plan(model, plan, profile), plan


def saved(folder: Path, model: Any, **options: Any) -> ModelCard:
    save_model(model, folder, **options)
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def loaded_from(folder: Path, card: str, compressed: tuple[Any, Plan]) -> Any:
    """The model as if it had been compressed from a folder with such a card."""
    folder.mkdir()
    (folder / "README.md").write_text(card, encoding="utf-8")
    model = copy.deepcopy(compressed[0])
    model.name_or_path = str(folder)
    return model


def test_the_card_has_the_figures_of_the_plan(compressed: tuple[Any, Plan], tmp_path: Path) -> None:
    model, plan = compressed
    card = saved(tmp_path / "model", model)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["rankopt", "low-rank", "compression"],
    }
    size, proof = plan.size, plan.certificate
    for figure in (
        f"{size.model:,} of {size.model_dense:,} (",
        f"{size.planned:,} of {size.planned_dense:,} (",
        f"budget {plan.budget.parameters:,}\n",
        "Backend `kronecker`, form `pivoted`, solver `exact`, objective `total`",
        f"proven optimal (`optimal`). The ranks lose {proof.loss:.6g}, no ranks within the budget "
        f"lose less than {proof.bound:.6g} (gap 0), in `{proof.unit}`",
        f"rises by {plan.predicted:.4g} nats per target",
        "**closed form**",
        "Nothing yet",
    ):
        assert figure in card.text, figure
    assert "## Command" not in card.text and "## Licence" not in card.text
    assert str(tmp_path) not in card.content
    assert saved(tmp_path / "again", model, plan=plan).content == card.content


def test_a_plan_that_is_not_proven_does_not_say_that_it_is(compressed: tuple[Any, Plan]) -> None:
    model, plan = compressed
    proof = plan.certificate.model_copy(update={"status": "time_limit", "gap": 0.25})
    worse = plan.model_copy(update={"certificate": proof, "min_retained": 0.125, "predicted": None})
    text = model_card(model, worse)
    assert "- Certificate: not proven optimal, stopped at the time limit (`time_limit`)." in text
    assert "that retain 12.50% of every layer's Fisher information lose less" in text
    assert "(gap 0.25)" in text and "Predicted" not in text
    pinned = plan.model_copy(update={"pinned": (plan.layers[0].layer.name,)})
    text = model_card(model, pinned)
    assert "that keep the 1 pinned layers as they are lose less" in text


def test_a_model_that_was_reloaded_has_a_card_without_a_plan(
    compressed: tuple[Any, Plan], tmp_path: Path
) -> None:
    model, plan = compressed
    saved(tmp_path / "model", model)
    again = saved(tmp_path / "again", type(model).from_pretrained(tmp_path / "model"))
    assert f"- Parameters: {plan.size.model:,}\n" in again.text
    assert "Backend `kronecker`, form `pivoted`\n" in again.text and "Cert" not in again.text


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    model = tiny.llama()
    save_model(model, tmp_path / "model")
    profile = profile_model(model, tiny.batches(model))
    plan = make_plan(profile, keep=1.0)
    assert not any(plan.ranks.values())
    save_model(apply_plan(model, plan, profile), tmp_path / "all dense")
    assert not list(tmp_path.rglob("README.md"))


def test_a_refined_model_is_labelled_and_measured(tmp_path: Path) -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=4)
    profile = profile_model(model, batches)
    dense = copy.deepcopy(model)
    apply_plan(model, make_plan(profile, keep=0.5), profile)
    found = refine(model, dense, batches, passes=2, learning_rate=3e-3)
    assert found.targets
    card = saved(tmp_path / "model", model, measured={"loss on `x`": 2.5, "F1": 1 / 3})
    assert card.data.tags[-1] == "refined"
    assert f"**refined on {found.targets:,} tokens (distill)**" in card.text
    assert "closed form**" not in card.text
    assert "- `` loss on `x` ``: 2.5\n- `F1`: 0.333333\n" in card.text


@pytest.mark.slow
def test_the_code_in_the_card_loads_the_model(compressed: tuple[Any, Plan], tmp_path: Path) -> None:
    card = saved(tmp_path / "model", compressed[0])
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert run(
        code.replace('"FOLDER"', repr(str(tmp_path / "model")))
        + "print(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__module__)"
    ) == ["LlamaForCausalLM rankopt.model.pivoted"]


def test_licence_language_and_data_of_the_source_are_carried_over(
    compressed: tuple[Any, Plan], tmp_path: Path
) -> None:
    given = "license: mit\nlanguage:\n- en\n- 'no'\ndatasets: glue\nbase_model: owner/base\n"
    front = f"---\n{given}metrics: [f1]\nmodel-index: nonsense\n---\n# A card\n"
    model = loaded_from(tmp_path / "source", front, compressed)
    card = saved(tmp_path / "model", model)
    assert card.data.license == "mit" and card.data.language == ["en", "no"]
    assert card.data.datasets == "glue" and card.data.base_model == "owner/base"
    assert card.data.metrics is None and "`mit`" in card.text
    assert str(tmp_path) not in card.content
    # And on, from card to card.
    again = type(model).from_pretrained(tmp_path / "model")
    assert saved(tmp_path / "again", again).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: !!bool x\n---\n",
        "---\nlicense: {a: b}\nlanguage: [1, 2]\ndatasets: 3\nbase_model: null\n---\n",
        '---\nlicense: "a\\n---\\nb"\n---\n',
        "# no front matter",
        "",
    ],
)
def test_a_broken_card_of_the_source_is_ignored(
    card: str, compressed: tuple[Any, Plan], tmp_path: Path
) -> None:
    model = loaded_from(tmp_path / "source", card, compressed)
    assert set(saved(tmp_path / "model", model).data.to_dict()) == {"library_name", "tags"}
    (tmp_path / "source" / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert "license" not in model_card(model)


@pytest.mark.parametrize(
    ("name", "commit", "base"),
    [
        ("owner/model", "0" * 40, "owner/model"),
        ("gpt2", "0" * 40, "gpt2"),
        ("demo/model", None, None),
        ("/models/secret", None, None),
        ("/cache/models--a--b/snapshots/0", "0" * 40, None),
        ("", None, None),
    ],
)
def test_the_base_model_is_a_name_of_the_hub(
    name: str, commit: str | None, base: str | None, compressed: tuple[Any, Plan]
) -> None:
    model = copy.deepcopy(compressed[0])
    model.name_or_path, model.config._commit_hash = name, commit
    text = model_card(model)
    assert ModelCard(text).data.base_model == base
    assert not name or (name in text) == (base == name)


def test_names_cannot_break_the_markdown(compressed: tuple[Any, Plan]) -> None:
    from rich.markdown import Markdown

    model, plan = compressed
    proof = plan.certificate.model_copy(update={"unit": HOSTILE})
    named = {"solver": HOSTILE, "backend": HOSTILE, "certificate": proof}
    command = ["rankopt", "apply", HOSTILE, "-o", "```"]
    text = model_card(model, plan.model_copy(update=named), {HOSTILE: 1.0}, command)
    assert ModelCard(text).data.to_dict() == ModelCard(model_card(model)).data.to_dict()
    tokens = Markdown(ModelCard(text).text).parsed
    headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    assert headings == [
        "`LlamaForCausalLM` of lower rank", "Load", "What was planned", "What was measured",
        "Command", "Versions",
    ]  # fmt: skip
    spans = [c.content for t in tokens for c in t.children or () if c.type == "code_inline"]
    shown = HOSTILE.replace("\n", "\\u000a").replace("\u202e", "\\u202e")
    assert spans.count(shown) == 4, spans
    assert not [t for t in tokens if t.type == "html_block"]
    (fence,) = (t.content for t in tokens if t.type == "fence" and t.info == "bash")
    assert shlex.split(fence) == [*command[:2], HOSTILE.replace("\u202e", "\\u202e"), "-o", "```"]


def test_a_card_that_somebody_edited_is_not_replaced(
    compressed: tuple[Any, Plan], tmp_path: Path
) -> None:
    model = compressed[0]
    saved(tmp_path / "model", model)
    saved(tmp_path / "model", model, overwrite=True)
    card = tmp_path / "model" / "README.md"
    card.write_text("mine", encoding="utf-8")
    with pytest.raises(RankoptError, match=r"did not write.*README\.md"):
        save_model(model, tmp_path / "model", overwrite=True)
    assert card.read_text(encoding="utf-8") == "mine"


def test_budgets_of_other_costs_have_a_line_each(compressed: tuple[Any, Plan]) -> None:
    model, plan = compressed
    spent = sum(entry.spent("max_bytes", plan.form) for entry in plan.layers)
    limit = Limit(kind="max_bytes", asked=spent, allowed=spent, spent=spent, dense=2 * spent)
    budget = plan.budget.model_copy(update={"kind": "max_bytes"})
    text = model_card(model, plan.model_copy(update={"limits": (limit,), "budget": budget}))
    assert (
        f"- In the planned layers: {spent:,} bytes, budget {spent:,} (dense {2 * spent:,})" in text
    )
    assert f"budget {plan.budget.parameters:,}\n" not in text
