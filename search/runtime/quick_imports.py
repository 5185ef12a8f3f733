"""Imports many modules in less time. Knows Python's garbage collector; does not know what is imported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_imports"]


@contextmanager
def quick_imports() -> Iterator[None]:
    """Context for the imports of a command, in which the garbage collector rests.

    Modules make millions of objects that stay. The collector would search them for garbage again and again, which takes
    a seventh of the time of importing transformers. If modules were imported, it never searches what is there then.
    """
    resting, before = not gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if not resting:
            gc.enable()
