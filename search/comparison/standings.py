"""Evaluates the measurements of a comparison: numbers in, a Markdown report and a plot out. Knows no model."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import ConfigDict, Field

from compression.refusal import Refusal
from search.evaluation.quality import Quality, ratio_standard_error
from search.reporting.tables import Column, markdown_table
from search.runtime.outside_text import markdown_text
from search.runtime.schema import Amount, Figure, checked

__all__ = ["Contrast", "Entry", "Heldout", "Mark", "check", "contrast", "plot", "report"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_QUANTILE = 1.96  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Mark:
    """The digest of the schedule that an agent recommends after `evaluations` evaluations of `tokens` tokens.

    A backward pass counts as the evaluations that it is charged for, see `agents.Proposal.cost`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    evaluations: Amount
    tokens: Amount
    digest: str


@dataclass(frozen=True)
class Entry:
    """One search by one agent.

    Attributes:
        marks: recommendations in ascending order of evaluations; the last one is after the whole budget.
        finalists: digests of the last recommendations.
        selected: digest of the schedule selected among them and the closed form on the selection text; empty before.
        agent_seconds: time of the agent itself, without evaluations.
        evaluation_seconds: time of the evaluations.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    agent: str
    seed: int
    marks: Annotated[tuple[Mark, ...], Field(min_length=1)]
    finalists: tuple[str, ...]
    selected: str
    agent_seconds: Figure
    evaluation_seconds: Figure

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the plain values of `dataclasses.asdict`; raises Refusal for others."""
        entry: Self = checked(cls, values)
        return entry


@dataclass(frozen=True)
class Heldout:
    """The figures of a schedule on the held-out data.

    Attributes:
        kl: nats per token.
        perplexity: on the held-out text.
        expected_accuracy: mean P(correct) on the items.
        kl_by_sequence, tokens_by_sequence: sum of KL and number of tokens of every sequence.
        kl_by_corpus: nats per token on every corpus, the unseen text included; empty if an earlier version measured.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    kl: Figure
    perplexity: Figure
    expected_accuracy: Figure
    kl_by_sequence: tuple[Figure, ...]
    tokens_by_sequence: tuple[Amount, ...]
    kl_by_corpus: Mapping[str, Figure] = field(default_factory=dict)

    @classmethod
    def from_quality(cls, quality: Quality) -> Self:
        """Raises ValueError for figures that are not finite."""
        if quality.state != "ok":
            raise Refusal("a recommended schedule gives NaN or infinite logits on the held-out data")
        return cls(
            kl=quality.kl,
            perplexity=quality.perplexity,
            expected_accuracy=quality.expected_accuracy,
            kl_by_sequence=tuple(float(f"{value:.6g}") for value in quality.kl_by_sequence),
            tokens_by_sequence=quality.tokens_by_sequence,
            kl_by_corpus={corpus.name: corpus.kl for corpus in quality.by_corpus},
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From plain values; raises Refusal for others."""
        measured: Self = checked(cls, values)
        return measured


@dataclass(frozen=True)
class Contrast:
    """The difference of two mean held-out KLs.

    Attributes:
        value: the first minus the second, in nats per token.
        standard_error: standard error of `value` over sequences and seeds.
        relative: `value` divided by the second KL.
        low, high: the 95 % interval of `relative`.
    """

    value: float
    standard_error: float
    relative: float
    low: float
    high: float


def check(
    entries: Collection[Entry], heldout: Mapping[str, Heldout], closed_form: str, schedules: Collection[str]
) -> None:
    """Check that the parts of a comparison that was read from a file belong together.

    Args:
        schedules: digests of the schedules that are still to be measured.

    Raises:
        Refusal: searches have different numbers of marks, measurements are of different data, or a schedule that is
            named is neither measured nor to be measured.
    """
    if len({len(entry.marks) for entry in entries}) > 1:
        raise Refusal("its searches have different numbers of marks")
    lengths = {(len(one.kl_by_sequence), *one.tokens_by_sequence) for one in heldout.values()}
    if len(lengths) > 1 or any(count != len(tokens) or not any(tokens) for count, *tokens in lengths):
        raise Refusal("its schedules are not measured on the same sequences")
    named = {closed_form} if entries else set()
    for entry in entries:
        named |= {*(mark.digest for mark in entry.marks), *([entry.selected] if entry.selected else entry.finalists)}
    if unknown := sorted(named.difference(heldout, schedules)):
        raise Refusal(f"it names the schedule {unknown[0]!r:.40}, but does not hold it")


def contrast(first: Sequence[Heldout], second: Sequence[Heldout]) -> Contrast:
    """The mean KL of the schedules of `first` minus that of `second`, one schedule per seed, on the same sequences.

    The variance is that of the paired difference of the means over seeds across sequences (a ratio estimate, see
    `search.evaluation.quality.ratio_standard_error`), plus the variance over the seeds of each side that has several.
    The effect of a seed on single sequences is counted in both, so the interval is conservative.
    """
    counts = torch.tensor(first[0].tokens_by_sequence, dtype=torch.float64)
    used = counts > 0
    sums = [torch.tensor([one.kl_by_sequence for one in side], dtype=torch.float64).mean(0) for side in (first, second)]
    counts, difference = counts[used], (sums[0] - sums[1])[used]
    value = float(difference.sum() / counts.sum())
    base = float(sums[1].sum() / counts.sum())
    squares = ratio_standard_error(difference, counts) ** 2
    squares += sum(variance(one.kl for one in side) / len(side) for side in (first, second) if len(side) > 1)
    error = math.sqrt(squares)
    relative, reach = value / base, _QUANTILE * error / base
    return Contrast(value, error, relative, relative - reach, relative + reach)


def report(entries: Collection[Entry], heldout: Mapping[str, Heldout], closed_form: str, title: str) -> str:
    """The report in Markdown: every agent against the closed form and against the best agent."""
    base = heldout[closed_form]
    agents = _by_agent(entries)
    finals = {name: [heldout[entry.selected] for entry in of] for name, of in agents.items()}
    order = sorted(agents, key=lambda name: fmean(one.kl for one in finals[name]))
    best = order[0]
    rows: list[dict[str, object]] = []
    for name in order:
        of = agents[name]
        row: dict[str, object] = {"agent": name, "seeds": len(of)}
        row["evaluations"] = round(fmean(entry.marks[-1].evaluations for entry in of))
        row["tokens"] = round(fmean(entry.marks[-1].tokens for entry in of))
        for place in range(len(of[0].marks)):
            row[f"mark{place}"] = _percent(contrast([heldout[entry.marks[place].digest] for entry in of], [base]))
        row["kl"] = fmean(one.kl for one in finals[name])
        row["perplexity"] = fmean(one.perplexity for one in finals[name])
        row["selected"] = _percent(contrast(finals[name], [base]))
        for corpus, kl in base.kl_by_corpus.items():
            row[f"kl_{corpus}"] = f"{fmean(one.kl_by_corpus[corpus] for one in finals[name]) / kl - 1:+.1%}"
        row["best"] = "" if name == best else _percent(contrast(finals[name], finals[best]))
        row["own"] = sum(entry.agent_seconds for entry in of) / max(1, sum(entry.marks[-1].evaluations for entry in of))
        rows.append(row)
    places = range(max(len(entry.marks) for entry in entries))
    budgets = [max(entry.marks[place].evaluations for entry in entries) for place in places]
    columns = (
        Column("agent", "agent"),
        Column("seeds", "seeds", "d"),
        Column("evaluations", "evaluations", ",d"),
        Column("tokens", "tokens", ",d"),
        *(Column(f"mark{place}", f"after {spent}", "") for place, spent in zip(places, budgets, strict=True)),
        Column("selected", "selected"),
        Column("kl", "KL nats/token", ".4f"),
        Column("perplexity", "perplexity", ".2f"),
        *(Column(f"kl_{corpus}", f"KL {corpus}") for corpus in base.kl_by_corpus),
        Column("best", f"selected, against {best}"),
        Column("own", "agent's seconds per evaluation", ".3f"),
    )
    used = [count for count in base.tokens_by_sequence if count]
    return (
        f"# Agents at equal cost: {markdown_text(title)}\n\n"
        f"Held-out KL to the dense model, relative to that of the closed form, {base.kl:.4f} nats per token "
        f"(perplexity {base.perplexity:.2f}), over {sum(used):,} tokens in {len(used)} sequences that no agent and no "
        "selection saw. Columns `after N` show the schedule that an agent recommends after N evaluations. Column "
        "`selected` shows the schedule selected among its last six recommendations and the closed form on the "
        "selection text, as at the end of a job; the columns named after a corpus show its KL there. Values are means "
        "over seeds with 95 % intervals, paired over sequences, with seeds as a second source of variance.\n\n"
        f"{markdown_table(rows, columns)}"
    )


def plot(entries: Collection[Entry], heldout: Mapping[str, Heldout], closed_form: str) -> str:
    """Anytime curves as SVG: held-out KL over the closed form's against evaluated tokens, mean over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    base = heldout[closed_form]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=1)
    agents = {name: of for name, of in _by_agent(entries).items() if of[0].marks[-1].evaluations > 1}
    for number, (name, of) in enumerate(sorted(agents.items())):
        contrasts = [
            contrast([heldout[entry.marks[place].digest] for entry in of], [base]) for place in range(len(of[0].marks))
        ]
        tokens = [fmean(entry.marks[place].tokens for entry in of) for place in range(len(of[0].marks))]
        axes.errorbar(
            [0, *tokens],
            [1, *(1 + one.relative for one in contrasts)],
            yerr=[0, *(_QUANTILE * one.standard_error / base.kl for one in contrasts)],
            label=name,
            color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.5,
            capsize=2,
        )
    axes.set_xlabel("evaluated tokens")
    axes.set_ylabel("held-out KL over the closed form's")
    if agents:
        axes.legend(fontsize=8, ncols=2)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "chisel", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _by_agent(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    agents: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.agent, entry.seed)):
        agents.setdefault(entry.agent, []).append(entry)
    return agents


def _percent(difference: Contrast) -> str:
    return f"{difference.relative:+.1%} ({difference.low:+.1%} to {difference.high:+.1%})"
