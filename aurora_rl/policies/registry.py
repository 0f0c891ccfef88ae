"""Drafters by name, and the drafter that a checkpoint is of."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aurora_rl.models.draft_vocab import DRAFT_VOCAB_SIZE, choose_draft_vocab
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.drafter import Drafter
from aurora_rl.registry import Registry

logger = logging.getLogger(__name__)

OWN_NAME = "aurora_rl_drafter"
"""Entry of a ``config.json`` that names the drafter if the architectures, which engines read, do not tell it. A class
without a name has its import path there."""

DRAFTERS: Registry[type[Drafter]] = Registry("drafter", "aurora_rl.drafters", Drafter)
"""Drafters by name."""

register_drafter = DRAFTERS.register
"""Decorator that makes a drafter's class available by a name, as in ``drafter.name``: :meth:`Registry.register`."""


def get_drafter(name: str) -> type[Drafter]:
    """Return the class of a drafter by its name, an entry point, or ``package.module:Class``.

    Raises:
        ValueError: No drafter has the name, or it names no drafter; the message names the nearest.

    Example:
        >>> get_drafter("medusa").__name__
        'MedusaDrafter'
    """
    return DRAFTERS.get(name)


def names_drafter(text: str) -> bool:
    """Return whether a text is a drafter's name or import path, and not the folder or hub id of a checkpoint.

    A registered name comes before a folder of that name. What is no folder and has no slash is a name, known or not.

    Example:
        >>> names_drafter("eagle3"), names_drafter("my_package.drafters:Mine"), names_drafter("runs/a/drafter")
        (True, True, False)
    """
    return text in DRAFTERS or not ("/" in text or os.path.exists(text))


def start_untrained(
    kind: type[Drafter],
    parts: TargetParts,
    prior: Tensor | None = None,
    *,
    vocab_size: int = DRAFT_VOCAB_SIZE,
    feature_layers: tuple[int, ...] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Drafter:
    """Return a new drafter of a class for a target.

    Args:
        kind: Class of the drafter.
        parts: Parts of the target.
        prior: Expected counts of the target's tokens ``[V]``, see :func:`token_prior`; None if nothing is known.
        vocab_size: Most tokens of the draft vocabulary.
        feature_layers: Layers to read; None takes the class's choice.
        options: Further keywords of its ``from_target``.

    Raises:
        ValueError: The class does not fit the target, or gives no drafter.
    """
    options, prior = options or {}, torch.zeros(len(parts.head)) if prior is None else prior
    vocab = choose_draft_vocab(min(vocab_size, len(parts.head)), prior)
    started = kind.from_target(parts, draft_vocab=vocab, feature_layers=feature_layers, **options)
    if not isinstance(started, Drafter):
        raise ValueError(f"from_target gave {started!r} and no drafter")
    # What started it belongs to its checkpoint, also where its class does not say so.
    started.options = started.options or options
    if started.formats:  # from here on it learns for this target
        started.trained_for = parts.fingerprint
    return started


def recognized(config: Mapping[str, Any]) -> type[Drafter]:
    """Return the class that wrote, or would write, a drafter's ``config.json``.

    Raises:
        ValueError: No class knows its architectures.

    Example:
        >>> recognized({"architectures": ["LlamaForCausalLMEagle3"]}).__name__
        'Eagle3Drafter'
    """
    # Known names and imported classes only: a file from elsewhere must not say what is imported.
    names, own = list(DRAFTERS), config.get(OWN_NAME)
    if (imported := _imported(own)) is not None and imported.recognizes(config):
        return imported
    for name in [own] if own in names else names:
        try:
            kind = get_drafter(name)
        except ValueError as error:  # some installed package's, perhaps not that of the drafter asked for
            logger.warning("%s; its checkpoints are not recognized", error)
            continue
        if kind.formats and kind.recognizes(config):
            return kind
    if isinstance(own, str) and re.fullmatch(r"[\w.]+:[\w.]+", own):
        module, _, name = own.partition(":")
        raise ValueError(
            f"config.json: the drafter is of the class {own}, which is not imported, and a file does not decide what "
            f"is; set drafter.name={own}, or in Python import {module} first, or give "
            f"{name}.from_pretrained(folder, target) as the drafter"
        )
    raise ValueError(
        f"config.json: no drafter is of architectures {config.get('architectures')}; there are {', '.join(names)}. Of "
        "another class set drafter.name=package.module:Class, or in Python give Class.from_pretrained(folder, target) "
        "as the drafter"
    )


def _imported(path: object) -> type[Drafter] | None:
    """Return the drafter's class of an import path, the last defined of several; None if it is not imported."""
    found, waiting = None, [Drafter]
    while waiting:
        kind = waiting.pop()
        waiting += reversed(kind.__subclasses__())
        if f"{kind.__module__}:{kind.__qualname__}" == path and not inspect.isabstract(kind):
            found = kind
    return found
