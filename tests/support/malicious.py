"""An object that acts if it is unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Malicious:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
