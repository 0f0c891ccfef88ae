"""The drafter's settings: what goes with an engine, an architecture and a size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aurora_rl.cli import assembly
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.spec import resolve
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.policies.adapters import adapted_layers
from aurora_rl.policies.formats.files import save_drafter

BOTH = "drafter.adapters=[acme,globex]"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ["engine.name=sglang"],
            "drafter.adapters=['acme', 'globex']: SGLang keeps one drafter for all requests; leave",
        ),
        (["engine.name=vllm"], "drafter.adapters=['acme', 'globex']: vLLM keeps one drafter for all requests; leave"),
        (["compare=[ngram,eagle3]"], "drafter.adapters=['acme', 'globex'] next to compare=['ngram', 'eagle3']: leave"),
        (["drafter.adapter_rank=0"], "drafter.adapter_rank must be at least 1, got 0"),
        (["drafter.adapters=[a/b]"], "drafter.adapters: the tenant is 'a/b'; give 1 to 128 letters"),
        (["drafter.adapters=[a,a]"], "drafter.adapters: names of adapters must differ, got a, a"),
        (["drafter.adapters=['..']"], "drafter.adapters: an adapter cannot be called '..'"),
    ],
)
def test_adapters_that_cannot_be_had_are_refused_by_name(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}"):
        load_config(overrides=[BOTH, *pairs])


@pytest.mark.parametrize("name", ["medusa", "dflash", "standalone", "ngram"])
def test_architectures_that_take_no_adapters_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} takes none; set drafter.name=eagle3, or leave the key out"):
        resolve(load_config(overrides=[BOTH, f"drafter.name={name}"]))
    assert resolve(load_config(overrides=[BOTH, "drafter.name=eagle"])).drafter_class.takes_adapters


def test_server_and_learner_start_with_the_same_adapters(
    configured: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("drafter.name=eagle3", BOTH, "drafter.adapter_rank=2")
    spec = resolve(config)
    target = assembly.load(spec)
    served, for_learner = assembly.first_drafter(spec, target, [], tmp_path / "start")
    learned = assembly.start_drafter(resolve(for_learner), target, [])
    published = served.published()
    assert all(torch.equal(tensor, published[name]) for name, tensor in learned.published().items())
    assert Handshake.of(target.parts, served, "eagle3") == Handshake.of(target.parts, learned, "eagle3")

    for layer in adapted_layers(learned).values():
        torch.nn.init.ones_(layer.lora_B)
    save_drafter(learned, tmp_path / "learned")
    more = configured(
        "drafter.name=eagle3", "drafter.adapters=[initech,acme]", "drafter.adapter_rank=2",
        f"drafter.path={tmp_path / 'learned'}",
    )  # fmt: skip
    read = adapted_layers(assembly.start_drafter(resolve(more), target, []))["fc"]
    assert torch.equal(read.lora_B[1], torch.ones_like(read.lora_B[1])) and not torch.count_nonzero(read.lora_B[0])


def test_an_adapter_that_is_too_large_is_refused_at_the_start(configured: Callable[..., Config]) -> None:
    spec = resolve(configured("drafter.name=eagle3", BOTH, "drafter.adapter_rank=99999"))
    message = (
        r"^drafter.adapter_rank=99999: an adapter of rank 99999 has \d+\.\d MB in float32, and 20 MB is the most: "
    )
    with pytest.raises(ConfigError, match=message + r"take a rank of \d+ or less$"):
        assembly.start_drafter(spec, assembly.load(spec), [])
