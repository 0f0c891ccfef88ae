"""EAGLE-3 as a GGUF file for llama.cpp, as llama.cpp's own converter writes it.

Read in release b11434 of https://github.com/ggml-org/llama.cpp (October 2026): the converter is ``LlamaModel`` of
``conversion/llama.py``, on ``conversion/base.py``, and the engine is ``src/models/eagle3.cpp``. The first releases with
EAGLE-3 (pull request 18039) have the layers in ``eagle3.extract_layers``, which this one does not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aurora_rl.policies.drafter import Drafter, check_draft_vocab
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.formats.checks import check_feature_layers
from aurora_rl.storage import CheckpointError

_ARCHITECTURE = "eagle3"
_LAYERS = 3  # number of target layers that llama.cpp reads
_BROKEN = (OSError, ValueError, LookupError)  # GGUFReader does not check its file, and raises these for others
_ROPE = ("default", "linear", "llama3")
# What stands for a whole file, and the type of its matrices; vectors are in float32 in all of them.
_TYPES = {
    torch.float32: (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    torch.float16: (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    torch.bfloat16: (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
}
_NAMES = {
    "fc": "fc",
    "midlayer.input_layernorm": "blk.0.attn_norm",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    "midlayer.self_attn.q_proj": "blk.0.attn_q",
    "midlayer.self_attn.k_proj": "blk.0.attn_k",
    "midlayer.self_attn.v_proj": "blk.0.attn_v",
    "midlayer.self_attn.o_proj": "blk.0.attn_output",
    "midlayer.post_attention_layernorm": "blk.0.ffn_norm",
    "midlayer.mlp.gate_proj": "blk.0.ffn_gate",
    "midlayer.mlp.up_proj": "blk.0.ffn_up",
    "midlayer.mlp.down_proj": "blk.0.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}


def save_gguf(drafter: Drafter, file: str | os.PathLike[str], target_gguf: str | os.PathLike[str]) -> None:
    """Write an EAGLE-3 to a GGUF file for ``llama-server -md``, whole or not at all.

    Matrices have the drafter's dtype. The embedding stays in the target's file. The vocabulary, with its merges and
    special tokens, is copied from there: llama.cpp reads the drafter's token ids by the drafter's own vocabulary.

    Args:
        drafter: Drafter to write.
        file: File to write, replaced if it is there.
        target_gguf: The target as llama.cpp serves it, quantized or not; of several parts the first.

    Raises:
        CheckpointError: llama.cpp does not compute such a drafter, ``file`` is something else, or ``target_gguf`` is
            broken or of another target.
        OSError: The file cannot be written, and is as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.models.parts import TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target(num_layers=7))
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
        >>> with TemporaryDirectory() as folder:
        ...     target = GGUFWriter(f"{folder}/target.gguf", "llama")
        ...     target.add_embedding_length(16)
        ...     target.add_token_list([f"<{token}>" for token in range(32)])
        ...     target.write_header_to_file()
        ...     target.write_kv_data_to_file()
        ...     target.close()
        ...     save_gguf(drafter, f"{folder}/drafter.gguf", f"{folder}/target.gguf")
        ...     sorted(tensor.name for tensor in GGUFReader(f"{folder}/drafter.gguf").tensors)[-4:]
        ['d2t', 'fc.weight', 'output.weight', 'output_norm.weight']
    """
    file, target_gguf = Path(file), Path(target_gguf)
    if file.exists() and not holds_gguf(file):
        raise CheckpointError(
            f"{file} is no GGUF file of an EAGLE-3 and would be lost; name a new file, such as drafter.gguf"
        )
    try:
        writer = GGUFWriter(None, _ARCHITECTURE)
        checked = _checked(drafter)
        _add_tensors(writer, checked)
        _add_settings(writer, checked)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    try:
        for field in _vocabulary(target_gguf, checked):
            writer.add_key_value(*field)
    except _BROKEN as error:
        raise CheckpointError(
            f"{target_gguf}: {error}; give the target of this drafter as the GGUF file that llama.cpp serves"
        ) from error
    new = file.with_name(f".{file.name}-new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(new)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(new, file)
    except OSError as error:
        writer.close()
        new.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error}") from error


def holds_gguf(file: str | os.PathLike[str]) -> bool:
    """Return whether a file is what :func:`save_gguf` writes."""
    try:
        return GGUFReader(file).fields["general.architecture"].contents() == _ARCHITECTURE
    except _BROKEN:
        return False


def _checked(drafter: Drafter) -> Eagle3Drafter:
    """Return the drafter. Raises ValueError where llama.cpp would not compute it, or would compute something else."""
    if not isinstance(drafter, Eagle3Drafter):
        raise ValueError(f"gguf is a format of Eagle3Drafter alone, and this is a {type(drafter).__name__}")
    for name, on in drafter.options.items():
        if on:
            raise ValueError(f"llama.cpp has no {name} for EAGLE-3; start a drafter without it")
    config: Any = drafter.config  # its entries are never None here, whatever the class says
    layers = drafter.feature_layers
    if len(layers) != _LAYERS:
        raise ValueError(
            f"the drafter reads layers {layers}, and llama.cpp's EAGLE-3 reads three; start one with three in "
            "drafter.feature_layers"
        )
    check_feature_layers(layers, config.num_target_layers)
    check_draft_vocab(drafter.draft_vocab, drafter.vocab_size, "draft_vocab")
    if config.hidden_act != "silu":
        raise ValueError(f"the drafter's hidden_act is {config.hidden_act!r}, and llama.cpp's EAGLE-3 has silu")
    if (kind := config.rope_parameters["rope_type"]) not in _ROPE:
        raise ValueError(f"the drafter's rope_type is {kind!r}; gguf is written with {', '.join(_ROPE)}")
    if drafter.fc.weight.dtype not in _TYPES:
        raise ValueError(
            f"the drafter is in {drafter.fc.weight.dtype}; gguf is written in float32, float16 or bfloat16"
        )
    return drafter


def _add_settings(writer: GGUFWriter, drafter: Eagle3Drafter) -> None:
    config: Any = drafter.config
    key = f"{_ARCHITECTURE}.{{}}".format
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(_TYPES[drafter.fc.weight.dtype][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(1)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    # Ids of layers that a state enters, as in feature_layers.
    writer.add_array(key("target_layers"), list(drafter.feature_layers))
    writer.add_uint32(key("target_hidden_size"), config.hidden_size)
    writer.add_bool(key("norm_before_residual"), False)
    writer.add_bool(key("norm_before_fc"), False)


def _add_tensors(writer: GGUFWriter, drafter: Eagle3Drafter) -> None:
    kind = _TYPES[drafter.fc.weight.dtype][1]
    for name, tensor in _renamed(drafter):
        stored = kind if tensor.dim() > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().cpu().numpy(), stored), raw_dtype=stored)
    writer.add_tensor("d2t", drafter.draft_vocab.cpu().numpy())  # ids here, and no offsets as elsewhere


def _renamed(drafter: Eagle3Drafter) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by llama.cpp's names, in llama.cpp's order of rows."""
    config: Any = drafter.config
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequency_factors(config)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in drafter.state_dict().items():
        module = name.removesuffix(".weight")
        rotated = heads.get(module.removeprefix("midlayer."))
        yield f"{_NAMES[module]}.weight", tensor if rotated is None else _neighbours(tensor, rotated)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of queries or keys for rotary positions that turn neighbours, not the halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _frequency_factors(config: Any) -> Tensor:
    """Return what llama.cpp divides the frequencies of its base by, ``[head_dim / 2]``."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    return config.rope_parameters["rope_theta"] ** -exponents / LlamaRotaryEmbedding(config).inv_freq


def _vocabulary(
    target_gguf: Path, drafter: Eagle3Drafter
) -> Iterator[tuple[str, Any, GGUFValueType, GGUFValueType | None]]:
    """Yield the fields of the target's file that are about its vocabulary; errors are those of ``_BROKEN``."""
    fields = GGUFReader(target_gguf).fields
    architecture = fields["general.architecture"].contents()
    found = {
        "hidden_size": (fields[f"{architecture}.embedding_length"].contents(), drafter.config.hidden_size),
        "vocab_size": (len(fields["tokenizer.ggml.tokens"].data), drafter.vocab_size),
    }
    for name, (there, here) in found.items():
        if there != here:
            raise ValueError(f"its {name} is {there}, the drafter's {here}")
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            yield name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
