"""A GGUF file is converted once, to what transformers makes of it, and mapped from the cache afterwards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from tiny_gguf import written

from search.model import unpacked
from search.model.gguf_reader import QuickReader
from search.model.loading import load_model, model_digest
from search.model.pretrained import quiet_transformers, read_pretrained
from search.model.sources import locate


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_converted_model_is_the_one_that_transformers_loads(file: Path, dtype: torch.dtype) -> None:
    found, source = load_model(str(file), "cpu", dtype), locate(str(file))
    with quiet_transformers():
        model, tokenizer = read_pretrained(source, dtype)
    model.to(dtype=dtype)
    assert found.digest == model_digest(model)
    assert found.model.config.to_dict() == model.config.to_dict()
    assert found.model.generation_config.to_dict() == model.generation_config.to_dict()
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    ids = torch.tensor([found.encode("Question: why?")])
    torch.testing.assert_close(found.model(ids).logits, model.eval()(ids).logits)


def test_the_file_is_converted_a_few_blocks_at_a_time_once_and_again_when_damaged(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    first = load_model(str(file), "cpu", progress=done.append)
    assert sum(done) == 100
    [folder] = (tmp_path / "cache" / "models").glob("tiny-*-float32-*")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 3
    converted: list[object] = []
    convert = unpacked.load_gguf_checkpoint
    monkeypatch.setattr(unpacked, "load_gguf_checkpoint", lambda *args: converted.append(args) or convert(*args))
    assert load_model(str(file), "cpu").digest == first.digest
    assert not converted
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    assert load_model(str(file), "cpu").digest == first.digest
    assert converted


def test_a_missing_tensor_or_an_unknown_architecture_is_refused_by_name(file: Path) -> None:
    written(file, without="blk.1.attn_q.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.self_attn\.q_proj"):
        load_model(str(file), "cpu")
    written(file, architecture="bert")
    with pytest.raises(ValueError, match=r"cannot be loaded: GGUF model with architecture bert is not supported"):
        load_model(str(file), "cpu")


def test_a_full_disk_is_noticed_before_anything_is_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"the model takes 0\.1 MB in .*models and 0\.0 MB are free"):
        load_model(str(file), "cpu")


def test_the_quick_reader_reads_what_gguf_reads_but_for_texts_in_lists(file: Path) -> None:
    ours, theirs = QuickReader(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        found = ours.fields[name]
        assert (found.offset, found.types) == (field.offset, field.types)
        if field.types[-1] == gguf.GGUFValueType.STRING and len(field.types) > 1:
            assert len(found.contents()) == len(field.contents())
        else:
            assert found.contents() == field.contents()
    assert [(one.name, one.data_offset, one.n_bytes) for one in ours.tensors] == [
        (one.name, one.data_offset, one.n_bytes) for one in theirs.tensors
    ]
