"""Drafters by Hugging Face's habits, against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Hub, hub
from huggingface_hub import metadata_load

from aurora_rl.models.loading import load_target
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.policies.hub import engine_commands, model_card
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

RUN = {
    "requests": 300,
    "swaps": 31,
    "acceptance_length": {"first": 1.5123, "last": 2.3456},
    "domains": {"code": {"requests": 150, "acceptance_length": 2.5}, "": {"requests": 150, "acceptance_length": None}},
    "speedup": 1.3049,
    "versions_served": [0, 1, 7],
}


@pytest.fixture
def drafter() -> Eagle3Drafter:
    parts = TargetParts.of(tiny_target(dtype=torch.float32))
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 32, 2), feature_layers=(1, 2))
    drafter.made_for = parts.fingerprint
    return drafter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(RUN))
    (tmp_path / "config.yaml").write_text("model: smollm2\nengine:\n  name: sglang\n")
    return tmp_path


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
    written.made_for = parts.fingerprint
    written.save_pretrained(str(tmp_path / "drafter"))
    for target in (model, parts, tiny_folder, str(tiny_folder)):
        read = Drafter.from_pretrained(tmp_path / "drafter", target)
        assert isinstance(read, MedusaDrafter) and read.made_for == parts.fingerprint
        assert all(torch.equal(read.published()[name], tensor) for name, tensor in written.published().items())


def test_a_subclass_reads_its_own_kind_in_the_layout_that_is_asked_for(drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path, layout="vllm")
    assert "eagle_aux_hidden_state_layer_ids" in json.loads((tmp_path / "config.json").read_text())
    target = tiny_target(dtype=torch.float32)
    assert Eagle3Drafter.from_pretrained(tmp_path, target, layout="vllm").feature_layers == (1, 2)
    with pytest.raises(CheckpointError, match=r"is of Eagle3Drafter, and MedusaDrafter is asked for"):
        MedusaDrafter.from_pretrained(tmp_path, target)
    other_target = tiny_target(dtype=torch.float32, seed=1)
    with pytest.raises(CheckpointError, match=r"trained for others.*made_for=any"):
        Drafter.from_pretrained(tmp_path, other_target)
    assert (
        Drafter.from_pretrained(tmp_path, other_target, made_for="any").made_for
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


def test_nothing_is_published_where_the_run_has_no_summary(drafter: Eagle3Drafter, server: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run=.*nowhere' is not the folder of a finished run.*summary.json"):
        drafter.push_to_hub("me/drafter", run=tmp_path / "nowhere")
    assert not server.created and not server.files


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_text_of_a_card(drafter: Eagle3Drafter, run: Path) -> None:
    config = drafter.write("vllm").config
    versions = ", ".join(f"{name} {version(name)}" for name in ("aurora-rl", "torch", "transformers"))
    assert model_card(drafter, "me/drafter", config, run=run, license="apache-2.0") == (
        f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: aurora_rl
license: apache-2.0
tags:
- speculative-decoding
- eagle3
---

# me/drafter

A drafter for speculative decoding of `HuggingFaceTB/SmolLM2-135M-Instruct`, trained with aurora_rl.

| | |
|---|---|
| architecture | `Eagle3Drafter` |
| parameters | 0.0 M |
| draft vocabulary | 16 of 32 tokens |
| target layers that it reads | 1, 2 |
| fingerprint of the target's weights | `{drafter.made_for}` |
| written with | {versions} |

## Training

| | |
|---|---|
| engine | sglang |
| requests | 300 |
| acceptance length, first → last | 1.51 → 2.35 |
| acceptance length, code | 2.50 |
| speedup over plain decoding | 1.30 |
| swaps of weights while serving | 31 |
| versions served | 0 to 7 |

## Use

```bash
aurora-rl serve model=smollm2 drafter.name=eagle3 drafter.path=me/drafter
python -m sglang.launch_server --model-path HuggingFaceTB/SmolLM2-135M-Instruct --speculative-algorithm EAGLE3 """
        """--speculative-draft-model-path me/drafter
vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --speculative-config """
        """'{"method": "eagle3", "model": "me/drafter", "num_speculative_tokens": 3}'
```

```python
from aurora_rl.policies import Drafter

drafter = Drafter.from_pretrained("me/drafter", "smollm2")
```
"""
    )


@pytest.mark.parametrize(
    ("model", "base_model", "stated", "command"),
    [
        ("FOLDER", None, None, "model=TARGET "),
        ("FOLDER", "me/target", "me/target", "model=me/target "),
        ("../models/mine", None, None, "model=TARGET "),
        ("me/target", None, "me/target", "model=me/target "),
        ("me/target", "me/family", "me/family", "model=me/target "),
    ],
)
def test_a_card_names_no_folder_of_the_machine(
    drafter: Eagle3Drafter, run: Path, model: str, base_model: str | None, stated: str | None, command: str
) -> None:
    (run / "config.yaml").write_text(f"model: {str(run) if model == 'FOLDER' else model}\nengine: {{name: x}}\n")
    card = model_card(drafter, "me/drafter", drafter.write("sglang").config, base_model=base_model, run=run)
    assert (f"base_model: {stated}\n" in card) if stated else ("base_model" not in card)
    assert command in card and str(run) not in card and "models/mine" not in card


@pytest.mark.parametrize(
    ("kind", "layout", "layers", "engines"),
    [
        (Eagle3Drafter, "sglang", (1, 2), ["aurora_rl", "sglang"]),
        (Eagle3Drafter, "vllm", (1, 2), ["aurora_rl", "sglang", "vllm"]),
        (Eagle3Drafter, "sglang", (0, 2), ["aurora_rl"]),
        (MedusaDrafter, "aurora_rl", None, ["aurora_rl"]),
        (MedusaDrafter, "vllm", None, ["aurora_rl", "vllm"]),
    ],
)
def test_engines_that_load_a_folder(
    kind: type[Drafter], layout: str, layers: tuple[int, ...] | None, engines: list[str]
) -> None:
    parts = TargetParts.of(tiny_target())
    config = kind.from_target(parts, draft_vocab=torch.arange(16), feature_layers=layers).write(layout).config
    assert list(engine_commands(kind, config, "drafter", "target")) == engines
