"""What learning costs the server: recording, a learner on the same cores, and swaps.

recording: the same requests are decoded in turns with and without their trajectories, which go over the wire to a
collector in another process. Greedy text is the same, so that the rounds of a pair are the same.

learner: a server and its learner, as under `aurora-rl serve` but for a fixed tree; the learner's process is stopped in
every other window of rounds. Texts and weights differ from window to window, so the time of a round is compared
as well as the throughput.

swap: of the swaps in the windows of the learner, the time that each takes, and the rounds of the second after it
against those of the second before it.

python benchmarks/presence.py --limit 8 --turns 10
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from common import MAX_LENGTH, arguments, cost, parse, prompts, write_result

from aurora_rl import Request, SamplingParams, SpecDecodeEnv, TargetParts, TreeShape
from aurora_rl.cli.assembly import first_drafter, load, request_queue
from aurora_rl.cli.config import load_config
from aurora_rl.cli.embedded import embedded_server
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.cli.spec import resolve
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.envs import Completion
from aurora_rl.models.loading import default_dtype, encode_chat, load_target
from aurora_rl.policies import get_drafter
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.rates import Rounds

GOALS = {"recording": 0.03, "learner": 0.15, "swap_in_rounds": 1.0, "round_after_swap": 0.05}
_TREE = TreeShape(4, 4, 4)


class Step(NamedTuple):
    """A round: when it began and ended, its tokens, its occupied slots, and the version that drafted."""

    began: float
    ended: float
    tokens: int
    occupied: int
    version: int


# ---- recording -------------------------------------------------------------------------------------------------------


def collect(pipe: Connection, handshake: Handshake) -> None:
    """Take trajectories, in a process of its own, until the pipe says that it is enough; return their number by it."""
    collector, taken = ZMQCollector("tcp://127.0.0.1:*", handshake=handshake), 0
    pipe.send(collector.address)
    while not pipe.poll():
        taken += len(collector.poll(0.1))
    collector.shutdown()
    pipe.send(taken)


def recording(options: argparse.Namespace) -> dict[str, Any]:
    """Decode the prompts with and without their trajectories, in turns whose order alternates."""
    dtype = default_dtype(options.device)
    model, tokenizer = load_target(options.model, dtype=dtype, device=options.device)
    parts = TargetParts.of(model)
    ids = [torch.tensor(encode_chat(tokenizer, prompt.messages)) for prompt in prompts(options)]
    vocab = torch.cat(ids).unique()
    drafter = get_drafter(options.drafter).from_target(parts, draft_vocab=vocab)
    handshake = Handshake.of(parts, drafter, options.drafter)

    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=collect, args=(end, handshake), daemon=True)
    process.start()
    sink, sent = TrajectorySink(pipe.recv(), handshake=handshake), 0

    def send(completion: Completion) -> None:
        nonlocal sent
        assert completion.trajectory is not None
        sink.extend(completion.trajectory)
        sent += 1

    # Greedy, and of one length whatever they say: both turns of a pair have the same rounds.
    sampling = SamplingParams(max_tokens=options.max_new_tokens, ignore_eos=True)
    waiting = list[Request]()
    requests = lambda: waiting.pop() if waiting else None  # noqa: E731
    room = max(map(len, ids)) + options.max_new_tokens
    decoder = SpeculativeDecoder(
        model, drafter, requests, shape=_TREE, max_length=room, num_slots=options.slots, on_completion=send
    )
    # Not a second SpeculativeDecoder: both environments share one engine and one policy.
    silent = SpecDecodeEnv(decoder.engine, requests, num_nodes=_TREE.max_nodes, record=False)
    policy = decoder.policy
    assert policy is not None

    def turn(env: SpecDecodeEnv) -> float:
        waiting[:] = [Request(number, prompt, sampling) for number, prompt in enumerate(ids)]
        began, td = time.perf_counter(), env.reset()
        while env.num_active:
            td = env.step_and_maybe_reset(policy(td))[1]
        return len(ids) * options.max_new_tokens / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {"recorded": [], "unrecorded": []}
    ways = [("recorded", decoder.env), ("unrecorded", silent)]
    for _, env in ways:
        turn(env)  # unmeasured
    for number in range(options.turns):
        for name, env in ways if number % 2 else reversed(ways):
            rates[name].append(turn(env))
        print(f"recording, turn {number + 1}: {rates['recorded'][-1] / rates['unrecorded'][-1]:.3f}", flush=True)
    sink.close(timeout=10.0)
    pipe.send(None)
    taken = pipe.recv()
    process.join(10)
    return {
        "tokens_per_second": {name: round(statistics.median(each), 2) for name, each in rates.items()},
        "throughput": cost(rates["unrecorded"], rates["recorded"], GOALS["recording"]),
        "trajectories": {"sent": sent, "taken": taken},
    }


# ---- a learner on the same machine -----------------------------------------------------------------------------------


def served_windows(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Serve with a learner that is stopped in every other window."""
    pairs = [
        f"model={options.model}",
        f"drafter.name={options.drafter}",
        f"device={options.device}",
        f"engine.slots={options.slots}",
        f"engine.threads={options.threads}",
        f"engine.max_length={MAX_LENGTH}",
        f"max_new_tokens={options.max_new_tokens}",
        f"run_dir={folder}",
        f"wire.trajectories=ipc://{folder}/trajectories",
        f"wire.weights=ipc://{folder}/weights",
        # Every round is alike: one tree, no plain windows, no texts to look up, and swaps at once.
        *("drafter.adaptive=false", "drafter.lookup=0", "baseline.share=0", "canary.share=0"),
        *options.overrides,
    ]
    config = load_config(overrides=pairs)
    torch.set_num_threads(config.engine.threads)
    spec = resolve(config)
    target = load(spec)
    found = prompts(options)
    # More than are served: a request takes a round at least for each five of its tokens.
    rounds = 2 * (options.turns + 1) * options.window
    times = math.ceil(5 * rounds * options.slots / (len(found) * options.max_new_tokens)) + 1
    queue = request_queue(spec, target, found * times)
    firsts = queue.first_prompts(len(found))
    drafter, learner_config = first_drafter(spec, target, firsts, folder / "drafter-day0")
    log = MetricsLog(folder / "metrics.jsonl", "server")
    ready = MetricsReader(log.path)
    learner = LearnerProcess(learner_config, folder)
    server = embedded_server(spec, target, queue, firsts[0], drafter, log)
    paces: dict[bool, list[float]] = {True: [], False: []}
    rates: dict[bool, list[float]] = {True: [], False: []}
    shares: dict[bool, list[float]] = {True: [], False: []}
    learning: list[list[Step]] = []
    try:
        learner.wait_ready(ready)
        window(server, options.window)  # unmeasured
        for turn in range(options.turns):
            for running in (True, False) if turn % 2 else (False, True):
                learner.child.send_signal(signal.SIGCONT if running else signal.SIGSTOP)
                before, began = cpu_seconds(learner.child.pid), time.perf_counter()
                steps = window(server, options.window)
                seconds = time.perf_counter() - began
                shares[running].append(round((cpu_seconds(learner.child.pid) - before) / seconds, 3))
                rates[running].append(sum(step.tokens for step in steps) / seconds)
                paces[running].append(1 / statistics.median(full_rounds(steps, options.slots)))
                if running:
                    learning.append(steps)
            print(f"learner, turn {turn + 1}: {rates[True][-1] / rates[False][-1]:.3f} of the throughput", flush=True)
    finally:
        learner.child.send_signal(signal.SIGCONT)
        server.close()
        learner.end()
    swaps = [event["ms"] for event in MetricsReader(log.path) if event["event"] == "swap"]
    return {
        "learner": {
            "throughput": cost(rates[False], rates[True], GOALS["learner"]),
            "pace_of_full_rounds": cost(paces[False], paces[True], GOALS["learner"]),
            "cores_used_by_learner": {"running": shares[True], "stopped": shares[False]},
        },
        "swaps": around_swaps(learning, options.slots) | {"all_ms": swaps},
    }


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, of its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def window(server: InferenceServer, rounds: int) -> list[Step]:
    """Serve so many rounds. A round's time has the swap before it in it, and no prefill."""
    steps, stats = [], server.stats
    for _ in range(rounds):
        prefill, tokens = server.env.engine.prefill_seconds, sum(each.tokens for each in stats.rounds)
        occupied, began = server.env.num_active, time.perf_counter()
        assert server.step(), "the prompts have run out"
        ended = time.perf_counter()
        prefill = server.env.engine.prefill_seconds - prefill
        delivered = sum(each.tokens for each in stats.rounds) - tokens
        steps.append(Step(began, ended - prefill, delivered, occupied, server.policy.version))
        stats.rounds = Rounds()
    return steps


def full_rounds(steps: Sequence[Step], slots: int) -> list[float]:
    """Seconds of the rounds with all slots occupied."""
    return [step.ended - step.began for step in steps if step.occupied == slots]


def around_swaps(windows: Sequence[Sequence[Step]], slots: int) -> dict[str, Any]:
    """Compare rounds after swaps with those before; a swap near the end of a window is left out.

    Example:
        >>> steps = [Step(t / 4, t / 4 + (0.25 if t == 8 else 0.125), 1, 1, int(t >= 8)) for t in range(16)]
        >>> found = around_swaps([steps], slots=1)
        >>> found["swaps"], found["round_with_swap"], found["rounds_after"]["cost"]
        (1, [2.0], 0.0)
    """
    with_swap, before, after = [], [], []
    for steps in windows:
        for at in range(1, len(steps)):
            if steps[at].version == steps[at - 1].version:
                continue
            swapped = steps[at]
            earlier = full_rounds([s for s in steps[:at] if s.began >= swapped.began - 1], slots)
            later = full_rounds([s for s in steps[at + 1 :] if s.began <= swapped.began + 1], slots)
            if earlier and later and swapped.began - steps[0].began >= 1 and steps[-1].began - swapped.began >= 1:
                usual = statistics.median(earlier)
                with_swap.append(round((swapped.ended - swapped.began) / usual, 3))
                before.append(1 / usual)
                after.append(1 / statistics.median(later))
    if not with_swap:
        return {"swaps": 0}
    return {
        "swaps": len(with_swap),
        "round_with_swap": with_swap,  # in usual rounds: 2 is a round and a swap that takes another
        "within_one_round": max(with_swap) - 1 <= GOALS["swap_in_rounds"],
        "rounds_after": cost(before, after, GOALS["round_after_swap"]),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="folder or hub id of the target")
    parser.add_argument("--drafter", default="medusa")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--turns", type=int, default=10, help="turns of each side")
    parser.add_argument("--window", type=int, default=200, help="rounds of a window with or without the learner")
    parser.add_argument("overrides", nargs="*", help="key=value pairs for the server and its learner")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `aurora-rl` sets it
    with TemporaryDirectory() as folder:
        served = served_windows(options, Path(folder) / "run")
    settings = {name: getattr(options, name) for name in ("drafter", "slots", "threads", "max_new_tokens", "window")}
    write_result(__file__, options, {**settings, "goals": GOALS, "recording": recording(options), **served})


if __name__ == "__main__":
    main()
