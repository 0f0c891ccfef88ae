"""`aurora-rl learn` as the processes that torchrun starts: they learn from a server, end in order, and go on as one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from forked_commands import ForkedProcess, Forks
from processes import wait
from rank_processes import ended, start_ranks
from run_events import events

from aurora_rl.training.states import check_state, states

pytestmark = pytest.mark.faults


def ready(run: Path, processes: list[ForkedProcess], count: int = 1) -> None:
    def there() -> bool:
        assert all(process.poll() is None for process in processes), [p.name for p in run.parent.glob("rank*")]
        return len(events(run, "learner_ready")) >= count

    wait(there)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.stress)])
def test_two_processes_learn_from_a_server_and_one_goes_on(
    forks: Forks, arguments: list[str], tmp_path: Path, parallel: str
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(forks, tmp_path, ["learn", *arguments, f"run_dir={run}", f"learner.parallel={parallel}"])
    ready(run, ranks)
    # Enough that some come after the first candidate: the gate decides by those.
    served = [*arguments, "learner.spawn=false", "traffic.requests=48", f"run_dir={tmp_path / 'served'}"]
    with (tmp_path / "flywheel").open("wb") as output:
        assert forks.start(["flywheel", *served], output, output).wait(60) == 0, (tmp_path / "flywheel").read_text()
    wait(lambda: len(events(run, "train")) > 5 and events(run, "gate"))
    for process in ranks:  # as torchrun does
        process.send_signal(signal.SIGTERM)
    statuses, outputs = ended(ranks, tmp_path)
    assert statuses == [0, 0] and outputs[1] == "", "\n".join(outputs)
    (done,) = events(run, "learner_done")
    assert done["steps"] == events(run, "train")[-1]["steps"] and not events(run, "step_skipped")
    check_state(states(run / "learner")[0])

    with (tmp_path / "again").open("wb") as output:
        alone = forks.start(["learn", *arguments, "--resume", str(run), "learner.parallel=null"], output, output)
    ready(run, [alone], count=2)
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(60) == 0, (tmp_path / "again").read_text()
    assert events(run, "resumed")[0]["steps"] == done["steps"]


def test_a_rank_that_is_killed_ends_the_learner_which_saves_what_it_learned(
    forks: Forks, arguments: list[str], tmp_path: Path
) -> None:
    words = ["learn", *arguments, f"run_dir={tmp_path / 'run'}", "learner.parallel=ddp"]
    ranks = start_ranks(forks, tmp_path, words)
    ready(tmp_path / "run", ranks)
    os.kill(ranks[1].pid, signal.SIGKILL)
    statuses, outputs = ended(ranks, tmp_path)
    assert statuses == [75, -9]
    assert "aurora-rl: rank 0 of 2 has lost the others: one of them has ended, and says why" in outputs[0]
    check_state(states(tmp_path / "run" / "learner")[0])
