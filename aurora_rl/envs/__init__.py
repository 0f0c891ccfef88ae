"""Serving as an environment: engines, verification rules, SpecDecodeEnv."""

from aurora_rl.envs.engine import ENGINES, Engine, PromptChunk, get_engine, register_engine
from aurora_rl.envs.processors import generation_processors
from aurora_rl.envs.request import Completion, Request
from aurora_rl.envs.spec_decode import SpecDecodeEnv
from aurora_rl.envs.transformers_engine import TransformersEngine
from aurora_rl.envs.verification.block import Block
from aurora_rl.envs.verification.rejection import Rejection, RejectionWithoutReplacement
from aurora_rl.envs.verification.rules import RULES, Greedy, SampleAndMatch, VerificationRule, get_rule, register_rule
from aurora_rl.sampling_params import SamplingParams

__all__ = [
    "ENGINES",
    "RULES",
    "Block",
    "Completion",
    "Engine",
    "Greedy",
    "PromptChunk",
    "Rejection",
    "RejectionWithoutReplacement",
    "Request",
    "SampleAndMatch",
    "SamplingParams",
    "SpecDecodeEnv",
    "TransformersEngine",
    "VerificationRule",
    "generation_processors",
    "get_engine",
    "get_rule",
    "register_engine",
    "register_rule",
]
