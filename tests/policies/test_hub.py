"""Drafters by Hugging Face's habits, against a hub on this machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
import torch
from hub_server import Hub, hub
from huggingface_hub import HfApi, metadata_load

from aurora_rl.models.loading import ModelError, load_target
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


# ---- save and load --------------------------------------------------------------------------------------------------


def test_a_drafter_is_read_for_a_model_its_parts_and_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    model, _ = load_target(tiny_folder, dtype=torch.float32, device="cpu")
    parts = TargetParts.of(model)
    written = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16))
    written.save_pretrained(str(tmp_path / "drafter"))
    for target in (model, parts, tiny_folder, str(tiny_folder)):
        read = Drafter.from_pretrained(tmp_path / "drafter", target)
        assert isinstance(read, MedusaDrafter) and read.trained_for == parts.fingerprint
        assert all(torch.equal(read.published()[name], tensor) for name, tensor in written.published().items())


def test_what_is_no_target_is_named(tiny_folder: Path, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path / "drafter")
    for source in (tmp_path / "drafter", tiny_folder):  # the drafter twice, and both in each other's place
        with pytest.raises(ModelError) as caught:
            Drafter.from_pretrained(source, tmp_path / "drafter")
        assert str(caught.value) == (
            f"cannot load model '{tmp_path}/drafter': the folder holds a drafter (Eagle3Drafter); give it as source, "
            "and as target the language model that it drafts for"
        )
    with pytest.raises(ValueError, match="^target is a int; give a model, its parts, or its name: 'smollm2', a folder"):
        Drafter.from_pretrained(tmp_path / "drafter", 5)


def test_a_subclass_reads_its_own_kind_in_the_layout_that_is_asked_for(drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path, format="vllm")
    assert "eagle_aux_hidden_state_layer_ids" in json.loads((tmp_path / "config.json").read_text())
    target = tiny_target(dtype=torch.float32)
    assert Eagle3Drafter.from_pretrained(tmp_path, target, format="vllm").feature_layers == (1, 2)
    with pytest.raises(CheckpointError, match=r"is of Eagle3Drafter, and MedusaDrafter is asked for"):
        MedusaDrafter.from_pretrained(tmp_path, target)
    other_target = tiny_target(dtype=torch.float32, seed=1)
    with pytest.raises(CheckpointError, match=r"trained for others.*trained_for=any"):
        Drafter.from_pretrained(tmp_path, other_target)
    assert (
        Drafter.from_pretrained(tmp_path, other_target, trained_for="any").trained_for
        == TargetParts.of(other_target).fingerprint
    )


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_a_published_drafter_is_read_back_by_its_id(drafter: Eagle3Drafter, run: Path, server: Hub) -> None:
    address = drafter.push_to_hub("me/drafter", run=run, license="mit", private=True, token="hf_secret")
    assert address.startswith(f"{server.url}/me/drafter/commit/")
    assert server.created[0]["name"] == "drafter" and server.created[0]["visibility"] == "private"
    assert server.tokens == {"Bearer hf_secret"} and server.commits == ["Upload a drafter"]
    assert set(server.files["me/drafter"]) == {"README.md", "config.json", "model.safetensors"}
    read = Drafter.from_pretrained("me/drafter", tiny_target(dtype=torch.float32))
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())


def test_a_revision_is_read_with_a_token(drafter: Eagle3Drafter, server: Hub) -> None:
    drafter.push_to_hub("me/drafter")
    server.read.clear()
    Drafter.from_pretrained("me/drafter", tiny_target(dtype=torch.float32), revision="v1", token="hf_secret")
    assert server.read[0] == ("v1", "Bearer hf_secret") and {token for _, token in server.read} == {"Bearer hf_secret"}


def test_a_second_upload_writes_the_card_anew_and_keeps_what_was_added_on_the_hub(
    drafter: Eagle3Drafter, run: Path, server: Hub, tmp_path: Path
) -> None:
    drafter.push_to_hub("me/drafter")
    card = server.files["me/drafter"]["README.md"].decode()
    assert "license" not in card and "base_model" not in card and "model=TARGET" in card
    edited = card.replace("library_name:", "license: gpl-3.0\nlanguage: en\nlibrary_name:")
    server.files["me/drafter"]["README.md"] = edited.encode()
    drafter.push_to_hub("me/drafter", run=run, base_model="me/target", commit_message="Trained further")
    assert server.commits == ["Upload a drafter", "Trained further"]
    (tmp_path / "card.md").write_bytes(server.files["me/drafter"]["README.md"])
    front = metadata_load(tmp_path / "card.md")
    assert front == {
        "base_model": "me/target",
        "library_name": "aurora_rl",
        "tags": ["speculative-decoding", "eagle3"],
        "license": "gpl-3.0",
        "language": "en",
    }
    assert "| requests | 300 |" in (tmp_path / "card.md").read_text()


def test_nothing_is_published_where_the_run_has_no_summary(
    drafter: Eagle3Drafter, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the hub is not asked first
    with pytest.raises(ValueError, match=r"run=.*nowhere' is not the folder of a finished run.*summary.json"):
        drafter.push_to_hub("me/drafter", run=tmp_path / "nowhere")
    assert not server.created and not server.files


@pytest.mark.parametrize("offline", [True, False])
def test_a_drafter_that_cannot_be_published_is_kept_in_a_folder(
    drafter: Eagle3Drafter, server: Hub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(HfApi, "hf_hub_download", lambda *_: httpx.get("http://127.0.0.1:1"))  # nobody listens
    with pytest.raises(ConnectionError, match=r"the hub could not be reached .*; the drafter is saved in") as error:
        drafter.push_to_hub("me/drafter")
    assert "call push_to_hub('me/drafter') again" in str(error.value)
    folder = Path(re.search(r"from_pretrained\('(.*?)', target\)", str(error.value))[1])
    try:
        read = Eagle3Drafter.from_pretrained(folder, tiny_target(dtype=torch.float32))
        assert all(torch.equal(read.published()[name], tensor) for name, tensor in drafter.published().items())
    finally:
        shutil.rmtree(folder.parent)
