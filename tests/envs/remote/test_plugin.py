"""What a plugin of any engine answers, and what becomes of faults of ours. The engines' own tests show the rest."""

from typing import Any

import pytest
from attach_fields import FIELDS
from typing_extensions import override

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.plugin import RecorderPlugin
from aurora_rl.envs.remote.plugin_server import PluginError


class Bare(RecorderPlugin):
    """A plugin of an engine that serves nothing."""

    engine = "Bare"
    refusal: str | None = None

    @property
    @override
    def _exact(self) -> bool:
        return True

    @override
    def _status(self) -> dict[str, Any]:
        session = self._session
        return {"attached": session is not None, "session": self._last_session} | (
            {} if session is None else session.status()
        )

    @override
    def _check_engine(self, handshake: Handshake) -> None:
        if self.refusal:
            raise PluginError(self.refusal)


@pytest.fixture
def plugin():
    plugin = Bare("tcp://127.0.0.1:*")
    yield plugin
    plugin._answer("detach", {})


def test_a_learner_attaches_once_switches_recording_and_detaches(plugin):
    first = plugin._answer("attach", FIELDS)
    assert first["attached"] and first["recording"]
    with pytest.raises(PluginError, match="attached already; detach first"):
        plugin._answer("attach", FIELDS)
    assert not plugin._answer("record", {"on": False})["recording"]
    over = plugin._answer("detach", {})
    assert not over["attached"] and over["session"] == first["session"] and over["recorded"] == 0


def test_what_cannot_be_done_is_named(plugin):
    for kind in ("record", "delete"):
        with pytest.raises(PluginError, match="nothing is attached; attach first"):
            plugin._answer(kind, {})
    with pytest.raises(PluginError, match="there is no request 'dance'"):
        plugin._answer("dance", {})
    plugin.refusal = "another model"
    with pytest.raises(PluginError, match="another model"):
        plugin._answer("attach", FIELDS)
    assert not plugin._answer("status", {})["attached"]


def test_a_fault_of_ours_switches_recording_off_and_the_engine_goes_on(plugin):
    plugin._answer("attach", FIELDS)

    def keep(session, out, *args):
        raise ZeroDivisionError("ours")

    assert plugin._after(keep)(lambda number: number + 1, 1) == 2
    status = plugin._answer("status", {})
    assert not status["recording"] and status["error"] == "ZeroDivisionError: ours"
    assert plugin._answer("record", {"on": True})["error"] == ""


def test_a_fault_of_the_engine_reaches_the_engine(plugin):
    plugin._answer("attach", FIELDS)

    def fail():
        raise LookupError

    with pytest.raises(LookupError):
        plugin._after(lambda *args: None)(fail)
    assert plugin._answer("status", {})["recording"]


def test_an_address_that_is_taken_is_told_in_the_log(plugin, caplog):
    plugin._listen()
    late = Bare(plugin._server.address)
    late._listen()
    assert late._server is None and "nobody can attach here" in caplog.text
    plugin._server.close()
