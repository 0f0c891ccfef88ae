"""Modules and names that moved: importing one raises an error that names its new place."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from typing_extensions import override

# Names that have a better one in the same module: old to new, by module below aurora_rl.
_RENAMED = {
    "statistics": {"Both": "FigurePair"}, "policies.adapters": {"MOST_BYTES": "MAX_BYTES"},
    "tenants": {"MOST_DELETIONS": "MAX_DELETIONS", "is_salt_of": "tenant_of_salt"},
    "envs.verification.rejection": {"bonus_draw": "ComparingRule", "both_distributions": "ComparingRule"},
    "serving.http.errors": {"CLIENT_GONE": "answer_nobody"},
    "serving.canary": {"Canary": "RoundTrialRules", "Trial": "RoundTrial", "Verdict": "RoundTrialVerdict"},
    "training.engine_canary": {"EngineRules": "EngineTrialRules", "EngineVerdict": "EngineTrialVerdict"},
    "serving.recorded_requests": {"record": "record_requests"},
    "workload.traffic": {"generate": "generate_traffic"}, "training.parallel": {"Command": "RankCommand"},
    "settings": {"check": "check_values"}, "envs.sglang.weights": {"load_drafter": "swap_weights"},
    "policies.formats.checks": {"check_captured": "check_feature_layers"},
    "policies.formats.files": {"check_layout": "check_format"},
    "cli.assembly": {"check_context": "slot_length"},
    "envs.attention_span": {"Sees": "First"}, "envs.exactness": {"ELSEWHERE": "TRY_SGLANG", "SGLANG": "NOT_LEARNED"},
    "models.detokenizer": {"decode": "detokenize"}, "policies.calibration": {"DrafterFault": "DrafterError"},
    "testing.drafter_weights": {"check_weights": "check_weight_loading"},
    "testing.enumerable_worlds": {"TabularDrafter": "EnumerableDrafter", "TabularTarget": "EnumerableTarget"},
    "testing.fixtures": {"Served": "ServedTrajectories"},
    "collectors.keys": {
        "KeyFault": "WireKeyError", "control_client_keys": "plugin_client_keys",
        "control_server_keys": "plugin_server_keys",
    },
}  # fmt: skip
# Old to new, below aurora_rl: modules, then names that left a module which is still there.
MOVED = {
    "target_head": "models.target_head", "policies.target": "models.parts", "slot_cache": "models.kv_cache",
    "inference_modules": "models.inference_modules", "metrics": "telemetry.log", "throughput": "telemetry.rates",
    "figures": "telemetry.stats", "report": "telemetry.report", "live": "telemetry.view",
    "envs.sampling": "envs.verification.sampling", "envs.rejection": "envs.verification.rejection",
    "policies.recorded": "tree_index", "policies.growth": "policies.tree_search",
    "policies.shape": "policies.tree_controller", "policies.ngram": "policies.lookup",
    "policies.vllm_format": "policies.formats.vllm", "objectives.contexts": "tree_index",
    "policies.hybrid": "policies.lookup", "objectives.target": "objectives.target_rows",
    "objectives.draws": "objectives.tree_law", "collectors.hello": "collectors.handshake",
    "collectors.weight_sync": "collectors.weights", "recordings": "collectors.dataset",
    "collectors.buffer": "training.replay", "learner": "training.learner", "gate": "training.gate",
    "checkpoints": "training.checkpoint", "agreement": "training.served_weights", "server": "serving.server",
    "conversations": "serving.requests", "answers": "serving.requests", "build": "cli.assembly",
    "bench": "cli.bench_objectives", "check": "cli.check", "config": "cli.config", "cpus": "cli.cpus",
    "output": "cli.output", "traffic": "workload.traffic", "traffic_templates": "workload.templates",
    "testing.forms": "testing.variants",
    "testing.stand_ins": "testing.fixtures", "testing.tabular": "testing.enumerable_worlds",
    "sglang": "envs.sglang", "envs.sglang.recorder": "envs.remote.assembler",
    **{f"cli.config_{name}": f"cli.config.{name}" for name in (
        "canary", "checks", "fleet", "privacy", "tree")},
    "cli.flywheel": "cli.serve", "cli.export": "cli.drafter",
    "objectives.tree_index": "tree_index", "serving.answers": "serving.requests",
    "objectives.settings": "settings", "policies.length": "policies.tree_controller",
    "serving.http.fields": "workload.request_fields", "llm.Prompt": "llm_prompts.PromptType",
    "policies.hub.engine_commands": "policies.model_card.engine_commands",
    "workload.traffic.Message": "workload.request_values.ChatMessage",
    "collectors.weight_scheme": "collectors.weights", "serving.recording": "serving.recorded_requests",
    "serving.sglang": "serving.attached",
    "cli.config.paths": "cli.config.loading", "testing.losses": "testing.asserts",
    **dict.fromkeys(("cli.config_drafter", "cli.config.drafter"), "cli.config.checks"),
    "cli.recording": "cli.training_data", "adaptation.recording": "adaptation.recorded_stream",
    "envs.recording": "envs.remote", "envs.sglang.control": "envs.remote.plugin_server",
    "envs.sglang.SGLangEngine": "envs.sglang.client.SGLangClient",
    "envs.sglang.client.SGLangCompletion": "envs.remote.client.EngineCompletion",
    "cli.sglang": "cli.attach", "cli.engines": "cli.embedded",
    "collectors.gatekeeper": "collectors.admission", "collectors.guard": "collectors.relay",
    "envs.kv_shapes": "envs.attention_span", "envs.alibi": "envs.forward_pass", "serving.capture": "serving.server",
    "serving.http.reading": "serving.http.app", "serving.http.generation": "serving.http.app",
    "envs.sglang.layout": "envs.sglang.refusals", "envs.sglang.models": "envs.sglang.refusals",
    "envs.batch_invariance": "envs.exactness", "envs.logprobs": "envs.request",
    **{f"envs.sglang.{name}": f"envs.remote.{name}" for name in (
        "assembler", "copies", "plugin_server", "replicas", "session")},
    "collectors.Hello": "collectors.handshake.Handshake",
    "collectors.ZMQWeightSyncScheme": "collectors.weights.WeightPublisher",
    "collectors.dataset.record": "serving.recorded_requests.record_requests",
    "serving.http.app.create_app": "serving.http.front.Front",
    "serving.http.proxy.create_proxy": "serving.http.proxy.Proxy",
    "collectors.trajectory_buffer": "training.replay.trajectory_buffer",
    "objectives.objective.SumLoss": "objectives.sum_loss.SumLoss",
    "policies.HybridDrafter": "policies.policy.DrafterPolicy",
    "policies.lookup.merge_trees": "policies.merging.TreeMerger",
    **{f"{home}.available_drafters": "policies.registry.DRAFTERS" for home in ("policies", "policies.registry")},
    "trajectories.ContextStore": "context.ContextStore", "trajectories.Sampling": "sampling_params.SamplingParams",
    "trajectories.TrajectoryRecorder": "context.TrajectoryRecorder",
    "training.drafter_optimizers": "training.optimizers.drafter_optimizers",
    "training.train_on": "training.steps.train_on", "training.train_step": "training.steps.train_step",
    "training.offline.train_on": "training.steps.train_on",
    **{f"policies.formats.{name}": f"policies.formats.files.{name}" for name in (
        "load_drafter", "save_drafter", "written")},
    "policies.formats.llama_eagle.is_eagle3": "policies.eagle3.Eagle3Drafter.recognizes",
    "envs.exactness.quiet": "models.loading.quiet_transformers",
    "policies.eagle3.Eagle3Layer": "policies.recurrent.DraftLayer",
    "cli.spec.handshake": "collectors.handshake.Handshake.of",
    **{f"cli.spec.{name}": f"cli.assembly.{name}" for name in (
        "first_drafter", "load", "request_queue", "start_drafter", "traffic")},
    **{f"serving.{name}": "cli.embedded" for name in ("EmbeddedServing", "SGLangServing", "Serving", "serving")},
    **{f"models.{name}": f"models.loading.{name}" for name in (
        "DEFAULT_TARGET", "ModelError", "default_dtype", "embedded_model_path", "encode_chat",
        "load_target", "stop_token_ids")},
    **{f"envs.verification.{name}": f"envs.verification.rules.{name}" for name in (
        "RULES", "Greedy", "SampleAndMatch", "Verdict", "VerificationRule", "check_shapes", "descend", "get_rule",
        "register_rule", "settle")},
    **{f"{home}.{old}": f"{home}.{new}" for home, names in _RENAMED.items() for old, new in names.items()},
}  # fmt: skip
_OF_TREE_INDEX = {
    "completion_requests": "aurora_rl.tree_index.completion_columns",
    "completion_tokens": "aurora_rl.objectives.windows",
    "path_products, subtree_sums": "aurora_rl.tree_index.TreeIndex",
    "windows": "aurora_rl.objectives.windows.by_window",
}
# Of modules that moved, the public names that their new module lacks, and what has them or is in their place.
ELSEWHERE = {
    "answers": {"Answers": "aurora_rl.serving.requests.RequestQueue"},
    "bench": {"bench_objectives": "aurora_rl.cli.bench_objectives.run"},
    "build": {
        "SCHEMA": "aurora_rl.collectors.codec", "Target": "aurora_rl.cli.assembly.LoadedTarget",
        "check, check_objectives, device_of, dtype_of, shape": "aurora_rl.cli.spec.resolve",
        "conversations": "aurora_rl.cli.assembly.request_queue", "check_context": "aurora_rl.cli.assembly.slot_length",
        "drafter": "aurora_rl.cli.assembly.start_drafter", "hello": "aurora_rl.collectors.handshake.Handshake.of",
        "learner": "aurora_rl.cli.learner.build_learner",
    },
    "checkpoints": {"CheckpointError, read_folder, save_tensors, write_folder": "aurora_rl.storage"},
    "cli.engines": {
        "sglang_server": "aurora_rl.cli.remote.remote_server", "served_config": "aurora_rl.cli.remote.served_config",
    },
    "collectors.gatekeeper": {"Gatekeeper": "aurora_rl.collectors.admission.Admission"},
    "collectors.guard": {
        "Guard": "aurora_rl.collectors.relay.Relay", "TooLong": "aurora_rl.collectors.relay.TooLongError",
    },
    "collectors.hello": {"Hello": "aurora_rl.collectors.handshake.Handshake"},
    "collectors.weight_scheme": {"ZMQWeightSyncScheme": "aurora_rl.collectors.weights.WeightPublisher"},
    **{f"cli.config_{name.lower()}": {f"{name}Config": f"aurora_rl.cli.config.{name}Config"} for name in (
        "Canary", "Drafter", "Fleet", "Privacy")},
    "config": {
        "ControlConfig": "aurora_rl.cli.config.BaselineConfig", "ConfigError": "aurora_rl.cli.errors",
    },
    "conversations": {"Conversations": "aurora_rl.serving.requests.RequestQueue"},
    "envs.sglang.layout": {"cores_of, ranks_of": "aurora_rl.envs.sglang.client"},
    "serving.http.generation": {"complete": "aurora_rl.serving.http.front"},
    "serving.http.reading": {"read_body": "aurora_rl.serving.http.app.Application"},
    "envs.sampling": {
        "SamplingBatch, SamplingParams": "aurora_rl.sampling_params",
        "argmax, gumbel, uniform": "aurora_kernels.noise",
        "warp_logits": "aurora_rl.envs.verification.sampling.served_log_probs",
    },
    "figures": {"Figures": "aurora_rl.telemetry.stats.Stats"},
    "inference_modules": {
        "FusedRMSNorm": "torch.nn.RMSNorm", "GROUPED_ATTENTION, grouped_attention": "aurora_rl.models.attention",
        "grouped_mask": "aurora_rl.models.attention.pass_mask",
        "text_and_trees": "aurora_kernels.tree_attention.tree_attention",
    },
    "objectives.contexts": {
        "SAMPLING_KEYS": "aurora_rl.objectives.objective", "SPINE_KEYS": "aurora_rl.tree_index.SEQUENCE_KEYS",
        **_OF_TREE_INDEX,
    },
    "objectives.settings": {"check": "aurora_rl.settings.check_values"},
    "objectives.draws": {"Draws": "aurora_rl.objectives.tree_law.TreeLaw"},
    "objectives.target": {"beside": "aurora_rl.objectives.target_rows.sibling_key"},
    "objectives.tree_index": _OF_TREE_INDEX,
    "policies.growth": {
        "Growth": "aurora_rl.policies.tree_search.grow", "TopKGrowth": "aurora_rl.policies.tree_search.TopKSearch",
        "SampledGrowth": "aurora_rl.policies.tree_search.SampledSearch",
    },
    "policies.hybrid": {
        "HybridDrafter": "aurora_rl.policies.DrafterPolicy", "merge_chain": "aurora_rl.policies.merging.TreeMerger",
    },
    "policies.length": {"LengthController": "aurora_rl.policies.tree_controller.TreeController"},
    "policies.recorded": {"RecordedTrees": "aurora_rl.tree_index.TreeIndex"},
    "policies.shape": {"ShapeController": "aurora_rl.policies.tree_controller.TreeController"},
    "policies.target": {
        "choose_draft_vocab, token_prior": "aurora_rl.models.draft_vocab",
        "check_captured": "aurora_rl.policies.formats.checks.check_feature_layers",
        "check_fixed_rope, check_heads_stated, check_layers_rise, check_rope, refuse_own_attention, settle_attention, "
        "written_config": "aurora_rl.policies.formats.checks",
        "targets_entries": "aurora_rl.models.parts.target_entries",
    },
    "recordings": {
        "Recording": "aurora_rl.collectors.dataset.TrajectoryDataset",
        "record": "aurora_rl.serving.recorded_requests.record_requests",
    },
    "report": {"EMPTY_SUMMARY": "aurora_rl.telemetry.stats.Stats.summary"},
    "server": {
        "DrafterFault": "aurora_rl.policies.calibration.DrafterError",
        "cost_table, measure_rounds": "aurora_rl.policies.calibration",
    },
    "serving.answers": {"Answers": "aurora_rl.serving.requests.RequestQueue"},
    "sglang": {
        "control": "aurora_rl.envs.remote.plugin_server", "engine": "aurora_rl.envs.sglang.client",
        "recorder": "aurora_rl.envs.remote.assembler",
        "server": "aurora_rl.serving.attached", "ControlError": "aurora_rl.envs.remote.plugin_server.PluginError",
        "ControlServer": "aurora_rl.envs.remote.plugin_server.PluginServer",
        "ENVIRONMENT": "aurora_rl.remote_engines.address_variable",
        "SGLangEngine": "aurora_rl.envs.sglang.client.SGLangClient",
        "SGLangCompletion": "aurora_rl.envs.remote.client.EngineCompletion",
        "free_ports": "aurora_rl.envs.remote.client",
        "session": "aurora_rl.envs.remote.session", "load_drafter": "aurora_rl.envs.sglang.weights.swap_weights",
        "RemoteServer": "aurora_rl.serving.attached.DrivenServer",
    },
    "serving.sglang": {"SGLangServer": "aurora_rl.serving.attached.DrivenServer"},
    "slot_cache": {"cache_mask": "aurora_rl.models.attention.pass_mask"},
    "testing.stand_ins": {"Served": "aurora_rl.testing.fixtures.ServedTrajectories"},
    "testing.tabular": {
        "TabularDrafter": "aurora_rl.testing.enumerable_worlds.EnumerableDrafter",
        "TabularTarget": "aurora_rl.testing.enumerable_worlds.EnumerableTarget",
    },
    "throughput": {"ControlWindows": "aurora_rl.telemetry.rates.BaselineWindows"},
    "traffic": {
        "Message": "aurora_rl.workload.request_values.ChatMessage",
        "generate": "aurora_rl.workload.traffic.generate_traffic",
    },
    "traffic_templates": {"POOLS, Pool": "aurora_rl.workload.pools"},
}  # fmt: skip
# Names without a successor, and what to do.
GONE = {
    "objectives.ImitationValues": "objectives.comparison.compare returns values and agreement as a pair",
    "objectives.imitation.ImitationValues": "objectives.comparison.compare returns values and agreement as a pair",
    "objectives.imitation.imitation": "objectives.comparison.compare computes a divergence at the steps of an unroll",
    "policies.load_drafter": "Drafter.from_pretrained reads a drafter",
    "policies.save_drafter": "a drafter's save_pretrained writes it",
    "models.is_embedded_model_installed": "models.loading.load_target says what to install",
    "models.loading.is_embedded_model_installed": "models.loading.load_target says what to install",
    "trees": "aurora_kernels.trees has draft trees as parent arrays",
    "envs.verification.sampling.gumbel": "aurora_kernels.noise.gumbel is the noise",
    "envs.verification.sampling.uniform": "aurora_kernels.noise.uniform has the numbers under it",
    "envs.verification.sampling.argmax": "aurora_kernels.noise.argmax takes the first of equals",
    "testing.drafter_serving.check_from_text": "testing.check_drafter checks whatever is drafted",
    "envs.sglang.ENVIRONMENT": "remote_engines.address_variable has the name of an engine's variable",
    "envs.sglang.KEYS_ENVIRONMENT": "remote_engines.keys_variable has the name of an engine's variable",
    "envs.sglang.weights.read_back": "envs.sglang.weights.shards_of has what a rank holds of each tensor",
    "testing.families": "docs/families.md says which families are served",
    "adaptation.live.LiveSample": "adaptation.live.measure_in_turns yields its fields",
    "telemetry.view.show_time": "str(datetime.timedelta(seconds=round(seconds))) is the text of a duration",
    "training.shares.RecentEngines": "a collections.deque has the engines of the last trajectories",
}
# Modules whose names were functions', and what to call.
_FUNCTIONS = {"cli.main": "aurora_rl.cli.main.main", "objectives.imitation": "aurora_rl.objectives.comparison.compare"}
_OLD_HOMES = {*_FUNCTIONS, *(old.rpartition(".")[0] for old in (*MOVED, *GONE))}


class _FormerFunction(ModuleType):
    """A module whose name was a function's."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        now = _FUNCTIONS[self.__name__.removeprefix("aurora_rl.")]
        raise TypeError(f"{self.__name__} is a module now; call {now}")


class MovedModules(MetaPathFinder):
    """A finder for the front of ``sys.meta_path``, ahead of what an older installation may have left."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError with the new path if the module moved; tell a module of the names that left it.

        A module is imported before its names are asked for, so the error names also what went elsewhere.

        Example:
            >>> import aurora_rl.target_head
            Traceback (most recent call last):
            ModuleNotFoundError: aurora_rl.target_head is aurora_rl.models.target_head now
            >>> from aurora_rl.models import load_target
            Traceback (most recent call last):
            ModuleNotFoundError: aurora_rl.models.load_target is aurora_rl.models.loading.load_target now
        """
        package, _, name = fullname.partition(".")
        if package != "aurora_rl":
            return None
        _refuse(name)
        spec = PathFinder.find_spec(fullname, path) if name in _OLD_HOMES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def prepared(module: ModuleType) -> None:
                # `from module import name` asks for a submodule of that name, if there may be any, and so finds here.
                vars(module).setdefault("__path__", [])
                execute(module)
                lazy = vars(module).get("__getattr__")

                def missing(attribute: str) -> Any:
                    try:
                        _refuse(f"{name}.{attribute}")
                    except ModuleNotFoundError as error:
                        raise AttributeError(str(error)) from None  # so that hasattr answers
                    if lazy is not None:
                        return lazy(attribute)
                    raise AttributeError(f"module {fullname!r} has no attribute {attribute!r}")

                vars(module)["__getattr__"] = missing
                if name in _FUNCTIONS:
                    module.__class__ = _FormerFunction

            spec.loader.exec_module = prepared  # type: ignore[method-assign]
        return spec


def _refuse(name: str) -> None:
    if name in MOVED:
        # Without the error's `name`, by which `from aurora_rl import ...` would take it for a missing attribute.
        elsewhere = "".join(f"; {names}: {place}" for names, place in ELSEWHERE.get(name, {}).items())
        raise ModuleNotFoundError(f"aurora_rl.{name} is aurora_rl.{MOVED[name]} now{elsewhere}")
    if name in GONE:
        raise ModuleNotFoundError(f"aurora_rl.{name} is gone; {GONE[name]}")
