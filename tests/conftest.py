"""What every test runs with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def a_machine_without_bfloat16() -> Iterator[None]:
    """The number type that "auto" stands for in this process does not depend on the processor.

    Programs that a test starts, the end-to-end job among them, take the machine's own; tests of bfloat16 ask for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield
