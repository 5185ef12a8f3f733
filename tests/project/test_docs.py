"""The documentation: what is generated is up to date, every link leads somewhere, docstrings name what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from search.commands.reference import reference

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "results/*.md")
    for page in sorted(ROOT.glob(pattern))
    if "build" not in page.parts
]


def test_the_page_of_commands_is_that_of_the_parsers() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference()  # make docs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    before = (ROOT / "docs" / "cli.md").read_bytes()
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "docs" / "cli.md").read_bytes() == before


def test_paths_that_the_documentation_names_exist() -> None:
    named = re.compile(r"`((?:agents|compression|envs|search|tests|benchmarks|examples|docs)/[\w./-]*)`")
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        if page.parent != ROOT / "results"  # tables say what was true when they were made
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert missing == []


def _documented(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    names = re.findall(r"^    (\w+(?:, \w+)*): ", section[1], re.MULTILINE) if section else []
    return [name for line in names for name in line.split(", ")]


def test_docstrings_describe_arguments_that_exist() -> None:
    wrong = []
    for package in ("agents", "compression", "envs", "search"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                made = node
                if isinstance(node, ast.ClassDef):
                    made = next((one for one in node.body if getattr(one, "name", "") == "__init__"), None)
                if made is None or not (documented := _documented(node)):
                    continue
                arguments = made.args
                known = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
                known |= {one.arg for one in (arguments.vararg, arguments.kwarg) if one is not None}
                wrong += [f"{file.relative_to(ROOT)}: {node.name}: {name}" for name in documented if name not in known]
    assert wrong == []
