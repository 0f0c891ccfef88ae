"""vLLM's own server, unpatched, on the CPU: it has an environment of its own, which `make vllm` makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_models import write_models
from sglang_requests import Learner
from transformers import AutoModelForCausalLM
from vllm_environment import PYTHON, VARIABLES, require

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.vllm.client import VLLMClient
from aurora_rl.policies import TargetParts
from aurora_rl.policies.formats.files import load_drafter, save_drafter

# A prompt is read in chunks of this many tokens at most, next to requests that decode, and kept by blocks of 32.
CHUNK, BLOCK = 128, 32


@pytest.fixture(scope="session")
def vllm_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target`, and its drafter `eagle3` as vLLM loads it."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    save_drafter(load_drafter(folder / "eagle3", TargetParts.of(target)), folder / "for_vllm", "vllm")
    return folder


@pytest.fixture(scope="session")
def launch(vllm_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VLLMClient]:
    """Starts a server that drafts chains of three; a context manager that ends it."""
    require()

    def start(*arguments: str, drafter: str = "for_vllm") -> VLLMClient:
        return VLLMClient.launch(
            vllm_models / "target",
            drafter=vllm_models / drafter,
            depth=3,
            dtype="float32",
            max_length=480,
            python=PYTHON,
            log=tmp_path_factory.mktemp("vllm") / "log",
            arguments=["--block-size", str(BLOCK), "--max-num-batched-tokens", str(CHUNK), *arguments],
            environment={**VARIABLES, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )

    return start


@pytest.fixture(scope="session")
def server(launch: Callable[..., VLLMClient]) -> Iterator[VLLMClient]:
    """A server; tests leave it without a learner and with the drafter's own weights."""
    with launch() as engine:
        yield engine


@pytest.fixture(scope="session")
def model(vllm_models: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(vllm_models / "target", dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="session")
def parts(model):
    return TargetParts.of(model)


@pytest.fixture(scope="session")
def drafter(vllm_models, parts):
    return load_drafter(vllm_models / "eagle3", parts)


@pytest.fixture(scope="session")
def handshake(parts, drafter):
    return Handshake.of(parts, drafter, "eagle3")


@pytest.fixture
def learner(handshake):
    ends = Learner(handshake)
    yield ends
    ends.die()
