"""Heal a compressed model: train it briefly to match the dense model it was made from.

Knows two causal language models that share a tokenizer, rows of tokens, and a folder for checkpoints; does not know
where they come from. Distillation compares the probabilities of all tokens at every position, see
`compression.training.distillation`. The loss "labels" uses the next tokens of the text instead. Learning rates fall
linearly to zero over the planned tokens or time, which is best for short training (Defazio et al. 2023). A longer
healing therefore has to be planned as such from the start.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.layers.packed import PackedLinear
from compression.refusal import Refusal
from compression.sites import find_blocks
from compression.storage.factor_cache import cache_key
from compression.training.distillation import divergence
from compression.training.gates import absorb_gates_, add_gates_
from compression.training.optimizer import FactoredRMSprop
from compression.training.replay import replayed
from compression.training.scales import absorb_changes_, add_changes_
from compression.training.trainable import (
    captured_head_input,
    frozen,
    pruned_values,
    put_parameters,
    scale_changes,
    trainable_,
)
from search.evaluation.quality import Quality
from search.evaluation.workload import Workload
from search.healing.plan import HealingPlan
from search.healing.progress import Measurement, Progress
from search.healing.rows import HealingText
from search.healing.sharding import Sharding, like, whole
from search.healing.teacher import Teacher, output_head
from search.model.loading import model_digest
from search.model.spreading import is_spread
from search.runtime.checkpoints import Checkpoint, Checkpoints
from search.runtime.console import Stage, duration
from search.runtime.distributed import Processes
from search.runtime.memory import is_out_of_memory
from search.runtime.signals import shield
from search.runtime.tensorboard import Curves

__all__ = ["Healed", "heal_"]

_EVALUATIONS = 8
_SAVE_SECONDS = 180.0
_DECAY = 0.95  # of the mean squares of the gradients, per step


@dataclass(frozen=True)
class Healed:
    """The outcome of a healing.

    Attributes:
        measurements: all measurements up to the best one, which describes the final model; the first precedes any
            training. Empty if the model gave non-finite logits from the start.
        stopped: why healing ended early; empty if it did not.
        tokens_per_second: learned positions per second of training, over all processes together.
    """

    measurements: Sequence[Measurement]
    stopped: str = ""
    tokens_per_second: float = math.nan

    def outlook(self, factor: float = 4.0) -> str:
        """One sentence that estimates the KL after a healing `factor` times as long; empty if KL does not fall.

        The estimate assumes that KL falls as a power of the tokens, fitted to the second half of the measurements.
        """
        late = [measured for measured in self.measurements if measured.tokens > 0]
        late = late[len(late) // 2 :]
        if len(late) < 2 or late[-1].kl <= 0 or late[0].kl <= late[-1].kl or late[0].tokens == late[-1].tokens:
            return ""
        power = math.log(late[0].kl / late[-1].kl) / math.log(late[-1].tokens / late[0].tokens)
        return (
            f"{factor:g} times as long ({duration(factor * late[-1].seconds)}) would bring KL to about "
            f"{late[-1].kl * factor ** -min(power, 0.5):.2f}"
        )


def heal_(
    model: nn.Module,
    dense: nn.Module,
    text: HealingText,
    judge: Workload,
    plan: HealingPlan,
    folder: Path | None,
    stage: Stage,
    warn: Callable[[str], None] = lambda text: None,
    drawn: Curves | None = None,
) -> Healed:
    """Heal `model`, which holds `MPOLinear` layers, in place; it ends in evaluation mode and without gradients.

    Args:
        dense: the model it was compressed from, which stays unchanged. It may share all tensors with `model` except
            those of the sites.
        text: the rows to learn from.
        judge: a workload of other text with `dense` as its reference, measured about eight times during the healing.
            The model ends in the state with the lowest KL measured, which may be the initial one.
        plan: the settings.
        folder: folder for checkpoints; healing resumes from the newest one there. None writes none.
        stage: progress display, advanced by the number of learned tokens.
        warn: receives remarks for the user, one line each.
        drawn: receives the training curves.

    Raises:
        ValueError: the model has no compressed matrix, its logits are not a linear map of its last hidden states, or a
            checkpoint belongs to another healing.
        OSError: a checkpoint cannot be written.
    """
    return _Healing(model, dense, text, judge, plan, folder, stage, warn, drawn or Curves()).run()


class _Healing:
    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        text: HealingText,
        judge: Workload,
        plan: HealingPlan,
        folder: Path | None,
        stage: Stage,
        warn: Callable[[str], None],
        drawn: Curves,
    ) -> None:
        self.model, self.judge, self.plan, self.stage, self.warn = model, judge, plan, stage, warn
        self.drawn = drawn
        self.device = next(model.parameters()).device
        self.processes = Processes()
        self.pass_tokens = min(plan.pass_tokens, plan.batch_tokens // self.processes.count)
        top_tokens = plan.targets if plan.loss == "distill" else None
        # All processes must run a sharded dense model together, so none may skip a pass because it stored the targets.
        self.teacher = Teacher(dense, text, top_tokens, bool(plan.hidden_weight), not self.processes.sharded, plan.seed)
        self.head = output_head(model)
        self.checkpoints = None if folder is None else Checkpoints(folder)
        self.at = Progress()
        self.identity = cache_key(plan=plan.identity(), text=text.name, rows=list(text.tokens.shape))
        self.start = cache_key(model=model_digest(model), dense=model_digest(dense))
        if plan.gates:
            add_gates_(model)
        add_changes_(model)
        trainable_(model)
        self.sharding = Sharding(model, dense) if self.processes.sharded else None
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = self._optimizer()
        self.stored = next(
            (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad), torch.float32
        )
        self.best = self._copied()
        self.recordings = ExitStack()
        # CUDA graphs exclude activation checkpointing, which runs a block twice, sharding, which moves parameters, and
        # several devices.
        replays = _has_graphs(model) and self.sharding is None and not plan.checkpointing
        self.recorded: int | None = 0 if replays else None  # rows in a replayed pass; None disables replay
        self.uses = False  # whether gradients are used up as soon as they are there
        self.used = torch.zeros(())  # the sum of the squares of those of a step

    def run(self) -> Healed:
        """See `heal_`."""
        stopped = ""
        self._resume()
        with _training(self.model, self.plan.checkpointing), self.recordings, self._using():
            if not self.at.measurements:
                self._measure()
            try:
                stopped = self._steps()
            except KeyboardInterrupt:
                if self.sharding is None:  # sharded processes may have been interrupted at different steps
                    self._save()
                raise
            if not stopped and self.at.measurements[-1].tokens != self.at.tokens:
                self._measure()
                self._save()
        best_found = self._named({name: whole(tensor) for name, tensor in self.best.items()})
        if self.sharding is not None:
            self.sharding.end()
        put_parameters(self.model, frozen(self.model, best_found))
        absorb_gates_(self.model)
        absorb_changes_(self.model)
        measurements = self.at.measurements
        best = min(range(len(measurements)), key=lambda number: measurements[number].kl, default=-1)
        return Healed(measurements[: best + 1], stopped, self.at.tokens / max(self.at.seconds, 1e-9))

    def _steps(self) -> str:
        """Run all remaining steps; returns why they ended early, or an empty string."""
        if not self.at.measurements:
            return "the model gives NaN or infinite logits; it is left unchanged"
        measured, saved = self.at.fraction(self.plan), time.monotonic()
        while self.at.fraction(self.plan) < 1:
            with shield():  # an interrupt takes effect after the step, so that the state saved is consistent
                stopped = self._step()
            if stopped:
                return stopped
            if self.at.fraction(self.plan) < 1 and self.at.fraction(self.plan) - measured >= 1 / _EVALUATIONS:
                measured = self.at.fraction(self.plan)
                self._measure()
            if self.processes.of_first(time.monotonic() - saved) > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        return ""

    def _step(self) -> str:
        """Run one optimizer step; returns why healing must end, or an empty string."""
        start = time.perf_counter()
        plan, length = self.plan, self.teacher.text.tokens.shape[1]
        rows = self.teacher.rows(self.at.position, max(1, plan.batch_tokens // length))
        wanted = int(self.teacher.text.wanted[torch.tensor(rows)].sum())
        rates = plan.rates(self.at.measurements[0].kl)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["kind"]] * self.at.rate_factor(plan)
        while (loss := self._gradients(rows, wanted)) is None:
            self.pass_tokens //= 2
            self.warn(f"memory ran out; training continues with passes of {self.pass_tokens} tokens")
        self.processes.sum_([loss])
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.sharding is None:
            self.processes.sum_(gradients)
        norm = math.hypot(float(whole(nn.utils.get_total_norm(gradients))), math.sqrt(float(self.used)))
        if not math.isfinite(float(loss)) or not math.isfinite(norm):
            self._forget_gradients()
            return f"the loss or its gradient was not finite at step {self.at.step}; the best state so far is kept"
        self.optimizer.step()
        self._forget_gradients()
        self.at.step += 1
        self.at.position += len(rows)
        self.at.tokens += wanted
        self.at.seconds += self.processes.of_first(time.perf_counter() - start)
        speed = self.at.tokens / self.at.seconds
        self.drawn.draw(
            self.at.tokens, {"heal/loss": float(loss), "heal/gradient norm": norm, "heal/tokens a second": speed}
        )
        self.stage.advance(
            wanted, f"loss {float(loss):.3f}, KL on search data {self.at.measurements[-1].kl:.3f}, {speed:.0f} tokens/s"
        )
        return ""

    def _gradients(self, rows: Sequence[int], wanted: int) -> torch.Tensor | None:
        """Compute the gradients for this process's share of the rows.

        Returns:
            The loss of these rows, or None if memory ran out and smaller passes may fit. Parameters whose gradients
            were used before it ran out stay changed; the step is then repeated with smaller passes.
        """
        size, loss = max(1, self.pass_tokens // self.teacher.text.tokens.shape[1]), torch.zeros((), device=self.device)
        mine = rows[self.processes.rank :: self.processes.count]
        self.used, self.uses = torch.zeros((), device=self.device), self.processes.count == 1 and len(rows) <= size
        try:
            self._record(min(size, len(mine)))
            for first in range(0, -(-len(rows) // self.processes.count), size):  # the same number in every process
                given = mine[first : first + size]
                part = self._loss(given or rows[:1], first) * (bool(given) / max(1, wanted))
                if self.uses and not torch.isfinite(part):
                    return part.detach()
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        except (RuntimeError, MemoryError) as error:
            # With sharding, all processes would have to agree on the smaller size.
            if size == 1 or self.sharding is not None or not is_out_of_memory(error):
                raise
            self.recordings.close()
            self._forget_gradients()
            return None
        return loss

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Inside the context, gradients are used as soon as they are there, where `_use` may do that."""
        alone = self.recorded is None and self.processes.count == 1
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._use, group))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if alone
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _use(self, group: Mapping[str, Any], parameter: nn.Parameter) -> None:
        """Change a parameter by its gradient and free that, if it is the gradient of the whole batch."""
        if self.uses and parameter.grad is not None:
            self.used += parameter.grad.square().sum()
            self.optimizer.change_(parameter, group)
            parameter.grad = None

    def _record(self, rows: int) -> None:
        """Record passes of `rows` rows as CUDA graphs, if replay is enabled, unless that is already done."""
        if self.recorded is None or rows == self.recorded:
            return
        self.recordings.close()
        self.recorded = rows
        name, _ = find_blocks(self.teacher.dense)
        ids, _ = self.teacher.inputs(range(rows))
        try:
            with torch.no_grad():
                self._replay(self.teacher.dense, name, ids)
            with _autocast(self.model):
                self._replay(self.model, name, ids)
        except RuntimeError as error:
            self.recordings.close()
            self.warn(f"passes are not recorded as CUDA graphs, which would be faster: {str(error).splitlines()[0]}")

    def _replay(self, model: nn.Module, blocks: str, ids: torch.Tensor) -> None:
        self.recordings.enter_context(replayed(model, list(model.get_submodule(blocks).children()), ids))

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.recorded is None)  # see `compression.training.replay`

    def _loss(self, rows: Sequence[int], salt: int) -> torch.Tensor:
        """The loss, summed over the wanted positions of these rows; `salt` varies the sample between passes."""
        ids, wanted = self.teacher.inputs(rows)
        targets, aim = self.teacher.targets(rows)
        with _autocast(self.model), captured_head_input(self.model) as caught:
            self.model(input_ids=ids, use_cache=False)
        hidden = caught[0][wanted]
        generator, sample = None, self.plan.sample if self.plan.loss == "distill" else 0
        if sample:
            seed = (self.plan.seed * 1_000_003 + self.at.position) * 1_009 + salt
            generator = torch.Generator(device=self.device).manual_seed(seed)
        loss = divergence(hidden, self.head, targets, sample, generator)
        if aim is not None:
            size = aim.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            loss = loss + self.plan.hidden_weight * (hidden.float() - aim.float()).square().mean(-1).sum() / size
        return loss

    def _measure(self) -> None:
        training = self.model.training
        self.model.eval()
        with _autocast(self.model):
            quality: Quality = self.judge.measure(self.model)
        self.model.train(training)
        if quality.state == "ok":
            if not self.at.measurements or quality.kl < min(measured.kl for measured in self.at.measurements):
                self.best = self._copied()
            self.at.measurements.append(Measurement(self.at.tokens, self.at.seconds, quality.kl, quality.perplexity))
            self.drawn.draw(self.at.tokens, {"heal/KL": quality.kl, "heal/perplexity": quality.perplexity})

    def _optimizer(self) -> FactoredRMSprop:
        pruned, scales = pruned_values(self.model), scale_changes(self.model)
        kinds: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            kind = "scales" if name in scales else "cores" if parameter.ndim > 1 or name in pruned else "vectors"
            kinds[kind].append(parameter)
        groups = [{"params": parameters, "kind": kind} for kind, parameters in kinds.items()]
        return FactoredRMSprop(groups, _DECAY)

    def _copied(self) -> dict[str, torch.Tensor]:
        """The trained parameters as the finished model will store them, which may take half the memory."""
        return {name: p.detach().to(self.stored, copy=True) for name, p in self.parameters.items()}

    @staticmethod
    def _named(tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}

    def _save(self) -> None:
        if self.checkpoints is None or (self.processes.rank and self.sharding is None):
            return
        tensors = self._tensors()
        if self.sharding is not None:
            tensors = {name: whole(tensor).cpu() for name, tensor in tensors.items()}
        if self.processes.rank:
            return
        state = {**self.at.to_state(), "identity": self.identity, "start": self.start}
        self.checkpoints.save(Checkpoint(self.at.step, tensors, state))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors that a checkpoint stores, with the same names and shapes at every step."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"model/{name}"] = parameter.detach()
            tensors[f"best/{name}"] = self.best[name]
            tensors |= {f"optimizer/{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def _complete(self, found: Checkpoint) -> Checkpoint:
        """Return `found` unchanged; raises ValueError if it belongs to this healing but lacks a tensor."""
        if found.state.get("identity") == self.identity:
            for name, tensor in self._tensors().items():
                if name not in found.tensors or found.tensors[name].shape != tensor.shape:
                    raise Refusal(f"it has no {name} of shape {tuple(tensor.shape)}")
        return found

    def _resume(self) -> None:
        if self.checkpoints is None:
            return
        with self.processes.first_alone():  # which writes them, and may still be writing the last of another healing
            found = self.checkpoints.newest(self._complete, self.warn)
        step = 0 if found is None else found.step
        if (of_first := self.processes.of_first(step)) != step:
            raise Refusal(
                f"process {self.processes.rank} finds a checkpoint of step {step} in {self.checkpoints.folder}, the "
                f"first process one of step {of_first:.0f}; all processes must read the same disk"
            )
        if found is None:
            return
        if found.state.get("identity") != self.identity:
            raise Refusal(
                f"the checkpoints in {self.checkpoints.folder} belong to a healing with other text, seed or settings; "
                "delete that folder, or heal into another one with --out"
            )
        if found.state.get("start", self.start) != self.start:
            raise Refusal(
                f"the checkpoints in {self.checkpoints.folder} belong to a healing of another model; delete that "
                "folder, or heal into another one with --out"
            )
        for name, tensor in self._tensors().items():
            tensor.copy_(like(found.tensors[name], tensor))
        self.at = Progress.from_state(found.state)
        self.stage.advance(self.at.tokens)
        self.warn(f"healing resumes from step {self.at.step}, {self.at.tokens:,} tokens")


def _has_graphs(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda" and not is_spread(model)


def _autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 if the hardware supports it or the frozen parameters are stored in bfloat16."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight = head.stored.like if isinstance(head, PackedLinear) else head.weight
    device = weight.device
    if weight.dtype == torch.bfloat16:
        fast = True
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    # Each weight is used once in a pass, so caching its bfloat16 copy would only take memory.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if fast else nullcontext()


class _training(AbstractContextManager[None]):
    """Prepare the model for backward passes; put it back into evaluation mode afterwards."""

    def __init__(self, model: nn.Module, checkpointing: bool) -> None:
        self.model, self.checkpointing = model, checkpointing

    def __enter__(self) -> None:
        if self.checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()

    def __exit__(self, *exception: object) -> None:
        if self.checkpointing:
            self.model.activation_checkpointing_disable()  # type: ignore[operator]
        self.model.eval()
