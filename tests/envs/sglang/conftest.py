"""SGLang's own server, unpatched, in processes of its own: what it needs on a CPU is in `tests/sglang_cpu`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from engine_models import write_models
from sglang_requests import Learner, environment
from transformers import AutoModelForCausalLM

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.sglang.client import SGLangClient
from aurora_rl.policies import TargetParts
from aurora_rl.policies.formats.files import load_drafter

# Tests with servers of their own. Under xdist one process takes these, and another all that share `chain` and `tree`.
SECOND = ("test_client_attach.py", "[eagle_chain", "[eagle_tree", "[published_chain")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "second" if any(part in nodeid for part in SECOND) else "first"

    return ByServer(config, log)


def why_not() -> str:
    """Why SGLang cannot be imported here; empty where it can."""
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed; `make install` brings it"
    # In a process of its own: an import of SGLang changes much of the process that it happens in.
    code = "import sglang, xgrammar"
    tried = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment(), "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"SGLang cannot be imported: {tried.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="session")
def launch(sglang_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SGLangClient]:
    """Starts a server that drafts as it is told to; a context manager that ends it."""
    # Where SGLang is required, a server that cannot be launched fails the tests and quotes its log.
    required = "sglang" in os.environ.get("AURORA_RL_REQUIRE", "").split(",")
    if not required and (reason := why_not()):
        pytest.skip(reason)

    def start(
        depth: int, width: int, num_nodes: int, drafter: str = "eagle3", arguments: Sequence[str] = ()
    ) -> SGLangClient:
        return SGLangClient.launch(
            sglang_models / "target",
            drafter=sglang_models / drafter,
            depth=depth,
            width=width,
            num_nodes=num_nodes,
            dtype="float32",
            max_length=480,
            log=tmp_path_factory.mktemp("sglang") / "log",
            arguments=["--chunked-prefill-size", "256", *arguments],
            environment=environment(),
        )

    return start


@pytest.fixture(scope="session")
def chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """A server that drafts chains of three; tests leave it without a learner and with the drafter's own weights."""
    with launch(3, 1, 3) as engine:
        yield engine


@pytest.fixture(scope="session")
def tree(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """A server that drafts trees of depth 2, four nodes expanded, seven kept.

    Not deeper: SGLang keeps the drafter's keys by place among the expanded nodes. From depth 3 on a node may see those
    of another branch, and the trees are not what the drafter's definition gives (docs/sglang.md).
    """
    with launch(2, 4, 7) as engine:
        yield engine


@pytest.fixture(scope="session")
def eagle_chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """Two replicas that draft chains of three by an EAGLE drafter of the whole vocabulary."""
    with launch(3, 1, 3, "eagle_whole", ["--dp-size", "2"]) as engine:
        yield engine


@pytest.fixture(scope="session")
def eagle_tree(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """As `tree`, by an EAGLE drafter of a reduced vocabulary."""
    with launch(2, 4, 7, "eagle") as engine:
        yield engine


@pytest.fixture(scope="session")
def published_chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """Two ranks that draft chains of three by an EAGLE-3 folder as its authors publish them."""
    with launch(3, 1, 3, "published", ["--tp-size", "2"]) as engine:
        yield engine


@pytest.fixture(scope="session")
def sglang_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target` and its drafters `eagle3`, `eagle`, `eagle_whole` and `published`."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(sglang_models):
    return AutoModelForCausalLM.from_pretrained(sglang_models / "target", dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def parts(model):
    return TargetParts.of(model)


@pytest.fixture(scope="module")
def drafter(sglang_models, parts):
    return load_drafter(sglang_models / "eagle3", parts)


@pytest.fixture(scope="module")
def handshake(parts, drafter):
    return Handshake.of(parts, drafter, "eagle3")


@pytest.fixture
def learner(handshake):
    ends = Learner(handshake)
    yield ends
    ends.die()
