"""What every test runs with."""

from __future__ import annotations

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # until everything is imported, see `pytest_collection_finish`
    # One thread a worker, and for all that a worker starts; set before torch loads.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from collections.abc import Iterator
from typing import Any

import pytest
import torch

WHOLE = (
    *("tests/project/test_disks.py", "tests/project/test_end_to_end.py", "tests/search/test_hf.py"),
    *("tests/search/workers/test_ray_cluster.py", "tests/search/workers/test_ray_pool.py"),
)
"""Files whose tests share something that takes seconds to set up: one worker runs all tests of such a file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: 2 - len({"e2e", "slow"} & {mark.name for mark in item.iter_markers()}))


def pytest_collection_finish() -> None:
    """Leaves what was imported, a million objects that stay, out of every later search for garbage.

    These searches took a sixth of the time of the tests.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives every test to the worker that is free next, in order; a file of `WHOLE` counts as one test.

    `--dist loadgroup` is meant for this, but the marks of pytest-xdist 3.8 have no effect under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in WHOLE else nodeid

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def logs_of_stable_baselines3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Its algorithms make a folder whenever they learn; it goes with those of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("sb3")))
        yield


@pytest.fixture(scope="session", autouse=True)
def a_machine_without_bfloat16() -> Iterator[None]:
    """The number type that "auto" stands for in this process does not depend on the processor.

    Programs that a test starts, the end-to-end job among them, take the machine's own; tests of bfloat16 ask for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield
