"""How to use your own topology: fits it to one matrix and compares it with low rank at equal parameters.

    python -m examples.new_topology                                          # one matrix of a small random model
    python -m examples.new_topology --model default --site model.layers.1.self_attn.v_proj \
        --topology pivoted-mpo:16.12x24.24 --chi 60

A topology is defined by its name: `mpo:`, the legs of the output, an x, the legs of the input. The prefix `pivoted-`
stores the cores without gauge freedom. Topologies need no registration: menus, schedules, priors and layers accept
every such name.
"""

from __future__ import annotations

import argparse

import torch

from compression import resolve
from search.config import Config
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model


def main(words: list[str] | None = None) -> tuple[float, float]:
    """Prints and returns the predicted costs, in nats per token, of the topology and of low rank."""
    parser = argparse.ArgumentParser(description="Fit a topology at one matrix.")
    parser.add_argument("--model", default="random:tiny-llama")
    parser.add_argument("--site", default="model.layers.0.self_attn.q_proj")
    parser.add_argument("--topology", default="pivoted-mpo:8.4x4.8")
    parser.add_argument("--chi", type=int, default=8)
    given = parser.parse_args(words)

    config, device = Config.of({"model": given.model, "quick": True}), torch.device("cpu")
    experiment = Experiment.of(config, *open_model(config, device), device)
    [site] = [site for site in experiment.sites if site.name == given.site]
    parameters = resolve(given.topology, site.out_features, site.in_features).parameters(given.chi)
    rank = resolve("pivoted-lowrank", site.out_features, site.in_features).largest_chi(parameters)

    fitted = experiment.store.factors(site.name, given.topology, "two-sided", given.chi).spectrum
    lowrank = experiment.store.factors(site.name, "pivoted-lowrank", "two-sided").spectrum[rank:]
    costs = 0.5 * float(fitted.square().sum()), 0.5 * float(lowrank.square().sum())
    print(
        f"{site.name}, {parameters} of {site.parameters} parameters: {given.topology} χ {given.chi} costs "
        f"{costs[0]:.3g} nats per token,"
    )
    print(f"low rank χ {rank} costs {costs[1]:.3g} nats per token")
    return costs


if __name__ == "__main__":
    main()
