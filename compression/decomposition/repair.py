"""Repairs a compressed model without training: fits each site to the inputs that the already compressed sites produce.

Knows a model of consecutive blocks, token batches and statistics; does not know files.

Decomposing every site by itself assumes that its input does not change. Repair instead visits the blocks in order, and
within a block the groups of sites that read the same input. A group receives the input x̂ that the already compressed
sites produce, and is fitted to the values of the dense model at the same point. The target is the output W x of the
dense site, or, for a site that writes to the residual stream, the dense model's stream after that site; such a site
also compensates for earlier errors in the stream. Both are linear least-squares problems with the solution

    W* = W + α·E[(y − W x̂) x̂ᵀ] (E[x̂ x̂ᵀ] + λ·I)⁻¹,    y the target.

Most of the residual y − W x̂ cannot be predicted from x̂, and a correction from little text learns noise. Therefore the
ridge λ and the share α in [0, 1] are those that help most on other text, see `compression.decomposition.correction`. If
no correction helps, the site keeps W. W* is then decomposed in the metric of G and C + E[(x̂ − x)(x̂ − x)ᵀ], where C, the
moment of the dense input x, comes from the statistics. These use more text and weight its tokens; using the moment of x̂
alone does harm where x̂ deviates little from x. A site that stays dense takes W* itself, which repairs it without adding
parameters. A pruned site keeps its mask, and the values under it are fitted to W* in that metric.

Where a bond between matrices is cut to a width, a site that writes the bond has only the rows of the kept groups. The
site that reads it receives only their values, x̂_S. Its start is the exact refit of W on the dense values x_S (see
`compression.numerics.elimination.refit`) instead of W, its target is the same, and C is that of x_S.
A start from the columns of W, without the refit, ends with a larger error on other text: the sequences of a repair are
too few for the correction to find the refit by itself.

A block of a 16-bit model computes in float32 while it is repaired, with the 16-bit numbers that its new layers store.
What bfloat16 rounds off the values of a layer is a part of the residual that nothing predicts, and at a small KL as
large as the part that is predicted.

Experts of a mixture are not corrected: the compressed model routes other tokens to them than the dense one, so that no
rows of the two belong together, and each expert reads too few of them.

Matching dense outputs from compressed inputs goes back to the layer-wise reconstruction of channel pruning (He, Zhang &
Sun 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from compression.bonds import keep_, linear_layer
from compression.calibration.blocks import Batch, Block, Widened, record_blocks
from compression.calibration.statistics import Statistics
from compression.decomposition.correction import FOLDS, Deviations, correction, sums
from compression.decomposition.entry_store import Entries
from compression.decomposition.factors import lowrank_cores
from compression.decomposition.unfinished_repair import UnfinishedRepair
from compression.layers.mpo_linear import MPOLinear
from compression.layers.routes import is_lowrank
from compression.numerics.elimination import Elimination, refit
from compression.numerics.fit import fit
from compression.numerics.gauge import stored
from compression.numerics.large_moments import moment_dtype
from compression.numerics.legs import resolve
from compression.numerics.whitening import shrink
from compression.refusal import Refusal
from compression.schedule import Choice, Schedule
from compression.sites import Site, check_widths, dense_weight, expert_of, put_modules

__all__ = ["repair_"]


@torch.no_grad()
def repair_(
    model: nn.Module,
    sites: Sequence[Site],
    schedule: Schedule,
    statistics: Statistics,
    batches: Sequence[Batch],
    shrinkage: float,
    elimination: Callable[[str], Elimination],
    correct: bool = True,
    progress: Callable[[int], None] = lambda done: None,
    unfinished: UnfinishedRepair | None = None,
    entries: Callable[[str, Choice], Entries] | None = None,
) -> Mapping[str, nn.Module]:
    """Compress `model` in place according to `schedule`, block by block, with repair.

    Args:
        model: the dense model; maps `input_ids` and `attention_mask` to logits, without gradients.
        sites: the sites of the model.
        schedule: the choice of every site.
        statistics: second moments of the dense model.
        batches: (input_ids, mask) pairs as for `compression.calibration.statistics.collect`, with at least two
            sequences. Memory holds their hidden states twice and one block, in float32. All tokens have equal weight.
        shrinkage: shrinkage of the moments, see `compression.numerics.whitening.shrink`.
        elimination: returns the order in which the groups of a bond are removed, see
            `compression.decomposition.factors.FactorStore.bonds`; called for the bonds that the schedule cuts.
        correct: whether W is replaced by W*. Otherwise W is decomposed in the metric of E[x̂ x̂ᵀ] and G (sequential
            calibration).
        progress: called with the number of blocks done.
        unfinished: stores the result of every block. If an interrupted repair has stored blocks there, this one
            continues after them, with the same result, bit for bit.
        entries: returns what is stored of a pruned or rounded site, see
            `compression.decomposition.entry_store.EntryStore`; needed if the schedule has one.

    Returns:
        The replaced modules by site name; putting them back restores the dense model. After an error they are put back
        already.

    Raises:
        ValueError: a site is already compressed, there are fewer than two sequences, a bond would have different widths
            at two of its sites, or a fit fails (see `compression.numerics.fit`).
    """
    if sum(len(ids) for ids, _ in batches) < FOLDS:
        raise Refusal(f"repair needs at least {FOLDS} sequences of calibration text")
    check_widths(sites, {site.name: schedule[site.name].widths for site in sites})
    free = [site for site in sites if not site.dense_because]
    masks = [mask for _, mask in batches]
    taken = {site.name: model.get_submodule(site.name) for site in free}
    dtypes = {name: dense_weight(module).dtype for name, module in taken.items() if not isinstance(module, MPOLinear)}
    if compressed := [name for name, module in taken.items() if isinstance(module, MPOLinear)]:
        raise Refusal(f"site {compressed[0]} is already compressed; repair must start from the dense model")
    numbers = range(min(site.block for site in sites), 1 + max(site.block for site in sites))
    prefix = sites[0].name.split(f".{sites[0].block}.")[0]
    blocks, first = record_blocks(model, [f"{prefix}.{number}" for number in numbers], batches)
    dense_states: Sequence[torch.Tensor] = first
    states: Sequence[torch.Tensor] = first
    before = 0
    try:
        if unfinished is not None and (begun := unfinished.load(model, free, schedule, first[0].device)) is not None:
            before, states, dense_states = begun.blocks, begun.states, begun.dense_states
            put_modules(model, begun.modules)
            progress(before)
        for done, (block, number) in enumerate(list(zip(blocks, numbers, strict=True))[before:], before + 1):
            here = [site for site in free if site.block == number]
            with Widened() as widened:
                groups = _groups(here, statistics)
                widened.take(model.get_submodule(block.name))
                targets = _Targets(block, groups, dense_states, masks, correct)
                for place, group in enumerate(groups):
                    starts = [
                        _start(site, taken[site.name], schedule[site.name], statistics, shrinkage, elimination)
                        for site in group
                    ]
                    found = None if expert_of(group[0]) else targets.moments(place, states, starts)
                    for at, (site, start) in enumerate(zip(group, starts, strict=True)):
                        weight = start.weight
                        gradient = _part(statistics.gradient(site.name).to(weight), start.rows)
                        seen = _part(statistics.input(site.name).to(weight), start.columns)
                        if found is not None:
                            moment, deviations = found
                            seen = seen + moment if correct else moment
                            if correct and (change := correction(deviations[at], gradient)) is not None:
                                weight = weight + change
                        metrics = seen, gradient
                        old, choice, dtype = taken[site.name], schedule[site.name], dtypes[site.name]
                        if choice.keeps_entries:
                            assert entries is not None
                            shrunk = (shrink(moment, shrinkage) for moment in metrics)
                            form = entries(site.name, choice).refitted(weight, *shrunk)
                            new = form.layer(dtype, _bias(old, dtype), stored=True)
                        else:
                            new = _compressed(_bias(old, dtype), dtype, weight, choice, *metrics, start.rows, shrinkage)
                        shape = site.out_features, site.in_features
                        new = widened.take(keep_(new, shape, start.rows, start.columns))
                        model.set_submodule(site.name, new)
                states, dense_states = targets.advance(states), targets.outputs
            if unfinished is not None:
                modules = {site.name: model.get_submodule(site.name) for site in here}
                unfinished.store(done, modules, states, dense_states)
            progress(done)
    except BaseException:
        put_modules(model, taken)
        raise
    return taken


@dataclass(frozen=True, eq=False)
class _Start:
    """The matrix of a site that is corrected: what the widths of the site's bonds leave of it.

    Attributes:
        weight: (out, in), float64; W, its rows that are left, or W refitted to the columns that are left.
        rows, columns: indices of the rows and columns of W that are left; None for all.
    """

    weight: torch.Tensor
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def _start(
    site: Site,
    dense: nn.Module,
    choice: Choice,
    statistics: Statistics,
    shrinkage: float,
    elimination: Callable[[str], Elimination],
) -> _Start:
    weight = dense_weight(dense).double()
    if not choice.widths:
        return _Start(weight)
    [cut], [width] = site.cuts, choice.widths
    kept = cut.indices(elimination(cut.bond).kept(width)).to(weight.device)
    if cut.of_rows:
        return _Start(weight[kept], rows=kept)
    moment = shrink(statistics.input(site.name).to(weight.device), shrinkage)
    return _Start(refit(weight, moment, kept), columns=kept)


def _part(moment: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Returns the rows and columns of a moment that are kept; all for None."""
    return moment if kept is None else moment[kept][:, kept]


def _compressed(
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    weight: torch.Tensor,
    choice: Choice,
    input_moment: torch.Tensor,
    gradient: torch.Tensor,
    rows: torch.Tensor | None,
    shrinkage: float,
) -> nn.Module:
    """Returns the layer that represents `weight` (out, in) under a choice, in its stored form.

    Args:
        bias: of the dense site.
        dtype: of the layer.
        input_moment, gradient: the metric of a decomposition, (in, in) and (out, out).
        rows: the rows of the bias that are left; None for all.
    """
    if bias is not None and rows is not None:
        bias = bias[rows]
    if choice.is_plain:
        return linear_layer(weight.to(dtype), bias)
    legs = resolve(choice.topology, *weight.shape)
    if is_lowrank(legs):
        cores, _ = lowrank_cores(weight, shrink(input_moment, shrinkage), shrink(gradient, shrinkage), choice.chi)
    else:
        metrics = (shrink(gradient, shrinkage)[None], shrink(input_moment, shrinkage)[None])
        cores = [core[0] for core in fit(weight[None], *metrics, legs, choice.chi).cores]
    return MPOLinear(stored([core.to(dtype) for core in cores], legs.pivoted), bias)


def _bias(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias if bias is None or dtype is None else bias.to(dtype)


def _groups(sites: Sequence[Site], statistics: Statistics) -> list[list[Site]]:
    """Groups sites that read the same input, in the order they run."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(statistics.input_of[site.name], []).append(site)
    return list(groups.values())


class _Targets:
    """Records the values of a dense block at every site, and computes moments of the compressed block relative to them.

    Without `correct`, only the inputs of the compressed block are used.

    Attributes:
        outputs: hidden states after the dense block; meaningful only with `correct`.
    """

    def __init__(
        self,
        block: Block,
        groups: Sequence[Sequence[Site]],
        states: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        correct: bool = True,
    ) -> None:
        self._block, self._groups, self._masks = block, groups, masks
        self._streams: list[list[torch.Tensor] | None] = [None] * len(groups)
        self._inputs: list[list[torch.Tensor]] = []
        # By batch, if the last group writes to the stream: the stream before it, and its input.
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.outputs = states
        if not correct:
            return
        dense = {site.name: block.model.get_submodule(site.name) for group in groups for site in group}
        self._weights = {name: dense_weight(module).double() for name, module in dense.items()}
        self._biases = {name: _bias(module) for name, module in dense.items()}
        with ExitStack() as stack:
            self._inputs = [
                [] if expert_of(group[0]) else stack.enter_context(block.caught(group[0])) for group in groups
            ]
            self.outputs = block.run(states)
        for number in range(len(groups)):
            if expert_of(groups[number][0]):
                continue
            with block.silent(self._later(number)):
                if self._writes(number, states[0]):
                    self._streams[number] = block.run(states) if self._later(number) else self.outputs

    def moments(
        self, number: int, states: Sequence[torch.Tensor], starts: Sequence[_Start]
    ) -> tuple[torch.Tensor, list[Deviations]]:
        """Computes the moments of one group after all earlier groups have been compressed.

        Args:
            starts: the start of every site of the group, whose W and columns count.

        Returns:
            E[(x̂ − x)(x̂ − x)ᵀ] (in, in), and the residuals of each site; without `correct`, E[x̂ x̂ᵀ] and none.
        """
        group, streams = self._groups[number], self._streams[number]
        moment, gathered, sequences = torch.zeros(0), None, 0
        tokens = sum(int(mask.sum()) for mask in self._masks)
        columns = starts[0].columns  # sites that read the same input read the same part of it
        for batch, (hidden, mask) in enumerate(zip(states, self._masks, strict=True)):
            if streams is None:
                before, reaching = hidden, self._block.input_of(group[0], batch, hidden)
            else:
                with self._block.silent([*group, *self._later(number)]), self._block.caught(group[0]) as caught:
                    before = self._block.forward(batch, hidden)
                [reaching] = caught
                if number == len(self._groups) - 1:
                    self._before.append((before, reaching))
            mask = mask.to(reaching.device)
            reaching = reaching.reshape(*mask.shape, -1)  # some modules flatten their tokens
            if batch == 0:
                width = reaching.shape[-1]
                moment = reaching.new_zeros(width, width, dtype=moment_dtype(width))
            counted = reaching
            if self._inputs:
                meant = self._inputs[number][batch].reshape(*mask.shape, -1)
                aim = meant if streams is None else streams[batch] - before  # the target minus the stream before it
                gathered = gathered or sums(reaching.shape[-1], aim.shape[-1], reaching, tokens)
                folds = ((torch.arange(len(mask), device=mask.device) + sequences) % FOLDS)[:, None].expand_as(mask)
                for fold in range(FOLDS):
                    part = mask & (folds == fold)
                    gathered.add(fold, reaching[part], aim[part])
                counted = reaching - (meant if columns is None else meant[..., columns])
            sequences += len(mask)
            rows = counted[mask]
            moment += (rows.T @ rows).to(moment) / tokens
        if gathered is None:
            return moment, []
        deviations = []
        for site, start in zip(group, starts, strict=True):
            weight, bias = self._weights[site.name], self._biases[site.name]
            if streams is None:
                aimed = weight if start.rows is None else weight[start.rows]
                deviations.append(gathered.deviations(start.weight, aimed, None))
            else:
                deviations.append(gathered.deviations(start.weight, None, bias))
        return moment, deviations

    def advance(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the hidden states after the block, once all its groups are compressed."""
        if not self._before:
            return self._block.run(states)
        last = self._block.model.get_submodule(self._groups[-1][0].name)
        with self._block.arithmetic():
            return [before + last(rows).reshape(before.shape) for before, rows in self._before]

    def _later(self, number: int) -> list[Site]:
        return [site for group in self._groups[number + 1 :] for site in group]

    def _writes(self, number: int, hidden: torch.Tensor) -> bool:
        """Whether the site's output is added to the stream unchanged; tests it by putting constants in its place.

        They are powers of two, which 16 bits hold exactly, as they do not hold the sum of a constant and an output.
        """
        site = self._groups[number][0]
        if len(self._groups[number]) > 1 or site.out_features != hidden.shape[-1]:
            return False
        module = self._block.model.get_submodule(site.name)
        size = 2.0 ** round(math.log2(max(float(hidden.float().abs().mean()), 2.0**-20)))

        def with_output(value: float) -> torch.Tensor:
            handle = module.register_forward_hook(lambda module, arguments, output: torch.full_like(output, value))
            try:
                return self._block.forward(0, hidden)
            finally:
                handle.remove()

        change = with_output(2 * size) - with_output(size)  # none behind a norm
        return bool((change - size).abs().max() <= 0.02 * size)
