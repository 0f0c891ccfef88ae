"""AcceptanceRewardLoss against TorchRL's ClipPPOLoss and GRPOLoss, where they say the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from reward_estimates import BRANCHES
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.llm import GRPOLoss

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.objectives.acceptance_reward import clipped_gain
from aurora_rl.testing.enumerable_worlds import (
    VOCAB,
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    table_gradient,
    tree_trajectory,
)
from aurora_rl.trajectories import pack


def test_the_clipped_gain_is_that_of_torchrls_clip_ppo() -> None:
    torch.manual_seed(0)
    count, clip = 200, 0.2
    logits = torch.nn.Linear(4, VOCAB).double()
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
        ),
    )
    td = TensorDict(
        {
            "observation": torch.randn(count, 4).double(), "action": torch.randint(VOCAB, (count,)),
            "action_log_prob": -torch.rand(count).double() - 0.5, "advantage": torch.randn(count, 1).double(),
        },
        [count],
    )  # fmt: skip
    reference = ClipPPOLoss(actor, None, clip_epsilon=clip, entropy_bonus=False, critic_coeff=None)
    log_q = logits(td["observation"]).log_softmax(-1).gather(1, td["action"][:, None])[:, 0]
    loss = -clipped_gain(log_q, td["action_log_prob"], td["advantage"][:, 0], clip).mean()
    expected = reference(td)["loss_objective"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    mine = logits.weight.grad.clone()
    logits.weight.grad = None
    expected.backward()
    named = dict(reference.named_parameters())
    gradient = (
        logits.weight.grad if logits.weight.grad is not None else next(p.grad for p in named.values() if p.ndim == 2)
    )
    torch.testing.assert_close(mine, gradient)


class Chains(torch.nn.Module):
    """The drafter as TorchRL's GRPOLoss sees a policy: sequences of tokens, each with its prefix."""

    def __init__(self, drafter: EnumerableDrafter) -> None:
        super().__init__()
        self.drafter = drafter

    def get_dist(self, td: TensorDict, logits_key: str) -> SimpleNamespace:
        def log_prob(action: Tensor) -> Tensor:
            return torch.stack(
                [
                    torch.stack([self.drafter.log_q(tuple(row[:i]))[token] for i, token in enumerate(row)])
                    for row in action.tolist()
                ]
            )

        return SimpleNamespace(log_prob=log_prob, mask=torch.ones(td.shape + (2,), dtype=torch.bool))


def test_the_group_baseline_with_a_clip_is_torchrls_grpo() -> None:
    """Branches of a root are a group, their values the rewards: the same loss and gradient."""
    drafter, target = EnumerableDrafter(10), EnumerableTarget(10)
    drawn = [DrawnTree(BRANCHES, tokens) for tokens in ((0, 1, 2, 0), (2, 0, 1, 1), (1, 2, 0, 0))]
    behaviour = [[-0.9, -1.3, -0.6, -1.0], [-1.1, -0.7, -1.6, -0.8], [-1.0, -0.4, -1.2, -2.0]]
    batch = pack(
        [
            tree_trajectory(tree, target, rule="sample_and_match", log_probs=log_probs)
            for tree, log_probs in zip(drawn, behaviour, strict=True)
        ]
    )
    found = AcceptanceRewardLoss(drafter, target.head, baseline="group", clip=0.2, reduction="sum")(batch)
    tokens, log_probs, advantage = [], [], []
    for tree, recorded in zip(drawn, behaviour, strict=True):
        first, then = tree.tokens[:2], tree.tokens[2:]
        reward = torch.stack([target.p(())[a] * (1 + target.p((a,))[b]) for a, b in zip(first, then, strict=True)])
        score = (reward - reward.mean()) / (reward.std(correction=0) + 1e-6)
        for branch in range(2):
            tokens.append([first[branch], then[branch]])
            log_probs.append([recorded[branch], recorded[2 + branch]])
            advantage.append([float(score[branch])] * 2)
    td = TensorDict(
        {
            "tokens": {"full": torch.tensor(tokens)}, "log_probs": {"full": torch.tensor(log_probs).double()},
            "advantage": torch.tensor(advantage).double()[:, :, None],
        },
        [6],
    )  # fmt: skip
    grpo = GRPOLoss(Chains(drafter), clip_epsilon=0.2, entropy_bonus=False, aggregation="none")
    reference = grpo(td).loss_objective.sum()
    torch.testing.assert_close(found["loss_acceptance_reward"], reference, atol=1e-5, rtol=1e-5)
    got, expected = (table_gradient(drafter, loss) for loss in (found["loss_acceptance_reward"], reference))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
