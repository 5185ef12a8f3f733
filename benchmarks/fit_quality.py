"""Compares MPO fits by their relative error on held-out activations at equal parameters, over depths and families.

    python -m benchmarks.fit_quality [--quick] [--write]

All methods use the same calibration text and are judged by tr(E C Eᵀ) / tr(W C Wᵀ) with C from held-out text. At every
kept fraction, each method gets the largest χ that stores no more parameters:

* sequential: sequential SVD of the weight into two or three cores with balanced legs.
* whitened: truncated SVD in the metric of the calibration inputs with two full factors, which is optimal for its rank.
* pivoted: the same without gauge freedom.
* fitted: our fit in that metric, without gauge freedom, with two or three balanced legs or legs that follow the heads.
* menu: the pivoted or fitted option that a menu would take, which has the lowest error on calibration text after the
  errors of fits are multiplied by their optimism.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch

from benchmarks.report import Bar, markdown, publish
from compression import Choice, Site, collect, contract, fitted_topologies, resolve
from compression.decomposition.factors import OPTIMISM, FactorStore
from search.config import Config
from search.experiment.calibration import calibration_batches, factor_store
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.architecture import head_size

METHODS = ("sequential 2", "sequential 3", "whitened", "pivoted", "fitted 2", "fitted 3", "fitted heads", "menu")
_MENU = ("pivoted", "fitted 2", "fitted 3", "fitted heads")


def topologies(site: Site, heads: int | None) -> dict[str, tuple[str, str]]:
    """Topology and metric of every method for a site; methods whose legs do not fit the site are left out."""
    balanced = {count: fitted_topologies(site, None, (count,)) for count in (2, 3)}
    named = {
        "sequential 2": ("mpo2", "plain"),
        "sequential 3": ("mpo3", "plain"),
        "whitened": ("lowrank", "input"),
        "pivoted": ("pivoted-lowrank", "input"),
    }
    named |= {f"fitted {count}": (names[0], "input") for count, names in balanced.items() if names}
    followed = [name for name in fitted_topologies(site, heads) if name not in balanced[2]]
    return named | ({"fitted heads": (followed[0], "input")} if followed else {})


def errors_of_site(
    store: FactorStore, site: Site, weight: torch.Tensor, held_out: torch.Tensor, kept: float, heads: int | None
) -> tuple[dict[str, float], str]:
    """Returns the relative held-out error by method, and the method that the menu picks."""
    weight, held_out = weight.double(), held_out.double()
    scale = float(((weight @ held_out) * weight).sum())
    errors, predicted = {}, {}
    for method, (topology, metric) in topologies(site, heads).items():
        legs = resolve(topology, site.out_features, site.in_features)
        chi = legs.largest_chi(min(int(kept * site.parameters), site.parameters - 1))
        if chi == 0:
            continue
        choice = Choice(topology, chi, metric)
        error = weight - contract([core.double() for core in store.cores(site.name, choice)])
        errors[method] = float(((error @ held_out) * error).sum()) / scale
        if method in _MENU:
            factors = store.factors(site.name, topology, metric, chi)
            tail, factor = (factors.spectrum, OPTIMISM) if "mpo" in topology else (factors.spectrum[chi:], 1.0)
            predicted[method] = factor * float(tail.double().square().sum())
    picked = min(predicted, key=lambda method: predicted[method])
    return errors | {"menu": errors[picked]}, picked


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="measure seven sites at two kept fractions")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    arguments = parser.parse_args()
    config = Config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    last = max(site.block for site in sites)
    blocks = [last // 2] if arguments.quick else [round(share * last) for share in (0.04, 0.25, 0.5, 0.75, 0.96)]
    fractions = (0.3, 0.6) if arguments.quick else (0.2, 0.4, 0.6, 0.8)
    chosen = [site for site in sites if site.block in blocks and not site.dense_because]
    calibration = experiment.calibration.unweighted  # errors on held-out activations weigh all tokens equally
    store = factor_store(loaded, sites, calibration, calibration.cache)
    text = experiment.splits.heldout_text
    batches = list(calibration_batches(loaded, text, config.seed))
    held_out = collect(loaded.model, chosen, batches, torch.Generator(device).manual_seed(0))
    heads, results, start = head_size(loaded.model), {}, time.perf_counter()
    for site in chosen:
        weight = loaded.model.get_submodule(site.name).weight.detach()
        for kept in fractions:
            found = errors_of_site(store, site, weight, held_out.input(site.name), kept, heads)
            results[site.name, kept] = found
        print(f"{site.name} after {time.perf_counter() - start:.0f} s", flush=True)
    body, bars = report(results, chosen, fractions)
    counts = (
        f"Measured on {len(chosen)} sites of SmolLM2-135M-Instruct (blocks {', '.join(map(str, blocks))}), with C from "
        f"{experiment.splits.calibration.tokens:,} calibration and {text.tokens:,} held-out tokens."
    )
    publish("benchmarks.fit_quality", "MPO fits on held-out activations", f"{counts}\n\n{body}", bars, arguments.write)


def report(
    results: Mapping[tuple[str, float], tuple[Mapping[str, float], str]],
    sites: Sequence[Site],
    fractions: Sequence[float],
) -> tuple[str, list[Bar]]:
    """Returns the report (medians over sites, and the sites where a true MPO wins) and the bars."""

    def ratios(over: str, under: str, kept: float | None = None) -> list[float]:
        return [
            errors[over] / errors[under]
            for (_, fraction), (errors, _) in results.items()
            if over in errors and under in errors and kept in (None, fraction)
        ]

    medians = []
    for method in METHODS:
        cells: list[object] = [method]
        for kept in fractions:
            values = [errors[method] for (_, at), (errors, _) in results.items() if at == kept and method in errors]
            cells.append(f"{median(values):.4f} ({len(values)})" if values else "")
        medians.append(cells)
    wins = []
    for site in sites:
        for kept in fractions:
            errors, picked = results[site.name, kept]
            if picked != "pivoted":
                gain = 1 - errors["menu"] / errors["pivoted"]
                wins.append(
                    [site.name, kept, picked, f"{errors['pivoted']:.4f}", f"{errors['menu']:.4f}", f"{gain:+.1%}"]
                )
    by_family = []
    for family in dict.fromkeys(site.family for site in sites):
        names = {site.name for site in sites if site.family == family}
        picked = [how for (name, _), (_, how) in results.items() if name in names]
        by_family.append([family, len(picked), *(picked.count(method) for method in _MENU)])
    body = (
        "Median relative error over the sites (in brackets the number of sites that the method fits):\n\n"
        + markdown(["method", *(f"kept {kept}" for kept in fractions)], medians)
        + "\n\nHow often the menu picked each method, over sites and kept fractions:\n\n"
        + markdown(["family", "cases", *_MENU], by_family)
        + "\n\nThe cases in which the menu picked a true MPO, compared with `pivoted` on held-out text:\n\n"
        + markdown(["site", "kept", "picked", "pivoted", "menu", "lower by"], wins)
    )
    bars = [
        Bar("sequential_over_fitted_2_cores_median", median(ratios("sequential 2", "fitted 2")), ">=", 3),
        Bar("sequential_over_fitted_3_cores_median", median(ratios("sequential 3", "fitted 3")), ">=", 3),
        Bar("sequential_over_menu_median", median(ratios("sequential 2", "menu")), ">=", 3),
        Bar("menu_over_whitened_largest", max(ratios("menu", "whitened")), "<=", 1),
    ]
    return body, bars


if __name__ == "__main__":
    main()
