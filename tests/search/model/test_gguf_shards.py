"""GGUF models in several files: the same as in one, from any file of them, or refused with advice that helps."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch

from search.model.loading import load_model
from search.model.source_files import SourceFiles
from search.model.sources import locate

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def written(path: Path, tensors_per_file: int = 0) -> None:
    """The tiny Llama as GGUF, in files of this many tensors; 0 writes one file."""
    loaded = load_model("random:tiny-llama", "cpu")
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_file)
    writer.add_name("tiny")
    writer.add_vocab_size(257)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(loaded.tokenizer.get_vocab(), key=loaded.tokenizer.get_vocab().get)
    tokens[255] = "ab"  # the format needs a merge
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 256 + [3])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    for name, values in loaded.model.state_dict().items():
        place, _, leaf = name.removeprefix("model.").removesuffix(".weight").partition("layers.")
        if leaf:
            block, _, inner = leaf.partition(".")
            writer.add_tensor(f"blk.{block}.{NAMES[inner]}.weight", values.numpy())
        elif place != "lm_head":
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[place] + ".weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    written(folder / "tiny.gguf", 12)
    assert len(list(folder.glob("tiny-0000?-of-00003.gguf"))) == 3
    return folder


def copied(shards: Path, folder: Path, without: int = 0) -> Path:
    for file in shards.iterdir():
        if not file.name.startswith(f"tiny-0000{without}"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_model_in_three_files_is_the_model_in_one(shards: Path, tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    whole, found = load_model(str(tmp_path / "tiny.gguf"), "cpu"), load_model(str(shards), "cpu")
    assert found.digest == whole.digest
    ids = torch.tensor([found.encode("Question: why?")])
    assert torch.equal(found.model(ids).logits, whole.model(ids).logits)


def test_any_file_of_a_model_names_all_of_them(shards: Path) -> None:
    for number in (1, 2, 3):
        source = locate(str(shards / f"tiny-0000{number}-of-00003.gguf"))
        assert (source.gguf, source.model_id) == ("tiny-00001-of-00003.gguf", "tiny")
    assert gguf.GGUFReader.__name__ == "GGUFReader"


@pytest.mark.parametrize("without", [1, 2, 3])
def test_a_missing_file_is_named(shards: Path, tmp_path: Path, without: int) -> None:
    folder = copied(shards, tmp_path, without)
    other = next(folder.iterdir())
    for name in (folder, other):
        with pytest.raises(ValueError, match=rf"tiny-0000{without}-of-00003\.gguf is missing; copy it"):
            locate(str(name))


def test_a_file_that_lost_its_number_is_refused_with_the_name_it_needs(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "renamed.gguf").write_bytes((shards / "tiny-00001-of-00003.gguf").read_bytes())
    with pytest.raises(
        ValueError, match=r"renamed\.gguf is one of 3 files of a model; name them as NAME-00001-of-00003"
    ):
        load_model(str(tmp_path), "cpu")


def test_files_of_two_models_are_not_joined(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path)
    (folder / "tiny-00002-of-00003.gguf").write_bytes((folder / "tiny-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ValueError, match="is not shard 2 of the 3 shards"):
        load_model(str(folder), "cpu")


def test_of_two_models_in_a_folder_one_can_be_named_as_the_message_says(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path)
    (folder / "zother.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 GGUF models; name one of them, such as (.*)$") as refused:
        locate(str(folder))
    advice = str(refused.value).rpartition("such as ")[2]
    assert locate(advice).gguf == "tiny-00001-of-00003.gguf"


def test_a_change_in_any_file_is_another_model(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    files = sorted(folder.glob("*.gguf"))
    before = SourceFiles.of(locate(str(files[0])))
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    assert SourceFiles.of(locate(str(files[0]))).architecture != before.architecture
