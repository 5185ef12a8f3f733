"""Priors of the default model at fixed model sizes, and the table of what they cost.

    python -m benchmarks.published_priors [--quick] [--write] [--sizes 120 107 94] [--agent NAME --budget N]

One run of `python search.py` for each size in millions of parameters, tied weights once; its prior is kept as
results/priors/NAME-SIZEm.json with `--write`. The table is made from the priors alone, so that one of them can be made
again, or searched longer, by itself. Runs that stand in `--runs` are not repeated.

`--quick` takes the closed form at the smallest size and writes nothing over published priors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Bar, markdown, publish
from compression import model_parameters
from search.config import Config
from search.experiment.experiment import load
from search.model.devices import resolve_device
from search.pipeline.run import run
from search.priors.format import Estimate, Prior, PriorScore
from search.runtime.console import Console
from search.runtime.run_folder import PRIOR

PRIORS = RESULTS / "priors"
SIZES = (120, 107, 94)
_SHOWN = ("uniform", "lagrangian", "searched", "repaired")


def kept_at(size: int, config: Config) -> float:
    """Kept fraction over the sites at which the whole model has `size` million parameters."""
    loaded, sites = load(config, resolve_device(config.device))
    inside = sum(site.parameters for site in sites)
    return 1 - (model_parameters(loaded.model) - size * 10**6) / inside


def make(size: int, config: Config, folder: Path) -> Prior:
    """The prior of one size, from a finished run in `folder` or a new one."""
    if not (folder / PRIOR).exists():
        known = {"resume": str(folder)} if (folder / "config.json").exists() else {"out": str(folder)}
        target = kept_at(size, config)
        with Console() as console:
            run(Config.of({**config.model_dump(exclude={"out", "resume"}), **known, "target_kept": target}), console)
    return Prior.read(folder / PRIOR)


def table(priors: Sequence[Prior]) -> str:
    """Markdown: a row for each prior and schedule of its run."""
    rows = []
    for prior in sorted(priors, key=lambda prior: -prior.kept_fraction):
        known = (prior.configuration[name] for name in ("agent", "budget") if name in prior.configuration)
        agent = ", ".join(map(str, known))
        made = f"{str(prior.environment.get('commit'))[:12]}, {str(prior.environment.get('date'))[:10]}"
        rows += [_row(score, agent, made) for score in prior.scores if score.schedule in _SHOWN]
    header = ("parameters", "schedule", "kept", "bytes", "KL nats/token (95 %)", "perplexity", "P(correct) (95 %)")
    return markdown((*header, "items", "tokens", "agent, budget", "commit, date"), rows)


def _row(score: PriorScore, agent: str, made: str) -> tuple[object, ...]:
    return (
        f"{score.parameters:,}",
        score.schedule,
        f"{score.kept_fraction:.3f}",
        f"{score.bytes:,}",
        _estimate(score.kl),
        "-" if score.perplexity is None else f"{score.perplexity:.2f}",
        _estimate(score.expected_accuracy),
        score.items,
        f"{score.tokens:,}",
        agent if score.schedule in ("searched", "repaired") else "-",
        made,
    )


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    bounds = "" if estimate.low is None else f" ({estimate.low:.4f} to {estimate.high:.4f})"
    return f"{estimate.value:.4f}{bounds}"


def bars(prior: Prior) -> list[Bar]:
    """That a search never makes it worse, and that the closed form is worth having."""
    kl = {score.schedule: score.kl.value for score in prior.scores if score.kl is not None}
    size = round(next(score.parameters for score in prior.scores if score.schedule == "searched") / 1e6)
    return [
        Bar(f"searched_over_lagrangian_kl_{size}m", kl["searched"] / kl["lagrangian"], "<=", 1.0),
        Bar(f"uniform_over_lagrangian_kl_{size}m", kl["uniform"] / kl["lagrangian"], ">=", 2.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--agent", default="gradient")
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--repair-tokens", type=int, default=Config().repair_tokens)
    parser.add_argument("--runs", type=Path, default=RESULTS / "published-runs", help="where run folders are kept")
    given = parser.parse_args()
    values: dict[str, Any] = {"agent": given.agent, "budget": given.budget, "repair_tokens": given.repair_tokens}
    values |= {"heal_minutes": 0.0, "benchmark_items": 0, "export": "none"}  # a prior is a schedule
    sizes = given.sizes
    if given.quick:
        values |= {"agent": "lagrangian", "budget": 1, "repair_tokens": 0}
        sizes = [min(given.sizes)]
    config = Config.of(values)
    made = {}
    for size in sizes:
        made[size] = make(size, config, given.runs / f"{size}m-{config.agent}-{config.budget}")
        if given.write and not given.quick:
            PRIORS.mkdir(exist_ok=True)
            name = made[size].model.id.lower().replace("/", "-")
            (PRIORS / f"{name}-{size}m.json").write_text(made[size].to_json(), encoding="utf-8")
    standing = [Prior.read(path) for path in sorted(PRIORS.glob("*m.json"))] if given.write else list(made.values())
    body = (
        "What a published prior costs on held-out text and questions, no training; `repaired` is of the same size. "
        "KL is to the dense model.\n\n" + table(standing)
    )
    found = [bar for prior in standing for bar in bars(prior)]
    publish("benchmarks.published_priors", "Published priors", body, found, given.write and not given.quick)


if __name__ == "__main__":
    main()
