"""Profiles a model: measures the KL that each site costs by itself at several χ, beside the menu's prediction.

Each measurement evaluates one schedule on part of the search data: one site at one χ, all others dense. Knows the order
of a sweep and the contents of its folder; `search.profiling.sensitivity` knows how to analyse the table.

The hidden states before the changed block equal those of the dense model and are not computed again
(`search.evaluation.prefix_reuse`), so a sweep costs about half of its forward passes. The order is level by level, and
by block within a level. An interrupted sweep therefore leaves complete levels, and the estimate of the time left is
unbiased although late blocks are cheaper than early ones. Any number of evaluators share the measurements.
sensitivity.csv is rewritten after every few measurements; a resumed sweep measures what is missing from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compression.allocation.menu import nested_options
from compression.numerics.legs import resolve
from compression.refusal import Refusal
from compression.schedule import Choice, Schedule
from compression.sites import Site
from compression.storage.factor_cache import cache_key
from compression.storage.strict_json import bounded_text
from search.config import Config
from search.evaluation.packed_sequences import Packed
from search.evaluation.pool import Job, Pool
from search.evaluation.score import Score
from search.experiment.experiment import Experiment, Extract
from search.experiment.open_model import open_model
from search.experiment.preparation import calibrate
from search.model.loading import LoadedModel
from search.profiling.sensitivity import CACHED, Row, block_by_chi, block_by_family, parse_rows, rows_text, summary
from search.reporting.frames import parquet_bytes
from search.reporting.heat_maps import draw_heat_map
from search.runtime.console import Console
from search.runtime.provenance import environment
from search.runtime.run_folder import CONFIG, ENVIRONMENT, RunFolder
from search.trials.fingerprints import differences, with_later
from search.trials.preflight import preflight
from search.workers.pools import search_pool

__all__ = ["CHI", "FRACTIONS", "PROFILE", "TABLE", "TOKENS", "Levels", "profile", "read_profile"]

CHI = tuple(range(10, 100, 10))
FRACTIONS = (0.25, 0.5, 0.75)
TOKENS = 512
"""Default number of tokens per measurement: few, so that thousands of site and χ combinations can be measured."""
PROFILE, TABLE, PARQUET, SWEEP_TABLE = "profile.json", "sensitivity.csv", "sensitivity.parquet", "summary.txt"
_FORMAT = 1
_UNSAVED = 7  # measurements that a killed sweep may lose
_TOPOLOGY, _METRIC = "pivoted-lowrank", "two-sided"  # as in the menus


@dataclass(frozen=True)
class Levels:
    """Bond dimensions of a sweep.

    Attributes:
        chi: bond dimensions that are the same at every site, each at least 1.
        fractions: bond dimensions as fractions of a site's full χ, each above 0 and below 1.
    """

    chi: tuple[int, ...] = CHI
    fractions: tuple[float, ...] = FRACTIONS

    def __post_init__(self) -> None:
        if bad := [chi for chi in self.chi if chi < 1]:
            raise Refusal(f"chi must be whole numbers of at least 1, got {bad[0]}")
        if bad_fractions := [one for one in self.fractions if not 0 < one < 1]:
            raise Refusal(f"fractions must lie between 0 and 1, got {bad_fractions[0]}")
        if not self.chi and not self.fractions:
            raise Refusal("chi or fractions must name a level, got none")

    def of(self, site: Site) -> list[int]:
        """Return the χ of one site in the order of levels, without repetitions and without those that save nothing."""
        legs = resolve(_TOPOLOGY, site.out_features, site.in_features)
        wanted = [*self.chi, *(max(1, round(one * max(legs.full_bonds))) for one in self.fractions)]
        return [chi for chi in dict.fromkeys(wanted) if chi <= legs.break_even_chi]


def profile(
    config: Config, levels: Levels | None, tokens: int | None, console: Console, context: int | None = None
) -> tuple[Path, str]:
    """Measure what is missing from a sweep.

    Args:
        levels: bond dimensions to measure; None takes those of the sweep that is resumed, or the defaults.
        tokens: maximum number of tokens per measurement; None as for `levels`.
        context: measure only the sites that fill the KV cache, k and v, on one text of this many tokens; None as for
            `levels`.

    Returns:
        The folder of the sweep and the summary.

    Raises:
        ValueError: the input is refused, or the folder holds a sweep over another model or other data.
        DataUnavailable: the data or the model cannot be obtained.
    """
    for name, value in (("tokens", tokens), ("context", context)):
        if value is not None and value < 64:
            raise Refusal(f"{name} must be a whole number of at least 64, got {value}")
    config, device, _ = preflight(config)
    with console.stage("load", 100, "%") as stage:
        loaded, sites = open_model(config, device, progress=stage.advance)
    if levels and not any(levels.of(site) for site in sites if not site.dense_because):
        raise Refusal("chi or fractions must name a level that makes a matrix of the model smaller, and none does")
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
    for note in experiment.splits.notes:
        console.note(note)
    with RunFolder.open(config.resume, config.out, "profile", config.model, config.seed) as folder:
        console.opened(folder.path)
        document, found = _read(folder.path) if (folder / PROFILE).exists() else ({}, [])
        tokens = tokens or document.get("tokens", TOKENS)
        context = context or document.get("context")
        if context:
            _check_context(experiment, context)
        extract = Extract(tokens, context)
        data = experiment.extract(extract)
        _refuse_another(folder.path, document, _fingerprint(experiment, data))
        levels = levels or _levels(document)
        folder.write_text(CONFIG, config.to_json())
        folder.write_json(ENVIRONMENT, environment())
        calibrate(experiment, console)
        with console.stage("decompose", len(sites), "matrices") as stage:
            experiment.store.menu(progress=lambda done: stage.advance(1), form="factors")  # each matrix alone
        experiment.calibration.release()
        kept = {"model": loaded.model_id, "levels": asdict(levels), "tokens": tokens, "context": context}
        wanted = list(_order([site for site in sites if not context or site.family in CACHED], levels))
        dense = Schedule.dense(tuple(site.name for site in sites))
        with search_pool(experiment, dense, console.note, extract) as pool:
            folder.write_json(PROFILE, _document(experiment, data, kept, pool.dense))
            rows = _sweep(folder, experiment, wanted, found, pool, console)
        text = summary(rows, loaded.model_id, context)
        _publish(folder, rows, text)
    return folder.path, text


def read_profile(folder: Path, loaded: LoadedModel) -> list[Row]:
    """Return the rows of a sweep of this model.

    Raises:
        ValueError: the folder holds no sweep, or one of another model.
    """
    document, rows = _read(folder)
    own = {"model": loaded.digest, "architecture": loaded.architecture}
    known = with_later(document["fingerprint"], own)
    if any(known.get(name) != value for name, value in own.items()):
        raise Refusal(f"profile must be of the same model, but {folder} is of {document['model']}")
    return rows


def _read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    if not (folder / PROFILE).is_file():
        raise Refusal(f"profile must be the folder of a sweep, but there is no {folder / PROFILE}")
    text = bounded_text(folder / PROFILE, "the profile")
    try:
        document = json.loads(text)
        if document["format"] != _FORMAT:
            raise Refusal(f"its format must be {_FORMAT}, got {document['format']}")
        rows = parse_rows((folder / TABLE).read_text(encoding="utf-8")) if (folder / TABLE).exists() else []
        _levels(document)
        if type(document["tokens"]) is not int or not isinstance(document["fingerprint"], dict):
            raise Refusal("its tokens must be a whole number and its fingerprint an object")
        if type(document.get("context")) not in (int, type(None)):
            raise Refusal("its context must be a whole number or null")
        return {**document, "model": str(document["model"])}, rows
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Refusal(f"cannot use the profile {folder}: {error}") from None


def _levels(document: Mapping[str, Any]) -> Levels:
    """Return the levels of the sweep that is resumed, or the defaults if there is none."""
    if not document:
        return Levels()
    return Levels(tuple(document["levels"]["chi"]), tuple(document["levels"]["fractions"]))


def _refuse_another(folder: Path, document: Mapping[str, Any], expected: Mapping[str, object]) -> None:
    if document and (known := with_later(document["fingerprint"], expected)) != expected:
        raise Refusal(f"{folder} is another profile: " + "; ".join(differences(known, expected)))


def _check_context(experiment: Experiment, context: int) -> None:
    """Refuse a context that is longer than the model allows, and a model without sites of the families k and v."""
    if not any(site.family in CACHED for site in experiment.sites):
        raise Refusal(f"context needs matrices of the families {' and '.join(CACHED)}, and this model has none")
    most = getattr(experiment.loaded.model.config.get_text_config(), "max_position_embeddings", context)
    if context > most:
        raise Refusal(f"context must be at most {most}, the number of positions of the model, got {context}")


def _fingerprint(experiment: Experiment, data: Sequence[Packed]) -> dict[str, object]:
    """Return everything that determines the numbers in the table, as plain JSON values."""
    return {
        "model": experiment.loaded.digest,
        "architecture": experiment.loaded.architecture,
        "statistics": experiment.calibration.key,
        "data": cache_key(tokens=[list(one.tokens) for one in data]),
        "dtype": str(experiment.loaded.model.dtype),
        "sites": cache_key(names=[site.name for site in experiment.sites]),
    }


def _sweep(
    folder: RunFolder,
    experiment: Experiment,
    wanted: Sequence[tuple[Site, int]],
    rows: Sequence[Row],
    pool: Pool,
    console: Console,
) -> list[Row]:
    """Measure everything in `wanted` that is not in `rows`; return all rows, the wanted ones first and in order."""
    found = {(row.site, row.chi): row for row in rows}
    missing = [(site, chi) for site, chi in wanted if (site.name, chi) not in found]
    places = {(site.name, chi): place for place, (site, chi) in enumerate(wanted)}
    costs: dict[str, dict[int, float]] = {}
    handed = unsaved = 0

    def in_order() -> list[Row]:
        return sorted(found.values(), key=lambda row: places.get((row.site, row.chi), len(places)))

    with console.stage("profile", len(wanted), "measurements", len(wanted) - len(missing)) as stage:
        try:
            for done in range(len(missing)):
                while handed < min(len(missing), done + pool.capacity):
                    pool.submit(handed, Job(_alone(experiment.sites, *missing[handed])))
                    handed += 1
                number, result = pool.finished()
                site, chi = missing[number]
                predicted = costs.get(site.name) or costs.setdefault(site.name, _costs(experiment, site))
                found[site.name, chi] = _row(site, chi, predicted[chi], result.score)
                unsaved += 1
                if unsaved == _UNSAVED:
                    folder.write_text(TABLE, rows_text(in_order()))
                    unsaved = 0
                stage.advance(1, f"block {site.block}, χ {chi}")
        finally:
            folder.write_text(TABLE, rows_text(in_order()))
    return in_order()


def _order(sites: Sequence[Site], levels: Levels) -> Iterator[tuple[Site, int]]:
    """Yield sites with their χ level by level, and by block within a level."""
    chis = {site.name: levels.of(site) for site in sites if not site.dense_because}
    for level in range(max(map(len, chis.values()), default=0)):
        for site in sorted(sites, key=lambda site: site.block):
            if level < len(chis.get(site.name, ())):
                yield site, chis[site.name][level]


def _alone(sites: Sequence[Site], changed: Site, chi: int) -> Schedule:
    dense = dict(Schedule.dense(tuple(site.name for site in sites)))
    return Schedule(tuple((dense | {changed.name: Choice(_TOPOLOGY, chi, _METRIC)}).items()))


def _costs(experiment: Experiment, site: Site) -> dict[int, float]:
    """Return the predicted KL of a site by χ, in nats per token."""
    spectrum = experiment.store.factors(site.name, _TOPOLOGY, _METRIC).spectrum.numpy()
    options = nested_options(_TOPOLOGY, _METRIC, np.asarray(spectrum, dtype=np.float64), site)
    return {option.choice.chi: option.cost for option in options if isinstance(option.choice, Choice)}


def _row(site: Site, chi: int, predicted: float, score: Score) -> Row:
    legs = resolve(_TOPOLOGY, site.out_features, site.in_features)
    return Row(
        site=site.name,
        block=site.block,
        family=site.family,
        topology=_TOPOLOGY,
        chi=chi,
        relative_chi=chi / max(legs.full_bonds),
        kept_fraction=legs.parameters(chi) / site.parameters,
        predicted_kl=predicted,
        kl=score.kl,
        kl_standard_error=score.quality.kl_standard_error,
        expected_accuracy=score.expected_accuracy,
        perplexity=score.quality.perplexity,
        state=score.state,
        seconds=score.seconds,
    )


def _document(
    experiment: Experiment, data: Sequence[Packed], kept: Mapping[str, object], dense: Score
) -> dict[str, object]:
    return {
        "format": _FORMAT,
        "fingerprint": _fingerprint(experiment, data),
        **kept,
        "dense": {
            "perplexity": dense.quality.perplexity,
            "expected_accuracy": dense.expected_accuracy,
            "items": dense.quality.items,
            "tokens": dense.quality.tokens,
        },
    }


def _publish(folder: RunFolder, rows: Sequence[Row], text: str) -> None:
    """Write the files that are derived from the complete table: parquet, summary and heat maps."""
    folder.write_bytes(PARQUET, parquet_bytes([asdict(row) for row in parse_rows(rows_text(rows))]))
    folder.write_text(SWEEP_TABLE, text)
    blocks, families, table = block_by_family(rows)
    unit = "KL, nats per token"
    drawn = draw_heat_map(table, blocks, families, "one site compressed, geometric mean over χ", "family", unit)
    folder.write_text("plots/block-family.svg", drawn)
    blocks, chis, table = block_by_chi(rows)
    if chis:
        drawn = draw_heat_map(table, blocks, chis, "one site compressed at a time, summed over the block", "χ", unit)
        folder.write_text("plots/block-chi.svg", drawn)
