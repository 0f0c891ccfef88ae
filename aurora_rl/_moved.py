"""Modules and names that moved: importing one raises an error that names its new place."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from typing_extensions import override

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
    "sglang": "envs.sglang (its server: aurora_rl.serving.sglang, its engine: aurora_rl.envs.sglang.client)",
    "collectors.weight_scheme": "collectors.weights", "serving.recording": "serving.recorded_requests",
    "cli.recording": "cli.training_data", "adaptation.recording": "adaptation.recorded_stream",
    "envs.sglang.control": "envs.sglang.plugin_server",
    "collectors.Hello": "collectors.handshake.Handshake", "collectors.ZMQWeightSyncScheme": "collectors.weights",
    "collectors.dataset.record": "serving.recorded_requests.record",
    "serving.http.app.create_app": "serving.http.front.Front",
    "serving.http.proxy.create_proxy": "serving.http.proxy.Proxy",
    "collectors.trajectory_buffer": "training.replay.trajectory_buffer",
    "objectives.objective.SumLoss": "objectives.sum_loss.SumLoss", "policies.HybridDrafter": "policies.lookup",
    "trajectories.ContextStore": "context.ContextStore", "trajectories.Sampling": "sampling_params.SamplingParams",
    "trajectories.TrajectoryRecorder": "context.TrajectoryRecorder",
    "training.drafter_optimizers": "training.optimizers.drafter_optimizers",
    "training.train_on": "training.steps.train_on", "training.train_step": "training.steps.train_step",
    "training.offline.train_on": "training.steps.train_on",
    **{f"policies.formats.{name}": f"policies.formats.files.{name}" for name in (
        "load_drafter", "save_drafter", "written")},
    "envs.exactness.quiet": "models.loading.quiet_transformers",
    "policies.eagle3.Eagle3Layer": "policies.recurrent.DraftLayer",
    "cli.spec.handshake": "collectors.handshake.Handshake.of",
    **{f"cli.spec.{name}": f"cli.assembly.{name}" for name in (
        "first_drafter", "load", "request_queue", "start_drafter", "traffic")},
    **{f"serving.{name}": "cli.engines" for name in ("EmbeddedServing", "SGLangServing", "Serving", "serving")},
    **{f"models.{name}": f"models.loading.{name}" for name in (
        "DEFAULT_TARGET", "ModelError", "default_dtype", "embedded_model_path", "encode_chat",
        "load_target", "stop_token_ids")},
    **{f"envs.verification.{name}": f"envs.verification.rules.{name}" for name in (
        "RULES", "Greedy", "SampleAndMatch", "Verdict", "VerificationRule", "check_shapes", "descend", "get_rule",
        "register_rule", "settle")},
}  # fmt: skip
# Names without a successor, and what to do.
GONE = {
    "objectives.ImitationValues": "objectives.imitation.imitation returns values and agreement as a pair",
    "objectives.imitation.ImitationValues": "objectives.imitation.imitation returns values and agreement as a pair",
    "models.is_embedded_model_installed": "models.loading.load_target says what to install",
    "trees": "aurora_kernels.trees has draft trees as parent arrays",
    "envs.verification.sampling.gumbel": "aurora_kernels.noise.gumbel is the noise",
    "envs.verification.sampling.uniform": "aurora_kernels.noise.uniform has the numbers under it",
    "envs.verification.sampling.argmax": "aurora_kernels.noise.argmax takes the first of equals",
    "testing.drafter_serving.check_from_text": "testing.check_drafter checks whatever is drafted",
    "testing.families.page": "docs/generate.py writes the page",
}
_FUNCTION = "cli.main"  # was one, and is a module
_OLD_HOMES = {_FUNCTION, *(old.rpartition(".")[0] for old in (*MOVED, *GONE))}


class _FormerFunction(ModuleType):
    """A module whose name was a function's."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"{self.__name__} is a module now; call {self.__name__}.main")


class MovedModules(MetaPathFinder):
    """A finder for the front of ``sys.meta_path``, ahead of what an older installation may have left."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError with the new path if the module moved; tell a module of the names that left it.

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
                def missing(attribute: str) -> Any:
                    _refuse(f"{name}.{attribute}")
                    raise AttributeError(f"module {fullname!r} has no attribute {attribute!r}")

                vars(module)["__getattr__"] = missing
                execute(module)
                if name == _FUNCTION:
                    module.__class__ = _FormerFunction

            spec.loader.exec_module = prepared  # type: ignore[method-assign]
        return spec


def _refuse(name: str) -> None:
    if name in MOVED:
        # Without the error's `name`, by which `from aurora_rl import ...` would take it for a missing attribute.
        raise ModuleNotFoundError(f"aurora_rl.{name} is aurora_rl.{MOVED[name]} now")
    if name in GONE:
        raise ModuleNotFoundError(f"aurora_rl.{name} is gone; {GONE[name]}")
