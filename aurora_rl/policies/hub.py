"""Hugging Face's habits for drafters: ``save_pretrained``, ``from_pretrained``, ``push_to_hub`` and the model card."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from aurora_rl.models.loading import DEFAULT_TARGET, default_dtype, load_target
from aurora_rl.models.parts import TargetParts

if TYPE_CHECKING:
    from aurora_rl.policies.drafter import Drafter

_EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SGLANG = {"LlamaForCausalLMEagle3": "EAGLE3", "LlamaForCausalLMEagle": "EAGLE", "DFlashDraftModel": "DFLASH"}
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_Path = str | os.PathLike[str]


class HubMixin:
    """Saving, loading and publishing of a drafter by the names that Hugging Face's libraries use."""

    def save_pretrained(self, folder: _Path, *, layout: str | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Args:
            folder: Folder to write; a drafter in it is replaced.
            layout: One of the drafter's ``formats``; None takes the first.

        Raises:
            CheckpointError: The drafter has no such format, or the folder holds something else.
        """
        from aurora_rl.policies import save_drafter

        save_drafter(cast("Drafter", self), folder, layout)

    @classmethod
    def from_pretrained(
        cls,
        source: _Path,
        target: PreTrainedModel | TargetParts | _Path,
        *,
        layout: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        made_for: str = "target",
    ) -> Self:
        """Read a drafter for a target, in float32.

        Called on :class:`Drafter` itself, the architecture is the one that ``config.json`` names. Called on a subclass,
        another architecture is refused.

        Args:
            source: Folder, or id of a repository on the hub.
            target: Model, its parts, or its name as in the configuration: "smollm2", a folder or a hub id. A model must
                not be in an engine yet.
            layout: Format of the checkpoint; None takes the first of the architecture's ``formats``.
            options: Options of the architecture that the checkpoint does not state.
            made_for: "target" refuses a drafter that was trained for other weights than the target's; "any" takes it.

        Raises:
            CheckpointError: Files are missing or broken, or the drafter does not fit the target.
            ModelError: The target cannot be loaded.

        Example:
            >>> from aurora_rl.policies import Drafter, MedusaDrafter
            >>> from aurora_rl.testing import tiny_target
            >>> import torch
            >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
            >>> with TemporaryDirectory() as folder:
            ...     drafter.save_pretrained(folder)
            ...     type(Drafter.from_pretrained(folder, tiny_target())).__name__
            'MedusaDrafter'
        """
        from aurora_rl.policies import load_drafter

        if isinstance(target, str | os.PathLike):
            target, _ = load_target(target, dtype=default_dtype("cpu"), device="cpu")
        parts = target if isinstance(target, TargetParts) else TargetParts.of(target)
        kind = None if inspect.isabstract(cls) else cast("type[Drafter]", cls)
        return cast(Self, load_drafter(source, parts, kind, layout=layout, options=options, made_for=made_for))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        run: _Path | None = None,
        license: str | None = None,
        layout: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a drafter",
        create_pr: bool = False,
    ) -> str:
        """Publish the drafter with a model card. The repository is created if it does not exist.

        The card is written anew by every call. Entries of its front matter that this library does not write, such as a
        ``license`` that was set on the hub, stay as they are.

        Args:
            repo_id: Repository, such as "name/smollm2-eagle3".
            base_model: Hub id of the target; None takes the model of the run, unless that was a folder.
            run: Folder of the run that trained the drafter; its ``summary.json`` and ``config.yaml`` go into the card.
            license: License of the weights, such as "apache-2.0"; None states none.
            layout: One of the drafter's ``formats``; None takes the first.
            private: Whether a new repository is private; None leaves it to the account's setting.
            token: Token of the hub; None takes the one that ``hf auth login`` stored.
            commit_message: Message of the commit.
            create_pr: Open a pull request instead of committing to the main branch.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            CheckpointError: The drafter cannot be written in this format.
            ValueError: The run has no summary.
            HfHubHTTPError: The hub refused the upload.
        """
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "drafter"
            self.save_pretrained(folder, layout=layout)
            config, api = json.loads((folder / "config.json").read_text()), HfApi(token=token)
            card = model_card(
                cast("Drafter", self),
                repo_id,
                config,
                base_model=base_model,
                run=run,
                license=license,
                metadata=_metadata(repo_id, api),
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )
        return commit.pr_url or commit.commit_url


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
    from aurora_rl.policies import StandaloneDrafter

    name = config["architectures"][0]
    nested = (config.get("eagle_config") or {}).get(_LAYER_IDS) or ()
    left = nested or (config.get("dflash_config") or {}).get("target_layer_ids") or ()  # layers that states leave
    standalone = issubclass(kind, StandaloneDrafter)
    commands = {"aurora_rl": f"aurora-rl serve model={target} drafter.name={_name(kind)} drafter.path={drafter}"}
    target = _EMBEDDED_ID if target == DEFAULT_TARGET else target
    algorithm = "STANDALONE" if standalone else _SGLANG.get(name)
    if algorithm is not None and min(left, default=0) >= 0:  # SGLang cannot capture what enters layer 0
        commands["sglang"] = (
            f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} "
            f"--speculative-draft-model-path {drafter}"
        )
    # Of EAGLE-3's layers vLLM wants the ids at the top level; without any, it takes the authors' defaults.
    stated = name == "LlamaForCausalLMEagle3" and (_LAYER_IDS in config or not nested)
    method = "draft_model" if standalone else "medusa" if name == "MedusaModel" else "eagle3" if stated else None
    if method is not None:
        settings = json.dumps({"method": method, "model": drafter, "num_speculative_tokens": 3})
        commands["vllm"] = f"vllm serve {target} --speculative-config '{settings}'"
    return commands


def model_card(
    drafter: Drafter,
    repo_id: str,
    config: Mapping[str, Any],
    *,
    base_model: str | None = None,
    run: _Path | None = None,
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
        ValueError: The run has no summary.
    """
    settings, figures = ({}, []) if run is None else _run(Path(run))
    target = next((name for name in (settings.get("model"), base_model) if name and not _is_folder(name)), "TARGET")
    base_model = base_model or {"TARGET": None, DEFAULT_TARGET: _EMBEDDED_ID}.get(target, target)
    kind = type(drafter)
    tags = ["speculative-decoding", _name(kind).rpartition(":")[2].lower()]
    stated = {"base_model": base_model, "library_name": "aurora_rl", "tags": tags, "license": license}
    front = ModelCardData(**{**metadata, **{name: value for name, value in stated.items() if value is not None}})
    rows = [
        ("architecture", f"`{kind.__name__}`"),
        ("parameters", f"{sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M"),
        ("draft vocabulary", f"{len(drafter.draft_vocab):,} of {drafter.vocab_size:,} tokens"),
        ("target layers that it reads", ", ".join(map(str, drafter.feature_layers)) or "none"),
        ("fingerprint of the target's weights", f"`{drafter.made_for}`" if drafter.made_for else "not known"),
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


def _name(kind: type[Drafter]) -> str:
    """The name of a class in configurations."""
    from aurora_rl.policies import available_drafters

    name = kind.__name__.removesuffix("Drafter").lower()
    return name if name in available_drafters() else f"{kind.__module__}:{kind.__qualname__}"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _run(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Configuration of a run, and rows of its figures; what a run did not measure has no row."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    except (OSError, ValueError) as error:
        raise ValueError(f"run={str(folder)!r} is not the folder of a finished run: {error}") from error
    domains = (summary.get("domains") or {}).items()
    versions = summary.get("versions_served") or []
    rows = [
        ("engine", settings["engine"]["name"]),
        ("requests", summary["requests"]),
        ("acceptance length, first → last", _length(summary["acceptance_length"])),
        *((f"acceptance length, {name or 'no domain'}", _length(of["acceptance_length"])) for name, of in domains),
        ("speedup over plain decoding", None if summary.get("speedup") is None else f"{summary['speedup']:.2f}"),
        ("swaps of weights while serving", summary.get("swaps")),
        ("versions served", f"{versions[0]} to {versions[-1]}" if versions else None),
    ]
    return settings, [(name, str(value)) for name, value in rows if value is not None]


def _is_folder(model: str) -> bool:
    """Whether a model's name is that of a folder of this machine, which is nobody else's business."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def _length(value: Mapping[str, float | None] | float | None) -> str | None:
    """An acceptance length, or its first and last value; None where there is none."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    return None if None in values else " → ".join(f"{each:.2f}" for each in values)


def _metadata(repo_id: str, api: HfApi) -> dict[str, Any]:
    """Front matter of a repository's card; empty where the hub says that there is no card."""
    try:
        return ModelCard.load(api.hf_hub_download(repo_id, "README.md")).data.to_dict()
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return {}
