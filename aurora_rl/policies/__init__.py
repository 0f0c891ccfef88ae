"""Drafters and the policy that serves them."""

from aurora_rl.policies.drafter import DRAFTERS, Drafter, Proposal, TreeShape, Unroll, register_drafter
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.medusa import MedusaDrafter
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.policies.target import TargetParts, choose_draft_vocab, token_prior

__all__ = [
    "DRAFTERS",
    "Drafter",
    "DrafterPolicy",
    "Eagle3Drafter",
    "MedusaDrafter",
    "Proposal",
    "TargetParts",
    "TreeShape",
    "Unroll",
    "choose_draft_vocab",
    "token_prior",
    "register_drafter",
]
