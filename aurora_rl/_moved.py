"""Module paths that moved: importing one raises an error that names the new path."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

# Old to new, below aurora_rl. The old package sglang stands for its modules, of which "server" is serving.sglang.
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
    "conversations": "serving.requests", "answers": "serving.requests", "build": "cli.spec", "bench": "cli.bench",
    "check": "cli.check", "config": "cli.config", "cpus": "cli.cpus", "output": "cli.output",
    "traffic": "workload.traffic", "traffic_templates": "workload.templates", "testing.forms": "testing.variants",
    "testing.stand_ins": "testing.fixtures", "testing.tabular": "testing.enumerable_worlds",
    "sglang": "envs.sglang",
}  # fmt: skip


class MovedModules(MetaPathFinder):
    """A finder for the front of ``sys.meta_path``, ahead of what an older installation may have left."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise ModuleNotFoundError with the new path if the module moved.

        Example:
            >>> import aurora_rl.target_head
            Traceback (most recent call last):
            ModuleNotFoundError: aurora_rl.target_head is aurora_rl.models.target_head now
        """
        package, _, name = fullname.partition(".")
        if package == "aurora_rl" and name in MOVED:
            # Without the error's `name`, by which `from aurora_rl import ...` would take it for a missing attribute.
            raise ModuleNotFoundError(f"{fullname} is aurora_rl.{MOVED[name]} now")
