"""Scenarios: ordered phases of traffic, and the arms that are compared on them."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aurora_rl.workload.traffic import DOMAINS, Prompt, generate_traffic, read_jsonl

PLAIN = "plain"
"""Name of plain decoding among the arms."""
_DTYPES = ("float32", "bfloat16", "float16", "float64")

BUILT_IN = sorted(each.name.removesuffix(".yaml") for each in files(__package__).joinpath("scenarios").iterdir())
"""Names of the scenarios that come with the package."""


@dataclass
class Phase:
    """Requests of one kind.

    Phases of the same source take its requests in turn, so that no request is served twice.
    """

    name: str = "???"
    """Name in the report; phases of one name are the same traffic, which comes back."""
    requests: int = 0
    """Number of requests."""
    domains: list[str] = field(default_factory=list)
    """Domains of the built-in traffic, with equal shares; none takes ``path``."""
    path: str | None = None
    """JSONL file of prompts."""
    target_noise: float = 0.0
    """Standard deviation of the noise on the target's matrices, over their own: a target that was trained further."""
    target_dtype: str | None = None
    """Dtype of the target in this phase; null is the run's."""
    ignore_eos: bool = False
    """Whether answers go on to the token budget."""


@dataclass
class Arm:
    """One way to draft for the scenario's stream."""

    set: list[str] = field(default_factory=list)
    """``key=value`` pairs over the run's configuration."""
    lookup_only: bool = False
    """Whether the drafter rests, and all nodes are looked up."""
    learns: bool = False
    """Whether it learns from the stream as it is served."""
    trained: bool = False
    """Whether it starts from a drafter that has learned from the scenario's training traffic."""
    by_part: bool = True
    """Whether it learns from a part of an answer as soon as that is there, or from requests that have ended. It is for
    scenarios with ``part_tokens``."""


@dataclass
class Live:
    """Measurement of tokens per second, with a learner running next to arms that learn."""

    requests: int = 8
    """Requests of a sample, the last of each phase; 0 measures nothing."""
    arms: list[str] = field(default_factory=list)
    """Names of the arms to measure; none is all."""
    slots: list[int] = field(default_factory=lambda: [1])
    """Numbers of slots to measure at."""
    repeats: int = 3
    """Turns of each arm."""


@dataclass
class Scenario:
    """A stream of requests, and the arms that are compared on it."""

    about: str = ""
    """Purpose of the scenario, in a sentence."""
    phases: list[Phase] = field(default_factory=list)
    """The stream, in order."""
    mixed: bool = False
    """Whether the requests of all phases are shuffled into one phase."""
    training: list[Phase] = field(default_factory=list)
    """Traffic that arms with ``trained`` have learned from before; it is not part of the stream."""
    arms: dict[str, Arm] = field(default_factory=dict)
    """Arms by name. Plain decoding, whose acceptance length is 1, is always measured."""
    set: list[str] = field(default_factory=list)
    """``key=value`` pairs over the run's configuration, for all arms."""
    seeds: int = 1
    """Runs of each arm that learns."""
    window: int = 20
    """Requests of a point of a curve."""
    part_tokens: int = 0
    """Tokens of an answer's parts, by which long answers are measured and learned from; 0 leaves answers whole."""
    pace: float = 3.0
    """Optimizer steps that a learner takes in the time of what it gets at once, a request or a part of one: those that
    one next to the server affords."""
    live: Live = field(default_factory=Live)


def read_scenario(name: str | os.PathLike[str]) -> Scenario:
    """Read a scenario of the package by its name, or a YAML file.

    Raises:
        ValueError: There is no such scenario, or it cannot be used; the message names what is wrong.

    Example:
        >>> [phase.name for phase in read_scenario("smoke").phases]
        ['code', 'sql', 'code']
    """
    path = files(__package__).joinpath("scenarios", f"{name}.yaml") if name in BUILT_IN else Path(name)
    if not path.is_file():
        raise ValueError(f"there is no scenario {str(name)!r}; take {', '.join(BUILT_IN)}, or a YAML file")
    text = path.read_text()
    try:
        scenario = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Scenario), OmegaConf.create(text)))
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"scenario {name}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the YAML parser has its own hierarchy of errors
        raise ValueError(f"scenario {name} is not valid YAML: {error}") from error
    assert isinstance(scenario, Scenario)
    try:
        _check(scenario)
    except ValueError as error:
        raise ValueError(f"scenario {name}: {error}") from None
    return scenario


def _check(scenario: Scenario) -> None:
    if not scenario.phases or not scenario.arms:
        raise ValueError("it needs phases and arms")
    for each in (*scenario.phases, *scenario.training):
        if each.name == "???" or each.requests < 1:
            raise ValueError(f"a phase needs a name and requests of at least 1, got {each}")
        if bool(each.domains) == (each.path is not None):
            raise ValueError(f"phase {each.name}: give domains, or the path of a JSONL file")
        if unknown := [domain for domain in each.domains if domain not in DOMAINS]:
            raise ValueError(f"phase {each.name}: unknown domain {unknown[0]!r}; there are {', '.join(DOMAINS)}")
        if len(set(each.domains)) < len(each.domains):
            raise ValueError(f"phase {each.name}: domains names one twice: {each.domains}")
        if each.target_dtype not in (None, *_DTYPES):
            raise ValueError(f"phase {each.name}: target_dtype must be {', '.join(_DTYPES)}, got {each.target_dtype}")
        if each.target_noise < 0:
            raise ValueError(f"phase {each.name}: target_noise is {each.target_noise}, below 0")
    changed = [phase.name for phase in scenario.phases if phase.target_noise or phase.target_dtype]
    if scenario.mixed and changed:
        raise ValueError(f"it is mixed, and phase {changed[0]} has a target of its own")
    for name_of_arm, arm in scenario.arms.items():
        if not re.fullmatch(r"[\w.-]+", name_of_arm) or name_of_arm == PLAIN:
            raise ValueError(
                f"an arm's name is letters, digits, '-', '_' and '.', and not {PLAIN!r}; got {name_of_arm!r}"
            )
        if arm.lookup_only and (arm.learns or arm.trained):
            raise ValueError(f"arm {name_of_arm} is lookup_only, and has no weights to learn or train")
    if not scenario.training and (trained := [arm for arm, each in scenario.arms.items() if each.trained]):
        raise ValueError(f"arm {trained[0]} is trained, and the scenario has no training traffic")
    for key in ("seeds", "window"):
        if getattr(scenario, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(scenario, key)}")
    if scenario.part_tokens < 0:
        raise ValueError(f"part_tokens must be at least 0, got {scenario.part_tokens}")
    if not scenario.part_tokens and (whole := [name for name, arm in scenario.arms.items() if not arm.by_part]):
        raise ValueError(f"arm {whole[0]} has by_part: false, and the scenario has no part_tokens")
    if scenario.part_tokens and scenario.live.requests:
        raise ValueError("live measures whole requests; a scenario with part_tokens needs live.requests of 0")
    if not scenario.pace > 0:
        raise ValueError(f"pace must be above 0, got {scenario.pace}")
    live = scenario.live
    if live.requests < 0 or live.repeats < 1 or not all(slots >= 1 for slots in live.slots):
        raise ValueError(f"live has a number that is too small: {live}")
    if unknown := [arm for arm in live.arms if arm not in scenario.arms]:
        raise ValueError(f"live.arms has {unknown[0]!r}; the arms are {', '.join(scenario.arms)}")
    shortest = min(phase.requests for phase in scenario.phases)
    if live.requests >= (sum(phase.requests for phase in scenario.phases) if scenario.mixed else shortest):
        raise ValueError(
            f"live.requests={live.requests} must be less than the {shortest} requests of a phase; 0 "
            "measures no tokens per second"
        )
    if scenario.window > shortest:
        raise ValueError(f"window={scenario.window} is more than the {shortest} requests of a phase")


def phase_prompts(scenario: Scenario, seed: int) -> tuple[list[list[Prompt]], list[Prompt]]:
    """Return the prompts of every phase, and those of the training traffic. None comes twice.

    A mixed scenario has one phase. Follow-ups are left out: they depend on the answers.

    Raises:
        ValueError: A source has too few prompts; the message says how many there are.
    """
    every = [*scenario.training, *scenario.phases]
    wanted = Counter[tuple[str, bool]]()
    for phase in every:
        wanted.update(_shares(phase))
    pools = {source: iter(_pool(*source, count, seed)) for source, count in wanted.items()}
    draw, taken = random.Random(seed), []
    for phase in every:
        prompts = [next(pools[source]) for source, count in _shares(phase).items() for _ in range(count)]
        if len(phase.domains) > 1:
            draw.shuffle(prompts)
        if phase.ignore_eos:
            prompts = [replace(prompt, sampling={**prompt.sampling, "ignore_eos": True}) for prompt in prompts]
        taken.append(prompts)
    training = [prompt for part in taken[: len(scenario.training)] for prompt in part]
    phases = taken[len(scenario.training) :]
    if scenario.mixed:
        together = [prompt for part in phases for prompt in part]
        draw.shuffle(together)
        phases = [together]
    return phases, training


def _shares(phase: Phase) -> dict[tuple[str, bool], int]:
    """Return how many requests of a phase are of each source: a domain, or the path of a file and True."""
    if phase.path is not None:
        return {(phase.path, True): phase.requests}
    count = len(phase.domains)
    return {
        (domain, False): phase.requests // count + (place < phase.requests % count)
        for place, domain in enumerate(phase.domains)
    }


def _pool(name: str, is_file: bool, count: int, seed: int) -> Sequence[Prompt]:
    if not is_file:
        return generate_traffic(count, seed, domains=[name], unseen=False)
    found = read_jsonl(name)
    if len(found) < count:
        raise ValueError(f"{name} has {len(found)} prompts, and the scenario takes {count}; lower its requests")
    return [replace(prompt, follow_ups=()) for prompt in found[:count]]


def to_yaml(scenario: Scenario) -> str:
    """Return the scenario as YAML that :func:`read_scenario` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(scenario))
