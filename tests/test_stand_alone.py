"""Light imports and the walls, each in an interpreter of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'solvers')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_fast_and_imports_nothing_heavy() -> None:
    code = """
import time
# Of this thread alone: the machine may be busy.
start = time.thread_time()
import rankopt, rankopt_solvers
print(time.thread_time() - start)
heavy = {"torch", "transformers", "cvxpy", "optuna", "scipy", "sklearn", "datasets", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    assert min(float(run(code)) for _ in range(5)) < 0.5


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import rankopt
    from tests import tiny

    model = tiny.llama()
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    rankopt.profile_model(model, tiny.batches(model)).save(path)
    return path


def test_a_saved_profile_is_planned_compared_and_reported_where_torch_is_not_installed(
    profile_file: Path,
) -> None:
    code = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import rankopt
from rankopt.cli import main
profile = rankopt.Profile.load(sys.argv[1])
assert rankopt.make_plan(profile, keep=0.6, solver="knapsack").size.planned > 0
try:
    rankopt.profile_model
except rankopt.RankoptError as error:
    assert "rankopt[torch]" in str(error), error
else:
    raise AssertionError("profile_model is there without torch")
compare = ["rankopt", "compare", sys.argv[1], "--keep", "0.8", "0.6"]
report = ["rankopt", "report", sys.argv[1], "-o", sys.argv[2]]
for sys.argv in (compare, report):
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
    page = profile_file.parent / "page.html"
    printed = run(code, str(profile_file), str(page))
    assert page.stat().st_size > 100_000
    assert printed.count("| uniform") == 2


def test_comparing_does_not_import_torch_where_it_is_installed(profile_file: Path) -> None:
    code = """
from rankopt.cli import main
sys.argv = ["rankopt", "compare", sys.argv[1], "--keep", "0.8"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    assert "knapsack" in run(code, str(profile_file))


def test_every_public_name_resolves() -> None:
    import rankopt
    import rankopt_solvers

    for package in (rankopt, rankopt_solvers):
        for name in {*dir(package), *package.__all__}:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rankopt.nonsense
