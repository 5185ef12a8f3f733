"""Plans follow costs, costs are measured once a machine, and a bad file of them costs nothing but time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from compression.layers import planner as module
from compression.layers.planner import Planner, measured, random_layer
from compression.layers.routes import TOKENS, Plan, Route, choose, extra_entries, modelled, routes
from compression.numerics.legs import Legs, resolve

CPU = torch.device("cpu")
LEGS = resolve("pivoted-lowrank", 24, 36)
COSTS: dict[int, dict[Route, float]] = {
    1: {"pivoted": 3.0, "rebuild": 9.0, "merged": 2.0},
    64: {"pivoted": 3.0, "rebuild": 5.0, "merged": 2.97},
    512: {"pivoted": 5.0, "transposed": 4.0, "merged": 6.0},
}


def test_memory_takes_the_cheapest_route_that_keeps_nothing() -> None:
    plan = choose(COSTS, LEGS, 5, "memory")
    assert [plan.route(tokens) for tokens in (1, 64, 512)] == ["pivoted", "pivoted", "transposed"]


def test_latency_keeps_weights_where_that_is_more_than_two_percent_faster() -> None:
    plan = choose(COSTS, LEGS, 5, "latency")
    assert [plan.route(tokens) for tokens in (1, 64, 512)] == ["merged", "pivoted", "transposed"]
    assert plan.used == {"merged", "pivoted", "transposed"}


def test_a_token_count_follows_the_one_nearest_in_ratio() -> None:
    plan = choose(COSTS, LEGS, 5, "latency")
    assert [plan.route(tokens) for tokens in (0, 8, 9, 181, 182, 10**6)] == [
        "merged",
        "merged",
        "pivoted",
        "pivoted",
        "transposed",
        "transposed",
    ]


@pytest.mark.parametrize("topology", ["lowrank", "pivoted-lowrank", "mpo2", "pivoted-mpo2", "mpo3", "pivoted-mpo4"])
def test_every_route_has_an_estimate_and_one_of_them_keeps_nothing(topology: str) -> None:
    legs = resolve(topology, 48, 36)
    for tokens in TOKENS:
        estimates = modelled(legs, 5, tokens)
        assert set(estimates) == set(routes(legs))
        assert all(cost > 0 for cost in estimates.values())
        assert any(not extra_entries(legs, 5, route) for route in estimates)


def test_estimates_tell_a_large_contraction_from_a_rebuild() -> None:
    balanced = resolve("mpo2", 576, 576)
    assert choose({512: modelled(balanced, 144, 512)}, balanced, 144, "memory").route(512) == "rebuild"
    lowrank = resolve("lowrank", 576, 576)
    assert choose({512: modelled(lowrank, 144, 512)}, lowrank, 144, "memory").route(512) == "last"


def test_a_tiny_bond_has_a_plan_that_keeps_nothing_though_others_are_far_cheaper() -> None:
    layer = random_layer(resolve("pivoted-lowrank", 1536, 576), 1, torch.float32, CPU)
    found = measured(layer.legs, 1, torch.float32, CPU, 512, seconds=0.01)
    assert any(not extra_entries(layer.legs, 1, route) for route in found)
    for goal in ("memory", "latency"):
        Planner(goal, None, tokens=(512,)).plan_(layer)
        assert layer.plan.used <= set(found)


def test_measured_costs_are_positive_and_leave_hopeless_routes_out() -> None:
    legs = resolve("mpo2", 96, 96)
    found = measured(legs, 40, torch.float32, CPU, 512, seconds=0.01)
    estimates = modelled(legs, 40, 512)
    assert set(found) == {route for route in estimates if estimates[route] <= 6 * min(estimates.values())}
    assert {"rebuild", "merged"} <= set(found) < set(routes(legs))
    assert all(cost > 0 for cost in found.values())


class Measuring:
    """Stands in for the clock: counts what is asked, and prices each route by its place in the list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Legs, int, int]] = []
        monkeypatch.setattr(module, "measured", self)

    def __call__(
        self, legs: Legs, chi: int, dtype: torch.dtype, device: torch.device, tokens: int
    ) -> dict[Route, float]:
        self.asked.append((legs, chi, tokens))
        return {route: 1.0 / number for number, route in enumerate(routes(legs), 1)}


def model_of(*chis: int) -> nn.ModuleList:
    return nn.ModuleList(random_layer(LEGS, chi, torch.float32, CPU) for chi in chis)


def test_costs_are_measured_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, file = Measuring(monkeypatch), tmp_path / "deep" / "costs.json"
    first = Planner("latency", file)
    first.plan_(model_of(5, 5, 20))
    assert len(measuring.asked) == 2 * len(TOKENS)
    model = model_of(5, 20)
    Planner("latency", file).plan_(model)
    assert len(measuring.asked) == 2 * len(TOKENS)
    assert model[0].plan.used == {"merged"}
    assert [path.name for path in file.parent.iterdir()] == ["costs.json"]


def test_neighbouring_bond_dimensions_share_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch)
    planner = Planner("memory", tokens=(1,))
    legs = resolve("pivoted-lowrank", 320, 320)
    planner.plan_(nn.ModuleList(random_layer(legs, chi, torch.float32, CPU) for chi in range(100, 110)))
    assert [chi for _, chi, _ in measuring.asked] == [101]


@pytest.mark.slow
def test_aligned_bond_dimensions_are_measured_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch)
    planner = Planner("memory", tokens=(1,))
    for full in (320, 200, 17):
        legs = resolve("pivoted-lowrank", full, full)
        measuring.asked.clear()
        planner.plan_(nn.ModuleList(random_layer(legs, chi, torch.float32, CPU) for chi in range(1, full + 1)))
        stand_ins = [chi for _, chi, _ in measuring.asked]
        assert len(stand_ins) == len(set(stand_ins)) <= 34
        assert any(chi % 16 == 0 for chi in stand_ins)
        assert all(0 < chi <= full and (chi % 16 == 0 or chi % 2) for chi in stand_ins)


def test_a_share_grows_with_the_bond_dimension_within_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda *what: {"pivoted": 1.0, "merged": 2.0})
    legs = resolve("pivoted-lowrank", 320, 320)
    shares = [Planner("memory").share(legs, chi, torch.float32, CPU, 512) for chi in (99, 101, 103)]
    assert shares[0] < shares[1] == 0.5 < shares[2]


def test_other_types_and_thread_counts_are_measured_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch)
    planner = Planner("memory", tokens=(1,))
    planner.plan_(model_of(5))
    planner.plan_(model_of(5).bfloat16())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    planner.plan_(model_of(5))
    assert len(measuring.asked) == 3


GOOD = {"pivoted": 1.0, "merged": 2.0}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "seconds": {"torch',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"format": 99, "seconds": {}}',
        b'{"format": 1, "seconds": {"machine": 3}}',
    ],
)
def test_a_torn_or_foreign_file_counts_as_empty_and_is_replaced(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, file = Measuring(monkeypatch), tmp_path / "costs.json"
    file.write_bytes(content)
    Planner("latency", file, tokens=(1,)).plan_(model_of(5))
    assert len(measuring.asked) == 1
    assert json.loads(file.read_text())["format"] == 1


@pytest.mark.parametrize(
    "costs", [{}, {"merged": 1.0}, {"pivoted": -1.0}, {"pivoted": "fast"}, {"pivoted": True}, {"sideways": 1.0}, 7]
)
def test_an_impossible_entry_is_measured_again(costs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, file = Measuring(monkeypatch), tmp_path / "costs.json"
    Planner("latency", file, tokens=(1,)).plan_(model_of(5))
    document = json.loads(file.read_text())
    [machine] = document["seconds"]
    document["seconds"][machine] = dict.fromkeys(document["seconds"][machine], costs)
    del document["sha256"]  # as earlier versions wrote it
    file.write_text(json.dumps(document))
    Planner("latency", file, tokens=(1,)).plan_(model_of(5))
    assert len(measuring.asked) == 2


def test_costs_that_do_not_match_their_checksum_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, file = Measuring(monkeypatch), tmp_path / "costs.json"
    Planner("latency", file, tokens=(1,)).plan_(model_of(5))
    document = json.loads(file.read_text())
    for entries in document["seconds"].values():
        for costs in entries.values():
            costs.update(dict.fromkeys(costs, 1.0))
    file.write_text(json.dumps(document))
    Planner("latency", file, tokens=(1,)).plan_(model_of(5))
    assert len(measuring.asked) == 2


def test_costs_that_another_process_wrote_meanwhile_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, file = Measuring(monkeypatch), tmp_path / "costs.json"
    one, other = Planner("latency", file, tokens=(1,)), Planner("latency", file, tokens=(1,))
    one.plan_(model_of(5))
    other.plan_(model_of(5))
    one.plan_(model_of(20))
    other.plan_(model_of(12))
    Planner("latency", file, tokens=(1,)).plan_(model_of(5, 12, 20))
    assert len(measuring.asked) == 3


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch)
    (tmp_path / "blocked").write_text("a file, not a folder")
    Planner("latency", tmp_path / "blocked" / "costs.json", tokens=(1,)).plan_(model_of(5))
    assert len(measuring.asked) == 1


def test_without_measuring_nothing_is_timed_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(monkeypatch)
    model = model_of(5)
    Planner("memory", tmp_path / "costs.json", measure=False).plan_(model)
    assert not measuring.asked
    assert not list(tmp_path.iterdir())
    assert model[0].plan.used <= {"pivoted", "transposed", "rebuild"}


def test_a_plan_says_what_it_keeps_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    Measuring(monkeypatch)
    stored = 4 * (LEGS.parameters(5) + LEGS.index_entries(5))
    frugal, fast = (Planner(optimize).plan_(model_of(5, 5)) for optimize in ("memory", "latency"))
    assert frugal.stored_bytes == fast.stored_bytes == 2 * stored
    assert fast.resident_bytes == 2 * (stored + 4 * 24 * 36) + 2 * 16 * 24  # merged, and made from ordered rows
    assert fast.used == {"merged": 2}
    assert frugal.resident_bytes <= 2 * (stored + 16 * 24)


def test_what_cannot_be_planned_for_is_refused() -> None:
    with pytest.raises(ValueError, match="memory or latency, got 'size'"):
        Planner("size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        Planner("memory", tokens=(0, 1))
    assert Plan(((1, "last"),)).route(5) == "last"


def test_a_share_is_the_best_route_over_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda legs, chi, dtype, device, tokens: COSTS[tokens])
    assert Planner("memory").share(LEGS, 5, torch.float32, CPU, 1) == 1.5
    assert Planner("latency").share(LEGS, 5, torch.float32, CPU, 1) == 1.0
    assert Planner("memory").share(LEGS, 5, torch.float32, CPU, 512) == pytest.approx(4 / 6)


def test_a_share_without_a_measurement_of_the_dense_matrix_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda *what: {"pivoted": 1.0})
    expected = modelled(LEGS, 5, 1)
    share = Planner("memory").share(LEGS, 5, torch.float32, CPU, 1)
    assert share == pytest.approx(expected["pivoted"] / expected["merged"], rel=0.2)
