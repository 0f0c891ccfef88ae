"""A name or a module path that moved raises an error that names the new place."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from types import ModuleType

import pytest

from aurora_rl._moved import ELSEWHERE, GONE, MOVED, MovedModules

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
    "envs.sglang": "ENVIRONMENT KEYS_ENVIRONMENT LEARNED SGLangClient SGLangEngine SGLangError register",
    "envs.sglang.client": "SGLangClient SGLangCompletion SGLangError drafter_arguments reserved_context",
    "envs.sglang.weights": "draft_vocab load_drafter read_back",
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
    "policies.adapters": "MOST_BYTES",
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
    "adaptation.live": "LiveSample measure_in_turns",
    "envs.verification.rejection": "bonus_draw both_distributions reject",
    "policies.formats.llama_eagle": "is_eagle3",
    "serving.http.errors": "CLIENT_GONE",
    "telemetry.view": "LiveView show_time",
    "training.shares": "RecentEngines engine_of in_turns",
    "serving": "EmbeddedServing SGLangServing Serving serving",
    "settings": "check nearest settings_of",
    "statistics": "Both",
    "tenants": "MOST_DELETIONS is_salt_of",
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

# Public names of the modules that have none any more.
MOVED_NAMES = {
    "agreement": "drafts_agreed",
    "answers": "Answers",
    "bench": "VARIANTS bench_objectives learning_curve mean_curves",
    "build": """
        SCHEMA Target check check_context check_objectives conversations device_of drafter dtype_of first_drafter
        hello learner load opening shape traffic
    """,
    "check": "check_model",
    "checkpoints": "CheckpointError load_training_state read_folder save_tensors save_training_state write_folder",
    "collectors.buffer": "trajectory_buffer",
    "collectors.gatekeeper": "Gatekeeper KEY_NAME",
    "collectors.guard": "Guard Meter TooLong TooLongError cost near_address",
    "collectors.hello": "Hello",
    "collectors.weight_scheme": "ZMQWeightSyncScheme",
    "collectors.weight_sync": "EngineStatus WeightPublisher WeightReceiver",
    "config": """
        Config ConfigError ControlConfig DrafterConfig EngineConfig GateConfig LearnerConfig TrafficConfig WireConfig
        load_config nearest_key to_yaml
    """,
    "conversations": "Conversations turn_seed",
    "cpus": "usable_cpus",
    "envs.rejection": "Rejection RejectionWithoutReplacement reject without",
    "envs.sampling": "SamplingBatch SamplingParams argmax gumbel served_log_probs uniform warp warp_logits",
    "figures": "Figures",
    "gate": "Decision Gate Replay replay",
    "inference_modules": """
        FusedDecoderLayer FusedRMSNorm GROUPED_ATTENTION PackedLinear Rotary fuse_decoder_layers grouped_attention
        grouped_mask layer_kind prepare_for_inference stage text_and_trees
    """,
    "learner": "Learner",
    "live": "LiveView every",
    "metrics": "JsonLines MetricsLog MetricsReader",
    "objectives.contexts": """
        SAMPLING_KEYS SPINE_KEYS TREE_KEYS completion_requests completion_tokens path_products subtree_sums windows
    """,
    "objectives.draws": "Draws before log_left",
    "objectives.target": "beside context_rows target_keys target_logits target_rows",
    "output": "SafeStream plain_console",
    "policies.growth": "Growth SampledGrowth TopKGrowth best_first grow",
    "policies.hybrid": "HybridDrafter merge_chain",
    "policies.ngram": "NgramDrafter Tree continuations ngram_tree padded",
    "policies.recorded": "RecordedTrees true_chains",
    "policies.shape": "Outcome ShapeController",
    "policies.target": """
        TargetParts check_captured check_fixed_rope check_heads_stated check_layers_rise check_rope choose_draft_vocab
        copy_layer default_feature_layers layer_config norm_weight refuse_own_attention settle_attention
        targets_entries token_prior written_config
    """,
    "policies.vllm_format": "LAYER_IDS from_vllm to_vllm",
    "recordings": "Recording record",
    "report": "EMPTY_SUMMARY draw_report summary_table write_summary",
    "server": "DrafterFault InferenceServer cost_table measure_rounds",
    "sglang": "ENVIRONMENT SGLangCompletion SGLangEngine SGLangError register",
    "sglang.control": "ControlError ControlServer ask",
    "sglang.engine": "SGLangCompletion SGLangEngine SGLangError drafter_arguments free_ports reserved_context",
    "sglang.plugin": "Plugin SUPPORTED",
    "sglang.recorder": "EngineRound FeatureStore TargetRows TrajectoryAssembler parents_of request_number",
    "sglang.requests": "sampling_of unwanted",
    "sglang.server": "RemoteServer",
    "sglang.session": "ATTACH Session",
    "sglang.weights": "SwapError load_drafter",
    "slot_cache": """
        KVShape RecurrentStateError ShapeRecorder SlotCache cache_mask column_positions sliding_window uniform_shapes
    """,
    "target_head": "TargetHead context_length decoder_layers decoder_of",
    "testing.losses": "refuses total_loss total_of",
    "testing.forms": "siblings_reversed topk_form",
    "testing.stand_ins": "EchoDrafter GappyDrafter Served gappy_drafter served_for_checks",
    "testing.tabular": """
        DrawnTree TEXTS TabularDrafter TabularTarget Text VOCAB chance_of drawn_trees exact_gradient expectation
        log_probs_of outcomes_of reach_of table_gradient tree_trajectory
    """,
    "throughput": "ControlWindows Rates Round Rounds rates",
    "traffic": "Message Prompt TrafficError generate read_jsonl",
    "traffic_templates": "POOLS Pool TEMPLATES",
    "cli.config.drafter": "check_drafter_config",
    "cli.config.paths": "PATHS expand_home",
    "cli.config_canary": "CanaryConfig check_trials compared without_trials",
    "cli.config_checks": "check_config without_extras",
    "cli.config_drafter": "DrafterConfig check_drafter_config",
    "cli.config_fleet": "EngineGroup FleetConfig Placement check_fleet engine_groups learner_placement",
    "cli.config_privacy": "PrivacyConfig check_privacy check_records keep_nothing",
    "cli.config_tree": "keys_of nested node_at wrong_type",
    "cli.engines": "embedded_server served_config sglang_server",
    "cli.export": "register run",
    "cli.flywheel": "register run",
    "cli.sglang": "register run",
    "objectives.tree_index": "completion_requests completion_tokens path_products subtree_sums windows",
    "serving.answers": "Answers",
    "objectives.settings": "check nearest settings_of",
    "policies.length": "LengthController",
    "serving.http.fields": "check_fields",
    "serving.http.generation": "complete while_connected",
    "serving.http.reading": "read_body",
    "serving.capture": "Capture",
    "envs.alibi": "AlibiPositions",
    "envs.batch_invariance": "check_batch_invariance require_fused",
    "envs.kv_shapes": "kv_shapes",
    "envs.logprobs": "TokenLogprobs token_logprobs",
    "envs.sglang.layout": "cores_of layout_fault ranks_of",
    "envs.sglang.models": "drafter_fault target_fault",
    "envs.sglang.replicas": "ask_all",
}


@pytest.mark.parametrize("old", MOVED_NAMES)
def test_an_old_module_says_where_each_of_its_names_is(old: str) -> None:
    moved, part = ("sglang", old.partition(".")[2]) if old.startswith("sglang") else (old, "")
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"aurora_rl.{old}")
    places = {name: place for names, place in ELSEWHERE.get(moved, {}).items() for name in names.split(", ")}
    home = places.get(part) or f"aurora_rl.{MOVED[moved]}.{part}".rstrip(".")
    for name in MOVED_NAMES[old].split():
        if name in places:
            assert re.search(rf"[;,] {name}\b.*: {re.escape(places[name])}(;|$)", str(caught.value))
            place = pkgutil.resolve_name(places[name])
            assert hasattr(place, name) or not isinstance(place, ModuleType), f"{places[name]} lacks {name}"
        else:
            assert hasattr(importlib.import_module(home), name), f"{home} lacks {name}"


@pytest.mark.parametrize("old", [*MOVED, "sglang.server", "sglang.engine", "collectors.weight_scheme"])
def test_what_moved_names_the_new_place(old: str) -> None:
    moved = old if old in MOVED else old.partition(".")[0]
    assert pkgutil.resolve_name(f"aurora_rl.{MOVED[moved]}") is not None
    told = rf"^aurora_rl\.{moved} is aurora_rl\.{re.escape(MOVED[moved])} now(;|$)"
    room, _, name = f"aurora_rl.{old}".rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=told):
        exec(f"from {room} import {name}")
    of_modules = (
        *("cli.spec.", "collectors.dataset.", "trajectories.", "training.offline.", "objectives.objective."),
        *(
            "llm.",
            "policies.hub.",
            "workload.traffic.",
            "envs.exactness.",
            "policies.eagle3.",
            "serving.http.app.",
            "serving.http.proxy.",
        ),
    )
    if not old.startswith(of_modules):  # modules, which have no modules
        with pytest.raises(ModuleNotFoundError, match=told):
            importlib.import_module(f"aurora_rl.{old}")


@pytest.mark.parametrize("room", OLD_NAMES)
def test_an_old_name_is_where_it_was_or_names_its_new_place(room: str) -> None:
    for name in OLD_NAMES[room].split():
        if f"{room}.{name}" not in {*MOVED, *GONE}:
            exec(f"from aurora_rl.{room} import {name}")


@pytest.mark.parametrize("old", GONE)
def test_what_is_gone_says_what_to_do(old: str) -> None:
    room, _, name = f"aurora_rl.{old}".rpartition(".")
    with pytest.raises(ModuleNotFoundError, match=rf"^aurora_rl\.{old} is gone; {re.escape(GONE[old])}$"):
        exec(f"from {room} import {name}")


@pytest.mark.parametrize(
    ("old", "new"), [("cli.main", "cli.main.main"), ("objectives.imitation", "objectives.comparison.compare")]
)
def test_a_module_that_was_a_function_names_the_new_one(old: str, new: str) -> None:
    assert callable(pkgutil.resolve_name(f"aurora_rl.{new}"))
    with pytest.raises(TypeError, match=rf"^aurora_rl\.{old} is a module now; call aurora_rl\.{re.escape(new)}$"):
        importlib.import_module(f"aurora_rl.{old}")(["check"])  # type: ignore[operator]


@pytest.mark.parametrize(
    "old",
    [
        *("models.load_target", "trajectories.ContextStore", "objectives.ImitationValues"),
        *(
            "collectors.Hello",
            "envs.sglang.SGLangEngine",
            "training.shares.RecentEngines",
        ),  # two look names up themselves
    ],
)
def test_a_module_has_no_name_that_left_it(old: str) -> None:
    room, _, name = f"aurora_rl.{old}".rpartition(".")
    module = importlib.import_module(room)
    assert not hasattr(module, name) and getattr(module, name, None) is None
    with pytest.raises(AttributeError, match=rf"^aurora_rl\.{re.escape(old)} is "):
        getattr(module, name)
    with pytest.raises(ImportError, match="^cannot import name 'never_there' from"):
        exec(f"from {room} import never_there")
    assert not hasattr(module, "never_there")


def test_a_reload_leaves_one_finder() -> None:
    importlib.reload(importlib.import_module("aurora_rl"))
    assert sum(isinstance(finder, MovedModules) for finder in sys.meta_path) == 1


def test_the_old_name_of_sglang_s_client_names_the_new_one() -> None:
    new = "aurora_rl.envs.sglang.client.SGLangClient"
    assert pkgutil.resolve_name(new)
    with pytest.raises(ImportError, match=rf"^aurora_rl\.envs\.sglang\.SGLangEngine is {re.escape(new)} now$"):
        exec("from aurora_rl.envs.sglang import SGLangEngine")
