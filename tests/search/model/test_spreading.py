"""A model over several devices: every block gets its inputs where it is, and results are those of one device.

This machine need not have several devices: PyTorch's fake tensors refuse operations on tensors of different ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from odd_models import store_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compression import ScheduleApplier, discover_sites, uniform_schedule
from compression.calibration.blocks import record_blocks
from compression.calibration.statistics import MomentAccumulator, sampled_gradient
from compression.sites import Site
from search.healing.sharding import sharing_copy
from search.model import spreading
from search.model.loading import load_model
from search.model.spreading import devices_of, is_spread, spread_

CPU = torch.device("cpu")
NAMES = ("random:tiny-llama", "random:tiny-gpt2")


def spread(name: str) -> Any:
    model = load_model(name, "cpu").model
    spread_(model, CPU, [CPU, CPU])
    return model


@pytest.fixture(params=NAMES)
def apart(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    """A spread model with block N on the device cpu:N, and the name of its blocks."""
    model = spread(request.param)
    prefix = discover_sites(model)[0].name.partition(".0.")[0]
    moved: dict[int, Any] = {}
    with FakeTensorMode():
        for path, module in model.named_modules():
            inner = path.removeprefix(f"{prefix}.")
            device = "cpu" if inner == path else f"cpu:{inner.split('.')[0]}"
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in moved:
                        other = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(other, requires_grad=False) if parameter else other
                    tensors[key] = None if tensor is None else moved[id(tensor)]
        yield model, prefix


def test_no_operation_mixes_the_devices_of_statistics_and_repair(apart: tuple[Any, str]) -> None:
    model, prefix = apart
    assert is_spread(model)
    ids = torch.randint(256, (2, 16), device="cpu")
    mask = torch.ones_like(ids, dtype=torch.bool)
    accumulator = MomentAccumulator(model, discover_sites(model, shapes_only=True))
    with accumulator:
        accumulator._mask, accumulator._full = mask, True
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logits.backward(sampled_gradient(logits.detach(), mask, torch.Generator()))
    assert logits.device == CPU
    for name, moment in accumulator._gradients.items():
        assert moment.outer.device == model.get_submodule(name).weight.device
    blocks, states = record_blocks(model, [f"{prefix}.{number}" for number in range(3)], [(ids, mask)])
    for number, block in enumerate(blocks):
        states = block.run(states)
        assert states[0].device == torch.device(f"cpu:{number}")
    model.get_submodule(f"{prefix}.1")._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="two devices"):
        model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_and_hooks_outlive_replaced_matrices_and_copies(name: str) -> None:
    plain, model = load_model(name, "cpu").model, spread(name)
    ids = torch.arange(40).reshape(2, 20)
    expected = plain(ids).logits
    assert torch.equal(model(ids).logits, expected)
    store = store_of(model, 257)
    hooks = [module for module in model.modules() if module._forward_pre_hooks]
    schedule = uniform_schedule(store.sites, "lowrank", "input", sum(site.parameters for site in store.sites) // 2)
    with ScheduleApplier(plain, store) as one, ScheduleApplier(model, store) as other:
        one.apply_(schedule)
        other.apply_(schedule)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert [module for module in model.modules() if module._forward_pre_hooks] == hooks
    copy, name = sharing_copy(model), store.sites[0].name
    copy.set_submodule(name, _Silent(store.sites[0]))
    assert not torch.equal(copy(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


class _Silent(nn.Module):
    """In the place of a matrix: gives zeros."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.outputs = site.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.outputs)


@pytest.mark.parametrize(
    ("count", "rooms", "places"),
    [
        (4, [3.0, 1.0], [0, 0, 0, 1]),
        (6, [1.0, 1.0, 1.0], [0, 0, 1, 1, 2, 2]),
        (3, [0.0, 1.0], [1, 1, 1]),
        (3, [1.0, 0.0], [0, 0, 0]),
        (1, [1.0, 1.0], [0]),
    ],
)
def test_blocks_are_divided_in_order_by_free_memory(count: int, rooms: list[float], places: list[int]) -> None:
    assert spreading._places(count, rooms) == places


def test_a_model_larger_than_its_devices_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "get_max_memory", lambda: {"cpu": 1000})
    model = load_model("random:tiny-llama", "cpu").model
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"device_map must give room to the blocks of the model, 0\.0 GB"):
        spread_(model, CPU, [CPU])
    assert list(model.modules()) == before


def test_auto_is_all_gpus_or_the_only_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("auto", CPU) == (CPU,)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto", torch.device("cuda:0")) == (torch.device("cuda:0"), torch.device("cuda:1"))
    with pytest.raises(ValueError, match="must name devices of the type of cuda:0, the main device, and names cpu"):
        devices_of("cpu,cpu", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="device must exist"):
        devices_of("cuda:7", CPU)
