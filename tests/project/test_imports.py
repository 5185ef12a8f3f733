import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("compression", "envs", "agents", "search")
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


def contracts(tree):
    return subprocess.run(LINT, cwd=tree, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_dependencies_run_one_way():
    run = contracts(ROOT)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("envs", "import agents", "search -> agents | envs -> compression BROKEN"),
        ("compression", "import search.config", "search -> agents | envs -> compression BROKEN"),
        ("agents", "import transformers", "agents never see a model, a dataset or a terminal BROKEN"),
        ("search", "import transformers", "transformers is imported where models are loaded BROKEN"),
        ("search", "import ray", "ray is imported by the evaluators that run on it BROKEN"),
        ("search", "import optuna", "optuna is imported by the journal and by its own agents BROKEN"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(copy, module, line, contract):
    (copy / module / "intruder.py").write_text(line + "\n")
    run = contracts(copy)
    assert run.returncode == 1
    assert contract in run.stdout


def test_pickle_is_imported_nowhere():
    guilty = []
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                guilty += [
                    f"{file}: {name}" for name in names if name.split(".")[0] in ("pickle", "cloudpickle", "dill")
                ]
    assert guilty == []


def test_the_script_at_the_root_has_no_logic():
    tree = ast.parse((ROOT / "search.py").read_text(encoding="utf-8"))
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While)
    ]
