"""Writes tiny models in every form for other programs, with what transformers generates from them.

A model has heads of 32 features, the smallest that vLLM's CPU kernels take, and a tokenizer with a merge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from compression import FactorCache, FactorStore, ScheduleApplier, Site, collect, discover_sites
from compression.bonds import discover_bonds, with_bonds
from compression.layers.kept import kept
from compression.layers.packed import PackedLinear, PackedMatrix
from compression.numerics.group_integers import quantize
from compression.numerics.legs import resolve
from compression.numerics.packed_size import BITS, GROUP
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Unit, dense_weight, units
from search.export.folder import export_gguf, export_integers, export_model, export_plain
from search.model.loading import LoadedModel, load_model
from search.model.random_models import byte_tokenizer

__all__ = ["EXPECTED", "FORMS", "NEW_TOKENS", "NO_TEXT", "TOP", "answers", "cast_", "write_tiny_folders"]

EXPECTED = "expected.json"
NEW_TOKENS, TOP = 8, 5
FORMS = {
    "hf": ("factors", ((48, 1), (None, None), (96, 2))),
    "hf-empty": ("factors", ((0, 1), (None, 0), (64, None))),
    "plain-alike": ("plain", ((48, 1),) * 3),
    "plain": ("plain", ((48, 2), (32, 1), (96, 0))),
    "gguf": ("plain", ((64, 2), (32, 1), (96, 0))),
    "compressed-tensors": ("rounded", ((48, None), (None, None), (32, None))),
    "mlx": ("rounded", ((48, None), (None, None), (32, None))),
}
"""Folder name: form of the matrices, and hidden units and key/value groups of each block; None leaves all."""

_BITS = {"compressed-tensors": (4,), "mlx": BITS}
"""Bits of the rounded matrices, in turns. vLLM on a processor computes with 4."""

NO_TEXT = range(94, 257)
"""Tokens of the tiny models that are no ASCII; llama.cpp's server leaves bytes of incomplete characters out."""

_PROMPTS = ([10, 20, 30, 40, 50], [5, 5, 5], list(range(60, 90)), [77, 3, 2, 9])


def write_tiny_folders(folder: Path) -> None:
    """Write a folder for each of `FORMS`, and `EXPECTED`: for each its prompts and our answers.

    Folders of rounded matrices are in float16.
    """
    _write_dense(folder / "dense")
    said = {}
    for name, (form, widths) in FORMS.items():
        loaded = _cut(str(folder / "dense"), form, widths)
        if name.startswith("hf"):
            export_model(loaded.model, loaded.tokenizer, folder / name)
        elif name == "gguf":
            export_gguf(loaded.model, loaded.tokenizer, folder / name, "float32")
        elif form == "rounded":
            _round_(loaded.model, _BITS[name])
            cast_(loaded.model, torch.float16)
            export_integers(loaded.model, loaded.tokenizer, folder / name, name)
            cast_(loaded.model, torch.float32)
        else:
            export_plain(loaded.model, loaded.tokenizer, folder / name)
        said[name] = answers(loaded.model, _PROMPTS, NO_TEXT if name == "gguf" else ())
    (folder / EXPECTED).write_text(json.dumps({"prompts": _PROMPTS, "answers": said}), encoding="utf-8")


def cast_(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters another type; the frequencies of positions stay, which `model.half()` rounds too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _round_(model: Any, bits: Sequence[int]) -> None:
    """Round the matrices in place, as far as their columns are whole groups and they lost nothing."""
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    layers = [(name, each) for name, each in layers if name != "lm_head" and not kept(each)]
    for number, (name, layer) in enumerate((name, each) for name, each in layers if each.in_features % GROUP == 0):
        width = bits[number % len(bits)]
        codes = quantize(layer.weight, width, GROUP)
        matrix = PackedMatrix(codes, layer.in_features, width, GROUP, torch.float32)
        model.set_submodule(name, PackedLinear(matrix, layer.bias))


@torch.no_grad()
def answers(model: Any, prompts: Any, banned: Sequence[int] = ()) -> list[dict[str, list[Any]]]:
    """What a model generates greedily after each prompt, and the `TOP` largest log-probabilities of the first token.

    Args:
        banned: tokens that are not generated.
    """
    found = []
    for prompt in prompts:
        ids: list[int] = list(prompt)
        first: list[float] = []
        while len(ids) < len(prompt) + NEW_TOKENS:
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            first = first or scores.topk(TOP).values.tolist()
            scores[list(banned)] = -torch.inf
            ids.append(int(scores.argmax()))
        found.append({"tokens": ids[len(prompt) :], "first": first})
    return found


def _write_dense(folder: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=257,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    stated = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    stated["model"]["vocab"]["th"] = stated["model"]["vocab"].pop("ÿ")
    stated["model"]["merges"] = [["t", "h"]]
    stated["pre_tokenizer"]["use_regex"] = True
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stated)), bos_token=end, eos_token=end, pad_token=end
    ).save_pretrained(folder)


def _cut(name: str, form: str, widths: Any) -> LoadedModel:
    loaded = load_model(name, "cpu")
    model = loaded.model
    sites = discover_sites(model)
    sites = with_bonds(sites, discover_bonds(model, sites))
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, (8, 64), generator=generator)
    statistics = collect(model, sites, [(ids, torch.ones_like(ids, dtype=torch.bool))], generator)
    store = FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None))
    chosen = {}
    for unit in units(sites):
        assert isinstance(unit, Unit)
        width = widths[unit.block][0 if unit.family == "mlp" else 1]
        left = () if width is None else (width,)
        chosen |= {site.name: _choice(site, left, form == "factors") for site in unit.sites}
    schedule = Schedule(tuple((site.name, chosen.get(site.name, DENSE)) for site in sites))
    ScheduleApplier(model, store, packed=True).apply_(schedule)
    return loaded


def _choice(site: Site, left: tuple[int, ...], factored: bool) -> Choice:
    shape = site.shape(left)
    if not factored or 0 in shape:
        return Choice("dense", 0, "none", left)
    return Choice("pivoted-lowrank", max(1, resolve("pivoted-lowrank", *shape).break_even_chi // 2), "two-sided", left)
