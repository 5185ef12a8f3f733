"""Estimate from the shapes of a model how much memory and disk space the stages of a run take.

Knows experiments; computes nothing on the model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from compression.decomposition.entry_store import entry_bytes
from compression.numerics.large_moments import moment_dtype
from compression.sites import model_bytes
from search.experiment.calibration import CHUNK_TOKENS, factor_limit, moment_bytes
from search.experiment.experiment import Experiment
from search.runtime.distributed import Processes

__all__ = ["Need", "needs"]

_BATCH = 1024  # tokens of a batch in calibration
_LOGITS = 16  # bytes of every logit in a backward pass: itself, its softmax, the cumulative sum and the gradient
_WORKSPACE = 6  # copies of the largest square matrix while a bond is eliminated
_STEP = 512  # tokens of a step of healing
_LEARNED = 64  # tokens of it whose logits are there at a time
_REPAIR = 7  # float64 copies while a matrix is repaired: two halves, their drift, C, and what a solution copies


@dataclass(frozen=True)
class Need:
    """What a stage takes at its peak.

    Attributes:
        stage: name of the stage.
        memory: bytes, with the model but without the libraries.
        disk: bytes in the cache, with what earlier stages left there.
    """

    stage: str
    memory: int
    disk: int


def needs(experiment: Experiment) -> tuple[Need, ...]:
    """What loading, calibration, decomposition, repair and healing take, in this order; others take no more.

    Repair and healing are left out if the run has none.
    """
    model, calibration, config = experiment.loaded.model, experiment.calibration, experiment.config
    sites = [site for site in experiment.sites if not site.dense_because]
    resident, moments = model_bytes(model), moment_bytes(sites)
    vocabulary, width = model.get_input_embeddings().weight.shape
    tokens, blocks = experiment.splits.calibration.tokens, 1 + max(site.block for site in sites)
    if calibration.by_block:
        of_block = Counter[int]()
        for site in sites:
            of_block[site.block] += moment_bytes([site])
        collecting = 2 * max(of_block.values()) + CHUNK_TOKENS * vocabulary * _LOGITS
        kept = moments // 4
        written = kept + (blocks + 3) * tokens * width * model.dtype.itemsize
    else:
        collecting = moments * 3 // 2 + _BATCH * vocabulary * _LOGITS
        kept = moments // 2
        written = 3 * kept  # of two passes, and the state of an unfinished one
    longest = max(max(site.out_features, site.in_features) for site in sites)
    square = longest**2
    if calibration.by_block:
        factors = factor_limit(model, sites, config.offered_bits)
    else:
        lowrank = sum(
            min(each.out_features, each.in_features) * (each.out_features + each.in_features) for each in sites
        )
        factors = 4 * (2 * lowrank + sum(site.parameters for site in sites))
        if config.form == "small":
            factors += sum(entry_bytes(site, 4, config.offered_bits) for site in sites)
    found: tuple[Need, ...] = (
        Need("load", resident, 0),
        Need("calibrate", resident + collecting, written),
        Need("decompose", resident + moment_dtype(longest).itemsize * _WORKSPACE * square, kept + factors),
    )
    left = int(experiment.budget.target_kept * sum(site.parameters for site in sites))
    if config.repair_tokens:
        states = 2 * 4 * min(config.repair_tokens, tokens) * width  # of the dense and the compressed model, in float32
        repaired = left * model.dtype.itemsize
        widened = 4 * sum(site.parameters for site in sites) // blocks if model.dtype.itemsize < 4 else 0
        taken = resident + states + widened + 8 * _REPAIR * square
        found = (*found, Need("repair", taken, kept + factors + states + repaired))
    if config.heal_minutes:
        size = model.dtype.itemsize
        # A number in float32, that of the best state, and the gradient in float32 where passes are replayed or shared.
        number = 4 + size + (4 if experiment.device.type == "cuda" or Processes.wanted() > 1 else 0)
        trained = 0 if config.form == "small" else number * left  # scales and norms are few
        activations = _STEP * size * sum(site.out_features + site.in_features for site in sites)
        batch = activations + _LEARNED * vocabulary * _LOGITS
        found = (*found, Need("heal", resident + trained + batch, kept + factors))
    return found
