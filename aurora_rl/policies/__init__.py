"""Drafters and the policy that serves them."""

from aurora_rl.models.draft_vocab import choose_draft_vocab, token_prior
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.dflash import DFlashDrafter
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, Unroll
from aurora_rl.policies.eagle import EagleDrafter
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.lookup import NgramDrafter
from aurora_rl.policies.medusa import MedusaDrafter
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.policies.registry import DRAFTERS, get_drafter, register_drafter
from aurora_rl.policies.standalone import StandaloneDrafter
from aurora_rl.policies.tree_shape import TreeShape

__all__ = [
    "DRAFTERS",
    "Checkpoint",
    "DFlashDrafter",
    "Drafter",
    "DrafterPolicy",
    "Eagle3Drafter",
    "EagleDrafter",
    "HeadLogits",
    "MedusaDrafter",
    "NgramDrafter",
    "Proposal",
    "StandaloneDrafter",
    "TargetParts",
    "TreeShape",
    "Unroll",
    "choose_draft_vocab",
    "get_drafter",
    "register_drafter",
    "token_prior",
]
