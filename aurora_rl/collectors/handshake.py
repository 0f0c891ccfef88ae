"""The handshake: facts on which engine and learner must agree before anything is learned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from aurora_rl.collectors.codec import SCHEMA, CodecError, checksum, short
from aurora_rl.policies import Drafter, TargetParts

_SAME_DRAFTER = "start both from one drafter: give server and learner the same drafter.path"
_CURES = {
    "schema": "run the same version of aurora-rl on both sides",
    "target": "set the same model on both sides",
    "head_checksum": "set the same model and dtype on both sides",
    "feature_layers": _SAME_DRAFTER,
    "draft_map_checksum": f"their draft vocabularies differ; {_SAME_DRAFTER}, or the same drafter.vocab_size, and the "
    "same engine.name",
    "drafter": "set the same drafter.name on both sides",
    "adapters": "set the same drafter.adapters, in one order, and drafter.adapter_rank on both sides",
}
_MAX_TEXT = 256
_MAX_LAYERS = 256


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Handshake:
    """The identity of a deployment, sent by the engine with its trajectories and its weight requests.

    Args:
        schema: Version of the wire format and of the trajectory layout.
        target: Digest of the target's configuration, and one of rows of its weights: two fine-tunes of a model differ.
        head_checksum: `codec.checksum` of the target's output head, with which the learner makes logits of ``hidden``.
        feature_layers: Layers whose residual stream is recorded, in order of concatenation.
        draft_map_checksum: `codec.checksum` of the reduced draft vocabulary. Its size alone, as "8192 rows", if it may
            follow the traffic: whichever it is, the next weights bring the learner's.
        drafter: Registered name of the drafter's architecture.
        adapters: Digest of the names of its adapters and of their rank; empty if it has none.

    >>> learner = Handshake(1, "llama-3.1-8b", "ab12", (2, 16, 29), "", "eagle3")
    >>> engine = Handshake.from_meta({**learner.to_meta(), "feature_layers": [2, 16, 30]})
    >>> learner.mismatch(engine).split("; ")[0]
    'handshake mismatch: feature_layers is (2, 16, 29) at the learner and (2, 16, 30) at the engine'
    """

    schema: int
    target: str
    head_checksum: str
    feature_layers: tuple[int, ...]
    draft_map_checksum: str
    drafter: str
    adapters: str = ""

    @classmethod
    def of(cls, parts: TargetParts, drafter: Drafter, name: str, *, takes_map: bool = False) -> Handshake:
        """Return the handshake of a target and a drafter whose architecture is registered under ``name``.

        ``takes_map`` says that the engine takes another draft vocabulary with new weights, as an embedded one does.
        """
        vocab, moves = drafter.draft_vocab, takes_map and bool(drafter.vocab_tables)
        return cls(
            schema=SCHEMA,
            target=f"{parts.digest}-{parts.fingerprint}",
            head_checksum=checksum(parts.head.tensors()),
            feature_layers=tuple(drafter.feature_layers),
            draft_map_checksum=f"{len(vocab)} rows" if moves else checksum({"draft_vocab": vocab}),
            drafter=name,
            adapters="" if drafter.adapters is None else _digest(asdict(drafter.adapters)),
        )

    @property
    def identity(self) -> str:
        """Digest of the fields, the same on both sides; weights carry it, so that no other deployment's are loaded."""
        return _digest(self.to_meta())

    def to_meta(self) -> dict[str, Any]:
        """Return the fields as JSON values, without that of adapters where there are none."""
        meta = {**self.__dict__, "feature_layers": list(self.feature_layers)}
        if not self.adapters:  # an earlier release does not know it
            del meta["adapters"]
        return meta

    @classmethod
    def from_meta(cls, meta: object) -> Handshake:
        """Read the `to_meta` of a peer, which is not trusted.

        Raises:
            CodecError: Names the field that is missing, unknown or of the wrong type.
        """
        if not isinstance(meta, dict):
            raise CodecError(
                f"a handshake must be a JSON object, got a {type(meta).__name__}; use one release on both sides"
            )
        names = [field.name for field in fields(cls)]
        if set(meta) | {"adapters"} != set(names):
            raise CodecError(
                f"a handshake has the fields {short(list(meta))}, this side reads exactly {', '.join(names)}; use one "
                "release on both"
            )
        meta = {"adapters": "", **meta}
        layers = meta["feature_layers"]
        if type(meta["schema"]) is not int:
            raise CodecError(f"schema in a handshake must be an integer, got {short(meta['schema'])}")
        if not isinstance(layers, list) or len(layers) > _MAX_LAYERS or not all(type(layer) is int for layer in layers):
            raise CodecError(
                f"feature_layers in a handshake must be a list of at most {_MAX_LAYERS} integers, got {short(layers)}"
            )
        for name in ("target", "head_checksum", "draft_map_checksum", "drafter", "adapters"):
            if not isinstance(meta[name], str) or len(meta[name]) > _MAX_TEXT:
                raise CodecError(
                    f"{name} in a handshake must be a string of at most {_MAX_TEXT} characters, got {short(meta[name])}"
                )
        return cls(**{**meta, "feature_layers": tuple(layers)})

    def mismatch(self, engine: Handshake, *, values: bool = True) -> str | None:
        """Compare the learner's handshake (``self``) with an engine's; None if they agree.

        The sentence names the first field that differs, both values if they are asked for, and what to do.
        """
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(engine, field.name)
            if here != there:
                found = f"{field.name} differs from the learner's, whose log has both values"
                if values:
                    found = f"{field.name} is {here!r} at the learner and {there!r} at the engine"
                return f"handshake mismatch: {found}; {_CURES[field.name]}"
        return None
