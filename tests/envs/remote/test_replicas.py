"""The plugins of data-parallel replicas, asked as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer, replica_address
from aurora_rl.envs.remote.replicas import ask_all, status_of_all

SERVED = {
    "requests": 2, "terminated": 1, "prompt_tokens": 9, "tokens": 20, "speculative_tokens": 18, "speculative_rounds": 6,
    "drafted_tokens": 18, "accepted": {"1": 2, "3": 4}, "acceptance_length": 3.0,
}  # fmt: skip


def status(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "dp_size": 2, "attached": True, "session": f"s{number}", "slots": 4, "version": 3 - number, "recorded": 2,
        "seen": {"verify": 5}, "skipped": {"prefix": number}, "drops": {}, "queued": 1, "sent": 2, "swaps": 2 - number,
        "swap_ms": [10.0, 11.0][number:], "faults": [{"number": 1, "cause": "dead"}] * number, "error": "", "ranks": [],
        "refused": "no key" if number else None, "served": SERVED, **changed,
    }  # fmt: skip


def test_the_status_of_a_server_adds_up_its_replicas() -> None:
    whole = status_of_all([status(0), status(1)])
    assert (whole["session"], whole["version"], whole["slots"], whole["swaps"]) == ("s0+s1", 2, 8, 3)
    assert (whole["seen"], whole["skipped"], whole["recorded"]) == ({"verify": 10}, {"prefix": 1}, 4)
    assert whole["swap_ms"] == [10.0, 11.0, 11.0] and whole["refused"] == "replica 1: no key" and whole["error"] == ""
    assert whole["faults"] == [{"number": 1, "cause": "dead", "replica": 1}]
    served = whole["served"]
    assert (served["requests"], served["tokens"], served["acceptance_length"]) == (4, 40, 3.0)
    assert served["accepted"] == {"1": 4, "3": 8}


def test_a_replica_that_was_restarted_makes_another_session() -> None:
    assert status_of_all([status(0), status(1, session="")])["session"] == ""
    assert not status_of_all([status(0), status(1, attached=False)])["attached"]


def test_a_replica_that_is_detached_hides_nothing_of_another() -> None:
    kept = ("dp_size", "session", "slots", "seen", "ranks")
    detached = {name: status(0)[name] for name in kept} | {"attached": False}
    whole = status_of_all([detached, status(1)])
    assert not whole["attached"] and whole["slots"] == 8
    assert whole["faults"] == [{"number": 1, "cause": "dead", "replica": 1}] and whole["refused"] == "replica 1: no key"
    assert (whole["version"], whole["swaps"], whole["recorded"], whole["served"]["requests"]) == (2, 1, 2, 2)


def test_what_was_deleted_is_told_if_every_replica_told_it() -> None:
    parts = [status(n, deleted={"trajectories": 1 + n, "learner": told}) for n, told in enumerate(("told", "absent"))]
    assert status_of_all(parts)["deleted"] == {"trajectories": 3, "learner": "absent"}


class Replicas:
    """Plugins at paths that differ by a number, one of which may refuse."""

    def __init__(self, folder: Path, count: int) -> None:
        self.address, self.asked, self.refuse = f"ipc://{folder}/plugin", list[tuple[int, str]](), ""
        self.refuses, self.count = 1, count
        with ExitStack() as opened:
            for number in range(count):
                server = PluginServer(replica_address(self.address, number), self._answer_of(number))
                opened.callback(server.close)
            self._opened = opened.pop_all()

    def _answer_of(self, number: int) -> Any:
        def answer(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
            self.asked.append((number, kind))
            if number == self.refuses and kind in ("attach", "delete") and self.refuse:
                raise PluginError(self.refuse)
            return status(number, dp_size=self.count)

        return answer

    def close(self) -> None:
        self._opened.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    both = Replicas(tmp_path, 2)
    yield both
    both.close()


def test_all_replicas_are_asked(replicas: Replicas) -> None:
    assert ask_all(replicas.address, "status", engine="SGLang")["session"] == "s0+s1"
    assert replicas.asked == [(0, "status"), (1, "status")]


def test_where_one_refuses_none_stays_attached(replicas: Replicas) -> None:
    replicas.refuse = "another head"
    with pytest.raises(PluginError, match="replica 1 of 2: another head"):
        ask_all(replicas.address, "attach", {}, engine="SGLang")
    assert replicas.asked == [(0, "attach"), (1, "attach"), (0, "detach")]


def test_one_that_fails_keeps_a_deletion_from_no_other(tmp_path: Path) -> None:
    three = Replicas(tmp_path, 3)
    try:
        three.refuse = "nothing is attached"
        with pytest.raises(PluginError, match="replica 1 of 3: nothing is attached"):
            ask_all(three.address, "delete", {"tenant": "a"}, engine="SGLang")
        assert three.asked == [(0, "delete"), (1, "delete"), (2, "delete")]
    finally:
        three.close()


def test_replicas_need_a_port_to_count_from() -> None:
    with pytest.raises(PluginError, match="give one with a port"):
        replica_address("tcp://127.0.0.1:*", 1)
