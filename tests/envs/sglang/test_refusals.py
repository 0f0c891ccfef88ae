"""Targets and drafters that SGLang may have, and which of them are refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aurora_rl.envs.sglang.refusals import drafter_fault, target_fault


def target(**changed):
    parts = {
        "model": SimpleNamespace(layers_to_capture=[2]), "lm_head": nn.Linear(1, 1), "logits_processor": object(),
        "config": SimpleNamespace(vocab_size=8, num_hidden_layers=2), **changed,
    }  # fmt: skip
    return SimpleNamespace(**{name: part for name, part in parts.items() if part is not None})


def test_a_target_has_what_the_recorder_reads():
    assert target_fault(target(), "EAGLE3", hybrid=False) == ""
    assert target_fault(target(model=object()), "EAGLE", hybrid=False) == ""


def test_a_hybrid_target_is_named():
    fault = target_fault(target(), "EAGLE3", hybrid=True)
    assert fault.startswith("SGLang's SimpleNamespace has layers with a state")


@pytest.mark.parametrize(
    ("changed", "lacks"),
    [
        ({"model": object()}, "model.layers_to_capture"),
        ({"lm_head": None}, "lm_head"),
        ({"logits_processor": None, "config": SimpleNamespace()}, "logits_processor, config.vocab_size, config.num_hi"),
    ],
)
def test_a_target_without_it_is_named(changed, lacks):
    assert target_fault(target(**changed), "EAGLE3", hybrid=False).startswith(
        f"SGLang's SimpleNamespace has no {lacks}"
    )


class LlamaForCausalLMEagle(nn.Module):
    """By the name of a drafter that learns."""

    def __init__(self, name, dtype):
        super().__init__()
        self.fc = nn.Module()
        self.fc.register_parameter(name, nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False))


@pytest.mark.parametrize(
    ("name", "dtype", "quantized"),
    [
        ("weight", torch.bfloat16, False),
        ("weight", torch.float8_e4m3fn, True),
        ("qweight", torch.int32, True),
        ("weight_scale", torch.float32, True),
    ],
)
def test_a_quantized_drafter_is_named(name, dtype, quantized):
    fault = drafter_fault(LlamaForCausalLMEagle(name, dtype))
    assert fault.startswith(f"SGLang's drafter is quantized ('fc.{name}' is ") if quantized else fault == ""
