"""The model card of a drafter, and the commands that serve it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCardData
from omegaconf import OmegaConf
from yaml import YAMLError

from aurora_rl.models.loading import DEFAULT_TARGET

if TYPE_CHECKING:
    from aurora_rl.policies.drafter import Drafter

_EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Architectures of drafters that SGLang loads; a standalone drafter is of any causal LM.
_SGLANG = ("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle", "DFlashDraftModel")


def engine_commands(kind: type[Drafter], config: Mapping[str, Any], drafter: str, target: str) -> dict[str, str]:
    """Return the command that serves a drafter's folder, by the name of each engine that loads it.

    Args:
        kind: Class of the drafter.
        config: What its ``config.json`` holds.
        drafter: Folder or hub id of the drafter.
        target: Target as in the configuration: a folder, a hub id, or "smollm2".

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> engine_commands(MedusaDrafter, {"architectures": ["MedusaDrafter"]}, "runs/1/drafter", "smollm2")
        {'aurora_rl': 'aurora-rl serve model=smollm2 drafter.name=medusa drafter.path=runs/1/drafter'}
    """
    from aurora_rl.policies import StandaloneDrafter  # all three import this module
    from aurora_rl.policies.formats.vllm import LAYER_IDS
    from aurora_rl.policies.registry import DRAFTERS

    name = config["architectures"][0]
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS) or ()
    left = nested or (config.get("dflash_config") or {}).get("target_layer_ids") or ()  # layers that states leave
    standalone = issubclass(kind, StandaloneDrafter)
    pairs = (f"model={target}", f"drafter.name={DRAFTERS.name_of(kind)}", f"drafter.path={drafter}")
    commands = {"aurora_rl": shlex.join(["aurora-rl", "serve", *pairs])}
    target = _EMBEDDED_ID if target == DEFAULT_TARGET else target
    algorithm = kind.sglang_algorithm if standalone or name in _SGLANG else None
    if algorithm is not None and min(left, default=0) >= 0:  # SGLang cannot read what enters layer 0
        start = ["python", "-m", "sglang.launch_server", "--model-path", target, "--speculative-algorithm", algorithm]
        commands["sglang"] = shlex.join([*start, "--speculative-draft-model-path", drafter])
    # vLLM wants the ids of EAGLE-3's layers at the top level; without any, it takes the authors' defaults.
    stated = name == "LlamaForCausalLMEagle3" and (LAYER_IDS in config or not nested)
    method = "draft_model" if standalone else "medusa" if name == "MedusaModel" else "eagle3" if stated else None
    if method is not None:
        settings = json.dumps({"method": method, "model": drafter, "num_speculative_tokens": 3})
        commands["vllm"] = shlex.join(["vllm", "serve", target, "--speculative-config", settings])
    return commands


def model_card(
    drafter: Drafter,
    repo_id: str,
    config: Mapping[str, Any],
    *,
    base_model: str | None = None,
    run: str | os.PathLike[str] | None = None,
    license: str | None = None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the text of a model card: front matter, what the drafter is, figures of its run, and how to serve it.

    Args:
        drafter: The drafter.
        repo_id: Repository of the card.
        config: What its ``config.json`` holds.
        base_model: Hub id of the target; None takes the model of the run, unless that was a folder.
        run: Folder of a run; None leaves its figures out.
        license: License of the weights; None keeps what ``metadata`` states.
        metadata: Front matter of the card that is replaced.

    Raises:
        ValueError: The run has no summary, or a file of it is broken.
    """
    from aurora_rl.policies.registry import DRAFTERS

    model, figures = (None, []) if run is None else run_figures(run)
    target = next((name for name in (model, base_model) if name and not _is_folder(name)), "TARGET")
    base_model = base_model or {"TARGET": None, DEFAULT_TARGET: _EMBEDDED_ID}.get(target, target)
    kind = type(drafter)
    tags = ["speculative-decoding", DRAFTERS.name_of(kind).rpartition(":")[2].lower()]
    stated = {"base_model": base_model, "library_name": "aurora_rl", "tags": tags, "license": license}
    front = ModelCardData(**{**metadata, **{name: value for name, value in stated.items() if value is not None}})
    rows = [
        ("architecture", f"`{kind.__name__}`"),
        ("parameters", f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M"),
        ("draft vocabulary", f"{len(drafter.draft_vocab):,} of {drafter.vocab_size:,} tokens"),
        ("target layers that it reads", ", ".join(map(str, drafter.feature_layers)) or "none"),
        ("fingerprint of the target's weights", f"`{drafter.trained_for}`" if drafter.trained_for else "not known"),
        ("written with", ", ".join(f"{name} {version(name)}" for name in ("aurora-rl", "torch", "transformers"))),
    ]
    commands = "\n".join(engine_commands(kind, config, repo_id, target).values())
    about = f"`{base_model}`" if base_model else "a causal language model"
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {repo_id}",
        f"A drafter for speculative decoding of {about}, trained with aurora_rl.",
        _table(rows),
        *(["## Training", _table(figures)] if figures else []),
        "## Use",
        f"```bash\n{commands}\n```",
        "```python\nfrom aurora_rl.policies import Drafter\n\n"
        f'drafter = Drafter.from_pretrained("{repo_id}", "{target}")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def run_figures(run: str | os.PathLike[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the model of a run, and names and texts of its figures. What was not measured is left out.

    Raises:
        ValueError: The run has no summary, or a file of it is broken.
    """
    folder = Path(run).expanduser()
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"run={str(folder)!r} is not the folder of a finished run: {reason}") from error
    try:
        return _figures(summary, settings)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"run={str(folder)!r}: summary.json or config.yaml lacks an entry, or has one of another type: "
            f"{type(error).__name__}: {error}; name the folder of another run, or leave run out"
        ) from error


def _figures(summary: dict[str, Any], settings: dict[str, Any]) -> tuple[str | None, list[tuple[str, str]]]:
    model, domains = settings.get("model"), (summary.get("domains") or {}).items()
    if not isinstance(model, str | None):
        raise TypeError(f"model is {model!r}, which is no text")
    versions, held_out = summary.get("versions_served") or [], summary.get("held_out")
    # A training serves nobody: its figures are of the held-out requests, replayed before it and after its best epoch.
    length, span = ("acceptance length", "first → last")
    if held_out is not None:
        length, span = ("acceptance length by replay of held-out requests", "day 0 → best epoch")
    rows = [
        ("engine", settings["engine"]["name"]),
        ("requests" if held_out is None else "requests learned from", summary["requests"]),
        ("held-out requests", held_out),
        (f"{length}, {span}", _length(summary["acceptance_length"])),
        *((f"{length}, {name or 'no domain'}", _length(of["acceptance_length"])) for name, of in domains),
        ("speedup over plain decoding", None if summary.get("speedup") is None else f"{summary['speedup']:.2f}"),
        ("swaps of weights while serving", summary.get("swaps")),
        ("versions served", f"{versions[0]} to {versions[-1]}" if versions else None),
    ]
    return model, [(name, str(value)) for name, value in rows if value is not None]


def _is_folder(model: str) -> bool:
    """Return whether a model's name is a local folder, whose path a card does not show."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def _length(value: Mapping[str, float | None] | float | None) -> str | None:
    """Format an acceptance length, or its first and last value. Return None if there is none."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    return None if None in values else " → ".join(f"{each:.2f}" for each in values)
