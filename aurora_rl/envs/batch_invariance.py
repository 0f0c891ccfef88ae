"""The check that an engine of ``batch_invariant=True`` makes before it serves: the same bits alone and in company."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aurora_rl.envs.engine import Engine
from aurora_rl.envs.exactness import Exactness, UnsupportedModelError
from aurora_rl.models.inference_modules import FusedDecoderLayer


def check_batch_invariance(engine: Engine, text: Tensor) -> None:
    """Check that logits are the same bits in plain rounds and in a tree, next to another slot, after a whole prefill.

    All slots are free; ``text`` is ``[n]`` int64 with ``n > 5``. UnsupportedModelError says where logits differ.
    """
    root, slot = len(text) - 5, engine.num_slots - 1
    engine.prefill([slot], [text[:1]])
    plain = torch.cat([_round(engine, [slot], text[at : at + 1][None]) for at in range(1, len(text))])[-4:]
    engine.release(slot)
    slots = sorted({0, slot})
    # The other slot has a shorter text, so that columns are masked for one and not for both.
    engine.prefill(slots, [text[: root + 1] if each == slot else text[:2] for each in slots])
    wrong = (text[root + 1] + 1) % engine.vocab_size
    tree = torch.stack([wrong, text[root + 1], wrong, text[root + 2], wrong, text[root + 3]]).repeat(len(slots), 1)
    parents = torch.tensor([-1, -1, 1, 1, 0, 3], device=text.device).repeat(len(slots), 1)
    hidden = engine.verify(torch.tensor(slots), tree, parents, torch.ones_like(tree, dtype=torch.bool))
    together = engine.logits(hidden)[-1, [0, 2, 4, 6]]
    for each in slots:
        engine.release(each)
    if not torch.equal(together, plain):
        raise UnsupportedModelError(
            "logits of a token change in their last bits with what else is in the pass, by at most "
            f"{float((together - plain).abs().max()):.2g}; set engine.batch_invariant=false"
        )


def require_fused(layers: nn.ModuleList, found: Exactness) -> bool:
    """Return True if all decoder layers are fused, or raise UnsupportedModelError."""
    if all(isinstance(layer, FusedDecoderLayer) for layer in layers):
        return True
    reasons = "".join(f"; {form}: {reason}" for form, reason in found.switched_off.items())
    raise UnsupportedModelError(
        "engine.batch_invariant=true serves models whose decoder layers are all fused, which these are not"
        f"{reasons}; set engine.batch_invariant=false"
    )


def _round(engine: Engine, slots: list[int], tokens: Tensor) -> Tensor:
    """Deliver tokens ``[s, 1]`` in a plain round, and return the logits ``[s, V]`` that preceded them."""
    none = tokens[:, :0]
    hidden = engine.verify(torch.tensor(slots), none, none, none.bool())
    logits = engine.logits(hidden)[:, 0]
    engine.commit(torch.tensor(slots), none, tokens, torch.ones(len(slots), dtype=torch.int64))
    return logits
