"""Models: what loads, what is refused before any weight is used, and that loading leaves nothing behind."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.zoo_models import write_model
from compression.refusal import Refusal
from search.data import hub
from search.model import loading, sources
from search.model.devices import resolve_device
from search.model.loading import LoadedModel, load_for_use, load_model, model_digest
from search.model.pretrained import set_attention_
from search.model.sources import locate
from search.runtime.errors import DataUnavailable
from search.runtime.files import file_digest

TINY = ("random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2", "random:tiny-gemma2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama saved as a Hugging Face folder."""
    loaded = load_model("random:tiny-llama", "cpu")
    path = tmp_path / "tiny ü"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


def logits(loaded: LoadedModel, text: str = "Question: why?") -> torch.Tensor:
    result = loaded.model(torch.tensor([loaded.encode(text)])).logits
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("name", TINY)
def test_a_random_model_is_the_same_every_time_and_ready_to_read(name: str) -> None:
    first, second = load_model(name, "cpu"), load_model(name, "cpu")
    assert first.digest == second.digest
    assert torch.equal(logits(first), logits(second))
    assert logits(first).isfinite().all()
    assert not first.model.training
    assert not any(parameter.requires_grad for parameter in first.model.parameters())
    assert first.model.config._attn_implementation == ("eager" if "gemma2" in name else "sdpa")


def test_a_random_model_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    load_model("random:tiny-llama", "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("text", ["plain", "  spaces  and\n\nlines ", "ü é 鋼 😀", "<|endoftext"])
def test_the_byte_tokenizer_is_exact(text: str) -> None:
    loaded = load_model("random:tiny-gpt2", "cpu")
    tokens = loaded.encode(text)
    assert len(tokens) == len(text.encode())
    assert loaded.tokenizer.decode(tokens) == text


def test_the_asked_type_is_given() -> None:
    loaded = load_model("random:tiny-llama", "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_the_digest_sees_one_changed_weight_and_counts_tied_ones_once() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    assert model_digest(loaded.model) == loaded.digest
    loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert model_digest(loaded.model) != loaded.digest
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_local_folder_gives_the_saved_model(folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Card\n")
    loaded, original = load_model(str(folder), "cpu"), load_model("random:tiny-llama", "cpu")
    assert loaded.digest == original.digest
    assert torch.equal(logits(loaded), logits(original))
    assert (loaded.model_id, loaded.license) == ("tiny ü", "apache-2.0")


def test_an_architecture_without_fused_attention_is_loaded_from_a_folder_and_assembled(tmp_path: Path) -> None:
    original = load_model("random:tiny-gemma2", "cpu")
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    parameters = {name: values.detach() for name, values in original.model.named_parameters()}
    assembled = loading.assemble(str(tmp_path), torch.device("cpu"), parameters, original.digest)
    for found in (load_model(str(tmp_path), "cpu"), assembled):
        assert model_digest(found.model) == original.digest
        torch.testing.assert_close(logits(found), logits(original))


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled.*pytorch_model\.bin.*safetensors"):
        load_model(str(folder), "cpu")


def test_a_missing_weight_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(str(folder), "cpu")


def test_a_cut_weight_file_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize(
    ("missing", "complaint"), [("config.json", "must have a config.json"), ("model.safetensors", "must hold")]
)
def test_an_incomplete_folder_is_refused(folder: Path, missing: str, complaint: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=complaint):
        locate(str(folder))


@pytest.mark.parametrize("name", ["defualt", "random:tiny-lama", "random:", "./nowhere/model", "a b", ""])
def test_an_unknown_model_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"model must be .*; the nearest is (default|random:tiny-\w+)"):
        locate(name)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(hub, "answers", lambda name: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DataUnavailable, match="hub cannot be reached; give a folder") as caught:
        locate("somebody/some-model")
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The hub of processes that start meanwhile takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield


_CONVERSATIONS = "from search.data.conversations import read_conversations as read; read('somebody/some-data', None)"


@pytest.mark.usefixtures("silent_hub")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["search.py", "--model", "somebody/some-model", "--quiet"],
            2,
            r"search\.py: .*hub cannot be reached; give a folder.*\n",
        ),
        (["-c", _CONVERSATIONS], 1, r"(?s).*DataUnavailable: data .* the hub cannot be reached; give a .* file\n"),
    ],
)
@pytest.mark.slow
def test_a_hub_that_says_nothing_is_not_waited_for(words: list[str], code: int, said: str) -> None:
    root = Path(loading.__file__).parents[2]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code
    assert re.fullmatch(said, done.stderr)


def test_from_the_hub_only_safe_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "answers", lambda name: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("somebody/some-model").model_id == "somebody/some-model"
    assert not [pattern for pattern in asked if pattern.endswith((".bin", ".pt", ".py", "*"))]


def test_the_unpacked_default_is_made_once_and_again_when_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Path] = []

    def unpack(folder: Path) -> None:
        made.append(folder)
        loaded = load_model("random:tiny-llama", "cpu")
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)

    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_unpack_default", unpack)
    first = load_model("default", "cpu")
    assert load_model("default", "cpu").digest == first.digest
    assert len(made) == 1
    source = locate("default").folder
    assert source is not None
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    config = json.loads((source / "config.json").read_text())
    damages: list[tuple[str, bytes]] = [
        ("model.safetensors", bytes(content)),
        ("config.json", json.dumps(config | {"rms_norm_eps": 0.1}).encode()),
        ("adapter_config.json", b"{}"),
        ("sha256", b"\xff"),
    ]
    for number, (name, damage) in enumerate(damages, 2):
        (source / name).write_bytes(damage)
        again = load_model("default", "cpu")
        assert (again.digest, again.model.config.rms_norm_eps) == (first.digest, config["rms_norm_eps"])
        assert len(made) == number
    (source / "sha256").write_text(file_digest(source / "model.safetensors"))  # as earlier versions wrote it
    locate("default")
    (source / "config.json").write_text("{}")
    assert load_model("default", "cpu").digest == first.digest
    assert len(made) == len(damages) + 2


@pytest.mark.parametrize(
    ("device", "count", "expected"), [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cuda", 1, "cuda:0")]
)
def test_a_device_word_is_resolved(monkeypatch: pytest.MonkeyPatch, device: str, count: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device(device) == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "count", "nearest"),
    [("cuda:1", 1, "cuda:0"), ("cuda", 0, "cpu"), ("gpu", 1, "cpu"), ("cuda:x", 1, "cuda")],
)
def test_a_device_that_is_not_there_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, nearest: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"device must .*got '{device}'.*the nearest is {nearest}$"):
        resolve_device(device)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_folder_with_a_description_of_a_million_values_is_refused_before_a_library_parses_it(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).write_text('{"eos_token_id": [' + "0," * 1_000_000 + "0]}")
    monkeypatch.setattr(loading, "read_pretrained", lambda *_: pytest.fail("it was parsed"))
    for load in (load_model, load_for_use):
        with pytest.raises(ValueError, match=f"cannot use model .*{name}: it holds too many values"):
            load(str(folder), "cpu")


def test_the_attention_that_is_asked_for_is_used_or_refused_by_name() -> None:
    model = load_model("random:tiny-llama", "cpu").model
    ids = torch.arange(20)[None]
    fused = model(input_ids=ids).logits
    set_attention_(model, "eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(input_ids=ids).logits, fused, rtol=1e-4, atol=1e-4)
    with pytest.raises(Refusal, match="attention flash_attention_2 does not work with LlamaForCausalLM: "):
        set_attention_(model, "flash_attention_2")


@pytest.mark.parametrize("name", ["gptj", "bloom", "gpt_oss"])
def test_an_architecture_without_fused_attention_gets_the_one_it_has(name: str, tmp_path: Path) -> None:
    loaded = load_model(str(write_model(name, tmp_path / name)), "cpu")
    assert loaded.model.config._attn_implementation == "eager"
