"""Recordings to learn from: opened, or made by letting the target answer chats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from tensordict import TensorDict
from typing_extensions import override

from aurora_rl.cli.assembly import VOCAB_PROMPTS, LoadedTarget, engine_maker
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.progress import Watch, watch
from aurora_rl.cli.spec import RunSpec
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import generation_processors
from aurora_rl.envs.verification.rules import require_replayable, rule_of_code
from aurora_rl.models.loading import stop_token_ids
from aurora_rl.policies import Drafter
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.trajectories import validate
from aurora_rl.workload.traffic import Prompt


def fingerprint(folders: Sequence[str], prompts: Sequence[Prompt]) -> str:
    """Return a checksum of the data: the prompts and their order, or each recording's first trajectories."""
    recordings = [TrajectoryDataset(folder) for folder in folders]
    found = [recording.digest(min(len(recording), VOCAB_PROMPTS)) for recording in recordings]
    written = json.dumps([found, [asdict(prompt) for prompt in prompts]], default=list)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def sources(folders: Sequence[str], path: str | None) -> str:
    """Return what names the data of a training: its recordings, or the chats at ``path`` (None: built in)."""
    recordings = " ".join(f"--recording {folder}" for folder in folders)
    return recordings or ("the built-in traffic" if path is None else f"traffic.path={path}")


def num_to_learn(count: int, share: float) -> int:
    """Return the number of trajectories to learn from; the rest, a share but at least one, is held out.

    >>> num_to_learn(20, 0.1), num_to_learn(4, 0.1)
    (18, 3)
    """
    return count - max(round(count * share), 1)


def questions(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return what the target is to answer: the chats without their last answer, if they have one.

    Follow-ups and stop strings are left out: they are for serving. So are chats that nobody may learn from.

    Raises:
        ConfigError: A chat has nothing but answers, or nobody may learn from any.
    """
    asked = []
    for prompt in prompts:
        if not prompt.learn:
            continue
        messages = prompt.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ConfigError(f"traffic.path: chat {prompt.id!r} has answers only; put a question before them")
        asked.append(replace(prompt, messages=messages, follow_ups=(), stop=()))
    if not asked:
        raise ConfigError(f"traffic.path: all {len(prompts)} chats say learn=false; train on chats that do not say so")
    return asked


def recorded_prompts(folders: Sequence[Path], count: int) -> list[list[int]]:
    """Return about ``count`` of the first prompts of recordings, as many of each."""
    prompts: list[list[int]] = []
    for folder in folders:
        recording = TrajectoryDataset(folder)
        if not len(recording):
            raise ConfigError(f"--recording {folder} holds no trajectories; learner.recording={folder} records a run's")
        for index in range(min(len(recording), -(-count // len(folders)))):
            sequence = recording[index]["sequence"]
            prompts.append(sequence["tokens"][: int(sequence["prompt_length"])].tolist())
    return prompts


def recording_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each recording: the last part of its path that tells it from the others.

    Example:
        >>> recording_names([Path("/runs/code"), Path("/runs/math")])
        ['code', 'math']
        >>> recording_names([Path("/runs/1/recording"), Path("/runs/2/recording")])
        ['1', '2']
    """
    longest = max(len(folder.parts) for folder in folders)
    count = next(n for n in range(1, longest + 1) if len({f.parts[-n:] for f in folders}) == len(set(folders)))
    ends = [folder.parts[-count:] for folder in folders]
    while min(map(len, ends)) > 1 and len({end[-1] for end in ends}) == 1:
        ends = [end[:-1] for end in ends]
    return ["/".join(end) for end in ends]


def open_recording(folder: Path, target: LoadedTarget, drafter: Drafter) -> TrajectoryDataset:
    """Open a recording, and check that it can be replayed and that its first trajectory fits target and drafter."""
    vocab_size, width = target.parts.head.weight.shape
    with naming(f"--recording {folder}"):
        recording = TrajectoryDataset(folder, drafter.feature_layers)
        feature_size = width * len(drafter.feature_layers)
        first = recording[0]
        validate(first, vocab_size=vocab_size, hidden_size=width, feature_size=feature_size)
        for code in set(recording.numbers("sampling.rule")):
            require_replayable(rule_of_code(code))
    return recording


class ShownRecording(TrajectoryDataset):
    """A recording whose growth is shown."""

    watch: Watch

    @override
    def append(self, trajectory: TensorDict) -> None:
        super().append(trajectory)
        self.watch.tell(len(self))


def record_answers(
    spec: RunSpec, target: LoadedTarget, requests: RequestQueue, drafter: Drafter, folder: Path, console: Console
) -> TrajectoryDataset:
    """Serve the requests that are not recorded yet by an engine in this process, with the drafter as it starts."""
    config, model = spec.config, target.model
    stop_tokens = stop_token_ids(model, target.tokenizer)
    with naming(f"model={config.model}"):
        processors = generation_processors(model, stop_tokens) if config.generation_config == "auto" else None
    for reason in requests.failed:
        console.print(f"not recorded: {reason}", soft_wrap=True)
    waiting, recording = list(iter(requests, None)), ShownRecording(folder, drafter.feature_layers)
    with watch(console, "recording", len(waiting), len(recording)) as recording.watch:
        record_requests(
            model,
            drafter,
            waiting,
            recording,
            shape=spec.tree,
            num_slots=config.engine.slots,
            stop_tokens=stop_tokens,
            processors=processors,
            seed=config.seed,
            engine=engine_maker(spec),
            rule=spec.rule,
        )
    return recording
