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


def test_dependencies_run_one_way():
    run = contracts(ROOT)
    assert run.returncode == 0, run.stdout


INTRUDERS = {
    # A module that breaks a contract, and the contract's name.
    ("envs/intruder.py", "import agents"): "search -> agents | envs -> compression",
    ("compression/sites.py", "import search.config"): "search -> agents | envs -> compression",
    ("search/runtime/intruder.py", "import search.config"): "search: each floor imports only what stands below it",
    ("search/loose.py", "pass"): "search: each floor imports only what stands below it",
    ("compression/calibration/intruder.py", "import compression.decomposition.repair"): "compression: each floor",
    ("compression/numerics/intruder.py", "import compression.schedule"): "numerics: arrays in, arrays out",
    ("search/evaluation/intruder.py", "import search.config"): "evaluation scores what it is given",
    ("search/data/packages.py", "import search.data.prose"): "no circles between the modules of a package",
    ("agents/intruder.py", "import transformers"): "agents never see a model, a dataset or a terminal",
    ("compression/storage/intruder.py", "import transformers"): "the engine knows no RL, no hub, no study",
    ("envs/intruder2.py", "import torch"): "environments never see a model",
    ("search/trials/intruder.py", "import transformers"): "transformers is imported where models are loaded",
    ("search/trials/intruder2.py", "import ray"): "ray is imported by the evaluators that run on it",
    ("search/priors/intruder.py", "import optuna"): "optuna is imported by the journal and by its own agents",
    ("agents/intruder2.py", "import stable_baselines3"): "stable-baselines3 is imported by the policy",
    ("search/trials/intruder3.py", "import lm_eval"): "lm-eval is imported for its tasks",
}


@pytest.mark.slow
def test_a_forbidden_import_breaks_its_contract(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in INTRUDERS:
        with (tmp_path / file).open("a", encoding="utf-8") as opened:
            opened.write(f"\n{line}\n")
    run = contracts(tmp_path)
    assert run.returncode == 1
    broken = [line for line in run.stdout.splitlines() if line.endswith("BROKEN")]
    assert [name for name in INTRUDERS.values() if not any(line.startswith(name) for line in broken)] == []
    assert not any(line.endswith("KEPT") for line in run.stdout.splitlines())  # each contract can be broken


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
