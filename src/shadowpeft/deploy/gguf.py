"""GGUF files of llama and qwen3 models, with the names and metadata that llama.cpp's converter gives them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.deploy.gguf_tokenizer import tokenizer_metadata
from shadowpeft.deploy.packages import ExportError, check_generates, need
from shadowpeft.files import new_folder, write_files
from shadowpeft.model.architectures import head_of

GGUF_FILE = "model.gguf"
SUPPORTED = ("llama", "qwen3")
Precision = Literal["float32", "float16"]
_OUTSIDE = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True)
class GgufWritten:
    """What the file lacks although the folder had it."""

    notes: list[str]


def write_gguf(
    model: PreTrainedModel,
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: Precision = "float32",
    name: str = "shadow",
) -> GgufWritten:
    """Writes ``model.gguf`` and reads every tensor of it back.

    Args:
        model: an ordinary causal language model of type llama or qwen3.
        folder: empty or absent.
        tokenizer: its vocabulary is stored if it is a BPE of bytes or of sentencepiece's pieces which llama.cpp reads alike;
            else the file holds none, and a note says so.
        precision: of matrices; vectors are always float32, as llama.cpp has them.
        name: ``general.name``.

    Raises:
        ExportError: another type, a feature of it that the format does not hold, or a tokenizer of more ids than rows, or one
            that changes texts first as llama.cpp would not.
        MissingPackageError: gguf is not installed.
    """
    gguf = need("gguf", what="GGUF export")
    check_generates(model, what="GGUF export")
    check_supported(model.config)
    target = new_folder(folder)
    if tokenizer is None:
        metadata, notes = {"tokenizer.ggml.model": "no_vocab"}, ["no tokenizer was given"]
    else:
        metadata, notes = tokenizer_metadata(tokenizer, gguf, num_rows=model.config.vocab_size)

    def write(staging: Path) -> None:
        writer = gguf.GGUFWriter(staging / GGUF_FILE, model.config.model_type)
        _add_metadata(writer, model.config, precision, name, gguf)
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor_name, values in gguf_tensors(model, precision):
            writer.add_tensor(tensor_name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_gguf(staging / GGUF_FILE, model, precision)

    write_files(target, write)
    return GgufWritten(notes)


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses what the format, or this writer, does not hold."""
    if config.model_type not in SUPPORTED:
        raise ExportError(
            f"GGUF export knows the types {', '.join(SUPPORTED)}, not {config.model_type!r}; use llama.cpp's own "
            "convert_hf_to_gguf.py on the detached folder"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    unusual = {
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "rope_type": None if rope.get("rope_type", "default") == "default" else rope["rope_type"],
        "hidden_act": None if config.hidden_act == "silu" else config.hidden_act,
        "use_sliding_window": getattr(config, "use_sliding_window", False),
    }
    for field, value in unusual.items():
        if value:
            raise ExportError(f"GGUF export does not know {field}={value!r}; use llama.cpp's own converter")


def gguf_tensors(model: PreTrainedModel, precision: Precision) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of every tensor; a tied head is left out, as llama.cpp then reads the token table."""
    config = model.config
    for name, tensor in model.base_model.state_dict().items():
        yield _gguf_name(name), _values(_permuted(name, tensor, config), precision)
    if not config.tie_word_embeddings:
        yield "output.weight", _values(head_of(model).weight, precision)


def _gguf_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, index, inside = name.split(".", 2)
    return f"blk.{index}.{_INSIDE[inside]}"


def _permuted(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """llama.cpp rotates neighbouring pairs of a llama head, transformers its halves: rows of q, k are interleaved."""
    if config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _values(tensor: Tensor, precision: Precision) -> np.ndarray:
    wanted = torch.float16 if precision == "float16" and tensor.dim() > 1 else torch.float32
    return tensor.detach().to(wanted).cpu().contiguous().numpy()


def _add_metadata(writer: Any, config: PreTrainedConfig, precision: Precision, name: str, gguf: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if precision == "float16" else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def check_gguf(path: Path, model: PreTrainedModel, precision: Precision) -> None:
    """Reads the file back and compares every tensor, in the model's own order of rows, and the size of the vocabulary.

    Raises:
        ExportError: a tensor is missing, unknown or holds other values, or there are more or fewer tokens than rows.
    """
    gguf = need("gguf", what="GGUF export")
    reader = gguf.GGUFReader(path)
    vocabulary = reader.fields.get("tokenizer.ggml.tokens")
    if vocabulary is not None and len(vocabulary.data) != model.config.vocab_size:
        raise ExportError(
            f"{path.name}: the vocabulary has {len(vocabulary.data)} tokens, but token_embd.weight "
            f"{model.config.vocab_size} rows; please report this"
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(gguf_tensors(model, precision))
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [n for n, values in expected.items() if n in found and not np.array_equal(found[n].data, values)]
    if wrong:
        raise ExportError(f"{path.name} does not hold what was written, first {wrong[0]!r}; please report this")
