"""Models with fewer hidden units and heads in every form of export: what loads computes what was applied."""

import json
import subprocess
import sys

import pytest
import torch
from cut_model import FORMS, cut_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import assert_same_logits, assert_same_tensors
from transformers import AutoModelForCausalLM, DynamicCache

from compression import MPOLinear
from compression.layers.quantize import quantize_
from compression.numerics.whitening import shrink
from compression.sites import dense_weight, model_parameters
from compression.size import SizeModel
from search import hf
from search.evaluation.packed_sequences import packed_text
from search.evaluation.workload import Workload
from search.export.folder import check_export, export_dense_, export_model, footprint, forms
from search.export.model_card import model_card
from search.export.quantize import module_bits
from search.model.latent_cache import latent_cache
from search.model.loading import load_for_use, load_model

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")
PROMPT = torch.arange(40).reshape(2, 20)
MLP = "model.layers.1.mlp"


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    cut = cut_model()
    cut.apply()
    path = tmp_path_factory.mktemp("exported") / "cut"
    export_model(cut.loaded.model, cut.loaded.tokenizer, path)
    return cut, path


@pytest.fixture
def copy(exported, tmp_path):
    """A copy that a test may damage."""
    (tmp_path / "copy").mkdir()
    for file in exported[1].iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "copy"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_export_computes_what_the_cut_model_does(name, form, tmp_path):
    cut = cut_model(name, form)
    model, original = cut.loaded.model, {}
    for site in cut.store.sites:
        original[site.name] = dense_weight(model.get_submodule(site.name)).clone()
    cut.apply()
    expected, size = logits(model), SizeModel(load_model(name, "cpu").model, cut.store.sites).size(cut.schedule)
    assert (model_parameters(model), footprint(model).stored) == (size.parameters, size.bytes)

    export_model(model, cut.loaded.tokenizer, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]["format"] == hf.FORMAT
    read = load(tmp_path / "hf")
    assert_same_tensors(read, model)
    assert_same_logits(logits(read), expected)
    assert_same_logits(logits(load_for_use(str(tmp_path / "hf"), "cpu").model), expected)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert footprint(model).stored == sum(each.numel() * each.element_size() for each in tensors.values())
    read.save_pretrained(tmp_path / "again")
    assert_same_logits(logits(load(tmp_path / "again")), expected)
    torch.testing.assert_close(logits(read.dequantize()), expected, rtol=1e-3, atol=1e-3)

    export_dense_(model, cut.loaded.tokenizer, tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"), "cpu").model
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)
    for site in cut.store.sites:
        choice, weight = cut.schedule[site.name], dense_weight(dense.get_submodule(site.name))
        assert weight.shape == (site.out_features, site.in_features)
        if not choice.is_plain or not choice.widths:
            continue
        [width], [how] = choice.widths, site.cuts
        kept = how.indices(cut.store.bonds.elimination(how.bond).kept(width))
        place = (kept,) if how.of_rows else (slice(None), kept)
        left = original[site.name] if how.of_rows else torch.zeros(weight.shape)
        left = left if how.of_rows else left.index_copy(1, kept, cut.store.bonds.plain(site.name, choice.widths))
        torch.testing.assert_close(weight[place], left[place])
        removed = weight.clone()
        removed[place] = 0
        assert not removed.any()


ALONE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    save_file({"logits": model(ids, attention_mask=torch.ones_like(ids)).logits}, sys.argv[2])
assert not any(name.split(".")[0] in ("search", "compression") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_process_without_this_project_reads_the_folder_by_the_file_beside_it(exported, tmp_path):
    cut, path = exported
    command = [sys.executable, "-I", "-c", ALONE, str(path), str(tmp_path / "logits")]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert_same_logits(load_file(tmp_path / "logits")["logits"], logits(cut.loaded.model))


def test_a_dense_folder_in_half_precision_for_other_tools_is_close(tmp_path):
    cut = cut_model()
    cut.apply()
    expected = logits(cut.loaded.model)
    check_export("gguf-ready", cut.loaded.model, cut.loaded.tokenizer)
    export_dense_(cut.loaded.model.to(torch.float16), cut.loaded.tokenizer, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.float16}
    assert not [name for name in tensors if "kept" in name]
    found = logits(load_model(str(tmp_path / "out"), "cpu").model)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_what_is_said_of_a_cut_model_is_true():
    factors, plain = cut_model(form="factors"), cut_model()
    for cut, said in ((factors, "21 matrices are MPOs, and 21 have"), (plain, "0 matrices are MPOs, and 21 have")):
        cut.apply()
        assert forms(cut.loaded.model) == f"{said} lost rows or columns."
    card = model_card("cut", "dense", {}, {}, "searched", forms(plain.loaded.model), [])
    assert "0 matrices are MPOs" in card
    assert "removed hidden units and heads are filled up with zeros" in card
    assert "heads of the attention are left" in card


def test_without_the_plug_in_a_cut_matrix_is_refused_for_its_shape(exported, tmp_path):
    document = json.loads((exported[1] / "config.json").read_text())
    del document["quantization_config"], document["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "model.safetensors").write_bytes((exported[1] / "model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["plain", "factors"])
@pytest.mark.parametrize("name", MODELS[:2])
def test_fewer_heads_generate_with_a_cache_what_they_generate_without(name, form, attention, tmp_path):
    cut = cut_model(name, form)
    cut.apply()
    export_model(cut.loaded.model, cut.loaded.tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention)
    assert model.config.num_attention_heads == 4
    ids = PROMPT[:1, :7]
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    uncached = ids
    with torch.no_grad():
        for _ in range(12):
            uncached = torch.cat([uncached, model(uncached, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(answer, uncached)
        caches = DynamicCache(config=model.config)
        whole = model(ids, use_cache=False).logits
        with latent_cache(model) as latent:
            for cache in (caches, latent):
                parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(3, dim=1)]
                torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert caches.layers[0].keys.shape[1] == 1  # of two heads


@pytest.mark.parametrize("kind", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_cut_model_loads_and_is_close(form, kind, tmp_path):
    cut = cut_model("random:tiny-qwen2", form)
    model, sites, statistics = cut.loaded.model, cut.store.sites, cut.store._measured.statistics()
    cut.apply()
    expected = logits(model)
    known, moments = {site.name for site in sites}, (statistics.input, statistics.gradient)
    quantize_(
        model,
        module_bits(model, sites, kind),
        lambda name: tuple(shrink(each(name), 0.01) for each in moments) if name in known else None,
    )
    found = logits(model)
    if kind == "int8":
        assert (found - expected).norm() < 0.05 * expected.norm()
    export_model(model, cut.loaded.tokenizer, tmp_path / "out")
    read = load(tmp_path / "out")
    assert_same_logits(logits(read), found)
    torch.testing.assert_close(logits(read.dequantize()), found, rtol=1e-3, atol=1e-3)


def test_a_model_that_is_quantized_in_half_precision_is_measured_against_the_dense_one_in_full():
    measured = []
    for dtype in (torch.float32, torch.bfloat16):
        cut = cut_model(form="factors")
        model, workload = cut.loaded.model, Workload([packed_text(row) for row in PROMPT.tolist()], cut.loaded.model)
        workload.reference(model)
        cut.apply()
        quantize_(model.to(dtype), module_bits(model, cut.store.sites, "int8"), lambda name: None)
        measured.append(workload.measure(model).kl)
    assert measured[1] == pytest.approx(measured[0], rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_loads_and_keeps_its_row_numbers(form, tmp_path):
    cut = cut_model(form=form)
    cut.apply()
    export_model(cut.loaded.model.to(torch.float16), cut.loaded.tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert {each.dtype for name, each in model.named_buffers() if ".kept_" in name} == {torch.int32}
    reference = logits(cut.loaded.model.float())
    assert (logits(model) - reference).norm() < 0.05 * reference.norm()


def edit(path, change, tensors=None):
    """Change the description of the modules and the tensors consistently, as somebody who forges a folder would."""
    document = json.loads((path / "config.json").read_text())
    change(document["quantization_config"]["modules"])
    (path / "config.json").write_text(json.dumps(document))
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    values = load_file(file) | (tensors or {})
    header.pop("chisel_config")
    header["chisel_sha256"] = json.dumps({name: hf._checksum(name, each) for name, each in values.items()})
    save_file(values, file, metadata=header)


GATE, DOWN = f"{MLP}.gate_proj", f"{MLP}.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said[GATE].update(shape=[24, 33]), "shape must be the rows and columns left"),
        (lambda said: said[GATE].update(shape=[-1, 32]), "shape must be the rows and columns left"),
        (lambda said: said[GATE].update(shape=[24]), "shape must be the rows and columns left"),
        (lambda said: said[GATE].update(shape=[True, 32]), "shape must be the rows and columns left"),
        (lambda said: said[GATE].pop("shape"), f"the matrices of {MLP} must all be cut to the same share"),
        (lambda said: said[GATE].update(shape=[20, 32]), f"the matrices of {MLP} must all be cut to the same share"),
        (lambda said: said.pop(GATE), f"the matrices of {MLP} must all be cut to the same share"),
        (
            lambda said: [said[each].update(shape=shape) for each, shape in _other_widths()],
            r"has shape \(24,\), the model needs \(20,\)",
        ),
        (
            lambda said: said.update(
                {"model.embed_tokens": {"kind": "packed-embedding", "bits": 8, "group": 64, "shape": [5, 32]}}
            ),
            "shape must be the rows and columns left of a mpo",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(copy, change, message):
    edit(copy, change)
    with pytest.raises(ValueError, match=message) as refused:
        load(copy)
    assert "\n" not in str(refused.value)


def _other_widths():
    return [(GATE, [20, 32]), (f"{MLP}.up_proj", [20, 32]), (DOWN, [32, 20])]


@pytest.mark.parametrize("wrong", [-1, 48, "repeated", "descending"])
def test_row_numbers_that_are_none_are_refused_when_the_folder_is_loaded(copy, wrong):
    numbers = load_file(copy / "model.safetensors")[f"{GATE}.kept_rows"].clone()
    if wrong == "descending":
        numbers = numbers.flip(0).contiguous()
    else:
        numbers[-1] = numbers[0] if wrong == "repeated" else wrong
    edit(copy, lambda said: None, {f"{GATE}.kept_rows": numbers})
    with pytest.raises(ValueError, match=f"compressed module {GATE}: kept_rows must be ascending numbers from 0 to 47"):
        load(copy)


def test_a_folder_of_format_1_loads_and_is_saved_as_the_newest(exported, tmp_path):
    cut = cut_model(form="factors")
    for name, choice in cut.schedule:  # the factors without the widths, as every schedule was before
        if choice.widths:
            dense = cut.loaded.model.get_submodule(name)
            cores = cut.store.factors(name, "lowrank", "two-sided").cores
            cut.loaded.model.set_submodule(name, MPOLinear([cores[0][..., :4], cores[1][:4]], dense.bias))
    export_model(cut.loaded.model, cut.loaded.tokenizer, tmp_path / "one")
    document = json.loads((tmp_path / "one" / "config.json").read_text())
    document["quantization_config"]["format"] = 1
    (tmp_path / "one" / "config.json").write_text(json.dumps(document))
    assert not any("shape" in each for each in document["quantization_config"]["modules"].values())
    model = load(tmp_path / "one")
    assert_same_logits(logits(model), logits(cut.loaded.model))
    model.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]["format"] == hf.FORMAT
