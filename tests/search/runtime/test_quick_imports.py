"""Imports run without the garbage collector, which is afterwards as it was."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from search.runtime.quick_imports import quick_imports


@pytest.mark.parametrize("works", [True, False])
def test_the_collector_rests_while_modules_are_imported(works: bool) -> None:
    assert gc.isenabled()
    try:
        with quick_imports():
            assert not gc.isenabled()
            if not works:
                raise ImportError
    except ImportError:
        assert not works
    assert gc.isenabled()


def test_a_collector_that_rested_before_still_rests() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_what_imports_have_made_is_left_alone_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gc.get_freeze_count()
    with quick_imports():
        pass
    assert gc.get_freeze_count() == before
    (tmp_path / "imported_by_a_test.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with quick_imports():
            import imported_by_a_test
        assert len(imported_by_a_test.made) == 1000
        assert gc.get_freeze_count() >= before + 1000
    finally:
        gc.unfreeze()
        sys.modules.pop("imported_by_a_test")
