"""Makes priors of the default model at fixed model sizes, and a table of their quality.

    python -m benchmarks.published_priors [--quick] [--write] [--sizes 120 107 94] [--agent NAME --budget N]

Makes one run of `python search.py` for each size in millions of parameters, with tied weights counted once. With
`--write`, the prior of the run is written to results/priors/NAME-SIZEm.json. The table is made from the prior files
alone, so a single prior can be made again, for example with a longer search. Runs found in `--runs` are not repeated.

`--quick` uses the closed form at the smallest size and does not overwrite published priors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, Bar, markdown, publish, without_places
from compression import model_parameters
from search.config import Config
from search.experiment.open_model import open_model
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
    loaded, sites = open_model(config, resolve_device(config.device))
    inside = sum(site.parameters for site in sites)
    return 1 - (model_parameters(loaded.model) - size * 10**6) / inside


def make(size: int, config: Config, folder: Path) -> Prior:
    """Returns the prior of one size, from a finished run in `folder` or from a new or resumed run."""
    if not (folder / PRIOR).exists():
        known = {"resume": str(folder)} if (folder / "config.json").exists() else {"out": str(folder)}
        target = kept_at(size, config)
        with Console() as console:
            run(Config.of({**config.model_dump(exclude={"out", "resume"}), **known, "target_kept": target}), console)
    return Prior.read(folder / PRIOR)


def _published(prior: Prior) -> Prior:
    """Returns the prior with commands that name no place on this machine."""
    facts = prior.environment
    shown = {name: without_places(str(facts[name])) for name in ("command", "continued_by") if name in facts}
    return prior.model_copy(update={"environment": {**facts, **shown}})


def table(priors: Sequence[Prior]) -> str:
    """Returns a Markdown table with a row for each prior and each schedule of its run."""
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
    """Bars: the search is no worse than the closed form, and the closed form is clearly better than uniform."""
    kl = {score.schedule: score.kl.value for score in prior.scores if score.kl is not None}
    size = round(next(score.parameters for score in prior.scores if score.schedule == "searched") / 1e6)
    return [
        Bar(f"searched_over_lagrangian_kl_{size}m", kl["searched"] / kl["lagrangian"], "<=", 1.0),
        Bar(f"uniform_over_lagrangian_kl_{size}m", kl["uniform"] / kl["lagrangian"], ">=", 2.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use the closed form at the smallest size only")
    parser.add_argument("--write", action="store_true", help="write the priors and the table to results/")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="sizes in millions of parameters")
    parser.add_argument("--agent", default="gradient", help="agent (default: gradient)")
    parser.add_argument("--budget", type=int, default=200, help="evaluations per search (default: 200)")
    parser.add_argument("--repair-tokens", type=int, default=Config().repair_tokens, help="as for search.py")
    parser.add_argument("--runs", type=Path, default=RESULTS / "published-runs", help="folder that keeps the runs")
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
            (PRIORS / f"{name}-{size}m.json").write_text(_published(made[size]).to_json(), encoding="utf-8")
    standing = [Prior.read(path) for path in sorted(PRIORS.glob("*m.json"))] if given.write else list(made.values())
    body = (
        "Quality of the published priors on held-out text and questions, without training. `repaired` has the same "
        "size as `searched`. KL is to the dense model.\n\n" + table(standing)
    )
    found = [bar for prior in standing for bar in bars(prior)]
    publish("benchmarks.published_priors", "Published priors", body, found, given.write and not given.quick)


if __name__ == "__main__":
    main()
