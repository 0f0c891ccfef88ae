"""ImitationLoss through both heads by chunks of rows: what it is with whole logits, without making them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_kernels import Target
from aurora_kernels import rows as kernel_rows
from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import (
    DFlashDrafter,
    Drafter,
    Eagle3Drafter,
    EagleDrafter,
    HeadLogits,
    MedusaDrafter,
    Unroll,
)
from aurora_rl.testing.variants import topk_form
from aurora_rl.trajectories import pack

KINDS = [Eagle3Drafter, EagleDrafter, MedusaDrafter, DFlashDrafter]


class Unrolled:
    """Keeps what a drafter unrolled, as it is or with plain logits."""

    def __init__(self, drafter: Drafter, plain: bool) -> None:
        self.unroll, self.plain, self.last = drafter.unroll, plain, Unroll([], torch.empty(0))

    def __call__(self, batch: TensorDict, steps: int) -> Unroll:
        self.last = self.unroll(batch, steps)
        return self.last._replace(logits=[each + 0 for each in self.last.logits]) if self.plain else self.last

    @property
    def multiplied(self) -> bool:
        """Whether anything read the logits."""
        return any("product" in vars(logits) for logits in self.last.logits)


@cache
def batch_of(kind: type[Drafter]) -> TensorDict:
    drafter, _ = noisy_drafter_and_head(kind)
    sizes = [(5, 7), (1, 4), (2, 1), (9, 10)]
    return pack([
        trajectory_of(drafter, prompt_length=p, max_new_tokens=n, request=i) for i, (p, n) in enumerate(sizes)
    ])  # fmt: skip


def learn(
    monkeypatch: pytest.MonkeyPatch,
    drafter: Drafter,
    head: TargetHead,
    batch: TensorDict,
    *,
    plain: bool,
    kind: type[ImitationLoss] = ImitationLoss,
    **settings: Any,
) -> tuple[TensorDict, list[Tensor], bool]:
    """Loss and metrics, gradients of all parameters, and whether whole logits were made."""
    with monkeypatch.context() as patched:
        patched.setattr(drafter, "unroll", unrolled := Unrolled(drafter, plain))
        out = kind(drafter, head, **settings)(batch)
    drafter.zero_grad()
    out["loss_imitation"].sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in drafter.parameters()]
    return out, gradients, unrolled.multiplied


SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "weight": 0.3},
    {"reduction": "none"},
    {"weight": 0.0},
    {"divergence": "total_variation"},
    {"divergence": {"name": "jensen_shannon", "beta": 0.1}, "renormalize": False},
    {"divergence": {"name": "top_k_cross_entropy", "k": 3}},
    {"regression": 0.5},
]


@pytest.mark.parametrize(
    ("kind", "settings"), [(Eagle3Drafter, each) for each in SETTINGS] + [(kind, {}) for kind in KINDS[1:]], ids=str
)
def test_it_is_what_it_is_with_whole_logits(
    kind: type[Drafter], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (drafter, head), batch = noisy_drafter_and_head(kind), batch_of(kind)
    out, gradients, multiplied = learn(monkeypatch, drafter, head, batch, plain=False, **settings)
    expected, wanted, _ = learn(monkeypatch, drafter, head, batch, plain=True, **settings)
    assert not multiplied
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    for got, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, each)


def with_bias(head: TargetHead) -> TargetHead:
    return TargetHead(head.weight, torch.linspace(-1, 1, len(head), dtype=head.weight.dtype), scale=0.5, softcap=3.0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("target", ["a head with a bias and a cap", "likeliest tokens", "float32", "autocast"])
def test_every_form_of_the_target(target: str, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (drafter, head), batch = noisy_drafter_and_head(Eagle3Drafter), batch_of(Eagle3Drafter)
    if target == "a head with a bias and a cap":
        head = with_bias(head)
    elif target == "likeliest tokens":
        batch = pack([topk_form(trajectory_of(drafter), head, 5)])
    else:
        drafter, head = drafter.float(), TargetHead(head.weight.float())
        batch = batch.apply(lambda x: x.float() if x.is_floating_point() else x)
    with torch.autocast("cpu", torch.bfloat16, enabled=target == "autocast"):
        (out, gradients, multiplied), (expected, wanted, _) = (
            learn(monkeypatch, drafter, head, batch, plain=plain, renormalize=renormalize) for plain in (False, True)
        )
    assert not multiplied
    if target == "autocast":  # which with whole logits takes the divergence's sums in bfloat16 too
        torch.testing.assert_close(out["loss_imitation"], expected["loss_imitation"], rtol=5e-3, atol=0.0)
        assert all(float((a - b).norm()) <= 0.03 * float(b.norm()) for a, b in zip(gradients, wanted, strict=True))
        return
    torch.testing.assert_close(out["loss_imitation"], expected["loss_imitation"])
    for got, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, each)


class OwnWeights(ImitationLoss):
    def position_weights(self, batch: TensorDict, unroll: Unroll, law: Target) -> Tensor:
        return self.log_probs(law).exp().amax(-1)[None]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ImitationLoss, {"weighting": "expected_length"}),
        (ImitationLoss, {"target": "served"}),
        (ImitationLoss, {"target": "served", "divergence": "total_variation", "weighting": "expected_length"}),
        (OwnWeights, {}),
    ],
    ids=str,
)
def test_weights_that_depend_on_the_distributions_and_what_is_served(
    kind: type[ImitationLoss], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    samplings = [SamplingParams(temperature=0.7, top_p=0.6), SamplingParams()]
    batch = pack([trajectory_of(drafter, sampling_params=how, request=i) for i, how in enumerate(samplings)])
    (out, gradients, multiplied), (expected, wanted, _) = (
        learn(monkeypatch, drafter, head, batch, plain=plain, kind=kind, **settings) for plain in (False, True)
    )
    assert not multiplied
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    for got, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, each)


@pytest.mark.parametrize("target", ["model", "served"])
def test_it_makes_no_tensor_of_all_positions_and_tokens(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    monkeypatch.setattr(kernel_rows, "_FEWEST", 2)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)
    # So many draft rows that logits would be the largest tensors.
    wide, vocab = torch.randn(4096, 16, dtype=torch.float64), torch.arange(4096)
    drafter.lm_head = torch.nn.Linear(16, 4096, bias=False, dtype=torch.float64)
    drafter.draft_vocab = vocab
    batch = batch_of(Eagle3Drafter)
    count = len(batch["sequence", "hidden"])
    loss = ImitationLoss(drafter, TargetHead(wide), target=target)
    size = largest_tensor(lambda: loss(batch)["loss_imitation"].backward())
    assert 4096 * 16 <= size < 4096 * count
    assert isinstance(drafter.unroll(batch, 1).logits[0], HeadLogits)
