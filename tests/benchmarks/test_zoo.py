"""On one tiny model of each kind of architecture, the job leaves no wrong figure, no traceback and no bad folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_data import data_for_processes

from benchmarks import zoo
from benchmarks.zoo_models import KINDS


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data packages replaced by hand-made ones."""
    with pytest.MonkeyPatch.context() as patch:
        data_for_processes(tmp_path_factory.mktemp("data"), patch)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_job_on_this_kind_of_architecture_ends_well_or_is_refused_at_once(name: str, tmp_path: Path) -> None:
    member = zoo.try_model(name, tmp_path)
    if member.job == "ok":
        member.fresh = 0.0  # other processes are started once, by the benchmark; the export has loaded the folder
    assert not member.faults
    assert member.job == "ok" or "\n" not in member.job
