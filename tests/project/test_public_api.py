import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for package in ("compression", "envs", "agents", "search") for file in (ROOT / package).rglob("*.py")
)
NAMES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_it_is_and_what_it_offers(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("vllm", "mlx"):  # the one brings a torch of its own, the other is for Linux and macOS
            pytest.skip(f"{error.name} is not installed")
        raise
    assert (module.__doc__ or "").strip()
    # Its order is ruff's affair (RUF022).
    assert len(set(module.__all__)) == len(module.__all__)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []
    # A function or class that is offered and made here is documented.
    made_here = [getattr(module, each) for each in module.__all__]
    made_here = [each for each in made_here if callable(each) and getattr(each, "__module__", "") == name]
    assert [each.__name__ for each in made_here if not (getattr(each, "__doc__", None) or "").strip()] == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py"], ids=lambda file: file.parent.name
)
def test_a_package_file_is_a_contents_page(file):
    # An expression may stand there for the docstring and for registering the environment, as Gymnasium asks.
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    assert [type(node).__name__ for node in body if not isinstance(node, allowed)] == []
