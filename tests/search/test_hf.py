"""A compressed folder in transformers: what loads, what is done with it there, and what is refused."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import assert_same_logits, assert_same_tensors, tensorized
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from compression import MPOLinear
from search import hf
from search.export.folder import export_model
from search.model.loading import load_for_use

PROMPT = torch.arange(40).reshape(2, 20)
MASK = torch.ones_like(PROMPT)


@pytest.fixture(scope="module")
def original():
    return tensorized()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "a model"
    export_model(original.model, original.tokenizer, path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=MASK).logits


def alone(code, *arguments):
    """Run code in a process that cannot import this project."""
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    # The command line, which other tests run in this process, turns the talk of transformers down.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, env=plain)


def test_a_folder_gives_the_same_tensors_and_logits(original, folder):
    model = load(folder)
    assert_same_tensors(model, original.model)
    assert_same_logits(logits(model), logits(original.model))
    assert isinstance(model.model.layers[0].self_attn.q_proj, MPOLinear)


@pytest.mark.parametrize("kind", ["random:tiny-gpt2", "random:tiny-qwen2"])
def test_other_architectures_too(kind, tmp_path):
    loaded = tensorized(kind)
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert_same_logits(logits(load(tmp_path / "out")), logits(loaded.model))


def test_heads_of_their_own_too(tmp_path):
    loaded = tensorized(heads=True)
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert_same_logits(logits(load(tmp_path / "out")), logits(loaded.model))


OTHER = Path(__file__).parents[2] / "build" / "transformers" / "5.19.0"
"""The version of transformers that vLLM takes, where `make test` has put it; else processes elsewhere have ours."""

ELSEWHERE = """
import sys
folder, ours, again, logits, other = sys.argv[1:]
sys.path.insert(0, other)
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import save_file
for each in (folder, ours):
    try:
        AutoModelForCausalLM.from_pretrained(each)
    except RuntimeError:
        print("refused")
tokenizer = AutoTokenizer.from_pretrained(folder)
first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
first.save_pretrained(again)
second = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    found = [each(ids, attention_mask=torch.ones_like(ids)).logits for each in (first, second)]
assert not any(name.split(".")[0] in ("search", "compression") for name in sys.modules)
save_file({"first": found[0], "again": found[1]}, logits)
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=1)
print("score", model.loglikelihood_rolling.__name__, type(model.model).__name__, model.max_length)
print("transformers", transformers.__version__)
"""


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory):
    """What one process without this project makes of the folder, and the logits it finds."""
    place = tmp_path_factory.mktemp("elsewhere")
    load(folder).save_pretrained(place / "ours")
    ran = alone(ELSEWHERE, folder, place / "ours", place / "again", place / "logits.safetensors", OTHER)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran, load_file(place / "logits.safetensors")


@pytest.mark.slow
def test_without_this_project_the_code_beside_the_weights_reads_them(original, elsewhere):
    _, saved = elsewhere
    assert_same_logits(saved["first"], logits(original.model))
    assert_same_logits(saved["again"], logits(original.model))


@pytest.mark.slow
@pytest.mark.skipif(
    not OTHER.exists(), reason="`make test` puts the version of transformers that vLLM takes into build/"
)
def test_that_code_was_tried_in_the_version_of_transformers_that_vllm_takes(elsewhere):
    ran, _ = elsewhere
    assert ran.stdout.endswith(f"transformers {OTHER.name}\n")


@pytest.mark.slow
def test_without_project_or_trust_loading_is_an_error(elsewhere):
    ran, _ = elsewhere
    assert ran.stdout.split()[:3] == ["refused", "refused", "score"]
    assert ran.stderr.count("q_proj.weight") >= 2


def test_generation_continues_as_the_model_in_memory_does(original, folder):
    options = dict(attention_mask=MASK, max_new_tokens=8, do_sample=False, pad_token_id=256)
    assert torch.equal(load(folder).generate(PROMPT, **options), original.model.generate(PROMPT, **options))


def test_other_types_are_a_matter_of_to_and_of_loading(folder):
    loaded, cast = load(folder, dtype=torch.bfloat16), load(folder).to(torch.bfloat16)
    assert logits(cast).dtype == torch.bfloat16
    for name, values in loaded.state_dict().items():
        assert torch.equal(values, cast.state_dict()[name])
    assert loaded.model.layers[0].self_attn.q_proj.places_0.dtype == torch.int32
    assert logits(load(folder).half()).dtype == torch.float16
    assert logits(loaded.half().float()).dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(folder):
    model = load(folder).requires_grad_(False)
    before = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), before)


def test_saving_again_keeps_every_bit_and_the_file_says_so(original, folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_tensors(load(tmp_path / "again"), original.model)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dequantize_makes_an_ordinary_model(original, folder):
    model = load(folder)
    model.dequantize()
    assert not any(isinstance(module, MPOLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(original.model), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_trainer_trains_the_cores_and_resumes(folder, tmp_path):
    examples = [{"input_ids": row, "labels": row} for row in PROMPT.repeat(2, 1)]

    def trained(steps, checkpoint=None):
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        model = load(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(model=model, args=arguments, train_dataset=examples).train(resume_from_checkpoint=checkpoint)
        return model

    core = "model.layers.0.self_attn.q_proj.tail_0"
    start = load(folder).get_parameter(core)
    straight = trained(2)
    assert not torch.equal(straight.get_parameter(core), start)
    resumed = trained(2, str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(resumed.get_parameter(core), straight.get_parameter(core))
    assert_same_logits(logits(load(tmp_path / "checkpoint-2")), logits(straight.eval()))


def test_lora_learns_beside_the_cores_and_refuses_to_merge(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM")
    config._register_custom_module(hf.lora_layers())
    model = load(folder)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), before)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    adapted(PROMPT, attention_mask=MASK, labels=PROMPT).loss.backward()
    assert any(adapted.get_parameter(name).grad.abs().sum() > 0 for name in trainable)
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted.merge_and_unload()


@pytest.mark.slow
def test_lm_eval_reads_the_folder_with_the_code_beside_the_weights(elsewhere):
    ran, _ = elsewhere
    assert "ChiselForCausalLM" in ran.stdout


def rewritten(path, change):
    """Change the tensors of a weight file, its header kept."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def test_a_missing_core_is_refused(copy):
    rewritten(copy, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.tail_0"))
    with pytest.raises(ValueError, match=r"lack 1 tensors, such as model\.layers\.0\.self_attn\.q_proj\.tail_0"):
        load(copy)


def test_a_missing_dense_tensor_is_refused(copy):
    rewritten(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"such as model\.norm\.weight"):
        load(copy)


def test_a_core_of_another_shape_is_refused(copy):
    name = "model.layers.0.self_attn.q_proj.tail_0"
    rewritten(copy, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        load(copy)


def test_a_flipped_bit_is_refused(copy):
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, its checksum differs"):
        load(copy)


def test_a_cut_file_is_refused(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"cut|incomplete|Incomplete|not fully covered"):
        load(copy)


def test_weights_without_checksums_are_refused(copy):
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="without checksums"):
        load(copy)


def test_a_pickle_is_refused(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="never opened"):
        load(copy)


RULES = [
    ({"rms_norm_eps": 1e-2}, "rms_norm_eps was 1e-06, is 0.01"),
    ({"hidden_act": "relu"}, 'hidden_act was "silu", is "relu"'),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, "rope_parameters.rope_theta was 10000.0, is 9"),
    ({"rope_theta": 9.0}, "rope_theta was added"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling was added"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor was added"),
    ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "head_dim was 8, is 16"),
    ({"num_hidden_layers": 1}, "num_hidden_layers was 3, is 1"),
    ({"max_position_embeddings": 1}, "max_position_embeddings was"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings was true, is false"),
]


@pytest.mark.parametrize(("change", "message"), RULES)
def test_a_config_with_other_rules_is_refused(copy, change, message):
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(document | change))
    with pytest.raises(
        ValueError, match=f"config.json was changed after the weights were written: {re.escape(message)}"
    ):
        load(copy)
    with pytest.raises(ValueError, match="was changed after the weights were written"):
        load_for_use(str(copy), "cpu")


def test_a_field_that_was_removed_from_the_config_is_refused_if_its_default_differs(copy):
    document = json.loads((copy / "config.json").read_text())
    del document["vocab_size"]
    (copy / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="vocab_size was 257, is 32000"):
        load(copy)


def test_what_transformers_and_callers_add_is_no_change(copy, tmp_path):
    document = json.loads((copy / "config.json").read_text())
    free = {"dtype": "float16", "use_cache": False, "transformers_version": "9.9.9", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(document | free))
    model = load(copy, rms_norm_eps=1e-3, output_hidden_states=True)
    assert model.config.rms_norm_eps == 1e-3
    model.config.pad_token_id = 3
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    again = load(tmp_path / "again")
    assert (again.config.rms_norm_eps, again.config.pad_token_id) == (1e-3, 3)
    assert_same_tensors(again, model)


def as_earlier_versions(path):
    """Take the config out of the header of the weights."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
    assert metadata.pop("chisel_config")
    save_file(load_file(file), file, metadata)


def test_a_folder_of_an_earlier_version_holds_no_config_to_compare_and_loads(copy):
    as_earlier_versions(copy)
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(document | {"rms_norm_eps": 1e-2}))
    assert load(copy).config.rms_norm_eps == 1e-2


def edited(path, change):
    document = json.loads((path / "config.json").read_text())
    change(document["quantization_config"])
    (path / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(format=99), "this model has format 99, and this code reads formats 1 to 4"),
        (lambda said: said.update(modules=None), "must be a mapping"),
        (lambda said: said["modules"].update({"model.nowhere": {"kind": "mpo"}}), "no matrix of this name"),
        (lambda said: said["modules"]["model.layers.0.self_attn.q_proj"].update(kind="x"), "kind must be"),
        (lambda said: said["modules"]["model.layers.0.self_attn.q_proj"].update(bonds=[0]), "bonds must be 1 "),
        (lambda said: said["modules"]["model.layers.0.self_attn.q_proj"].update(bonds=[9]), "has shape"),
        (lambda said: said["modules"]["model.layers.0.self_attn.q_proj"].update(bonds=[2**40]), "bonds must be 1 "),
        (lambda said: said["modules"]["model.layers.0.self_attn.q_proj"].pop("topology"), "does not fit"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(copy, change, message):
    edited(copy, change)
    with pytest.raises(ValueError, match=r"the description of model\S+ in .*modules differs|format 99|a mapping"):
        load(copy)
    as_earlier_versions(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**31 - 1, "repeated"])
def test_row_numbers_out_of_range_are_refused_when_the_folder_is_loaded(copy, wrong):
    [file] = copy.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in tensors if ".places_" in name)
    tensors[name] = tensors[name].clone()
    tensors[name][1] = tensors[name][0] if wrong == "repeated" else wrong
    header["chisel_sha256"] = json.dumps({name: hf._checksum(name, values) for name, values in tensors.items()})
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match=r"compressed module .*: places_0 must be different row numbers from 0 to \d+"):
        load(copy)
