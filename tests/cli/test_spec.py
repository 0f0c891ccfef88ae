"""The configuration resolved: what is refused before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.config import Config, DrafterConfig, load_config, to_yaml
from aurora_rl.cli.errors import ConfigError
from aurora_rl.envs import TransformersEngine
from aurora_rl.policies import TreeShape

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
    "no integer": (("objectives=[{name: imitation, steps: three}]",), "steps must be an integer or null, got 'three'"),
    "no number": (("objectives=[{name: imitation, weight: .nan}]",), "weight must be finite and not negative, got nan"),
    "clip": (("objectives=[{name: acceptance_reward, clip: -1}]",), "clip must be positive or null, got -1"),
    "divergence's setting": (
        ("objectives=[{name: imitation, divergence: {name: jensen_shannon, beta: 2}}]",),
        r"objective 'imitation': divergence 'jensen_shannon': beta must lie in \(0, 1\), got 2",
    ),
    "rule": (
        ("objectives=[{name: imitation}, {name: expected_length, rule: typical}]",),
        "objectives: objective 'expected_length': no verification rule is called 'typical'; there are",
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
        "drafter.lookup=2: trees of SGLang take no lookup; leave the key out, or set it to 0",
    ),
    "lookup in vLLM": (
        ("engine.name=vllm", "drafter.name=eagle3", "drafter.lookup=2"),
        "drafter.lookup=2: trees of vLLM take no lookup; leave the key out, or set it to 0",
    ),
    "medusa in vLLM": (
        ("engine.name=vllm", "drafter.name=medusa"),
        r"medusa does not learn with vLLM \(vLLM serves it as it is\); with engine.name=vllm set drafter.name=eagle3",
    ),
    "ngram in vLLM": (
        ("engine.name=vllm", "drafter.name=ngram"),
        r"ngram does not learn with vLLM \(vLLM does not serve it\)",
    ),
    "unknown rule": (("rule=greeedy",), "rule: no verification rule is called 'greeedy'; did you mean 'greedy'"),
    "no rule": (("rule=pathlib:Path",), "rule: .*'pathlib:Path' is pathlib:Path, which is no subclass of .*Verificat"),
    "replay": (("rule=rejection", *SAMPLED), "rule: the rule 'rejection' is not replayable: .*; set rule=null"),
    "greedy": (("rule=greedy", "temperature=0.5"), "rule=greedy needs temperature=0, got 0.5; set rule=null"),
    "not in SGLang": (
        ("engine.name=sglang", "drafter.name=medusa"),
        r"drafter.name=medusa does not learn with SGLang \(SGLang does not serve it\); .* set drafter.name=eagle3",
    ),
    "not learned in SGLang": (
        ("engine.name=sglang", "drafter.name=dflash"),
        r"drafter.name=dflash does not learn with SGLang \(SGLang serves it as it is\); .* set drafter.name=eagle3",
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
        ("vlm", "engine.name: no engine is called 'vlm'; .* There are sglang, transformers, vllm, and any"),
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
    pairs = [f"engine.name={__name__}:NodesOfTwo", "drafter.depth=2"]
    assert spec.resolve(load_config(overrides=[*pairs, "drafter.num_nodes=2"])).engine_class is NodesOfTwo
    with pytest.raises(ConfigError, match="trees of 4 nodes, and the engine verifies 2 at most"):
        spec.resolve(load_config(overrides=[*pairs, "drafter.num_nodes=4"]))


def test_device_and_dtype(configured: Callable[..., Config]) -> None:
    run = spec.resolve(configured())
    assert (run.device, run.dtype) == (torch.device("cpu"), torch.float32)
    assert spec.resolve(configured("dtype=auto")).dtype in (torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="device='warp' cannot be used here .*; try cpu"):
        spec.resolve(configured("device=warp"))


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        (
            "drafter.num_nodes=2",
            "^drafter.depth=4 is more than drafter.num_nodes=2, .*; set drafter.num_nodes=4 or more$",
        ),
        (
            "drafter.depth=9",
            "^drafter.depth=9 is more than drafter.num_nodes=4, .*; set drafter.num_nodes=9 or more$",
        ),
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
        ("device=meta", "device='meta' cannot be used here"),
        (
            "drafter.num_nodes=65; drafter.depth=6",
            "drafter.depth=6, drafter.width=4 and drafter.num_nodes=65 make trees of 65 nodes, and the engine verifies "
            "64 at most; set drafter.num_nodes=64 or less",
        ),
        ("drafter.num_nodes=null; drafter.width=9; drafter.depth=9", "drafter.num_nodes=null make trees of 657 nodes"),
        ("traffic.path=/nowhere.jsonl", "cannot read requests from /nowhere.jsonl"),
        (
            "traffic.requests=99999999",
            r"^traffic.requests=99999999: .*; the generator has (\d+) distinct ones; ask for \1 or fewer$",
        ),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(pair: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        assembly.traffic(
            spec.resolve(load_config(overrides=["model=/never/read", "drafter.depth=4", *pair.split("; ")])).config
        )


def test_lookup_is_on_where_trees_can_take_it(config: Config) -> None:
    def lookup(*pairs: str) -> int:
        return spec.resolve(load_config(overrides=["device=cpu", *pairs])).tree.lookup

    assert spec.resolve(config).tree == TreeShape(4, 4, 4, lookup=8)
    assert lookup("drafter.name=eagle3") == lookup("drafter.lookup=null") == 8
    assert lookup("drafter.name=ngram") == lookup("drafter.mode=sampled") == lookup("drafter.lookup=0") == 0
    assert lookup("engine.name=sglang", "drafter.name=eagle3") == 0
    assert lookup("drafter.lookup=3", "drafter.name=ngram") == 3


def test_the_draft_vocabulary_follows_where_all_else_allows_it() -> None:
    def follows(*pairs: str) -> bool:
        return spec.resolve(load_config(overrides=["device=cpu", "drafter.name=eagle3", *pairs])).vocab_follows

    assert follows() and follows("drafter.vocab_follows=true") and not follows("drafter.vocab_follows=false")
    for pair, told in {
        "engine.name=sglang": "engine.name=sglang, whose map of draft tokens is read once",
        "drafter.mode=sampled": "drafter.mode=sampled, whose draws would lose their rows",
        "drafter.adapters=[acme]": r"drafter.adapters=\['acme'\], which share the rows",
        "learner.parallel=ddp": "learner.parallel=ddp, whose ranks share them",
        "privacy.zero_retention=true": "privacy.zero_retention=true, which keeps no answers",
    }.items():
        assert not follows(pair) and not follows(pair, "drafter.vocab_follows=false")
        with pytest.raises(ConfigError, match=f"drafter.vocab_follows=true does not go with {told}; leave it out"):
            follows(pair, "drafter.vocab_follows=true")


def test_a_drafter_without_rows_that_move_is_refused_before_anything_is_loaded() -> None:
    pairs = ["device=cpu", "drafter.name=ngram", "drafter.vocab_follows=true", "learner.spawn=false"]
    told = "^drafter.vocab_follows=true: drafter.name=ngram has no rows that could be another token's; leave it out"
    with pytest.raises(ConfigError, match=told):
        spec.resolve(load_config(overrides=pairs))
    spec.resolve(load_config(overrides=[*pairs[:2], "drafter.vocab_follows=false"]))


def test_traffic_without_a_budget_gets_one() -> None:
    assert spec.resolve(load_config(overrides=["device=cpu"])).sampling_params.max_tokens == 96
    assert spec.resolve(load_config(overrides=["device=cpu", "max_new_tokens=7"])).sampling_params.max_tokens == 7


def values(config: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (path, owner, key, value) of all that a configuration holds, to any depth."""
    if is_dataclass(config):
        items: Any = ((field.name, getattr(config, field.name)) for field in fields(config))
    else:
        items = config.items() if hasattr(config, "items") else enumerate(config)
    for key, value in items:
        yield f"{path}.{key}", config, key, value
        if is_dataclass(value) or (hasattr(value, "__getitem__") and not isinstance(value, str)):
            yield from values(value, f"{path}.{key}")


def test_nothing_of_a_resolved_configuration_can_be_changed() -> None:
    pairs = ["drafter.options={num_heads: 2}", "drafter.feature_layers=[1,2]"]
    loaded = load_config(
        overrides=[
            *pairs,
            "device=cpu",
            "privacy.opt_out=[a]",
            "http.cors_origins=[http://a:1]",
            "objectives=[{name: imitation, divergence: {name: jensen_shannon, beta: 0.5}}]",
        ]
    )
    before, config = to_yaml(loaded), spec.resolve(loaded).config
    tried = set()
    for path, owner, key, value in values(config):
        tried.add(path)
        with pytest.raises((FrozenInstanceError, TypeError)):
            if is_dataclass(owner):
                setattr(owner, key, value)
            else:
                owner[key] = value
    # A key, one of a section, an element of a list, a setting, and one in a mapping in a mapping in a list.
    some = {".seed", ".engine.slots", ".drafter.feature_layers.1", ".drafter.options.num_heads"}
    assert some | {".objectives.0.divergence.beta"} <= tried
    assert len(tried) > len(fields(Config))
    for more in (config.drafter.options, config.objectives[0]):
        with pytest.raises(TypeError):
            more["more"] = 1
    assert to_yaml(loaded) == before and config == loaded  # the caller's own is the same and frozen, too


def test_lists_and_mappings_of_the_caller_stay_the_callers_own() -> None:
    options, layers = {"num_heads": 3}, [1, 2]
    drafter = DrafterConfig(options=options, feature_layers=layers)  # type: ignore[arg-type]
    config = spec.resolve(Config(device="cpu", drafter=drafter)).config
    options["num_heads"], layers[0] = 5, 0
    assert (config.drafter.options, config.drafter.feature_layers) == ({"num_heads": 3}, (1, 2))


@pytest.mark.parametrize("pair", ["engine.url=http://h:1", "engine.plugin_address=ipc://p", 'engine.arguments=["--a"]'])
def test_a_key_of_an_engine_that_is_a_server_is_refused_by_one_that_is_not(pair: str) -> None:
    told = (
        rf"^{re.escape(pair)} has no effect with engine.name=transformers, .*; set engine.name=sglang or engine.name="
    )
    with pytest.raises(ConfigError, match=told):
        spec.resolve(load_config(overrides=[pair]))
