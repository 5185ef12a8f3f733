"""Recorded blocks: which passes are replayed, which run normally, and how healing uses them. Graphs need a GPU; here a
recorder stands in for them that writes to fixed places as they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tiny_healing import PLAN, heal, parameters, subject
from torch import nn

from compression.training.replay import replayed
from compression.training.trainable import trainable_
from search.healing import training


class Recorder:
    """Counts replays. Gradients of a block's parameters come in tensors that its next replay writes to again."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(
        self, modules: tuple[nn.Module, ...], samples: tuple[tuple[torch.Tensor, ...], ...]
    ) -> Sequence[Callable[..., Any]]:
        return [self._function(module, given) for module, given in zip(modules, samples, strict=True)]

    def _function(self, module: nn.Module, samples: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        places = [torch.zeros_like(parameter) for parameter in learned]
        recorder = self

        class Replayed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
                recorder.replays += 1
                for sample, tensor in zip(samples, tensors, strict=False):
                    assert sample.shape == tensor.shape
                    assert sample.requires_grad or not tensor.requires_grad
                    sample.data.copy_(tensor)
                with torch.enable_grad():
                    ctx.output = module(*samples)
                return ctx.output.detach()  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
                wanted = [sample for sample in samples if sample.requires_grad]
                found = torch.autograd.grad(ctx.output, [*wanted, *learned], slopes)
                for place, value in zip(places, found[len(wanted) :], strict=True):
                    place.copy_(value)
                inputs = iter(found)
                return (
                    *(next(inputs) if sample.requires_grad else None for sample in samples),
                    *(place.detach() for place in places),
                )

        return lambda *tensors: Replayed.apply(*tensors, *learned)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Healing on the CPU as it is on a GPU."""
    made = Recorder()
    monkeypatch.setattr(training, "_has_graphs", lambda device: True)
    monkeypatch.setattr(training, "replayed", partial(replayed, record=made))
    return made


def gradients(model: Any, passes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    for ids in passes:
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2"])
def test_replayed_passes_give_the_same_gradients_added_up(name: str) -> None:
    _, model, text, _ = subject(name)
    trainable_(model)
    blocks = list(model.get_submodule("transformer.h" if "gpt2" in name else "model.layers"))
    passes = [text.tokens[:3].long(), text.tokens[3:6].long()]
    plain = gradients(model, passes)
    model.zero_grad()
    recorder = Recorder()
    with replayed(model, blocks, passes[0], recorder):
        again = gradients(model, passes)
        assert recorder.replays == len(passes) * len(blocks)
        model(input_ids=passes[0][:2], use_cache=False)
        model(input_ids=passes[0], attention_mask=passes[0].gt(0).long(), use_cache=True)
        assert recorder.replays == len(passes) * len(blocks), "other calls run normally"
    model(input_ids=passes[0], use_cache=False)
    assert recorder.replays == len(passes) * len(blocks), "so do all when it is left"
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        assert torch.equal(value, again[key]), key


def test_blocks_that_are_not_run_once_each_in_order_are_refused() -> None:
    _, model, text, _ = subject()
    blocks = list(model.get_submodule("model.layers"))
    with (
        pytest.raises(RuntimeError, match="exactly once"),
        replayed(model, blocks[::-1], text.tokens[:2].long(), Recorder()),
    ):
        pass


@pytest.mark.slow
def test_healing_replays_and_comes_to_the_same(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model, text, judge = subject()
    _, told = heal(model, dense, text, judge)
    assert recorder.replays > 100
    assert told == []
    replays = recorder.replays
    monkeypatch.setattr(training, "_has_graphs", lambda device: False)
    _, plain, _, _ = subject()
    heal(plain, dense, text, judge)
    assert recorder.replays == replays
    for (name, mine), other in zip(parameters(model).items(), parameters(plain).values(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.slow
def test_what_cannot_be_recorded_is_told_and_heals_as_ever(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(training, "replayed", partial(replayed, record=refuse))
    dense, model, text, judge = subject()
    healed, told = heal(model, dense, text, judge)
    assert healed.measurements[-1].kl < healed.measurements[0].kl
    assert told == [
        "passes are not recorded as CUDA graphs, which would be faster: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.slow
def test_memory_that_runs_out_ends_the_recording_of_larger_passes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    plain = training._Healing._loss

    def loss(self: Any, rows: Sequence[int], salt: int) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, rows, salt)

    monkeypatch.setattr(training._Healing, "_loss", loss)
    dense, model, text, judge = subject()
    _, told = heal(model, dense, text, judge, PLAN)
    assert sizes[:2] == [2, 1]
    assert recorder.replays > 100
    assert told == ["memory ran out; training continues with passes of 40 tokens"]
