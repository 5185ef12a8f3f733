"""Folders for others: dense ones, what is refused, and the commands around them."""

import json
import shutil

import pytest
import torch
import yaml
from cut_shapes import DIFFER, cut_to
from tiny_model import tensorized
from transformers import AutoModelForCausalLM

from compression import MPOLinear
from compression.refusal import Refusal
from search import cli
from search.export.folder import check_export, export_dense_, export_gguf, export_model, footprint
from search.export.model_card import model_card
from search.export.upload import push
from search.model.chat import Chat, Spoken
from search.model.loading import load_for_use, load_model
from search.runtime.outside_text import plain

PROMPT = torch.arange(40).reshape(2, 20)


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    loaded = tensorized()
    path = tmp_path_factory.mktemp("exported") / "model ü"
    export_model(loaded.model, loaded.tokenizer, path, "---\nlicense: mit\n---\n")
    return path


@pytest.mark.parametrize("kind", ["random:tiny-llama", "random:tiny-gpt2"])
@pytest.mark.parametrize("heads", [False, True])
def test_a_dense_folder_is_an_ordinary_one_that_computes_the_same(kind, heads, tmp_path):
    loaded = tensorized(kind, heads=heads)
    before = logits(loaded.model)
    export_dense_(loaded.model, loaded.tokenizer, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & document.keys()
    read = load_model(str(tmp_path / "out"), "cpu").model
    assert not any(isinstance(module, MPOLinear) for module in read.modules())
    assert type(read) is type(load_model(kind, "cpu").model)
    torch.testing.assert_close(logits(read), before, rtol=1e-3, atol=1e-3)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    loaded = tensorized("random:tiny-gpt2")
    before, modules = logits(loaded.model), dict(loaded.model.named_modules())
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert torch.equal(logits(loaded.model), before)
    assert all(module is modules[name] for name, module in loaded.model.named_modules())
    assert not hasattr(loaded.model.config, "quantization_config")


def test_a_used_folder_is_refused_and_kept(folder):
    loaded = tensorized()
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(ValueError, match="holds a run or a model already"):
        export_model(loaded.model, loaded.tokenizer, folder)
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_folder_with_nothing_but_what_a_killed_run_left_is_replaced(tmp_path):
    loaded = tensorized()
    for name in (".lock", ".config.json.a1b2c3d4.tmp"):
        (tmp_path / name).touch()
    export_model(loaded.model, loaded.tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / ".lock").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    loaded = tensorized()

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export_model(loaded.model, Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_not_exported_as_a_compressed_one(tmp_path):
    loaded = load_model("random:tiny-llama", "cpu")
    with pytest.raises(ValueError, match="nothing in this model is compressed"):
        export_model(loaded.model, loaded.tokenizer, tmp_path / "out")


def test_the_footprint_counts_stored_bytes_once_against_both_dense_types():
    dense = load_model("random:tiny-llama", "cpu").model
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    assert footprint(dense).stored == footprint(dense).float32 == 4 * parameters
    assert footprint(dense.to(torch.bfloat16)).saved == 0.5
    assert footprint(dense).saved_of_float16 == 0
    assert footprint(tensorized().model).saved > 0.2


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Gemma3ForCausalLM", "Gemma2ForCausalLM"])
def test_gguf_takes_what_the_converter_takes_whatever_its_name_there(architecture):
    loaded = tensorized()
    model = type(architecture, (), {"__module__": "transformers.models", "config": loaded.model.config})()
    check_export("gguf-ready", model, loaded.tokenizer)


def test_gguf_refuses_other_architectures_and_slow_tokenizers():
    loaded = tensorized()
    check_export("gguf-ready", loaded.model, loaded.tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        check_export("gguf-ready", loaded.model, object())
    with pytest.raises(ValueError, match=r"takes no OPTForCausalLM .*--format dense"):
        check_export("gguf-ready", type("OPTForCausalLM", (), {})(), loaded.tokenizer)


@pytest.mark.parametrize(
    ("form", "message"), [("hf", "export it as dense"), ("gguf-ready", "takes no OwnLlama"), ("dense", "")]
)
def test_a_model_that_brings_its_own_code_is_exported_dense(form, message):
    loaded = tensorized()
    own = {"__module__": "transformers_modules.own", "config": loaded.model.config}
    model, tokenizer = type("OwnLlama", (), own)(), loaded.tokenizer
    if message:
        with pytest.raises(ValueError, match=message):
            check_export(form, model, tokenizer)
    else:
        check_export(form, model, tokenizer)


def test_the_vocabulary_that_the_gguf_converter_reads_stays_with_the_model(tmp_path):
    loaded = tensorized()
    loaded.tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(b"pieces")
    loaded.tokenizer.name_or_path = str(tmp_path / "source")
    export_dense_(loaded.model, loaded.tokenizer, tmp_path / "dense")
    assert (tmp_path / "dense" / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("place", ["config", "tokenizer"])
@pytest.mark.parametrize("reference", ["modeling_gone.Model", "someone/else--modeling.Model", [None, "tok_gone.Fast"]])
def test_no_export_refers_to_code_that_is_not_there(place, reference, tmp_path):
    for form, write in (("dense", export_dense_), ("hf", export_model)):
        loaded = tensorized()
        holder = loaded.model.config.__dict__ if place == "config" else loaded.tokenizer.init_kwargs
        holder["auto_map"] = {"AutoTokenizer": reference}
        write(loaded.model, loaded.tokenizer, tmp_path / form)
        for file in (tmp_path / form).glob("*.json"):
            text = file.read_text()
            assert "gone" not in text, file
            assert "someone" not in text, file
        assert ("auto_map" in (tmp_path / form / "config.json").read_text()) == (form == "hf")
    assert load_model(str(tmp_path / "dense"), "cpu").digest


def test_a_card_has_licence_size_table_and_how_to_load():
    prior = {
        "model": {"id": "small", "license": "Apache-2.0"},
        "kept_fraction": 0.8,
        "data": {"calibration": "ab" * 32},
    }
    rows = [{"schedule": "dense", "kl": 0.0}, {"schedule": "searched", "kl": 0.25}]
    text = model_card("mine", "hf", prior, {"rows": rows}, "searched", "12 MB", ["Nothing was trained."])
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: small\n")
    for part in ("| searched |", "0.2500", "12 MB", 'from_pretrained("mine")', "abababababababab", "0.8000"):
        assert part in text
    assert "\nvllm serve mine " in text
    assert "vllm" not in model_card("mine", "hf", prior, {}, "searched", "12 MB", [], (), "AutoModelForMaskedLM")
    assert "\nvllm serve 'my own' " in model_card("my own", "plain", prior, {}, "searched", "12 MB", [])
    assert "as large as the original" in model_card("mine", "dense", prior, {}, "searched", "12 MB", [])


@pytest.mark.parametrize(
    "name",
    ["my: model", "#1", "- x", "no", "1e3", "ü 鋼", "a\nlicense: mit", "'\"", "[x", "!tag", "", "{a: b}", "x" * 300],
)
def test_the_front_matter_of_a_card_is_yaml_for_every_name(name):
    prior = {"model": {"id": name, "license": name}}
    card = model_card(name, "hf", prior, {}, "searched", "12 MB", [])
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (plain(name), plain(name.lower()))
    assert front["tags"] == ["chisel", "tensor-network", "compression"]
    code = card.split("```python\n")[1].split("```")[0]
    assert code.count("\n") == 5
    compile(code, "card", "exec")


def test_a_chat_answers_in_pieces_that_make_up_the_whole(folder):
    chat, pieces = Chat(load_for_use(str(folder), "cpu"), tokens=12), []
    answer = chat.answer("abc", pieces.append)
    assert answer == "".join(pieces)
    ids = chat.loaded.tokenizer("abc", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=256
    )
    assert answer == chat.loaded.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_half_a_character_waits_for_its_other_half():
    pieces = []
    spoken = Spoken(lambda tokens, **options: bytes(tokens).decode(errors="replace"), pieces.append)
    spoken.put(torch.tensor([[65]]))  # the prompt
    for token in "aé!".encode():
        spoken.put(torch.tensor([token]))
    spoken.end()
    assert pieces == ["a", "é", "!"]


def test_generate_answers_a_prompt_and_refuses_none(folder, capsys):
    for cache in ([], ["--latent-cache"]):
        words = ["generate", str(folder), "--prompt", "abc", "--tokens", "4", "--quiet", *cache]
        assert cli.main(words) == cli.DONE
    assert capsys.readouterr().out.endswith("\n")
    assert cli.main(["generate", str(folder), "--prompt", " "]) == cli.REFUSED
    assert cli.main(["generate", str(folder), "--prompt", "abc", "--tokens", "0"]) == cli.REFUSED
    assert cli.main(["generate", "random:tiny-lama", "--prompt", "abc"]) == cli.REFUSED


def test_a_damaged_folder_is_refused_in_one_line(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert cli.main(["generate", str(tmp_path), "--prompt", "abc", "--quiet"]) == cli.REFUSED
    error = capsys.readouterr().err
    assert "checksum" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "a finished run has config.json and prior.json"),
        (["nowhere", "--format", "gguf-read"], "the nearest is gguf-ready"),
        (["nowhere", "--quantize", "q8_0"], "q8_0 is a type of GGUF files; use it with --format gguf"),
        (
            ["nowhere", "--format", "gguf", "--quantize", "int4"],
            "cannot be quantized to int4; use --quantize one of q8",
        ),
        (["nowhere", "--format", "plain", "--quantize", "int4"], "cannot be quantized to int4; use --quantize none"),
        (["nowhere", "--format", "gguf", "--quantize", "q8_0", "--dtype", "float16"], "use one of them"),
        (["nowhere", "--dtype", "float"], "dtype must be one of"),
    ],
)
def test_export_refuses_in_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *words, "--quiet"]) == cli.REFUSED
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Hub:
    """Takes uploads and says what it was given."""

    said = []  # noqa: RUF012 (of all instances)

    def create_repo(self, repository, **options):
        self.said.append((repository, options))

    def upload_folder(self, **options):
        self.said.append(options)
        return type("Commit", (), {"repo_url": "https://hub/x"})


def test_push_uploads_an_exported_folder_privately_unless_told_otherwise(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push(folder, "me/small") == "https://hub/x"
    assert Hub.said[0] == ("me/small", {"private": True, "exist_ok": True})
    assert Hub.said[1]["folder_path"] == folder


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", lambda content: content.replace(b"1e-06", b"1e-02"), "rms_norm_eps was 1e-06, is 0.01"),
        ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged, its checksum"),
    ],
)
def test_push_refuses_a_folder_that_was_changed(folder, tmp_path, monkeypatch, name, change, said):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(ValueError, match=said):
        push(copy, "me/small")


def test_push_uploads_a_gguf_file_that_is_whole(tmp_path, monkeypatch):
    loaded = cut_to("random:tiny-llama", DIFFER)
    export_gguf(loaded.model, loaded.tokenizer, tmp_path / "gguf", "float16", lambda file: "the card")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push(tmp_path / "gguf", "me/small") == "https://hub/x"
    file = tmp_path / "gguf" / "model.gguf"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Refusal, match=r"model\.gguf is cut or damaged .*export it again"):
        push(tmp_path / "gguf", "me/small")


def test_push_refuses_another_folder_or_name(folder, tmp_path):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        push(folder, "small")
    with pytest.raises(ValueError, match=r"no config\.json"):
        push(tmp_path, "me/small")
