"""What every test runs with."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, and for all that a worker starts; set before torch loads
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: 2 - len({"e2e", "slow"} & {mark.name for mark in item.iter_markers()}))


@pytest.fixture(scope="session", autouse=True)
def a_machine_without_bfloat16() -> Iterator[None]:
    """The number type that "auto" stands for in this process does not depend on the processor.

    Programs that a test starts, the end-to-end job among them, take the machine's own; tests of bfloat16 ask for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield
