"""Small causal LMs as drafters, and the plain model's own probabilities to compare their trees with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drafters import perturbed
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aurora_rl.policies import Drafter, Proposal, StandaloneDrafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target

VOCAB = torch.tensor([0, 1, 3, 7, 8, 12, 19, 25, 30, 31])
SIZES = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 512, "initializer_range": 0.4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def save_model(folder: Path, config: PretrainedConfig) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def plain(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)


def standalone_of_the_target(architecture: str = "llama", **options) -> StandaloneDrafter:
    """In float64, and trained a little: what adds nothing at day 0 adds something."""
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target(architecture))
    return perturbed(StandaloneDrafter.from_target(parts, draft_vocab=VOCAB, **options).double(), 0.2)


TEXTS = [torch.arange(9) % 32, torch.tensor([4, 4]), torch.tensor([31, 0, 17, 5, 5])]


def proposed(drafter: Drafter, shape: TreeShape) -> Proposal:
    """Trees after texts of unequal length, the slots filled in two turns."""
    drafter.allocate(len(TEXTS), 10)
    for slot, text in enumerate(TEXTS):
        half = len(text) // 2
        for part in (text[: half + 1], text[half:]):
            if len(part) > 1:
                num_new = torch.tensor([len(part) - 1])
                drafter.extend(torch.tensor([slot]), part[None], torch.zeros(1, len(part) - 1, 0), num_new)
    return drafter.propose(torch.arange(len(TEXTS)), shape)


def assert_drafts_as(model: PreTrainedModel, vocab: Tensor, proposal: Proposal) -> None:
    """Every node's log-probability is the plain model's, run anew over the whole text and the node's path."""
    for row, text in enumerate(TEXTS):
        paths: list[list[int]] = []
        for token, parent, log_prob in zip(*(part[row].tolist() for part in proposal[:3]), strict=True):
            above = paths[parent] if parent >= 0 else text.tolist()
            logits = model(torch.tensor([above])).logits[0, -1, vocab].log_softmax(-1)
            assert log_prob == pytest.approx(float(logits[(vocab == token).nonzero()]), abs=1e-5)
            paths.append([*above, token])
