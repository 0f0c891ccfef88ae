"""What a run is built from: its prompts and its first drafter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import Drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.workload.traffic import TrafficError, generate_traffic


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> assembly.LoadedTarget:
    return assembly.load(spec.resolve(load_config(overrides=[f"model={tiny_folder}", "device=cpu", "dtype=float32"])))


def test_the_limit_holds_for_the_generator_too(configured: Callable[..., Config]) -> None:
    assert len(assembly.traffic(configured("traffic.limit=3"))) == 3
    assert len(assembly.traffic(configured("traffic.limit=99"))) == 5


def test_prompts_that_cannot_be_served(configured: Callable[..., Config], target: assembly.LoadedTarget) -> None:
    prompts = assembly.traffic(configured())
    assert assembly.request_queue(spec.resolve(configured()), target, prompts).total == 5
    reason = r"\(5\); the first: prompt '.*', turn 1: the prompt has \d+ tokens; with max_new_tokens=8 that exceeds"
    with pytest.raises(TrafficError, match=f"none of the prompts can be served {reason}"):
        assembly.request_queue(spec.resolve(configured("engine.max_length=40")), target, prompts)
    with pytest.raises(ConfigError, match="engine.max_length=513 exceeds the context .*; set engine.max_length=512"):
        assembly.request_queue(spec.resolve(configured("engine.max_length=513")), target, prompts)


@pytest.mark.parametrize(("context", "length"), [(512, 512), (4096, 1024), (None, 1024)])
def test_a_length_that_nobody_set_fits_the_context(
    target: assembly.LoadedTarget, monkeypatch: pytest.MonkeyPatch, context: int | None, length: int
) -> None:
    monkeypatch.setattr(assembly, "context_length", lambda config: context)
    assert assembly.slot_length(load_config(), target) == length
    assert assembly.slot_length(load_config(overrides=["engine.max_length=100"]), target) == 100


def test_a_chat_template_that_refuses(config: Config, tiny_folder: Path) -> None:
    target = assembly.load(spec.resolve(config))
    target.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(TrafficError, match=f"the chat template of model '{tiny_folder}' refuses .*: no system role"):
        assembly.request_queue(spec.resolve(config), target, generate_traffic(2))


def test_tokens_that_the_model_lacks_fail_their_prompt_alone(config: Config, tiny_folder: Path) -> None:
    target = assembly.load(spec.resolve(config))
    target.tokenizer.add_tokens([f"<beyond-{i}>" for i in range(60)])  # ids up to 318; the model knows 300
    prompts = assembly.traffic(config)
    beyond = replace(prompts[3], messages=({"role": "user", "content": "What is <beyond-59>?"},))
    requests = assembly.request_queue(spec.resolve(config), target, [*prompts[:3], beyond, prompts[4]])
    assert (
        len(requests.failed) == 1 and "the tokenizer gives token 318, and the model knows 0..299" in requests.failed[0]
    )
    assert len(requests.first_prompts(64)) == 4
    assembly.start_drafter(spec.resolve(config), target, requests.first_prompts(64))  # the target reads them


def test_an_untrained_drafter_of_another_seed_is_another_one(
    configured: Callable[..., Config], target: assembly.LoadedTarget
) -> None:
    run = spec.resolve(configured("drafter.name=eagle3"))
    first, again, reseeded = (assembly.start_drafter(run, target, [], seed=seed) for seed in (None, run.config.seed, 7))
    assert torch.equal(first.fc.weight, again.fc.weight) and not torch.equal(first.fc.weight, reseeded.fc.weight)


@pytest.mark.parametrize("name", ["eagle3", "medusa", "dflash"])
@pytest.mark.parametrize("own_learner", [True, False])
def test_both_halves_start_from_the_same_drafter(
    configured: Callable[..., Config], target: assembly.LoadedTarget, tmp_path: Path, name: str, own_learner: bool
) -> None:
    run = spec.resolve(configured(f"drafter.name={name}"))
    requests = assembly.request_queue(run, target, assembly.traffic(run.config))
    served, learner_config = assembly.first_drafter(
        run, target, requests.first_prompts(64), tmp_path / "day0" if own_learner else None
    )
    learned = assembly.start_drafter(spec.resolve(learner_config), target, [])
    assert Handshake.of(target.parts, served, "eagle3") == Handshake.of(target.parts, learned, "eagle3")
    assert all(torch.equal(t, learned.published()[key]) for key, t in served.published().items())
    assert run.config.drafter.path is None
    # Only a drafter that is handed on in a folder can know the prompts.
    knows = not served.draft_vocab.equal(assembly.start_drafter(run, target, []).draft_vocab)
    assert knows == own_learner == (learner_config.drafter.path is not None)


def test_another_draft_vocabulary_is_a_mismatch(
    configured: Callable[..., Config], target: assembly.LoadedTarget
) -> None:
    engine, learner = (
        Handshake.of(target.parts, assembly.start_drafter(run, target, []), run.drafter_name)
        for run in map(spec.resolve, (configured(), configured("drafter.vocab_size=32")))
    )
    mismatch = engine.mismatch(learner)
    assert mismatch is not None and "draft_map_checksum" in mismatch


def test_trees_deeper_than_the_drafter_drafts_are_refused(
    configured: Callable[..., Config], target: assembly.LoadedTarget
) -> None:
    deep = ("drafter.depth=5", "drafter.num_nodes=5")
    with pytest.raises(ConfigError, match="drafter.depth=5 is more than the 4 nodes that this drafter"):
        assembly.start_drafter(spec.resolve(configured(*deep)), target, [])
    run = spec.resolve(configured(*deep, "drafter.options={num_heads: 5}"))
    assert assembly.start_drafter(run, target, []).max_depth == 5


def test_a_drafter_that_could_not_be_saved_is_refused_before_it_serves(
    configured: Callable[..., Config], target: assembly.LoadedTarget
) -> None:
    def start(*pairs: str) -> None:
        assembly.start_drafter(spec.resolve(configured("drafter.name=eagle3", *pairs)), target, [])

    with pytest.raises(ConfigError, match=r"drafter.name=eagle3 cannot be saved: feature_layers has 3; engines read"):
        start("drafter.feature_layers=[0,1,3]")
    start("drafter.feature_layers=[0,1]")
    with pytest.raises(ConfigError, match="cannot be saved: .* SGLang cannot read what enters layer 0"):
        start("drafter.feature_layers=[0,1]", "engine.name=sglang")


def test_a_run_starts_from_a_drafter_of_an_older_target_if_told_so(
    configured: Callable[..., Config], target: assembly.LoadedTarget, tmp_path: Path
) -> None:
    save_drafter(assembly.start_drafter(spec.resolve(configured()), target, []), tmp_path / "drafter")
    saved = f"drafter.path={tmp_path / 'drafter'}"
    newer = replace(target, parts=replace(target.parts, head=TargetHead(target.parts.head.weight + 0.1)))
    with pytest.raises(CheckpointError, match="the drafter was trained for others"):
        assembly.start_drafter(spec.resolve(configured(saved)), newer, [])
    run = spec.resolve(configured(saved, "drafter.trained_for=any"))
    assert assembly.start_drafter(run, newer, []).trained_for == newer.parts.fingerprint


def test_a_drafter_for_another_model_names_what_does_not_match(
    configured: Callable[..., Config], target: assembly.LoadedTarget, tmp_path: Path
) -> None:
    def start(*pairs: str) -> Drafter:
        return assembly.start_drafter(spec.resolve(configured("drafter.name=eagle3", *pairs)), target, [])

    save_drafter(start(), tmp_path / "drafter")
    saved = f"drafter.path={tmp_path / 'drafter'}"
    start(saved)
    document = json.loads((tmp_path / "drafter" / "config.json").read_text())

    def edit(**entries: object) -> None:
        (tmp_path / "drafter" / "config.json").write_text(json.dumps({**document, **entries}))

    edit(hidden_size=64)
    with pytest.raises(CheckpointError, match="drafter: config.json: hidden_size is 64, the target has 32"):
        start(saved)
    edit(intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"tensor 'midlayer.mlp.gate_proj.weight' has shape \(64, 32\)"):
        start(saved)
    edit(architectures=["MedusaDrafter"])
    with pytest.raises(CheckpointError, match="config.json is of MedusaDrafter, and Eagle3Drafter is asked for"):
        start(saved)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        start(f"drafter.path={tmp_path}")


THIRD_PARTY = """
from aurora_rl.policies import MedusaDrafter

class Narrow(MedusaDrafter):
    formats = ("aurora_rl",)

    @classmethod
    def from_target(cls, parts, *, draft_vocab, feature_layers=None, heads: int = 2):
        drafter = super().from_target(parts, draft_vocab=draft_vocab, feature_layers=feature_layers, num_heads=heads)
        drafter.options = {}  # forgets to say them
        return drafter

class Returnless(Narrow):
    @classmethod
    def from_target(cls, parts, *, draft_vocab, feature_layers=None):
        super().from_target(parts, draft_vocab=draft_vocab, feature_layers=feature_layers)
"""


@pytest.fixture
def third_party_drafters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_drafters.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("third_party_drafters")
def test_what_started_a_drafter_is_in_its_folder(
    configured: Callable[..., Config], target: assembly.LoadedTarget, tmp_path: Path
) -> None:
    def resolved(*pairs: str) -> spec.RunSpec:
        return spec.resolve(configured("drafter.name=their_drafters:Narrow", "drafter.depth=3", *pairs))

    started = assembly.start_drafter(resolved("drafter.options={heads: 3}"), target, [])
    save_drafter(started, tmp_path / "drafter")
    read = assembly.start_drafter(resolved(f"drafter.path={tmp_path / 'drafter'}"), target, [])
    assert read.published().keys() == started.published().keys() and read.max_depth == 3
    with pytest.raises(ConfigError, match="drafter.options: Narrow: heads must be an integer, got 2.5"):
        resolved(f"drafter.path={tmp_path / 'drafter'}", "drafter.options={heads: 2.5}")
    assert Handshake.of(target.parts, read, "mine").feature_layers == (3,)
    read.feature_layers = [3]  # type: ignore[assignment]
    assert Handshake.of(target.parts, read, "mine").feature_layers == (3,)


@pytest.mark.usefixtures("third_party_drafters")
def test_a_class_that_makes_no_drafter_is_named(
    configured: Callable[..., Config], target: assembly.LoadedTarget
) -> None:
    config = configured("drafter.name=their_drafters:Returnless")
    with pytest.raises(ConfigError, match="drafter.name=their_drafters:Returnless: from_target gave None"):
        assembly.start_drafter(spec.resolve(config), target, [])
