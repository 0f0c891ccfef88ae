"""The configuration resolved: what is refused before a model is loaded, and what a run starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora_rl.cli import spec
from aurora_rl.cli.config import Config, ConfigError, load_config
from aurora_rl.envs import TransformersEngine
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import TreeShape
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.workload.traffic import TrafficError, generate


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> spec.Target:
    return spec.load(spec.resolve(load_config(overrides=[f"model={tiny_folder}", "device=cpu", "dtype=float32"])))


SAMPLED = ("drafter.name=eagle3", "drafter.mode=sampled")
OBJECTIVES = {
    "none": (("objectives=[]",), "objectives is empty; name at least one"),
    "unknown": (("objectives=[{name: imitaton}]",), "no objective is called 'imitaton'; did you mean 'imitation'"),
    "unknown setting": (("objectives=[{name: discard, lambda: 1}]",), "objective 'discard' has no setting 'lambda'"),
    "divergence": (
        ("objectives=[{name: imitation, divergence: forwardkl}]",),
        "objectives: objective 'imitation': no divergence is called 'forwardkl'; did you mean 'forward_kl'",
    ),
    "steps": (("objectives=[{name: imitation, steps: 0}]",), "'imitation': steps must be at least 1, got 0"),
    "no integer": (("objectives=[{name: imitation, steps: three}]",), "steps must be an integer, got 'three'"),
    "no number": (("objectives=[{name: imitation, weight: .nan}]",), "'imitation': weight must be finite, got nan"),
    "clip": (("objectives=[{name: acceptance_reward, clip: -1}]",), "clip must be positive or null, got -1"),
    "divergence's setting": (
        ("objectives=[{name: imitation, divergence: {name: jensen_shannon, beta: 2}}]",),
        r"objective 'imitation': divergence 'jensen_shannon': beta must lie in \(0, 1\), got 2",
    ),
    "rule": (
        ("objectives=[{name: imitation}, {name: expected_length, rule: typical}]",),
        "objectives: objective 'expected_length': no verification rule is called 'typical'; did you mean",
    ),
    "not sampled": (("objectives=[{name: acceptance_reward}]",), "drafter.mode is 'topk'; set drafter.mode=sampled"),
    "one chain": (
        ("objectives=[{name: acceptance_reward, baseline: group}]", *SAMPLED),
        "hold one chain; set drafter.width=2 or more and drafter.num_nodes=8 or more",
    ),
    "dependent siblings": (
        ("objectives=[{name: acceptance_reward, baseline: leave_one_out}]", "drafter.num_nodes=8",
         "drafter.mode=sampled_without_replacement", "drafter.name=eagle3"),
        "needs independent siblings; set drafter.mode=sampled",
    ),
    "sampled and n-grams": (
        ("drafter.name=ngram", "drafter.mode=sampled", "objectives=[{name: imitation}]"),
        "drafter.name=ngram drafts in mode topk, not drafter.mode=sampled; set drafter.name=eagle3",
    ),
    "sampled and lookup": (
        ("drafter.mode=sampled", "drafter.lookup=2"),
        "lookup=2 adds nodes that the drafter did not draw; set it to 0 in mode 'sampled'",
    ),
    "lookup in SGLang": (
        ("engine.name=sglang", "drafter.name=eagle3", "drafter.lookup=2"),
        "drafter.lookup=2: SGLang's trees take no lookup; leave the key out, or set it to 0",
    ),
    "unknown rule": (("rule=greeedy",), "rule: no verification rule is called 'greeedy'; did you mean 'greedy'"),
    "no rule": (("rule=pathlib:Path",), "rule: .*'pathlib:Path' is pathlib:Path, which is no subclass of .*Verificat"),
    "replay": (("rule=rejection", *SAMPLED), "rule: the rule 'rejection' is not replayable: .*; set rule=null"),
    "greedy": (("rule=greedy", "temperature=0.5"), "rule=greedy needs temperature=0, got 0.5; set rule=null"),
    "not in SGLang": (
        ("engine.name=sglang", "drafter.name=medusa"),
        "drafter.name=medusa is none that SGLang has; with engine.name=sglang set drafter.name=eagle3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", OBJECTIVES)
def test_objectives_are_checked_before_a_model_is_loaded(why: str) -> None:
    pairs, message = OBJECTIVES[why]
    config = load_config(overrides=["model=/nowhere", *pairs])  # loading it would be another error
    with pytest.raises(ConfigError, match=message):
        spec.resolve(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vllm", "engine.name: no engine is called 'vllm'; did you mean .* There are sglang, transformers, and any"),
        ("pathlib:Path", "engine.name: the engine 'pathlib:Path' is pathlib:Path, which is no subclass of .*.Engine"),
        ("aurora_rl.envs:Engine", "engine.name: the engine 'aurora_rl.envs:Engine' is .*, which lacks commit, logits"),
    ],
)
def test_engines_are_checked_before_a_model_is_loaded(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec.resolve(load_config(overrides=["model=/nowhere", f"engine.name={name}"]))


class NodesOfTwo(TransformersEngine):
    max_nodes = 2


def test_an_engine_by_its_import_path_has_limits_of_its_own() -> None:
    config = load_config(overrides=[f"engine.name={__name__}:NodesOfTwo", "drafter.depth=2", "drafter.num_nodes=2"])
    assert spec.resolve(config).engine_class is NodesOfTwo
    config.drafter.num_nodes = 4
    with pytest.raises(ConfigError, match="trees of 4 nodes, and the engine verifies 2 at most"):
        spec.resolve(config)


def test_device_and_dtype(config: Config) -> None:
    run = spec.resolve(config)
    assert (run.device, run.dtype) == (torch.device("cpu"), torch.float32)
    config.dtype = "auto"
    assert spec.resolve(config).dtype in (torch.bfloat16, torch.float32)
    config.device = "warp"
    with pytest.raises(ConfigError, match="device='warp' cannot be used here .*; try cpu"):
        spec.resolve(config)


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("drafter.num_nodes=2", "drafter: num_nodes=2 cannot hold one path of depth 4"),
        ("drafter.name=no_such_module:X", "drafter.name: the drafter 'no_such_module:X' cannot be imported"),
        ("drafter.name=aurora_rl.cli.config:Config", "is no subclass of aurora_rl.policies.drafter.Drafter"),
        ("drafter.name=medua", "drafter.name: no drafter is called 'medua'; did you mean 'medusa'"),
        (
            "drafter.name=aurora_rl.policies:Drafter",
            "is aurora_rl.policies:Drafter, which lacks allocate, context_logits",
        ),
        (
            "drafter.options={heads: 3}",
            "drafter.options: MedusaDrafter has no setting 'heads'; did you mean 'num_heads'",
        ),
        ("drafter.options={num_heads: 2.5}", "drafter.options: MedusaDrafter: num_heads must be an integer, got 2.5"),
        ("drafter.lookup=-1", "drafter.lookup must not be negative, got -1"),
        ("drafter.name=hybrid", "drafter.name=hybrid is drafter.name=medusa drafter.lookup=2 now, and its"),
        (
            "drafter.name=hybrid; drafter.options={learned: eagle3, lookup: 3}",
            "drafter.name=hybrid is drafter.name=eagle3 drafter.lookup=3 now",
        ),
        (
            "drafter.options={learned: eagle3, lookup: 3}",
            "drafter.options.learned of the drafter hybrid is drafter.name=eagle3 drafter.lookup=3 now",
        ),
        (
            "drafter.options={lookup: 4}",
            "drafter.options.lookup of the drafter hybrid is drafter.name=medusa drafter.lookup=4 now",
        ),
        ("device=warp", "device='warp' cannot be used here"),
        (
            "drafter.num_nodes=65; drafter.depth=6",
            "drafter.depth=6, drafter.width=4 and drafter.num_nodes=65 make trees of 65 nodes, and the engine verifies "
            "64 at most; set drafter.num_nodes=64 or less",
        ),
        ("drafter.num_nodes=null; drafter.width=9; drafter.depth=9", "drafter.num_nodes=null make trees of 657 nodes"),
        ("traffic.path=/nowhere.jsonl", "cannot read requests from /nowhere.jsonl"),
        ("traffic.requests=99999999", "asked for 99999999 requests; the generator has"),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(pair: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        spec.traffic(
            spec.resolve(load_config(overrides=["model=/never/read", "drafter.depth=4", *pair.split("; ")])).config
        )


def test_the_limit_holds_for_the_generator_too(config: Config) -> None:
    config.traffic.limit = 3
    assert len(spec.traffic(config)) == 3
    config.traffic.limit = 99
    assert len(spec.traffic(config)) == 5


def test_prompts_that_cannot_be_served(config: Config, target: spec.Target, tmp_path: Path) -> None:
    prompts = spec.traffic(config)
    assert spec.request_queue(spec.resolve(config), target, prompts).total == 5
    config.engine.max_length = 40
    reason = r"\(5\); the first: prompt '.*', turn 1: the prompt has \d+ tokens; with max_new_tokens=8 that exceeds"
    with pytest.raises(TrafficError, match=f"none of the prompts can be served {reason}"):
        spec.request_queue(spec.resolve(config), target, prompts)
    config.engine.max_length = 513
    with pytest.raises(ConfigError, match="engine.max_length=513 exceeds the context .*; set engine.max_length=512"):
        spec.request_queue(spec.resolve(config), target, prompts)


def test_a_chat_template_that_refuses(config: Config, tiny_folder: Path) -> None:
    target = spec.load(spec.resolve(config))
    target.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(TrafficError, match=f"the chat template of model '{tiny_folder}' refuses .*: no system role"):
        spec.request_queue(spec.resolve(config), target, generate(2))


def test_tokens_that_the_model_lacks_fail_their_prompt_alone(config: Config, tiny_folder: Path) -> None:
    target = spec.load(spec.resolve(config))
    target.tokenizer.add_tokens([f"<beyond-{i}>" for i in range(60)])  # ids up to 318; the model knows 300
    prompts = spec.traffic(config)
    beyond = replace(prompts[3], messages=({"role": "user", "content": "What is <beyond-59>?"},))
    requests = spec.request_queue(spec.resolve(config), target, [*prompts[:3], beyond, prompts[4]])
    assert (
        len(requests.failed) == 1 and "the tokenizer gives token 318, and the model knows 0..299" in requests.failed[0]
    )
    assert len(requests.first_prompts(64)) == 4
    spec.start_drafter(spec.resolve(config), target, requests.first_prompts(64))  # the target reads them


@pytest.mark.parametrize("name", ["eagle3", "medusa", "dflash"])
@pytest.mark.parametrize("own_learner", [True, False])
def test_both_halves_start_from_the_same_drafter(
    config: Config, target: spec.Target, tmp_path: Path, name: str, own_learner: bool
) -> None:
    config.drafter.name = name
    requests = spec.request_queue(spec.resolve(config), target, spec.traffic(config))
    served, learner_config = spec.first_drafter(
        spec.resolve(config), target, requests, tmp_path / "day0" if own_learner else None
    )
    learned = spec.start_drafter(spec.resolve(learner_config), target, [])
    assert spec.handshake(target.parts, served, "eagle3") == spec.handshake(target.parts, learned, "eagle3")
    assert all(torch.equal(t, learned.published()[key]) for key, t in served.published().items())
    assert config.drafter.path is None
    # Only a drafter that is handed on in a folder can know the prompts.
    knows = not served.draft_vocab.equal(spec.start_drafter(spec.resolve(config), target, []).draft_vocab)
    assert knows == own_learner == (learner_config.drafter.path is not None)


def test_another_draft_vocabulary_is_a_mismatch(config: Config, target: spec.Target) -> None:
    ours = spec.handshake(target.parts, spec.start_drafter(spec.resolve(config), target, []), config.drafter.name)
    config.drafter.vocab_size = 32
    mismatch = ours.mismatch(
        spec.handshake(target.parts, spec.start_drafter(spec.resolve(config), target, []), config.drafter.name)
    )
    assert mismatch is not None and "draft_map_checksum" in mismatch


def test_lookup_is_on_where_trees_can_take_it(config: Config) -> None:
    def lookup(*pairs: str) -> int:
        return spec.resolve(load_config(overrides=["device=cpu", *pairs])).tree.lookup

    assert spec.resolve(config).tree == TreeShape(4, 4, 4, lookup=2)
    assert lookup("drafter.name=eagle3") == lookup("drafter.lookup=null") == 2
    assert lookup("drafter.name=ngram") == lookup("drafter.mode=sampled") == lookup("drafter.lookup=0") == 0
    assert lookup("engine.name=sglang", "drafter.name=eagle3") == 0
    assert lookup("drafter.lookup=3", "drafter.name=ngram") == 3


def test_trees_deeper_than_the_drafter_drafts_are_refused(config: Config, target: spec.Target) -> None:
    config.drafter.depth, config.drafter.num_nodes = 5, 5
    with pytest.raises(ConfigError, match="drafter.depth=5 is more than the 4 nodes that this drafter"):
        spec.start_drafter(spec.resolve(config), target, [])
    config.drafter.options = {"num_heads": 5}
    assert spec.start_drafter(spec.resolve(config), target, []).max_depth == 5


def test_a_drafter_that_could_not_be_saved_is_refused_before_it_serves(config: Config, target: spec.Target) -> None:
    config.drafter.name, config.drafter.feature_layers = "eagle3", [0, 1, 3]
    with pytest.raises(
        ConfigError, match=r"drafter.name=eagle3 cannot be saved: feature_layers has 3; engines capture"
    ):
        spec.start_drafter(spec.resolve(config), target, [])
    config.drafter.feature_layers = [0, 1]
    spec.start_drafter(spec.resolve(config), target, [])
    config.engine.name = "sglang"
    with pytest.raises(ConfigError, match="cannot be saved: .* SGLang cannot capture what enters layer 0"):
        spec.start_drafter(spec.resolve(config), target, [])


def test_a_run_starts_from_a_drafter_of_an_older_target_if_told_so(
    config: Config, target: spec.Target, tmp_path: Path
) -> None:
    save_drafter(spec.start_drafter(spec.resolve(config), target, []), tmp_path / "drafter")
    config.drafter.path = str(tmp_path / "drafter")
    newer = replace(target, parts=replace(target.parts, head=TargetHead(target.parts.head.weight + 0.1)))
    with pytest.raises(CheckpointError, match="the drafter was trained for others"):
        spec.start_drafter(spec.resolve(config), newer, [])
    config.drafter.made_for = "any"
    assert spec.start_drafter(spec.resolve(config), newer, []).made_for == newer.parts.fingerprint


def test_a_drafter_for_another_model_names_what_does_not_match(
    config: Config, target: spec.Target, tmp_path: Path
) -> None:
    config.drafter.name = "eagle3"
    save_drafter(spec.start_drafter(spec.resolve(config), target, []), tmp_path / "drafter")
    config.drafter.path = str(tmp_path / "drafter")
    spec.start_drafter(spec.resolve(config), target, [])
    document = json.loads((tmp_path / "drafter" / "config.json").read_text())

    def edit(**entries: object) -> None:
        (tmp_path / "drafter" / "config.json").write_text(json.dumps({**document, **entries}))

    edit(hidden_size=64)
    with pytest.raises(CheckpointError, match="drafter: config.json: hidden_size is 64, the target has 32"):
        spec.start_drafter(spec.resolve(config), target, [])
    edit(intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"tensor 'midlayer.mlp.gate_proj.weight' has shape \(64, 32\)"):
        spec.start_drafter(spec.resolve(config), target, [])
    edit(architectures=["MedusaDrafter"])
    with pytest.raises(CheckpointError, match="config.json is of MedusaDrafter, and Eagle3Drafter is asked for"):
        spec.start_drafter(spec.resolve(config), target, [])
    config.drafter.path = str(tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        spec.start_drafter(spec.resolve(config), target, [])


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
def test_what_started_a_drafter_is_in_its_folder(config: Config, target: spec.Target, tmp_path: Path) -> None:
    config.drafter.name, config.drafter.options, config.drafter.depth = "their_drafters:Narrow", {"heads": 3}, 3
    started = spec.start_drafter(spec.resolve(config), target, [])
    save_drafter(started, tmp_path / "drafter")
    config.drafter.path, config.drafter.options = str(tmp_path / "drafter"), {}
    read = spec.start_drafter(spec.resolve(config), target, [])
    assert read.published().keys() == started.published().keys() and read.max_depth == 3
    with pytest.raises(ConfigError, match="drafter.options: Narrow: heads must be an integer, got 2.5"):
        config.drafter.options = {"heads": 2.5}
        spec.resolve(config)
    assert spec.handshake(target.parts, read, "mine").feature_layers == (3,)
    read.feature_layers = [3]  # type: ignore[assignment]
    assert spec.handshake(target.parts, read, "mine").feature_layers == (3,)


@pytest.mark.usefixtures("third_party_drafters")
def test_a_class_that_makes_no_drafter_is_named(config: Config, target: spec.Target) -> None:
    config.drafter.name = "their_drafters:Returnless"
    with pytest.raises(ConfigError, match="drafter.name=their_drafters:Returnless: from_target gave None"):
        spec.start_drafter(spec.resolve(config), target, [])
