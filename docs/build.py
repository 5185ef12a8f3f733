"""Builds the documentation site into build/site, with every link checked; `make docs` runs it.

The repository's Markdown is copied as it stands, so that links work on the site as they do in the repository. The page
of commands is generated from the parsers first.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
COPIED = ("*.md", "LICENSE", "docs", "results", "examples", "benchmarks")
"""What pages are made of, and what they link to."""


def write_reference() -> None:
    """Write docs/cli.md."""
    sys.path.insert(0, str(ROOT))
    from search.commands.reference import reference

    (ROOT / "docs" / "cli.md").write_text(reference(), encoding="utf-8")


def copy_pages() -> None:
    """Copy what git tracks, or would track, of `COPIED` to build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *COPIED]
    for name in filter(None, subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            target = PAGES / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


def main() -> int:
    """Returns the exit code of mkdocs, which is not 0 if a link leads nowhere."""
    write_reference()
    copy_pages()
    config = str(ROOT / "docs" / "mkdocs.yml")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config], capture_output=True, text=True
    )
    # --quiet would hide the warnings from --strict, too.
    print(*(line for line in built.stderr.splitlines() if not line.startswith(("INFO", "  - "))), sep="\n")
    return built.returncode


if __name__ == "__main__":
    sys.exit(main())
