"""A name or a module path that moved raises an error that names the new place."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

from aurora_rl._moved import GONE, MOVED

# ---- names of the flat tree that the rooms replaced -----------------------------------------------------------------

# Public names of the modules that still have a module or a package at their path.
OLD_NAMES = {
    "cli": "main",
    "collectors": """
        CodecError Hello Limits TrajectorySink WeightPublisher WeightReceiver ZMQCollector ZMQWeightSyncScheme checksum
        decode encode trajectory_buffer
    """,
    "collectors.codec": "Buffer CodecError DEFAULT_LIMITS Key Limits Message SCHEMA checksum decode encode leaves",
    "collectors.collector": "ZMQCollector",
    "collectors.sink": "TRAJECTORY TrajectorySink",
    "collectors.sockets": "SocketThread bind connect open_socket",
    "envs": """
        Completion Engine Greedy Rejection RejectionWithoutReplacement Request SampleAndMatch SamplingParams
        SpecDecodeEnv TransformersEngine VerificationRule get_rule register_rule
    """,
    "envs.engine": "Engine",
    "envs.spec_decode": "Completion Request SpecDecodeEnv",
    "envs.transformers_engine": "TransformersEngine",
    "envs.verification": """
        Greedy RULES SampleAndMatch Verdict VerificationRule check_shapes descend get_rule register_rule settle
    """,
    "models": """
        DEFAULT_TARGET ModelError default_dtype embedded_model_path encode_chat load_target
        stop_token_ids
    """,
    "objectives": """
        AcceptanceRewardLoss DIVERGENCES DiscardSamplingLoss Divergence ExpectedLengthLoss ImitationLoss
        OBJECTIVES Objective SumLoss Values check_settings context_rows get_objective imitation make_objectives overlap
        register_objective target_logits target_rows
    """,
    "objectives.acceptance_reward": "AcceptanceRewardLoss clipped_gain",
    "objectives.discard": "DiscardSamplingLoss",
    "objectives.divergences": """
        DIVERGENCES Divergence cross_entropy forward_kl get_divergence hybrid_overlap jensen_shannon missed_probability
        negative_log_overlap overlap reverse_kl skewed_kl top_k_cross_entropy total_variation wants_renormalized
    """,
    "objectives.expected_length": "ExpectedLengthLoss",
    "objectives.imitation": "ImitationLoss expected_length_weights imitation",
    "objectives.objective": "Objective SumLoss Values",
    "objectives.registry": "OBJECTIVES check_settings get_objective make_objectives register_objective",
    "policies": """
        Checkpoint DFlashDrafter Drafter DrafterPolicy Eagle3Drafter EagleDrafter HybridDrafter MedusaDrafter
        NgramDrafter Proposal StandaloneDrafter TargetParts TreeShape Unroll available_drafters choose_draft_vocab
        get_drafter load_drafter register_drafter save_drafter token_prior
    """,
    "policies.attention": "KeysValues TreeAttention",
    "policies.block_layer": "BlockAttention BlockLayer Rotation",
    "policies.dflash": "DFlashDrafter",
    "policies.drafter": """
        Checkpoint Drafter Proposal TreeShape Unroll check_draft_vocab check_weights draft_rows log_softmax
    """,
    "policies.eagle": "EagleDrafter",
    "policies.eagle3": "Eagle3Drafter",
    "policies.formats": "load_drafter save_drafter written",
    "policies.medusa": "MedusaBlock MedusaDrafter",
    "policies.policy": "DrafterPolicy",
    "policies.recurrent": "DraftLayer RecurrentDrafter",
    "policies.registry": "OWN_NAME available_drafters get_drafter recognized register_drafter",
    "policies.standalone": "Branches StandaloneDrafter",
    "serving": "EmbeddedServing SGLangServing Serving serving",
    "settings": "check nearest settings_of",
    "testing": "check_drafter check_engine check_objective serve tiny_target tiny_trajectory topk_form",
    "testing.drafters": "check_drafter",
    "testing.engines": "check_engine",
    "testing.objectives": "check_objective",
    "testing.tiny": "cast dtype_of serve tiny_target tiny_trajectory",
    "training": "drafter_optimizers train_on train_step",
    "trajectories": """
        ContextStore DRAFT_MODES RULE_CODES Sampling TOPK_ENTRIES TrajectoryRecorder acceptance_length
        accepted_per_round pack pad_rows validate
    """,
}


@pytest.mark.parametrize("old", [*MOVED, "sglang.server", "sglang.engine", "collectors.weight_scheme"])
def test_what_moved_names_the_new_place(old: str) -> None:
    moved = old if old in MOVED else old.partition(".")[0]
    assert pkgutil.resolve_name(f"aurora_rl.{MOVED[moved].partition(' ')[0]}") is not None
    told = rf"^aurora_rl\.{moved} is aurora_rl\.{re.escape(MOVED[moved])} now$"
    room, _, name = f"aurora_rl.{old}".rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=told):
        exec(f"from {room} import {name}")
    of_modules = (
        *("cli.spec.", "collectors.dataset.", "trajectories.", "training.offline.", "objectives.objective."),
        *("envs.exactness.", "policies.eagle3.", "serving.http.app.", "serving.http.proxy."),
    )
    if not old.startswith(of_modules):  # modules, which have no modules
        with pytest.raises(ModuleNotFoundError, match=told):
            importlib.import_module(f"aurora_rl.{old}")


@pytest.mark.parametrize("room", OLD_NAMES)
def test_an_old_name_is_where_it_was_or_names_its_new_place(room: str) -> None:
    for name in OLD_NAMES[room].split():
        if f"{room}.{name}" not in MOVED:
            exec(f"from aurora_rl.{room} import {name}")


@pytest.mark.parametrize("old", GONE)
def test_what_is_gone_says_what_to_do(old: str) -> None:
    room, _, name = f"aurora_rl.{old}".rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=rf"^aurora_rl\.{old} is gone; {re.escape(GONE[old])}$"):
        exec(f"from {room} import {name}")


def test_the_command_s_old_function_names_the_new_one() -> None:
    from aurora_rl.cli import main

    with pytest.raises(TypeError, match=r"^aurora_rl\.cli\.main is a module now; call aurora_rl\.cli\.main\.main$"):
        main(["check"])  # type: ignore[operator]
