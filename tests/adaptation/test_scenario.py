"""Scenarios: those of the package, what is refused, and prompts that never come twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aurora_rl.adaptation.scenario import BUILT_IN, phase_prompts, read_scenario, to_yaml

PHASES = "phases: [{name: code, requests: 12, domains: [code]}, {name: sql, requests: 12, domains: [sql]}]\nwindow: 2\n"
ARMS = "arms: {scratch: {learns: true}}\n"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_scenario_of_the_package_has_its_prompts(name: str, tmp_path: Path) -> None:
    scenario = read_scenario(name)
    phases, training = phase_prompts(scenario, seed=0)
    assert [len(part) for part in phases] == (
        [sum(p.requests for p in scenario.phases)] if scenario.mixed else [p.requests for p in scenario.phases]
    )
    texts = [prompt.messages[0]["content"] for part in [training, *phases] for prompt in part]
    assert len(set(texts)) == len(texts)
    for phase, prompts in zip(scenario.phases, phases, strict=False):
        assert scenario.mixed or {prompt.domain for prompt in prompts} == set(phase.domains)
    (tmp_path / "again.yaml").write_text(to_yaml(scenario))
    assert read_scenario(tmp_path / "again.yaml") == scenario


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("phases: [", "is not valid YAML"),
        (ARMS, "needs phases and arms"),
        (PHASES, "needs phases and arms"),
        (PHASES + "arms: {a: {learn: true}}\n", "learn"),
        (PHASES + "seeds: many\n" + ARMS, "many"),
        (PHASES + "seeds: 0\n" + ARMS, "seeds must be at least 1, got 0"),
        (PHASES + "part_tokens: -1\nlive: {requests: 0}\n" + ARMS, "part_tokens must be at least 0, got -1"),
        (
            PHASES + "part_tokens: 4\nlive: {requests: 2}\n" + ARMS,
            "a scenario with part_tokens needs live.requests of 0",
        ),
        (PHASES + "arms: {a: {learns: true, by_part: false}}\n", "arm a has by_part: false, and the scenario has no"),
        (PHASES + "pace: 0\n" + ARMS, "pace must be above 0, got 0"),
        (PHASES.replace("[sql]", "[cooking]") + ARMS, "unknown domain 'cooking'; there are code, sql"),
        (PHASES.replace("domains: [sql]", "path: a.jsonl, domains: [sql]") + ARMS, "give domains, or the path"),
        (PHASES.replace(", domains: [sql]", "") + ARMS, "give domains, or the path"),
        (PHASES.replace("requests: 12, domains: [sql]", "domains: [sql]") + ARMS, "requests of at least 1"),
        (PHASES.replace("window: 2", "window: 13") + ARMS, "window=13 is more than the 12 requests"),
        (PHASES + "arms: {static: {trained: true}}\n", "arm static is trained, and the scenario has no training"),
        (PHASES.replace("[sql]", "[sql], target_noise: 0.1") + "mixed: true\n" + ARMS, "has a target of its own"),
        (PHASES.replace("[sql]", "[sql], target_noise: -1") + ARMS, "target_noise is -1"),
        (PHASES + "live: {requests: 12}\n" + ARMS, "live.requests=12 must be less than the 12 requests"),
        (PHASES.replace("[sql]", "[sql, sql]") + ARMS, "domains names one twice"),
        (PHASES.replace("[sql]", "[sql], target_dtype: fp16") + ARMS, "target_dtype must be float32, .*, got fp16"),
        (PHASES + "arms: {a/b: {}}\n", "an arm's name is letters"),
        (PHASES + "arms: {plain: {}}\n", "and not 'plain'"),
        (PHASES + "arms: {a: {lookup_only: true, learns: true}}\n", "is lookup_only, and has no weights"),
        (PHASES + "live: {repeats: 0}\n" + ARMS, "live has a number that is too small"),
        (PHASES + "live: {requests: 2, arms: [sufix]}\n" + ARMS, "live.arms has 'sufix'; the arms are"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_scenario(path)


def test_an_unknown_scenario_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="there is no scenario 'shitf'; take .*shift"):
        read_scenario("shitf")


def test_phases_of_one_source_share_it_in_order(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"role": "user", "content": f"question {n}"}]}) for n in range(8)]
    (tmp_path / "file.jsonl").write_text("\n".join(lines))
    path, source = tmp_path / "mine.yaml", f"path: {tmp_path / 'file.jsonl'}"
    text = f"phases: [{{name: a, requests: 3, {source}}}, {{name: b, requests: 3, {source}}}]\n"
    path.write_text(f"{text}training: [{{name: t, requests: 2, {source}}}]\nwindow: 1\nlive: {{requests: 0}}\n{ARMS}")
    phases, training = phase_prompts(read_scenario(path), seed=0)
    said = [[prompt.messages[0]["content"][-1] for prompt in part] for part in [training, *phases]]
    assert said == [["0", "1"], ["2", "3", "4"], ["5", "6", "7"]]
    path.write_text(f"{text.replace('requests: 3', 'requests: 5')}window: 1\nlive: {{requests: 0}}\n{ARMS}")
    with pytest.raises(ValueError, match="has 8 prompts, and the scenario takes 10"):
        phase_prompts(read_scenario(path), seed=0)


def test_mixing_keeps_every_prompt_and_no_order() -> None:
    scenario = read_scenario("mixed")
    (mixed,), _ = phase_prompts(scenario, seed=0)
    domains = [prompt.domain for prompt in mixed]
    changes = sum(a != b for a, b in zip(domains, domains[1:], strict=False))
    assert changes > len(mixed) / 2
    assert phase_prompts(scenario, seed=1)[0][0] != mixed


def test_answers_that_go_on_to_the_budget_say_so_in_every_request(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PHASES.replace("[sql]", "[sql], ignore_eos: true") + ARMS)
    (code, sql), _ = phase_prompts(read_scenario(path), seed=0)
    assert [prompt.sampling for prompt in code] == [{}] * 12
    assert [prompt.sampling for prompt in sql] == [{"ignore_eos": True}] * 12
