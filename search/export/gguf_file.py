"""Writes a model as a GGUF file for llama.cpp, as small as the model is, and reads such a file back.

Where all blocks have the same shape, the file has the architecture of the original. Otherwise it has llama.cpp's
architecture "deci", which has a number of hidden units, heads and key/value heads for each block and computes the same
as Llama, with biases where there are any. Both were compared with transformers by their logits.

What differs from the model in memory, and why:
* The rows of q and k are ordered as llama.cpp's rotary embedding pairs them, unless the architecture is Qwen2.
* A block without hidden units gets 32 that are zero: llama.cpp drops the attention of a deci block that has none.
* A quantized file has zero hidden units up to a multiple of 32, which is the length of a group that shares a scale.
* A matrix of 8, 5 or 4 bits is stored as the type of these bits, with the same integers and scales; each scale is there
  twice if 64 neighbours share one.
* The attention of the first block, and one whose output has a bias, is left out by a key/value group of zeros:
  llama.cpp takes the size of a head from the first block, and has no bias without a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from torch import nn

from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMatrix
from compression.refusal import Refusal
from compression.sites import dense_weight
from search.export.gguf_vocabulary import Vocabulary, vocabulary

__all__ = ["GGUF_TYPES", "check_gguf", "check_whole", "read_values", "write_gguf"]

GGUF_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q5_1": "Q5_1",
    "q5_0": "Q5_0",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}
"""GGUF's name of a type of weights, by the name of a dtype or of a `--quantize` form; those the package can write."""

_NATIVE = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_GROUP = 32
_ROUNDED = {8: "Q8_0", 5: "Q5_0", 4: "Q4_0"}
"""Types whose values are, as here, an integer less half of its range times a float16 scale, by bits."""
_ROPE = ("default", "linear", "llama3")  # kinds whose frequencies do not change with the length of the text
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Block:
    """The shape of a block in the file: hidden units, query heads and key/value heads."""

    hidden: int
    heads: int
    groups: int


@dataclass(frozen=True)
class _Layout:
    """How a model is stored.

    Attributes:
        architecture: llama.cpp's name of it.
        blocks: the shape of every block in the file.
        head: size of a head.
        tied: whether the head of the model is its embedding.
        kind: type of the matrices; vectors are in float32.
    """

    architecture: str
    blocks: tuple[_Block, ...]
    head: int
    tied: bool
    kind: gguf.GGMLQuantizationType

    @property
    def interleaved(self) -> bool:
        """Whether rotary embedding pairs neighbouring rows; otherwise it pairs the halves of a head."""
        return self.architecture != "qwen2"


@dataclass(frozen=True, eq=False)
class _Integers:
    """How a matrix is rounded: its bits, and the scales of 32 neighbours, float32 (rows, groups)."""

    bits: int
    scales: np.ndarray[Any, Any]

    def blocks(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns the bytes of a matrix of these integers and scales in the type of its bits (rows, bytes)."""
        grouped = values.reshape(len(values), -1, _GROUP)
        whole = np.where(self.scales == 0, 1, self.scales)[..., None]
        codes = (np.rint(grouped / whole).astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
        parts: list[np.ndarray[Any, Any]] = [self.scales.astype("<f2")[..., None].view(np.uint8)]
        if self.bits == 8:
            parts.append(codes ^ 128)  # as signed bytes
        else:
            low = codes & 15
            if self.bits == 5:
                highest = (codes >> 4).astype(np.uint32) << np.arange(_GROUP, dtype=np.uint32)
                parts.append(highest.sum(-1, dtype=np.uint32, keepdims=True).astype("<u4").view(np.uint8))
            parts.append(low[..., : _GROUP // 2] | low[..., _GROUP // 2 :] << 4)
        return np.concatenate(parts, -1).reshape(len(values), -1)


def check_gguf(model: Any, tokenizer: Any) -> None:
    """Refuse a model of which no GGUF file can be written here, whatever its widths are; looks at no weights.

    Raises:
        Refusal: says what stands in the way.
    """
    name, config = type(model).__name__, model.config
    otherwise = "use --format gguf-ready and llama.cpp's own converter, which gives a file of the original's size"
    if name not in _NATIVE:
        raise Refusal(f"a GGUF file is written for {', '.join(sorted(_NATIVE))}, not for {name}; {otherwise}")
    if config.hidden_act != "silu":
        raise Refusal(f"llama.cpp computes this architecture with silu, not with {config.hidden_act}; {otherwise}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (name == "MistralForCausalLM" and config.sliding_window is not None):
        raise Refusal(f"attention in a sliding window is not written to a GGUF file here; {otherwise}")
    if (kind := (config.rope_parameters or {}).get("rope_type", "default")) not in _ROPE:
        raise Refusal(f"rotary embedding of the kind {kind} is not written to a GGUF file here; {otherwise}")
    vocabulary(tokenizer, int(config.vocab_size))


def write_gguf(
    model: Any, tokenizer: Any, file: Path, kind: str, name: str = "", license_: str = "", source: str = ""
) -> None:
    """Write a model as a new GGUF file, read the file back and compare every tensor.

    Args:
        model: dense, or compressed to smaller plain matrices; it does not change.
        file: where to write; must not exist.
        kind: one of `GGUF_TYPES`, the type of all matrices that are not rounded already. Under "q5…" and "q4…" the
            embedding and the head are Q8_0.
        name, license_, source: for the reader of the file: name and licence of the model, id of its original.

    Raises:
        Refusal: the model is none that `check_gguf` lets pass, or has matrices that are not plain.
        OSError: the file cannot be written.
    """
    check_gguf(model, tokenizer)
    layout = _layout(model, gguf.GGMLQuantizationType[GGUF_TYPES[kind]])
    writer = gguf.GGUFWriter(file, layout.architecture)
    try:
        writer.add_type("model")
        for add, text in ((writer.add_name, name), (writer.add_license, license_)):
            if text:
                add(text)
        if source:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, source)
        writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES.get(layout.kind.name, f"MOSTLY_{layout.kind.name}")]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config, layout)
        _add_vocabulary(writer, vocabulary(tokenizer, int(model.config.vocab_size)))
        for tensor, values, integers in _tensors(model, layout):
            kept = _type_of(tensor, values, layout, integers)
            shape = quant_shape_to_byte_shape(values.shape, kept) if _packed(kept) else values.shape
            size = int(np.prod(shape)) * (1 if _packed(kept) else _item(kept))
            dtype = np.dtype(np.uint8) if _packed(kept) else np.dtype(np.float32 if _item(kept) == 4 else np.float16)
            writer.add_tensor_info(tensor, shape, dtype, size, raw_dtype=kept if _packed(kept) else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, values, integers in _tensors(model, layout):
            kept = _type_of(tensor, values, layout, integers)
            writer.write_tensor_data(_stored(values, kept) if integers is None else integers.blocks(values))
    finally:
        writer.close()
    _check(model, layout, file)


_FILE_TYPES = {"F32": "ALL_F32"}


def read_values(model: Any, file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a file that `write_gguf` wrote, as float32 tensors by the names and shapes of the model.

    Args:
        model: the model that was written, or one of the same shapes.

    Raises:
        Refusal: the file lacks a tensor, or holds one that is not expected.
    """
    reader = gguf.GGUFReader(file)
    stored = {each.name: dequantize(each.data, each.tensor_type) for each in reader.tensors}
    layout = _layout(model, gguf.GGMLQuantizationType.F32)
    architecture = reader.get_field("general.architecture").contents()
    layout = _Layout(architecture, layout.blocks, layout.head, layout.tied, layout.kind)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _names(model, layout):
        if tensor not in stored:
            raise Refusal(f"{file} lacks the tensor {tensor}")
        values = torch.from_numpy(np.array(stored.pop(tensor), dtype=np.float32))
        wanted = _parameter(model, name).shape
        if tensor.rpartition(".")[0].endswith(("attn_q", "attn_k")) and layout.interleaved:
            values = _halves(values, layout.head)
        found[name] = values[tuple(slice(size) for size in wanted)]
        if found[name].shape != wanted:
            raise Refusal(f"{file}: {tensor} has the shape {tuple(values.shape)}, the model needs {tuple(wanted)}")
    if more := sorted(stored.keys() - {"rope_freqs.weight"}):
        raise Refusal(f"{file} holds {len(more)} tensors that the model does not have, such as {more[0]}")
    return found


def check_whole(file: Path) -> None:
    """Refuse a file that is cut or no GGUF file. Values that were changed are not noticed, as it holds no checksums.

    Raises:
        Refusal: the file cannot be read to its end.
    """
    try:
        gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise Refusal(f"{file} is cut or damaged ({error}); export it again") from error


def _layout(model: Any, kind: gguf.GGMLQuantizationType) -> _Layout:
    config = model.config
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    ratio = config.num_attention_heads // config.num_key_value_heads
    blocks = []
    for number, layer in enumerate(model.model.layers):
        for path in _LAYER.values():
            if not isinstance(layer.get_submodule(path), nn.Linear | PackedLinear):
                raise Refusal(
                    f"model.layers.{number}.{path} is factored, and llama.cpp has no factored matrices; search with "
                    "--form plain, or export with --format hf"
                )
        hidden = layer.mlp.down_proj.in_features
        groups = layer.self_attn.k_proj.out_features // head
        if groups == 0 and (number == 0 or layer.self_attn.o_proj.bias is not None):
            groups = 1
        if hidden == 0 or _packed(kind):
            hidden = max(_GROUP, -(-hidden // _GROUP) * _GROUP)
        blocks.append(_Block(hidden, groups * ratio, groups))
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(output, "tied", "") != "" or getattr(output, "weight", None) is getattr(embedding, "weight", 0)
    native = _NATIVE[type(model).__name__]
    scaled = _rope_factors(model, head) is not None
    alike = len(set(blocks)) == 1
    if native == "qwen2":  # readers of this architecture take the size of a head from that of the residual stream
        alike = alike and not scaled and blocks[0].heads * head == config.hidden_size
    return _Layout(native if alike else "deci", tuple(blocks), head, tied, kind)


def _names(model: Any, layout: _Layout) -> Iterator[tuple[str, str]]:
    """Yield the name of every parameter that is stored and of its tensor in the file."""
    yield "model.embed_tokens.weight", "token_embd.weight"
    for number, layer in enumerate(model.model.layers):
        here, there = f"model.layers.{number}", f"blk.{number}"
        left_out = layout.blocks[number].groups == 0
        if not left_out:
            yield f"{here}.input_layernorm.weight", f"{there}.attn_norm.weight"
        yield f"{here}.post_attention_layernorm.weight", f"{there}.ffn_norm.weight"
        for tensor, path in _LAYER.items():
            if left_out and tensor.startswith("attn"):
                continue
            yield f"{here}.{path}.weight", f"{there}.{tensor}.weight"
            if layer.get_submodule(path).bias is not None:
                yield f"{here}.{path}.bias", f"{there}.{tensor}.bias"
    yield "model.norm.weight", "output_norm.weight"
    if not layout.tied:
        yield "lm_head.weight", "output.weight"


def _tensors(model: Any, layout: _Layout) -> Iterator[tuple[str, np.ndarray[Any, Any], _Integers | None]]:
    """Yield every tensor of the file as float32, widened and ordered as the file has it, and how it is rounded."""
    for name, tensor in _names(model, layout):
        values, (bits, steps) = _parameter(model, name).detach().to("cpu", torch.float32), _steps(model, name)
        if tensor.startswith("blk."):
            block = layout.blocks[int(tensor.split(".")[1])]
            part = tensor.split(".")[2]
            shape = _wide_shape(values, part, block, layout.head)
            if steps is not None:
                steps = _widened(steps, [shape[0], -(-shape[1] // _GROUP)])
            values = _widened(values, shape)
            if part in ("attn_q", "attn_k") and layout.interleaved:
                values = _neighbours(values, layout.head)
                steps = None if steps is None else _neighbours(steps, layout.head)
        integers = None if steps is None else _Integers(bits, steps.contiguous().numpy())
        yield tensor, values.contiguous().numpy(), integers
    if (factors := _rope_factors(model, layout.head)) is not None:
        yield "rope_freqs.weight", factors.numpy(), None


def _parameter(model: Any, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, PackedLinear | PackedEmbedding) and leaf == "weight":
        return _matrix(module).matrix(torch.float32)
    values = dense_weight(module) if leaf == "weight" and isinstance(module, nn.Linear) else getattr(module, leaf)
    assert isinstance(values, torch.Tensor)
    return values


def _matrix(module: PackedLinear | PackedEmbedding) -> PackedMatrix:
    return module.stored if isinstance(module, PackedLinear) else module.packed


def _steps(model: Any, name: str) -> tuple[int, torch.Tensor | None]:
    """The bits of a rounded matrix and its scales, float32 (rows, groups of 32); 0 and None if it is not rounded.

    Raises:
        Refusal: no type of GGUF holds it as it is.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(module, PackedLinear | PackedEmbedding) or not name.endswith(".weight"):
        return 0, None
    matrix = _matrix(module)
    if matrix.bits not in _ROUNDED or matrix.group % _GROUP or matrix.columns % _GROUP:
        raise Refusal(
            f"{name} has {matrix.columns} columns in {matrix.bits} bits, and a GGUF file holds matrices of 8, 5 or 4 "
            f"bits whose columns are a multiple of {_GROUP}; search with --serve llama.cpp, or export with --format hf"
        )
    scales = matrix.scales.view(torch.float16).to("cpu", torch.float32)
    return matrix.bits, scales.repeat_interleave(matrix.group // _GROUP, 1)[:, : matrix.columns // _GROUP]


def _wide_shape(values: torch.Tensor, tensor: str, block: _Block, head: int) -> list[int]:
    """The shape of a tensor in the file, which may have more hidden units or heads than the model."""
    rows = {"ffn_gate": block.hidden, "ffn_up": block.hidden, "attn_q": block.heads * head}
    rows |= dict.fromkeys(("attn_k", "attn_v"), block.groups * head)
    columns = {"ffn_down": block.hidden, "attn_output": block.heads * head}
    size = list(values.shape)
    size[0] = rows.get(tensor, size[0])
    if len(size) == 2:
        size[1] = columns.get(tensor, size[1])
    return size


def _widened(values: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Append zeros to a shape."""
    if size == list(values.shape):
        return values
    wide = values.new_zeros(size)
    wide[tuple(slice(each) for each in values.shape)] = values
    return wide


def _neighbours(values: torch.Tensor, head: int) -> torch.Tensor:
    """Reorder the rows of every head so that each row of its first half is followed by that of its second half."""
    return values.reshape(-1, 2, head // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _halves(values: torch.Tensor, head: int) -> torch.Tensor:
    """Undo `_neighbours`."""
    return values.reshape(-1, head // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _rope_factors(model: Any, head: int) -> torch.Tensor | None:
    """What the frequencies of the rotary embedding are divided by, (head / 2,); None if all are as usual."""
    rotary = model.model.rotary_emb
    theta = float((model.config.rope_parameters or {}).get("rope_theta", 10000.0))
    usual = theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors = (usual / rotary.inv_freq.detach().to("cpu", torch.float64)).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors


def _packed(kind: gguf.GGMLQuantizationType) -> bool:
    return kind.name not in ("F32", "F16")


def _item(kind: gguf.GGMLQuantizationType) -> int:
    return 4 if kind.name == "F32" else 2


def _type_of(
    tensor: str, values: np.ndarray[Any, Any], layout: _Layout, integers: _Integers | None = None
) -> gguf.GGMLQuantizationType:
    """The type in which a tensor is stored: vectors exactly, embedding and head in 8 bits at least.

    A rounded matrix is stored in the type of its bits.
    """
    types = gguf.GGMLQuantizationType
    if integers is not None:
        return types[_ROUNDED[integers.bits]]
    if values.ndim < 2:
        return types.F32
    if layout.kind.name in ("F32", "F16", "BF16"):
        return layout.kind
    if values.shape[-1] % _GROUP:
        return types.F16
    return types.Q8_0 if tensor in ("token_embd.weight", "output.weight") else layout.kind


def _stored(values: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    if kind.name == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise Refusal("a weight is too large for float16; use --dtype bfloat16 or float32")
    found: np.ndarray[Any, Any] = quantize(values, kind)
    return found


def _add_shape(writer: gguf.GGUFWriter, config: Any, layout: _Layout) -> None:
    hidden, heads, groups = ([getattr(each, name) for each in layout.blocks] for name in ("hidden", "heads", "groups"))
    one = layout.architecture != "deci"
    writer.add_block_count(len(layout.blocks))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(hidden[0] if one else hidden)
    writer.add_head_count(heads[0] if one else heads)
    writer.add_head_count_kv(groups[0] if one else groups)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(layout.head)
    writer.add_key_length(layout.head)
    writer.add_value_length(layout.head)
    writer.add_vocab_size(int(config.vocab_size))


def _add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2" if words.rule else "llama")
    writer.add_tokenizer_pre(words.rule or "default")
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.rule:
        writer.add_token_merges(list(words.merges))
    else:
        writer.add_token_scores([-float(number) for number in range(len(words.tokens))])
        writer.add_add_space_prefix(words.spaced)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for role, number in words.special.items():
        adders[role](number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.template:
        writer.add_chat_template(words.template)


def _check(model: Any, layout: _Layout, file: Path) -> None:
    """Refuse a file that does not hold what was meant to be written.

    Raises:
        Refusal: names the tensor that differs.
    """
    expected = {name: _rounded(model, name, tensor, layout) for name, tensor in _names(model, layout)}
    for name, values in read_values(model, file).items():
        if not torch.equal(values, expected[name]):
            raise Refusal(f"{file} was written wrongly: {name} differs; the disk may be faulty, so write it again")


def _rounded(model: Any, name: str, tensor: str, layout: _Layout) -> torch.Tensor:
    """A parameter as the type in the file can hold it."""
    values = _parameter(model, name).detach().to("cpu", torch.float32)
    if _steps(model, name)[1] is not None:
        return values
    part = tensor.split(".")[2] if tensor.startswith("blk.") else ""
    wide = values
    if part:
        wide = _widened(values, _wide_shape(values, part, layout.blocks[int(tensor.split(".")[1])], layout.head))
    array = wide.contiguous().numpy()
    kind = _type_of(tensor, array, layout)
    back = torch.from_numpy(np.array(dequantize(quantize(array, kind), kind), dtype=np.float32))
    return back[tuple(slice(size) for size in values.shape)]
