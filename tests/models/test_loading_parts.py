"""Parts of a target that are read from its files alone: they are those of the whole, and the rest is not read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from causal_families import tiny_family
from families import FAMILIES, random_family
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aurora_rl.models.loading import ModelError
from aurora_rl.models.loading_parts import load_parts
from aurora_rl.models.parts import TargetParts
from aurora_rl.testing import tiny_folder

SHARD = "20KB"  # a layer or two in each file
WHOLE = "the whole of model"  # begins the line of a target that was loaded whole


def parts_of_whole(folder: Path, dtype: torch.dtype) -> TargetParts:
    return TargetParts.of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes)


def index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_they_are_those_of_the_whole_target(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dtype = torch.bfloat16 if len(name) % 2 else torch.float32
    random_family(name).save_pretrained(tmp_path, max_shard_size=SHARD)
    whole, parts = parts_of_whole(tmp_path, dtype), load_parts(tmp_path, dtype=dtype, device="cpu")
    assert WHOLE not in caplog.text
    assert (parts.digest, parts.fingerprint) == (whole.digest, whole.fingerprint)
    assert same(parts.embedding, whole.embedding) and same(parts.norm, whole.norm)
    for found, expected in (
        (parts.last_layer, whole.last_layer),
        (parts.parameters, whole.parameters),
        (parts.head.tensors(), whole.head.tensors()),
    ):
        assert found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    tied = [each.embedding.data_ptr() == each.head.weight.data_ptr() for each in (parts, whole)]
    assert tied[0] == tied[1]


def test_the_last_layer_is_of_its_own_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in ("qwen3_next", "gpt_oss"):  # linear attention in the others, a sliding window in some
        tiny_family(name).save_pretrained(tmp_path / name, max_shard_size=SHARD)
        whole = parts_of_whole(tmp_path / name, torch.float32)
        assert load_parts(tmp_path / name, dtype=torch.float32, device="cpu").fingerprint == whole.fingerprint
    assert WHOLE not in caplog.text


def test_files_of_other_layers_are_not_read(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama(hidden_size=32, intermediate_size=64, num_hidden_layers=6))
    model.save_pretrained(tmp_path, max_shard_size=SHARD)
    parts = parts_of_whole(tmp_path, torch.float32)
    files = {name.split(".")[2]: tmp_path / file for name, file in index(tmp_path).items() if ".layers." in name}
    files["2"].write_bytes(b"damaged")
    assert load_parts(tmp_path, dtype=torch.float32, device="cpu").fingerprint == parts.fingerprint
    files["5"].write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot load model"):
        load_parts(tmp_path, dtype=torch.float32, device="cpu")


def test_what_is_quantized_is_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_folder(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "none of these"}
    config.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO)
    assert load_parts(tmp_path, dtype=torch.float32, device="cpu").head.weight.shape == (300, 32)
    assert WHOLE in caplog.text and "it is quantized" in caplog.text


def test_a_name_that_leads_nowhere_is_refused_as_ever_by_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, told in (("./missing", "no such folder; name a Hugging Face folder"), (tmp_path, "from that folder")):
        with pytest.raises(ModelError, match=told):
            load_parts(name, dtype=torch.float32, device="cpu")
    assert WHOLE not in caplog.text
