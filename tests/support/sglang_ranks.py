"""What `tests/envs/sglang/test_swaps.py` runs as two ranks of a server: `sglang_ranks.py SCENARIO FOLDER`.

Our plugin between batches of a scheduler that broadcasts requests as SGLang's does, on a drafter whose layers are cut
as SGLang's are. Rank 0 writes what it found to `FOLDER/SCENARIO.json`.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from attach_fields import FIELDS
from cut_drafter import HIDDEN, LAYERS, PARTS, SIZE, TARGET, VOCAB, Cut, LlamaForCausalLMEagle3, drafter_of
from torch import Tensor

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.sglang import plugin as plugin_module
from aurora_rl.envs.sglang import ranks as ranks_module
from aurora_rl.envs.sglang import swaps as swaps_module
from aurora_rl.envs.sglang.plugin import Plugin
from aurora_rl.envs.sglang.ranks import EngineRanks, Order
from aurora_rl.envs.sglang.swaps import Swaps
from aurora_rl.policies.faults import EVERY


class EAGLEWorkerV2(SimpleNamespace):
    """By the name of the worker that the hooks know."""


class Scheduler:
    """What the plugin uses of SGLang's scheduler, and its loop."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        rank = dist.get_rank(group)
        head = Cut(16, HIDDEN, rank)
        head.weight.copy_(TARGET.lm_head.weight.detach().chunk(SIZE)[rank])
        target = SimpleNamespace(
            model=SimpleNamespace(layers_to_capture=list(LAYERS)), logits_processor=object(), lm_head=head,
            config=TARGET.config,
            parameters=lambda: iter([head.weight]),
        )  # fmt: skip
        self.drafter = LlamaForCausalLMEagle3(rank)
        self.drafter.load_weights(drafter_of(0).published().items())
        loads = SimpleNamespace(
            begin_weight_update=lambda: None,
            end_weight_update=lambda run_post_load: None,
            update_weights_from_tensor=lambda named_tensors: (self.drafter.load_weights(named_tensors), (True, ""))[1],
        )
        runner = SimpleNamespace(
            model=self.drafter,
            device="cpu",
            weight_updater=loads,
            token_to_kv_pool=SimpleNamespace(start_layer=0, layer_num=0),
        )
        self.tp_cpu_group, self.busy, self.flushes, self.versions = group, False, 0, list[str]()
        self.server_args = SimpleNamespace(
            tp_size=SIZE, pp_size=1, dp_size=1, speculative_algorithm="EAGLE3",
            speculative_use_rejection_sampling=False,
            speculative_accept_threshold_single=1.0, speculative_accept_threshold_acc=1.0, speculative_num_steps=3,
            speculative_eagle_topk=1, speculative_num_draft_tokens=4, model_path="m", disable_cuda_graph=True,
            resolved_dict=lambda: {"tp_size": SIZE, "pp_size": 1, "enable_dp_attention": False, "attn_cp_size": 1,
                                   "moe_a2a_backend": "none", "speculative_token_map": None},
        )  # fmt: skip
        self.is_hybrid_ssm = False
        self.model_config, self.max_running_requests = SimpleNamespace(context_len=64, dtype=torch.float32), 4
        self.draft_worker = EAGLEWorkerV2(draft_worker=SimpleNamespace(draft_runner=runner, hot_token_id=VOCAB))
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=target))
        self.running_batch = SimpleNamespace(reqs=[])
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(1, 1))
        self.weight_updater = SimpleNamespace(_session=None, record_weight_version_after_update=self.versions.append)
        self.turns: list[list[str]] = []  # kinds of the orders of each turn

    def is_fully_idle(self) -> bool:
        return not self.busy

    def flush_cache(self) -> None:
        self.flushes += 1


def broadcast(receiver: Any, requests: list | None, group: dist.ProcessGroup) -> list:
    """As SGLang's `broadcast_pyobj`."""
    if requests is not None:
        data = torch.frombuffer(bytearray(pickle.dumps(requests)), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), 0, group)
        dist.broadcast(data, 0, group)
        return requests
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0, group)
    data = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group)
    return pickle.loads(bytes(data.numpy()))


class Server:
    """One rank: the plugin and the loop around it. Requests are functions of a rank, by name, and what they take."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.scheduler, self.ranks = Scheduler(group), EngineRanks(group)
        self.plugin = Plugin("")
        self.plugin._scheduler, self.plugin._swaps = self.scheduler, Swaps(self.scheduler, self.ranks)
        self.group, self.ended = group, False
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.weights: dict[str, Tensor] = {}
        self.gathered = threading.Event()
        self.told: list[dict[str, Any]] = []

    def turn(self) -> None:
        """One turn of SGLang's loop."""
        requests = None
        if self.ranks.rank == 0:
            requests = [self.inbox.get() for _ in range(self.inbox.qsize())]
        requests = self.plugin._send_orders(broadcast, object(), requests, self.group)
        self.scheduler.turns.append([each.kind for each in requests if isinstance(each, Order)])
        self.plugin._between_batches(self.take_in, self.scheduler, requests)

    def take_in(self, scheduler: Scheduler, requests: list[tuple[str, Any]]) -> None:
        for name, value in requests:
            getattr(self, name)(value)

    def busy(self, on: bool) -> None:
        self.scheduler.busy = on

    def spoil_load(self, how: list) -> None:
        rank, kind = how
        if self.ranks.rank == rank:
            self.scheduler.drafter.spoil = kind

    def spoil_transport(self, rank: int) -> None:
        """The next weights that this rank receives have a flipped bit."""
        if self.ranks.rank == rank:
            original = swaps_module._unpack

            def spoiled(payload: Tensor) -> Any:
                swaps_module._unpack = original
                payload[-1] ^= 1
                return original(payload)

            swaps_module._unpack = spoiled

    def zero(self, rank: int) -> None:
        if self.ranks.rank == rank:
            self.scheduler.drafter.model.layers[0].mlp.down_proj.weight.zero_()

    def rounds(self, count: int) -> None:
        self.plugin._seen["verify"] += count

    def stay_away(self, rank: int) -> None:
        """From now on this rank does not come to what an order says."""
        if self.ranks.rank == rank:
            self.plugin._swaps.obey = lambda *_: (time.sleep(2.5 * ranks_module.TIMEOUT_S), os._exit(0))  # type: ignore[method-assign]

    def die(self, rank: int) -> None:
        """It ends instead."""
        if self.ranks.rank == rank:
            self.plugin._swaps.obey = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    def gather(self, _: Any) -> None:
        weights = self.scheduler.drafter.weights(self.ranks)
        ballots = self.ranks.vote(versions=self.scheduler.versions, flushes=self.scheduler.flushes)
        self.weights, self.told = weights, ballots
        self.gathered.set()

    def end(self, _: Any) -> None:
        self.ended = True

    # ---- what rank 0's scenario does, in a thread of its own

    def ask(self, name: str, value: Any = None) -> None:
        self.inbox.put((name, value))

    def tell(self, name: str, value: Any) -> None:
        """Ask, and wait until all ranks have done it: orders of a turn come before its requests."""
        self.ask(name, value)
        self.held()

    def held(self) -> dict[str, Tensor]:
        """What all ranks hold now."""
        self.gathered.clear()
        self.ask("gather")
        assert self.gathered.wait(20)
        return self.weights


class Learner:
    """Attaches, and publishes weights."""

    def __init__(self, server: Server) -> None:
        self.handshake, self.server = Handshake.of(PARTS, drafter_of(0), "eagle3"), server
        self.publisher = WeightPublisher("tcp://127.0.0.1:*", handshake=self.handshake)

    def attach(self, handshake: Handshake | None = None) -> str:
        fields = {"handshake": (handshake or self.handshake).to_meta(), "weights": self.publisher.address}
        try:
            self.server.plugin._answer("attach", {**FIELDS, **fields})
        except PluginError as error:
            return str(error)
        return ""

    def publish(self, version: int, seed: int) -> str:
        """Why the engine does not serve these weights; empty if it does."""
        self.publisher.publish(version, drafter_of(seed).published())
        if self.publisher.wait_ack(version, 20.0):
            return ""
        return self.rejection(version) or "no answer"

    def rejection(self, version: int) -> str:
        """Why the engine does not serve a version; empty if it does or has not answered."""
        return next(iter(self.publisher.rejected_by(version).values()), "")


def same(held: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)


def expected(seed: int) -> dict[str, Tensor]:
    """What all ranks should hold of a drafter's weights."""
    found = {}
    for rank in range(SIZE):
        cut = LlamaForCausalLMEagle3(rank)
        cut.load_weights(drafter_of(seed).published().items())
        found |= {f"{name}.{rank}": parameter.data for name, parameter in cut.named_parameters()}
    return found


def wait(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def swaps(server: Server) -> dict[str, Any]:
    """Swaps that all ranks make together, and those that none makes as one could not."""
    learner, found, status = Learner(server), dict[str, Any](), lambda: server.plugin._answer("status", {})
    stranger = Handshake(**{**learner.handshake.__dict__, "head_checksum": "0" * 32})
    found["another head"], found["attach"] = learner.attach(stranger), learner.attach()
    found["start"] = same(server.held(), expected(0))

    found["idle"] = learner.publish(1, 1), same(server.held(), expected(1))
    found["reports"], found["status"] = status()["ranks"], status()["tp_size"]
    found["all"] = server.told

    server.ask("busy", True)
    wait(lambda: server.scheduler.busy)
    begun = len(server.scheduler.turns)
    found["busy"] = learner.publish(2, 2), same(server.held(), expected(2))
    orders = server.scheduler.turns[begun:]
    found["parts"] = [len(turn) for turn in orders if "part" in turn]
    found["flushed while busy"] = any("flush" in turn for turn in orders)
    flushes = server.scheduler.flushes
    server.ask("busy", False)
    found["flushed when idle"] = wait(lambda: server.scheduler.flushes > flushes)

    version = 3
    for name, (kind, value, mended) in {
        "garbled": ("spoil_load", [1, "garble"], [1, ""]),
        "raised": ("spoil_load", [1, "raise"], [1, ""]),
        "garbled on the first": ("spoil_load", [0, "garble"], [0, ""]),
        "transport": ("spoil_transport", 1, None),
    }.items():
        server.tell(kind, value)
        found[name] = learner.publish(version, 3), same(server.held(), expected(2)), status()["version"]
        if mended is not None:
            server.tell(kind, mended)
        version += 1
    found["after"] = learner.publish(version, 4), same(server.held(), expected(4)), status()["version"]
    found["serves"] = version
    # A rank's shard is damaged, and again: all mend the same.
    for turn in ("mended", "rolled back"):
        server.tell("zero", 1)
        known = len(status()["faults"])
        for _ in range(3):
            server.ask("rounds", EVERY)
            turns = len(server.scheduler.turns)
            wait(lambda: len(server.scheduler.turns) > turns + 2)  # noqa: B023
        found[turn] = wait(lambda: len(status()["faults"]) > known), status()["faults"][-1]  # noqa: B023
        found[f"{turn} to"] = [same(server.held(), expected(seed)) for seed in (4, 2)]
    found["told"] = server.told
    found["rejected"] = wait(lambda: learner.rejection(version)), learner.rejection(version)
    server.plugin._answer("detach", {})
    found["detached"] = wait(lambda: server.scheduler.turns[-1] == [] and server.plugin._swaps._session is None)
    found["again"] = learner.attach(), learner.publish(version + 1, 5), same(server.held(), expected(5))
    server.plugin._answer("detach", {})
    return found


def unregistered(server: Server) -> dict[str, Any]:
    return {"refused": Learner(server).attach()}


def lost(server: Server, kind: str) -> dict[str, Any]:
    """Rank 1 does not come, or ends, in the midst of a swap."""
    learner = Learner(server)
    found: dict[str, Any] = {"attach": learner.attach(), "first": learner.publish(1, 1)}
    server.ask("busy", True)
    wait(lambda: server.scheduler.busy)
    learner.publisher.publish(2, drafter_of(2).published())
    wait(lambda: "part" in server.scheduler.turns[-1])
    began = time.monotonic()
    server.ask(kind, 1)
    wait(lambda: learner.rejection(2), 30)
    found |= {"rejected": learner.rejection(2), "seconds": time.monotonic() - began}
    status = lambda: server.plugin._answer("status", {})  # noqa: E731
    wait(lambda: status()["error"])
    return found | {"error": status()["error"]}


SCENARIOS: dict[str, Callable[[Server], dict[str, Any]]] = {
    "swaps": swaps,
    "unregistered": unregistered,
    "stay_away": lambda server: lost(server, "stay_away"),
    "die": lambda server: lost(server, "die"),
}


def run(name: str, folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    server = Server(group)
    if name == "unregistered":
        dist.barrier()
        if server.ranks.rank == 0:
            server.ranks.register([])
    else:
        server.ranks.register([])
        dist.barrier()
    if name in ("stay_away", "die"):
        ranks_module.TIMEOUT_S = 1.0
    swaps_module.PART = 512
    plugin_module.version = lambda _: plugin_module.SUPPORTED[-1]
    if server.ranks.rank == 0:

        def play() -> None:
            try:
                found = SCENARIOS[name](server)
            except BaseException as error:
                found = {"failed": f"{type(error).__name__}: {error}"}
            (folder / f"{name}.json").write_text(json.dumps(found))
            if name in ("stay_away", "die"):
                os._exit(0)  # the ranks are out of step
            server.ask("end")

        player = threading.Thread(target=play, daemon=True)
        player.start()
    while not server.ended:
        try:
            server.turn()
        except RuntimeError:  # the engine's own broadcast, to a rank that has died
            if name != "die" or server.ranks.rank:
                raise
            player.join()  # which ends this process
        time.sleep(0.001)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]))
