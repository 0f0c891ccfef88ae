"""Hugging Face's habits for drafters: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import httpx
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import PreTrainedModel

from aurora_rl.models.loading import default_dtype, load_target
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.model_card import model_card, run_figures

if TYPE_CHECKING:
    from aurora_rl.policies.drafter import Drafter

_Path = str | os.PathLike[str]


class HubMixin:
    """Saving, loading and publishing of a drafter by the names that Hugging Face's libraries use."""

    def save_pretrained(self, folder: _Path, *, format: str | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Args:
            folder: Folder to write; a drafter in it is replaced.
            format: One of the drafter's ``formats``; None takes the first.

        Raises:
            CheckpointError: The drafter has no such format, or the folder holds something else.
        """
        from aurora_rl.policies.formats.files import save_drafter

        save_drafter(cast("Drafter", self), folder, format)

    @classmethod
    def from_pretrained(
        cls,
        source: _Path,
        target: PreTrainedModel | TargetParts | _Path,
        *,
        format: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        trained_for: str = "target",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Read a drafter for a target, in float32.

        :class:`Drafter` itself takes the architecture that ``config.json`` names; a subclass refuses another.

        Args:
            source: Folder, or id of a repository on the hub.
            target: Model, its parts, or its name as in the configuration: "smollm2", a folder or a hub id. A model must
                not be in an engine yet.
            format: Format of the checkpoint; None takes the first of the architecture's ``formats``.
            options: Options of the architecture that the checkpoint does not state.
            trained_for: "target" refuses a drafter trained for weights other than the target's; "any" takes it.
            revision: Branch, tag or commit of the drafter's repository; None takes its main branch. A folder has none.
            token: Token of the hub for the drafter's repository. None takes the one that ``hf auth login`` stored;
                False sends none.

        Raises:
            CheckpointError: Files are missing or broken, or the drafter does not fit the target.
            ModelError: The target cannot be loaded.
            ValueError: The target is of another kind.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from aurora_rl.policies import Drafter, MedusaDrafter
            >>> from aurora_rl.testing import tiny_target
            >>> import torch
            >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
            >>> with TemporaryDirectory() as folder:
            ...     drafter.save_pretrained(folder)
            ...     type(Drafter.from_pretrained(folder, tiny_target())).__name__
            'MedusaDrafter'
        """
        from aurora_rl.policies.formats.files import load_drafter, naming_drafters

        if isinstance(target, str | os.PathLike):
            with naming_drafters(target, drafter_key="source", target_key="target"):
                target, _ = load_target(target, dtype=default_dtype("cpu"), device="cpu")
        elif not isinstance(target, PreTrainedModel | TargetParts):
            raise ValueError(
                f"target is a {type(target).__name__}; give a model, its parts, or its name: 'smollm2', a folder or a "
                "hub id"
            )
        parts = target if isinstance(target, TargetParts) else TargetParts.of(target)
        kind = None if inspect.isabstract(cls) else cast("type[Drafter]", cls)
        drafter = load_drafter(
            source,
            parts,
            kind,
            format=format,
            options=options,
            trained_for=trained_for,
            revision=revision,
            token=token,
        )
        return cast(Self, drafter)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        run: _Path | None = None,
        license: str | None = None,
        format: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a drafter",
        create_pr: bool = False,
    ) -> str:
        """Publish the drafter with a model card. The repository is created if it does not exist.

        Entries of the card's front matter that this library does not write, such as a ``license``, stay as they are.

        Args:
            repo_id: Repository, such as "name/smollm2-eagle3".
            base_model: Hub id of the target; None takes the model of the run, unless that was a folder.
            run: Folder of the run that trained the drafter; its ``summary.json`` and ``config.yaml`` go into the card.
            license: License of the weights, such as "apache-2.0"; None states none.
            format: One of the drafter's ``formats``; None takes the first.
            private: Whether a new repository is private; None leaves it to the account's setting.
            token: Token of the hub; None takes the one that ``hf auth login`` stored.
            commit_message: Message of the commit.
            create_pr: Open a pull request instead of committing to the main branch.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            CheckpointError: The drafter cannot be written in this format.
            ValueError: The run has no summary, or a file of it is broken. The hub was not asked then.
            HfHubHTTPError: The hub refused the upload.
            ConnectionError: The hub could not be reached; the message names the folder where the drafter is saved.
        """
        if run is not None:
            run_figures(run)  # raises before the hub is asked
        scratch = Path(tempfile.mkdtemp(prefix="aurora-rl-"))
        folder, kept = scratch / "drafter", False
        try:
            self.save_pretrained(folder, format=format)
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
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
            kept = True
            raise ConnectionError(
                f"the hub could not be reached ({error.__cause__ or error}); the drafter is saved in {folder}: check "
                f"the network and HF_HUB_OFFLINE, then call push_to_hub({repo_id!r}) again, here or on "
                f"{type(self).__name__}.from_pretrained({str(folder)!r}, target)"
            ) from error
        finally:
            if not kept:
                shutil.rmtree(scratch)
        return commit.pr_url or commit.commit_url


def _metadata(repo_id: str, api: HfApi) -> dict[str, Any]:
    """Return the front matter of a repository's card; empty if the hub has no card."""
    try:
        return ModelCard.load(api.hf_hub_download(repo_id, "README.md")).data.to_dict()
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return {}
