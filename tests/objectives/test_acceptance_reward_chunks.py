"""AcceptanceRewardLoss by chunks of contexts: what it is at once, without logits of all contexts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from torch import Tensor

from aurora_kernels import rows as kernel_rows
from aurora_kernels.rows import Rows
from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import AcceptanceRewardLoss, Objective
from aurora_rl.objectives.served_target import ServedTarget
from aurora_rl.policies import Drafter, Eagle3Drafter, EagleDrafter, MedusaDrafter, TreeShape
from aurora_rl.testing import tiny_target
from aurora_rl.testing.tiny import serve
from aurora_rl.trajectories import DRAFT_MODES, pack, rule_code
from aurora_rl.tree_index import TreeIndex

RULES = ["greedy", "sample_and_match", "rejection", "rejection_without_replacement"]


@cache
def recorded(kind: type[Drafter]) -> TensorDict:
    """Requests of several rules and temperatures, with three chains a tree, which older weights drew."""
    drafter, _ = noisy_drafter_and_head(kind)
    trajectories = []
    for request, rule in enumerate(RULES):
        sampling = SamplingParams(temperature=0.0 if rule == "greedy" else 0.7, top_k=25, seed=request)
        prompt = torch.arange(request, request + 4)
        (trajectory,) = serve(
            drafter, tiny_target(dtype=torch.float64), [prompt], shape=TreeShape(3, 3, mode="sampled"),
            max_new_tokens=3, sampling_params=sampling, first_request=request,
        )  # fmt: skip
        trajectory["sampling", "rule"].fill_(rule_code(rule))
        trajectories.append(trajectory)
    batch = pack(trajectories)
    noise = torch.Generator().manual_seed(0)
    batch["nodes", "log_probs"] += 0.2 * torch.randn(batch["nodes", "log_probs"].shape, generator=noise)
    return batch


def batch_of(kind: type[Drafter], *, rules: list[str] = RULES, distinct: bool = False) -> TensorDict:
    """What was recorded, of some rules, as drawn with replacement or without.

    Trees with a repeated sibling would not be drawn without: their tokens are made different.
    """
    batch = recorded(kind).clone()
    codes = batch["sampling", "rule"]
    for code in (rule_code(name) for name in RULES if name not in rules):
        codes[codes == code] = rule_code(rules[0])
    if distinct:
        batch["sampling", "draft_mode"].fill_(DRAFT_MODES.index("sampled_without_replacement"))
        context = TreeIndex.of(batch).context
        for place in range(int(context.max()) + 1):
            siblings = (context == place).nonzero()[:, 0]
            batch["nodes", "tokens"][siblings] = (
                batch["nodes", "tokens"][siblings[0]] + 2 * torch.arange(len(siblings))
            ) % 32
        # So that what earlier siblings leave is something.
        batch["nodes", "log_probs"].clamp_(max=-1.5)
    return batch


def rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch, fewest: int) -> None:
    monkeypatch.setattr(kernel_rows, "_FEWEST", fewest)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)


def learn(loss: Objective, batch: TensorDict) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    out = loss(batch)
    parameters = list(loss.drafter.parameters())
    total = out["loss_acceptance_reward"].sum()
    return out.to_dict(), torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


BASELINES = ["none", "leave_one_out", "group"]
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"clip": 0.2, "reduction": "none"}),
    ({"distinct": True}, {"weight": 0.3}),
    ({}, {"baseline": "leave_one_out"}),
    ({"rules": RULES[:2]}, {"baseline": "group"}),
    ({"rules": RULES[:2]}, {"reward": "recorded", "baseline": "leave_one_out"}),
]


@pytest.mark.parametrize("fewest", [1, 4])
@pytest.mark.parametrize(
    ("kind", "batch_settings", "settings"),
    [(Eagle3Drafter, *each) for each in SETTINGS] + [(kind, {}, {}) for kind in (EagleDrafter, MedusaDrafter)],
    ids=str,
)
def test_values_and_gradients_are_those_of_one_chunk(
    kind: type[Drafter],
    batch_settings: dict[str, Any],
    settings: dict[str, Any],
    fewest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (drafter, head), batch = noisy_drafter_and_head(kind), batch_of(kind, **batch_settings)
    loss = AcceptanceRewardLoss(drafter, head, **settings)
    assert len(TreeIndex.of(batch).context) > 20
    expected, wanted = learn(loss, batch)
    rows_of_a_chunk(monkeypatch, fewest)
    found, gradients = learn(loss, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, wanted)
    assert sum(float(each.abs().sum()) for each in gradients) > 1e-3


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
@pytest.mark.parametrize("rule", ["sample_and_match", "rejection"])
def test_it_makes_no_tensor_of_all_contexts_and_tokens(
    rule: str, kind: type[Drafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, _ = noisy_drafter_and_head(kind)
    batch = batch_of(kind, rules=[rule])
    batch["sampling", "top_k"].fill_(0)  # so that every node has a chance
    rows_of_a_chunk(monkeypatch, 4)
    # So many draft rows that logits would be the largest tensors.
    heads = [torch.nn.Linear(16, 4096, bias=False, dtype=torch.float64) for _ in range(4)]
    drafter.lm_head, drafter.lm_heads = heads[0], torch.nn.ModuleList(heads)  # of either kind
    drafter.draft_vocab = torch.arange(4096)
    head = TargetHead(0.1 * torch.randn(4096, 16, dtype=torch.float64))
    loss = AcceptanceRewardLoss(drafter, head, baseline="leave_one_out")
    assert int(TreeIndex.of(batch).drawn_from.sum()) > 16
    size = largest_tensor(lambda: loss(batch)["loss_acceptance_reward"].backward())
    assert size == 4096 * 16  # of a head, or its gradient
    assert heads[0].weight.grad is not None and bool(heads[0].weight.grad.any())


@pytest.mark.parametrize(("rule", "readings"), [("sample_and_match", 1), ("rejection", 2)])
def test_the_served_distribution_is_read_again_where_a_gradient_hangs_on_it(
    rule: str, readings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    loss, batch, read = AcceptanceRewardLoss(drafter, head), batch_of(Eagle3Drafter, rules=[rule]), []
    log_probs = ServedTarget._log_probs

    def counted(target: ServedTarget, rows: Rows, renormalize: bool) -> Tensor:
        found = log_probs(target, rows, renormalize)
        read.append(len(found))
        return found

    monkeypatch.setattr(ServedTarget, "_log_probs", counted)
    learn(loss, batch)
    assert sum(read) == readings * int(TreeIndex.of(batch).drawn_from.sum())
