"""GGUF files of EAGLE-3 against what llama.cpp's converter does, and against what its engine computes.

Both stand here as they are read in https://github.com/ggml-org/llama.cpp, independently of the library: the converter
(``conversion/llama.py``) takes the folder that is exported for vLLM, whose names it maps by the tables of the package
``gguf``; the engine (``src/models/eagle3.cpp``) takes the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from drafters import perturbed
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import fields, target_gguf, tensors
from plain_engine import SOME, THETA, Draft, assert_drafts_alike, drafter_of, eagle3
from safetensors.torch import load_file
from torch import Tensor

from aurora_rl.models import loading
from aurora_rl.models.loading import load_target
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts
from aurora_rl.policies.formats import llama_cpp
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.policies.formats.llama_cpp import holds_gguf, save_gguf
from aurora_rl.storage import CheckpointError

LAYERS = (0, 1, 2)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ROPES = ({}, {"rope_type": "linear", "factor": 4.0}, LLAMA3)


def eagle3_of(**settings: Any) -> Drafter:
    return drafter_of("eagle3", SOME, **{"feature_layers": LAYERS, **settings}).float()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return target_gguf(tmp_path / "target.gguf")


# ---- the converter --------------------------------------------------------------------------------------------------

KINDS = {
    torch.float32: (0, GGMLQuantizationType.F32),
    torch.float16: (1, GGMLQuantizationType.F16),
    torch.bfloat16: (32, GGMLQuantizationType.BF16),
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows 0, d/2, 1, d/2 + 1, … of each head: the converter's ``permute``, row by row."""
    size = len(weight) // heads
    order = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return weight[order]


def converted_tensors(folder: Path) -> dict[str, np.ndarray]:
    config, found = json.loads((folder / "config.json").read_text()), {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in load_file(folder / "model.safetensors").items():
        name, data = name.replace("midlayer.", "model.layers.0."), tensor.numpy(force=True)
        if name == "t2d":
            continue
        if name == "d2t":
            found[name] = data + np.arange(len(data))
        elif name == "fc.weight":
            found[name] = data
        elif name == "model.layers.0.hidden_norm.weight":
            found["blk.0.attn_norm_2.weight"] = data
        else:
            for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if part in name:
                    data = interleaved(data, config[heads])
            place = names.get_name(name, try_suffixes=(".weight",))
            assert place is not None, name
            found[place] = data
    return found


def converted_fields(folder: Path, dtype: torch.dtype, count: int) -> dict[str, tuple[Any, GGUFValueType]]:
    config = json.loads((folder / "config.json").read_text())
    number, text, real, truth = (getattr(GGUFValueType, name) for name in ("UINT32", "STRING", "FLOAT32", "BOOL"))
    found = {
        "general.architecture": ("eagle3", text),
        "general.type": ("model", text),
        "general.size_label": (gguf.size_label(*[count] * 3, 0), text),
        "general.file_type": (KINDS[dtype][0], number),
        "general.quantization_version": (2, number),
        "eagle3.block_count": (config["num_hidden_layers"], number),
        "eagle3.context_length": (config["max_position_embeddings"], number),
        "eagle3.embedding_length": (config["hidden_size"], number),
        "eagle3.feed_forward_length": (config["intermediate_size"], number),
        "eagle3.attention.head_count": (config["num_attention_heads"], number),
        "eagle3.attention.head_count_kv": (config["num_key_value_heads"], number),
        "eagle3.attention.key_length": (config["head_dim"], number),
        "eagle3.attention.value_length": (config["head_dim"], number),
        "eagle3.attention.layer_norm_rms_epsilon": (config["rms_norm_eps"], real),
        "eagle3.rope.freq_base": (config["rope_parameters"]["rope_theta"], real),
        "eagle3.rope.dimension_count": (config["head_dim"], number),
        "eagle3.vocab_size": (config["vocab_size"], number),
        "eagle3.target_layers": (config["eagle_aux_hidden_state_layer_ids"], GGUFValueType.ARRAY),
        "eagle3.target_hidden_size": (config["hidden_size"], number),
        "eagle3.norm_before_residual": (False, truth),
        "eagle3.norm_before_fc": (False, truth),
    }
    if config["rope_parameters"]["rope_type"] == "linear":
        found["eagle3.rope.scaling.type"] = ("linear", text)
        found["eagle3.rope.scaling.factor"] = (config["rope_parameters"]["factor"], real)
    return found


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.get("rope_type", "default"))
def test_the_file_is_what_the_converter_writes(
    rope: dict[str, Any], dtype: torch.dtype, target: Path, tmp_path: Path
) -> None:
    drafter = eagle3_of(rope=rope).to(dtype)
    save_gguf(drafter, tmp_path / "drafter.gguf", target)
    save_drafter(drafter.float(), tmp_path / "folder", "vllm")
    there = fields(tmp_path / "drafter.gguf")
    vocabulary = {name: value for name, value in fields(target).items() if name.startswith("tokenizer.")}
    assert len(vocabulary) == 8 and vocabulary == {n: v for n, v in there.items() if n.startswith("tokenizer.")}
    stored, wanted = tensors(tmp_path / "drafter.gguf"), converted_tensors(tmp_path / "folder")
    expected = converted_fields(tmp_path / "folder", dtype, sum(values.size for _, values in stored.values()))
    assert there.keys() - vocabulary.keys() == expected.keys()
    for name, (value, kind) in expected.items():
        assert there[name][1][0] == kind, name
        assert there[name][0] == (float(np.float32(value)) if kind == GGUFValueType.FLOAT32 else value), name
    assert there["eagle3.target_layers"] == (list(LAYERS), [GGUFValueType.ARRAY, GGUFValueType.INT32])

    assert stored.keys() - {"rope_freqs.weight"} == wanted.keys() and len(wanted) == 14
    for name, values in wanted.items():
        whole = GGMLQuantizationType.I64 if name == "d2t" else GGMLQuantizationType.F32
        assert stored[name][0] == (whole if values.ndim == 1 else KINDS[dtype][1]), name
        np.testing.assert_array_equal(stored[name][1], values, err_msg=name)
    assert ("rope_freqs.weight" in stored) == (rope is LLAMA3)


def test_the_factors_of_llama3_are_the_converter_s(target: Path, tmp_path: Path) -> None:
    save_gguf(eagle3_of(rope=LLAMA3), tmp_path / "drafter.gguf", target)
    kind, factors = tensors(tmp_path / "drafter.gguf")["rope_freqs.weight"]
    expected = []
    for i in range(2):  # heads of four
        wavelength = 2 * np.pi * THETA ** (2 * i / 4)
        smooth = (256 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 256 / 4.0 else between)
    assert kind == GGMLQuantizationType.F32 and expected[0] == 1.0 and 1.0 < expected[1] < 8.0
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


@pytest.mark.smollm2
@pytest.mark.skipif("AURORA_RL_LLAMA_CPP" not in os.environ, reason="AURORA_RL_LLAMA_CPP names no source of llama.cpp")
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.get("rope_type", "default"))
def test_llama_cpp_s_own_converter_writes_the_same(rope: dict[str, Any], smollm2_path: Path, tmp_path: Path) -> None:
    model, _ = load_target(str(smollm2_path), dtype=torch.float32, device="cpu")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 100000.0, **rope}
    parts = TargetParts.of(model)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 49152, 96), feature_layers=(1, 9, 28))
    perturbed(drafter, 0.01).bfloat16()
    written, converted = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    save_drafter(drafter, tmp_path / "folder", "vllm")
    save_gguf(drafter, written, loading._embedded_gguf())
    subprocess.run(
        [sys.executable, "convert_hf_to_gguf.py", tmp_path / "folder", "--target-model-dir", smollm2_path]
        + ["--outtype", "bf16", "--outfile", converted],
        cwd=os.environ["AURORA_RL_LLAMA_CPP"],
        check=True,
        timeout=300,
    )
    assert fields(written) == fields(converted)
    here, there = tensors(written), tensors(converted)
    assert here.keys() == there.keys()
    for name, (kind, values) in there.items():
        assert here[name][0] == kind, name
        np.testing.assert_allclose(here[name][1], values, rtol=1e-6 if name == "rope_freqs.weight" else 0, err_msg=name)


# ---- the engine -----------------------------------------------------------------------------------------------------

ENGINE_NAMES = {
    "model.fc": ("fc",),
    "model.norm": ("output_norm",),
    "lm_head": ("output",),
    "layer.input_layernorm": ("blk.0.attn_norm",),
    "layer.hidden_norm": ("blk.0.attn_norm_2",),
    "layer.post_attention_layernorm": ("blk.0.ffn_norm",),
    "layer.self_attn.qkv_proj": ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"),
    "layer.self_attn.o_proj": ("blk.0.attn_output",),
    "layer.mlp.gate_up_proj": ("blk.0.ffn_gate", "blk.0.ffn_up"),
    "layer.mlp.down_proj": ("blk.0.ffn_down",),
}


def rotate_neighbours(x: Tensor, config: dict[str, Any]) -> Tensor:
    """``LLAMA_ROPE_TYPE_NORM`` on ``[n, heads, d]``: values 2i and 2i + 1 are a pair."""
    half = x.shape[-1] // 2
    frequency = config["base"] ** (-torch.arange(half, dtype=torch.float64) / half) / config["factors"]
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency / config["linear"]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2)


def engine_of(file: Path) -> Draft:
    """The engine on a file; a tensor without a place, or a place without a tensor, is a KeyError."""
    own = {name: value for name, (value, _) in fields(file).items() if name.startswith("eagle3.")}
    there = {name: torch.from_numpy(values.copy()) for name, (_, values) in tensors(file).items()}
    ids, factors = there.pop("d2t"), there.pop("rope_freqs.weight", torch.ones(1))
    parameters = {
        f"{name}.weight": torch.cat([there.pop(f"{part}.weight").double() for part in parts])
        for name, parts in ENGINE_NAMES.items()
    }
    if there:
        raise KeyError(f"{min(there)} is unknown")
    config = {
        "head_dim": own["eagle3.attention.key_length"],
        "num_attention_heads": own["eagle3.attention.head_count"],
        "num_key_value_heads": own["eagle3.attention.head_count_kv"],
        "rms_norm_eps": own["eagle3.attention.layer_norm_rms_epsilon"],
        "draft_vocab_size": len(ids),
        "base": own["eagle3.rope.freq_base"],
        "linear": own.get("eagle3.rope.scaling.factor", 1.0),
        "factors": factors.double(),
    }
    parameters["offsets"] = ids - torch.arange(len(ids))
    return eagle3(parameters, config, "layer.", own["eagle3.target_layers"], "offsets", rotate_neighbours)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.get("rope_type", "default"))
def test_the_engine_drafts_as_the_drafter(rope: dict[str, Any], target: Path, tmp_path: Path) -> None:
    drafter = eagle3_of(rope=rope)
    save_gguf(drafter, tmp_path / "drafter.gguf", target)
    assert_drafts_alike(drafter.double(), engine_of(tmp_path / "drafter.gguf"))


def test_the_engine_sees_what_is_wrong(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, file = eagle3_of(), tmp_path / "drafter.gguf"
    monkeypatch.setattr(llama_cpp, "_neighbours", lambda weight, heads: weight)
    save_gguf(drafter, file, target)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter.double(), engine_of(file))
    names = {"midlayer.input_layernorm": "blk.0.attn_norm_2", "midlayer.hidden_norm": "blk.0.attn_norm"}
    monkeypatch.undo()
    monkeypatch.setattr(llama_cpp, "_NAMES", llama_cpp._NAMES | names)
    save_gguf(drafter.float(), file, target)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter.double(), engine_of(file))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"fc_norm": True}, "llama.cpp has no fc_norm for EAGLE-3"),
        ({"norm_output": True}, "llama.cpp has no norm_output for EAGLE-3"),
        ({"feature_layers": (1, 2)}, r"reads layers \(1, 2\), and llama.cpp's EAGLE-3 reads three"),
        ({"feature_layers": (1, 2, 3)}, "feature_layers has 3; engines read what enters a layer, 0..2"),
        ({"feature_layers": (2, 1, 0)}, "feature_layers must rise"),
        (
            {"rope": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
            "rope_type is 'yarn'; gguf is written with default, linear, llama3",
        ),
    ],
)
def test_a_drafter_that_llama_cpp_does_not_compute_is_refused(
    settings: dict[str, Any], wrong: str, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=wrong):
        save_gguf(eagle3_of(**settings), tmp_path / "drafter.gguf", target)
    assert [path.name for path in tmp_path.iterdir()] == ["target.gguf"]


def test_another_drafter_activation_or_dtype_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a format of Eagle3Drafter alone, and this is a MedusaDrafter"):
        save_gguf(drafter_of("medusa", SOME).float(), tmp_path / "drafter.gguf", target)
    drafter: Any = eagle3_of()
    with pytest.raises(CheckpointError, match="is in torch.float64; gguf is written in float32"):
        save_gguf(drafter.double(), tmp_path / "drafter.gguf", target)
    drafter.float().config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu', and llama.cpp's EAGLE-3 has silu"):
        save_gguf(drafter, tmp_path / "drafter.gguf", target)


def test_the_target_s_file_is_checked(tmp_path: Path) -> None:
    drafter, out = eagle3_of(), tmp_path / "drafter.gguf"
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"something else" * 9, target_gguf(tmp_path / "whole.gguf").read_bytes()[:200]):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match="broken.gguf: .*give the target of this drafter as the GGUF file"):
            save_gguf(drafter, out, broken)
    with pytest.raises(CheckpointError, match="nowhere.gguf: "):
        save_gguf(drafter, out, tmp_path / "nowhere.gguf")
    with pytest.raises(CheckpointError, match="its vocab_size is 31, the drafter's 32"):
        save_gguf(drafter, out, target_gguf(tmp_path / "few.gguf", vocab_size=31))
    with pytest.raises(CheckpointError, match="its hidden_size is 8, the drafter's 16"):
        save_gguf(drafter, out, target_gguf(tmp_path / "narrow.gguf", hidden_size=8, architecture="qwen3"))
    assert not out.exists()


def test_only_a_drafter_s_file_is_replaced(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, out = eagle3_of(), tmp_path / "new" / "drafter.gguf"
    save_gguf(drafter, out, target)
    assert holds_gguf(out) and not holds_gguf(target) and not holds_gguf(tmp_path) and not holds_gguf(tmp_path / "no")
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match="target.gguf is no GGUF file of an EAGLE-3 and would be lost"):
        save_gguf(drafter, target, target)
    with pytest.raises(CheckpointError, match="new is no GGUF file of an EAGLE-3 and would be lost"):
        save_gguf(drafter, out.parent, target)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="drafter.gguf cannot be written: No space left on device"):
        save_gguf(eagle3_of(), out, target)
    assert out.read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["drafter.gguf"]
