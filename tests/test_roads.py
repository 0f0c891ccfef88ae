"""The pages of a public checkpoint's road: every command of theirs runs, in its order, on tiny models.

Names on the pages stand for folders here, and the last `serve` of a page for a `flywheel` of two
requests, which ends. Those before it start their drafter only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import fields, target_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aurora_rl import testing
from aurora_rl.cli import assembly, spec
from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.policies import Drafter

DOCS = Path(__file__).parents[1] / "docs"
TARGETS = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B-Instruct", "MODEL")
PUBLIC = "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
SMALL = ("device=cpu", "dtype=float32", "drafter.vocab_size=64", "engine.max_length=256", "max_new_tokens=6")
TWO = ("traffic.requests=2", "learner.spawn=false", "drafter.adaptive=false", "http.port=null")


def commands(page: str) -> list[list[str]]:
    """The words of a page's `aurora-rl` commands."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "aurora-rl"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of seven layers, so that EAGLE-3's usual three are three."""
    return testing.tiny_folder(tmp_path_factory.mktemp("target"), num_layers=7)


@pytest.fixture
def drive(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_handlers: None
) -> Callable[..., list[Drafter]]:
    """Run the commands of a page in `tmp_path`; return the drafters that its `serve`s started with."""
    monkeypatch.chdir(tmp_path)
    chat = [{"messages": [{"role": "user", "content": text}]} for text in ("one", "two", "three", "four")]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chat)))

    def run(page: str, **names: Path) -> list[Drafter]:
        started, last = [], []
        known = {**dict.fromkeys(TARGETS, target), **names}
        for words in commands(page):
            swapped = []
            for word in words:
                key, equals, value = word.rpartition("=")
                swapped.append(f"{key}{equals}{known.get(value, value)}")
            command, *rest = swapped
            if command == "serve":
                resolved = spec.resolve(load_config(overrides=[*rest, *SMALL]))
                started.append(assembly.start_drafter(resolved, assembly.load(resolved), []))
                last = rest
            else:
                more = ("--epochs", "1", "learner.batch_size=2") if command == "train" else ()
                options = [word for word in more if "=" not in word]
                assert cli.main([command, *options, *rest, *SMALL, *(w for w in more if "=" in w)]) == 0, words
        if started:
            assert cli.main(["flywheel", *last, *SMALL, *TWO, "run_dir=served"]) == 0
            assert json.loads(Path("served/summary.json").read_text())["requests"] == 2
        return started

    return run


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(drafter: Drafter, folder: Path) -> bool:
    """Whether a drafter's weights are other than those of a folder."""
    before = first_weights(folder)
    return any(not torch.equal(value, before[name]) for name, value in drafter.state_dict().items())


@pytest.fixture(scope="module")
def public(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 as its authors publish it: no layers, no fingerprint, nothing of RoPE."""
    resolved = spec.resolve(load_config(overrides=[f"model={target}", "drafter.name=eagle3", *SMALL]))
    folder = tmp_path_factory.mktemp("hub") / "eagle3"
    assembly.start_drafter(resolved, assembly.load(resolved), []).save_pretrained(folder, format="hf")
    entries = json.loads((folder / "config.json").read_text())
    for name in ("aurora_rl_made_for", "rope_parameters", "rope_scaling", "rope_theta"):
        entries.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**entries, "architectures": ["LlamaForCausalLM"]}))
    return folder


def test_a_model_without_a_drafter(drive: Callable[..., list[Drafter]], tmp_path: Path) -> None:
    new, learned = drive("day0.md")
    assert type(new).__name__ == type(learned).__name__ == "Eagle3Drafter"
    assert moved(learned, tmp_path / "day0") and not moved(learned, tmp_path / "runs" / "day0" / "drafter")


def test_a_public_eagle3(
    drive: Callable[..., list[Drafter]], public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (started,) = drive("warm_start.md", **{PUBLIC: public})
    assert not moved(started, public)
    assert f"{'target':<18}" in (out := capsys.readouterr().out) and "fits" in out and "does not fit" not in out
    assert any(
        not torch.equal(tensor, first_weights(public)[name])
        for name, tensor in first_weights(tmp_path / "runs" / "warm" / "drafter").items()
    )


def test_a_fine_tuned_target(
    drive: Callable[..., list[Drafter]], target: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(target).save_pretrained(tmp_path / "tuned")
    base = tmp_path / "runs" / "base" / "drafter"
    named = ["drafter", "export", "--drafter", str(public), "--to", "sglang", f"model={target}", *SMALL]
    assert cli.main([*named, "--out", str(base)]) == 0
    tuned = f"model={tmp_path / 'tuned'}"
    assert cli.main(["drafter", "inspect", str(base), tuned, *SMALL]) == 1  # why the page's key is needed
    assert "drafter.trained_for=any" in capsys.readouterr().out

    first, second = drive("fine_tuned.md", **{"my-tuned-model": tmp_path / "tuned"})
    assert not moved(first, base) and first.trained_for == second.trained_for
    assert moved(second, base)
    assert cli.main(["drafter", "inspect", "runs/tuned/drafter", tuned, *SMALL]) == 0


def test_back_to_an_engine(
    drive: Callable[..., list[Drafter]], target: Path, public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target_gguf(tmp_path / "MODEL.gguf", vocab_size=300, hidden_size=32)
    drive("export.md", **{"RUN/drafter": public})
    for folder, ids in (("for-sglang", None), ("for-vllm", [2, 3, 4])):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
        assert config.get("eagle_aux_hidden_state_layer_ids") == ids
    assert fields(tmp_path / "drafter.gguf")["eagle3.target_layers"][0] == [2, 3, 4]
