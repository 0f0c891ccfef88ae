"""GGUF files: a target's, as far as a drafter's export reads it, and what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages }}",
}


def target_gguf(file: Path, vocab_size: int = 32, hidden_size: int = 16, architecture: str = "llama") -> Path:
    """Write the metadata of a target, without its tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(3)
    writer.add_token_list([f"<{token}>" for token in range(vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
    for name, value in VOCABULARY.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def fields(file: Path) -> dict[str, tuple[Any, list[gguf.GGUFValueType]]]:
    """Value and types of every field of a file, without those of the container."""
    read = gguf.GGUFReader(file).fields
    return {name: (field.contents(), list(field.types)) for name, field in read.items() if not name.startswith("GGUF.")}


def tensors(file: Path) -> dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]]:
    """Type and values of every tensor of a file, in the order of axes that NumPy has."""
    return {
        tensor.name: (
            tensor.tensor_type,
            tensor.data
            if tensor.tensor_type == gguf.GGMLQuantizationType.I64
            else gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }
