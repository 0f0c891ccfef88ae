"""What a model card says, and which engines load a folder."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from aurora_rl.policies import (
    DFlashDrafter,
    Drafter,
    Eagle3Drafter,
    EagleDrafter,
    MedusaDrafter,
    StandaloneDrafter,
    TargetParts,
)
from aurora_rl.policies.model_card import engine_commands, model_card, run_figures
from aurora_rl.testing import tiny_target


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
| fingerprint of the target's weights | `{drafter.trained_for}` |
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


def test_figures_of_a_training_are_said_to_be_of_held_out_requests(drafter: Eagle3Drafter, run: Path) -> None:
    length = {"first": 1.2, "last": 2.25}
    summary = {"requests": 90, "held_out": 10, "acceptance_length": length, "domains": {"code": {"requests": 10}}}
    summary["domains"]["code"]["acceptance_length"] = length  # type: ignore[index]
    (run / "summary.json").write_text(json.dumps(summary))
    assert run_figures(run)[1] == [
        ("engine", "sglang"),
        ("requests learned from", "90"),
        ("held-out requests", "10"),
        ("acceptance length by replay of held-out requests, day 0 → best epoch", "1.20 → 2.25"),
        ("acceptance length by replay of held-out requests, code", "1.20 → 2.25"),
    ]


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
    ("kind", "format", "layers", "engines"),
    [
        (Eagle3Drafter, "sglang", (1, 2), ["aurora_rl", "sglang"]),
        (Eagle3Drafter, "vllm", (1, 2), ["aurora_rl", "sglang", "vllm"]),
        (Eagle3Drafter, "sglang", (0, 2), ["aurora_rl"]),
        (EagleDrafter, "sglang", None, ["aurora_rl", "sglang"]),
        (EagleDrafter, "hf", None, ["aurora_rl"]),
        (DFlashDrafter, "hf", None, ["aurora_rl", "sglang"]),
        (StandaloneDrafter, "hf", None, ["aurora_rl", "sglang", "vllm"]),
        (MedusaDrafter, "aurora_rl", None, ["aurora_rl"]),
        (MedusaDrafter, "vllm", None, ["aurora_rl", "vllm"]),
    ],
)
def test_engines_that_load_a_folder(
    kind: type[Drafter], format: str, layers: tuple[int, ...] | None, engines: list[str]
) -> None:
    parts = TargetParts.of(tiny_target())
    config = kind.from_target(parts, draft_vocab=torch.arange(16), feature_layers=layers).write(format).config
    commands = engine_commands(kind, config, "drafter", "target")
    assert list(commands) == engines
    if "sglang" in commands:
        assert f" --speculative-algorithm {kind.sglang_algorithm} " in commands["sglang"]


def test_commands_are_quoted_for_a_shell() -> None:
    config = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).write("vllm").config
    commands = engine_commands(MedusaDrafter, config, "a run's/drafter", "my target")
    assert shlex.split(commands["aurora_rl"])[2:] == [
        "model=my target", "drafter.name=medusa", "drafter.path=a run's/drafter"
    ]  # fmt: skip
    _, _, target, _, settings = shlex.split(commands["vllm"])
    assert target == "my target" and json.loads(settings)["model"] == "a run's/drafter"
    standalone = engine_commands(StandaloneDrafter, {"architectures": ["LlamaForCausalLM"]}, "a drafter", "my target")
    words = shlex.split(standalone["sglang"])
    assert words[4] == "my target" and words[-1] == "a drafter"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("summary.json", "{", "is not the folder of a finished run: Expecting property name"),
        ("summary.json", "[]", "lacks an entry, or has one of another type: AttributeError: 'list'"),
        ("summary.json", "{}", "lacks an entry, or has one of another type: KeyError: 'requests'; name the folder of"),
        ("summary.json", '{"requests": 1, "acceptance_length": "long"}', "has one of another type: ValueError: "),
        ("config.yaml", "engine: {name: x", "is not the folder of a finished run: while parsing a flow mapping"),
        ("config.yaml", "seed: 1", "lacks an entry, or has one of another type: KeyError: 'engine'"),
        ("config.yaml", "{model: 3, engine: {name: x}}", "another type: TypeError: model is 3, which is no text"),
    ],
)
def test_a_broken_run_is_a_value_error(drafter: Eagle3Drafter, run: Path, file: str, text: str, reason: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        model_card(drafter, "me/drafter", drafter.write("vllm").config, run=run)
    assert str(error.value).startswith(f"run='{run}'") and "\n" not in str(error.value)
