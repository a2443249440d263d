"""Files that rankopt 0.1 wrote before it had packages, and names that it had, work for ever.

``golden/`` holds a profile of format 2, a plan of format 1 and a compressed model, all of
``tiny.llama()``, and what was true of them when they were written.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt import Plan, Profile, evaluate, make_plan
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "facts.json").read_text(encoding="utf-8"))


def test_profile_has_its_digest_and_is_written_again_byte_by_byte(tmp_path: Path) -> None:
    profile = Profile.load(GOLDEN / "profile_v2.safetensors")
    assert profile.digest() == FACTS["profile"]
    profile.save(tmp_path / "again.safetensors")
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == (GOLDEN / "profile_v2.safetensors").read_bytes()


@pytest.mark.parametrize("fact", FACTS["plans"], ids=lambda fact: json.dumps(fact["asked"]))
def test_profile_gives_the_same_plans(fact: dict[str, Any]) -> None:
    plan = make_plan(Profile.load(GOLDEN / "profile_v2.safetensors"), **fact["asked"])
    assert list(plan.ranks.values()) == fact["ranks"]
    assert plan.size.planned == fact["parameters"]
    assert plan.certificate.loss == pytest.approx(fact["loss"], rel=1e-12)
    assert plan.certificate.bound == pytest.approx(fact["bound"], rel=1e-9)


def test_plan_is_written_again_byte_by_byte() -> None:
    path = GOLDEN / "plan_v1_kronecker.json"
    plan = Plan.load(path)
    assert plan.to_json() == path.read_text(encoding="utf-8")
    assert plan.profile_digest == FACTS["profile"]


def test_compressed_model_has_its_weights_and_its_loss() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "compressed_v1")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == FACTS["weights"]
    loss = evaluate(model, tiny.batches(model, count=3)).loss
    assert loss == pytest.approx(FACTS["loss"], rel=1e-5)


#: What could be imported before there were packages, and is documented: module -> names.
DOCUMENTED = {
    "rankopt": """BudgetError DataError Evaluation InfeasibleBudgetError Layer LowRankLinear
        ModelError Plan PlanError Profile ProfileError RankoptError __version__ applied apply_plan
        evaluate load_batches make_plan profile_model save_model search_plan text_batches""",
    "rankopt.backends": "find_backend known_backends",
    "rankopt.backends.base": "Backend ClosedForm Decomposition Scale",
    "rankopt.cli": "main",
    "rankopt.data": "Columns Row load_batches read_rows require_columns spread text_batches",
    "rankopt.plan": "Certificate Plan PlannedLayer Size",
    "rankopt.profile": "BackendInfo Profile ProfileInfo ScaleInfo",
    "rankopt.testing": "ConformanceError check_backend",
    "rankopt_solvers": """Frontier Group InfeasibleError NoChoiceFoundError Objective Problem
        ProblemError SOLVERS SideBudget Solution SolutionError UnknownSolverError certify frontier
        margins shared_choice solve solve_with_level verify within_level""",
    "rankopt_solvers.exact": "solve_exact",
    "rankopt_solvers.knapsack": "solve_knapsack",
    "rankopt_solvers.registry": "find_solver",
    "rankopt_solvers.search": "SAMPLERS Choice Measured SearchError SearchResult StudyError search",
    "rankopt_solvers.testing": "ConformanceError check_solver parametrize_with_checks",
}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_names_are_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in DOCUMENTED[module].split() if not hasattr(found, name)]
    assert not missing
