"""What `aurora-rl check` says of models that are served, served otherwise, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from aurora_rl.cli.check import _size, check_model
from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.main import main
from aurora_rl.envs import TransformersEngine
from aurora_rl.policies import Drafter, MedusaDrafter, TargetParts
from aurora_rl.policies.eagle import EagleDrafter
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.policies.standalone import StandaloneDrafter
from aurora_rl.testing import tiny_target

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def save(model: PreTrainedModel, tiny_folder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def report(model: Path, *overrides: str) -> tuple[bool, list[str]]:
    lines: list[str] = []
    pairs = [f"model={model}", "device=cpu", "dtype=float32", "engine.max_length=64", "drafter.vocab_size=64"]
    return check_model(load_config(overrides=[*pairs, *overrides]), lines.append), lines


@pytest.mark.parametrize("kind", [Eagle3Drafter, EagleDrafter, MedusaDrafter, StandaloneDrafter])
def test_a_folder_of_a_drafter_is_named_in_one_line(
    kind: type[Drafter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_drafter(kind.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)), tmp_path / "mine")
    assert main(["check", f"model={tmp_path}/mine", "device=cpu"]) == 2
    assert capsys.readouterr().err == (
        f"aurora-rl: cannot load model '{tmp_path}/mine': the folder holds a drafter ({kind.__name__}); give it as "
        "drafter.path, and as model the language model that it drafts for\n"
    )


def test_a_model_that_is_served(tiny_folder: Path) -> None:
    served, lines = report(tiny_folder)
    text = "\n".join(lines)
    assert served
    assert "LlamaForCausalLM, float32 on cpu" in text
    assert "exact in the fused form: logits differ by" in text
    for name in ("dflash", "eagle", "eagle3", "medusa", "ngram", "standalone"):
        assert f"{name} starts: " in text
    # 2 slots of 64 + 64 columns, 3 layers of keys and values of 2 heads of 8 in 4 bytes: 2 * 128 * 3 * 2 * 16 * 4 bytes
    assert "96 KiB of keys and values for 2 slots of 64 tokens" in text
    assert sum("ms plain" in line for line in lines) == 2
    assert lines[-1].startswith("round        times never fall with more slots")
    # An embedding and a head of 300 and a layer of 32: tens of thousands of weights.
    assert any(re.search(r"eagle3 starts: \d\dk weights", line) for line in lines)


def test_rounds_are_timed_with_the_processors_that_serving_applies(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "penalty"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    applied: list[int] = []
    penalty = RepetitionPenaltyLogitsProcessor.__call__
    monkeypatch.setattr(
        RepetitionPenaltyLogitsProcessor, "__call__", lambda self, *args: applied.append(1) or penalty(self, *args)
    )
    served, lines = report(folder, "drafter.name=ngram")
    assert served and applied
    assert "generation   the processors of generation_config are applied at every node" in lines


class OwnEngine(TransformersEngine):
    """An engine of a third party, which verifies no such model."""

    def __init__(self, model: PreTrainedModel, **settings: object) -> None:
        raise ValueError("another model is needed")


def test_the_engine_that_is_configured_is_checked(tiny_folder: Path) -> None:
    served, lines = report(tiny_folder, "drafter.name=ngram", f"engine.name={__name__}:OwnEngine")
    assert not served and lines[-1] == "engine       refused: another model is needed"
    with pytest.raises(ConfigError, match="^engine.name=sglang is a server of its own, .*; set engine.name=transform"):
        report(tiny_folder, "engine.name=sglang")  # nor is the usual drafter one that SGLang serves


def test_a_context_that_is_shorter_than_the_slots(tiny_folder: Path) -> None:
    served, lines = report(tiny_folder, "drafter.name=ngram", "engine.max_length=513")
    assert not served
    assert "engine.max_length=513 exceeds the context of model" in lines[-1]
    assert lines[-1].endswith("; set engine.max_length=512 or less, or leave it out")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (2000, "2.0 KiB"), (98304, "96 KiB"), (2**20, "1.0 MiB"), (300 * 2**30, "300 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert _size(count) == text


def test_a_form_that_disagrees_is_named(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    folder = save(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)), tiny_folder, tmp_path / "gemma")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *rest, **more: 0 * query)
    served, lines = report(folder, "drafter.name=ngram")
    assert served
    assert any("fused form switched off: its logits differ by" in line for line in lines)
    assert any("exact in the eager form" in line for line in lines)


def test_a_model_that_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"])
    served, lines = report(save(Lfm2ForCausalLM(config), tiny_folder, tmp_path / "lfm2"))
    assert not served
    assert lines[-1].startswith("engine       refused: Lfm2ForCausalLM has layers of the kind conv")
    assert lines[-1].endswith("serve it by another server without drafts; nothing here learns from such models yet")


def test_a_generation_config_that_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guided"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"guidance_scale": 2.0}))
    served, lines = report(folder, "drafter.name=ngram")
    assert not served and any(line.startswith("generation   refused: ") for line in lines)
    assert report(folder, "drafter.name=ngram", "generation_config=ignore")[0]
