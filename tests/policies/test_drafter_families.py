"""All drafters on targets that are no Llama (models/parts.py with policies): they start, draft, score and learn."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from families import FAMILIES, Texts, random_family, sampled_texts
from torch import Tensor, nn
from transformers import PreTrainedModel

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Drafter, TargetParts, TreeShape, get_drafter
from aurora_rl.testing.drafter_serving import filled
from aurora_rl.testing.drafter_training import check_unroll
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import pack

VOCAB = torch.arange(48)
LEARNED = ("eagle", "eagle3", "medusa", "dflash", "standalone")
# Families whose attention is not copied: its projections are others, or it normalises what it adds.
OWN_ATTENTION = (
    "bloom", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "mpt", "olmo2", "opt", "phi",
    "phi3",
)  # fmt: skip
# DFlash reads the text by attention alone, and a standalone drafter without attention says what head and embedding say
# of each other: nothing, where they are not tied and at random.
TELLING = [
    (name, kind)
    for name in FAMILIES
    for kind in LEARNED
    if kind not in ("dflash", "standalone") or name not in OWN_ATTENTION
]


@cache
def target(name: str, seed: int = 0) -> tuple[TargetParts, PreTrainedModel]:
    model = random_family(name, seed=seed)
    return TargetParts.of(model), model


@cache
def texts(name: str, seed: int = 0) -> Texts:
    return sampled_texts(target(name, seed)[1], number=16, length=16, seed=seed)


def started(name: str, kind: str, seed: int = 0) -> Drafter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_drafter(kind).from_target(target(name, seed)[0], draft_vocab=VOCAB)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_learners_target_is_the_served_one(name: str) -> None:
    parts, _ = target(name)
    served = texts(name).logits
    torch.testing.assert_close(parts.head(texts(name).hidden_states[-1]), served, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in FAMILIES for kind in LEARNED])
def test_a_drafter_drafts_what_it_scores_and_learns(name: str, kind: str) -> None:
    drafter, parts = started(name, kind), target(name)[0]
    trajectories = texts(name).trajectories(drafter.feature_layers)[:2]
    with torch.no_grad():
        unroll = drafter.unroll(pack(trajectories), 1)
    last = unroll.logits[0].view(len(trajectories), -1, len(VOCAB))[:, -1].log_softmax(-1)
    # Served without its last token, a text is at the anchor that training calls its last.
    for trajectory in trajectories:
        trajectory["sequence", "tokens"] = trajectory["sequence", "tokens"][:-1]
        trajectory["sequence", "features"] = trajectory["sequence", "features"][:-1]
    proposal = drafter.propose(filled(drafter, trajectories), TreeShape(depth=2, width=2))
    for row, law in enumerate(last):
        first = [i for i, parent in enumerate(proposal.parents[row].tolist()) if parent < 0]
        torch.testing.assert_close(proposal.log_probs[row, first], law[proposal.tokens[row, first]], rtol=0, atol=1e-4)
    trajectories = texts(name).trajectories(drafter.feature_layers)[:2]
    check_unroll(drafter, trajectories[:1])
    loss, batch = ImitationLoss(drafter, parts.head, steps=2), pack(trajectories)
    optimizers = drafter_optimizers(drafter, muon_lr=0.01, adam_lr=1e-3)
    losses = [train_step(loss, optimizers, batch, autocast=False)[0] for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["bloom", "gemma3_text"])
def test_ngrams_need_nothing_of_the_target(name: str) -> None:
    drafter = started(name, "ngram")
    slots = filled(drafter, texts(name).trajectories(())[:2])
    assert len(drafter.propose(slots, TreeShape(2)).tokens) == 2


@pytest.mark.parametrize(("name", "kind"), TELLING)
def test_day_0_is_no_worse_than_random_weights(name: str, kind: str) -> None:
    """By the chance that the likeliest draft at depths 1 and 2 is what the target says."""
    day_0, random = [], []
    for seed in range(2):
        drafter = started(name, kind, seed)
        day_0.append(agreement(drafter, name, seed))
        for random_seed in range(2):
            reset(drafter, seed=random_seed)
            random.append(agreement(drafter, name, seed))
    assert torch.stack(day_0).mean() > torch.stack(random).mean()


def agreement(drafter: Drafter, name: str, seed: int) -> Tensor:
    found = texts(name, seed)
    with torch.no_grad():
        logits, valid, _ = drafter.unroll(pack(found.trajectories(drafter.feature_layers)), 2)
    law = found.logits[:, 3:-1].flatten(0, 1).softmax(-1)
    chances = [law.gather(1, step.argmax(-1)[:, None])[:, 0][ok] for step, ok in zip(logits, valid, strict=True)]
    return torch.cat(chances).mean()


def reset(drafter: Drafter, seed: int) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.fill_(1)


def test_the_handshake_covers_all_of_the_head() -> None:
    parts, drafter = target("llama")[0], started("llama", "medusa")
    weight = parts.head.weight
    heads = [TargetHead(weight), TargetHead(weight, scale=2.0), TargetHead(weight, softcap=2.0)]
    found = {Handshake.of(replace(parts, head=head), drafter, "medusa").head_checksum for head in heads}
    assert len(found) == 3
