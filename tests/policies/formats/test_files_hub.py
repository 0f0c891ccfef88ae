"""Drafters from the hub as their authors wrote them; no network is asked."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aurora_rl.policies import (
    Drafter,
    Eagle3Drafter,
    EagleDrafter,
    TargetParts,
)
from aurora_rl.policies.formats import files as formats
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_trajectory
from aurora_rl.trajectories import pack

# As their authors write them: transformers 4, no feature layers, a short context.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 16, "head_dim": 4, "intermediate_size": 32, "max_position_embeddings": 64, "model_type": "llama",
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.28.1", "vocab_size": 32,
}  # fmt: skip


def published(kind: type[Drafter], parts: TargetParts, folder: Path) -> tuple[Drafter, dict[str, Tensor]]:
    """A drafter of float16 weights with its ``config.json`` in a folder, and the tensors for it."""
    folder.mkdir(parents=True)
    whole = kind is EagleDrafter  # which has no place for a map
    drafter = kind.from_target(parts, draft_vocab=torch.arange(32) if whole else torch.tensor([2, 7, 11, 30]))
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in drafter.published().items()}
    drafter.install(tensors)
    if whole:
        del tensors["d2t"]
    else:
        tensors["t2d"] = torch.zeros(32, dtype=torch.bool).index_fill(0, drafter.draft_vocab, True)
    config = LLAMA | ({"bias": True} if whole else {"draft_vocab_size": 4})
    (folder / "config.json").write_text(json.dumps(config))
    return drafter, tensors


def hub_gives(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Have the hub give a folder; return the ids that it is asked for."""
    asked: list[str] = []

    def give(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        return str(folder)

    monkeypatch.setattr(formats, "snapshot_download", give)
    return asked


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", [Eagle3Drafter, EagleDrafter])
def test_a_hub_id_is_read_as_its_authors_wrote_it(
    kind: type[Drafter], file: str, parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, tensors = published(kind, parts, tmp_path / "snapshot")
    tensors["embed_tokens.weight"] = parts.embedding.half()
    assert kind is EagleDrafter or "midlayer.self_attn.q_proj.weight" in tensors
    path = tmp_path / "snapshot" / file
    if file.endswith(".bin"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    asked = hub_gives(monkeypatch, tmp_path / "snapshot")
    read = load_drafter("authors/drafter", parts)
    assert asked == ["authors/drafter"] and type(read) is kind and read.trained_for == parts.fingerprint
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


def test_a_repository_that_holds_no_drafter_is_named(
    parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(Eagle3Drafter, parts, tmp_path / "snapshot")  # without tensors
    hub_gives(monkeypatch, tmp_path / "snapshot")
    with pytest.raises(CheckpointError, match="snapshot is not a checkpoint: .*model.safetensors"):
        load_drafter("authors/drafter", parts)


def test_a_folder_of_the_same_name_comes_first(
    parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_gives(monkeypatch, tmp_path)
    _, tensors = published(Eagle3Drafter, parts, tmp_path / "authors" / "drafter")
    save_file(tensors, tmp_path / "authors" / "drafter" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    load_drafter("authors/drafter", parts)
    assert not asked


def test_a_hub_that_cannot_be_reached_is_named(
    parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # where nobody answers once it is closed
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def download(repo_id: str, **options: Any) -> str:
        return huggingface_hub.snapshot_download(
            repo_id, endpoint=f"http://127.0.0.1:{port}", cache_dir=tmp_path, **options
        )

    monkeypatch.setattr(formats, "snapshot_download", download)
    with pytest.raises(
        CheckpointError, match="(?s)authors/drafter is neither a folder .* check your internet connection"
    ):
        load_drafter("authors/drafter", parts)
