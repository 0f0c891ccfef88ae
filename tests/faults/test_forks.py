"""A forked command is what a fresh one would be: its folder, environment, outputs, signals, session and status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from forked_commands import Forks

pytestmark = pytest.mark.faults

PROBE = """
import json, os, signal, sys
descriptors = {os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if int(number) > 2
               and os.path.exists(f"/proc/self/fd/{number}")}
print(json.dumps({
    "leads": os.getpid() == os.getsid(0) == os.getpgrp(), "pid": os.getpid(), "cwd": os.getcwd(), "first": sys.path[0],
    "words": sys.argv[1:], "variables": dict(os.environ), "threads": len(os.listdir("/proc/self/task")),
    "child": str(signal.getsignal(signal.SIGCHLD)), "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "hangup": str(signal.getsignal(signal.SIGHUP)), "sockets": [path for path in descriptors if "socket:" in path],
}), flush=True)
if "AURORA_TEST_WAITS" in os.environ:
    signal.pause()
"""


def test_a_forked_command_is_as_a_fresh_one(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "my_probe.py").write_text(PROBE)
    words = ["flywheel", "drafter.name=my_probe:Nothing", "http.port=null", f"run_dir={tmp_path / 'run'}"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | {"MINE": "1"}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with open(tmp_path / "out", "wb") as out, open(tmp_path / "errors", "wb") as errors:
            process = forks.start(words, out, errors, cwd=tmp_path, env=variables)
            assert process.wait(60) == process.poll() == 2
    finally:
        signal.signal(signal.SIGHUP, before)
    found = json.loads((tmp_path / "out").read_text())
    assert (tmp_path / "errors").read_text().startswith("aurora-rl: drafter.name")
    assert found["leads"] and found["pid"] == process.pid and not Path(f"/proc/{process.pid}").exists()
    assert found["cwd"] == found["first"] == str(tmp_path) and found["words"] == words
    assert found["variables"] == variables | {"OMP_WAIT_POLICY": "passive"}
    assert (found["threads"], found["blocked"], found["sockets"]) == (1, 0, [])
    assert found["child"] == str(signal.SIG_DFL) and "Stop._note" in found["hangup"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_forked_command_is_ended_by_its_signals(forks: Forks, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "my_probe.py").write_text(PROBE)
    words = ["flywheel", "drafter.name=my_probe:Nothing", "http.port=null", f"run_dir={tmp_path / 'run'}"]
    reader, out = os.pipe()
    with open(reader, "rb") as lines:
        process = forks.start(words, out, out, cwd=tmp_path, env=os.environ | {"AURORA_TEST_WAITS": "1"})
        os.close(out)
        assert json.loads(lines.readline())["pid"] == process.pid and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        assert b"Traceback" not in lines.read()  # which ends with the last that holds the pipe
