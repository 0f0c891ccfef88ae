"""Fields of request bodies, checked by name: honoured, harmless, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from aurora_rl.serving.http.errors import ApiError
from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL, refusal


def check_fields(
    body: Mapping[str, Any],
    known: Collection[str],
    *,
    where: str = "",
    harmless: Collection[str] = HARMLESS,
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
) -> dict[str, Any]:
    """Return the known fields of an object, and refuse by name what this server does not support.

    Args:
        body: The object.
        known: Names of the fields that are honoured.
        where: Place of the object in the request's body, with a dot after it.
        harmless: Names of fields that are dropped whatever they hold.
        neutral: Values of fields that are not supported which say that they are not wanted; null always does.

    Raises:
        ApiError: Status 400, where a field is unknown or asks for something that is not supported.

    Example:
        >>> check_fields({"n": 2, "user": "me", "presence_penalty": 0.0}, ["n"])
        {'n': 2}
    """
    kept = {}
    for name, value in body.items():
        place = f"{where}{name}"
        if name in known:
            kept[name] = value
        elif (reason := refusal(name, value, neutral, where=where)) is not None:
            raise ApiError(400, reason, param=place, code="unsupported_field")
        elif name not in harmless and name not in neutral:
            near = difflib.get_close_matches(name[:64], [*known, *neutral], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {place[:100]!r}{hint}", param=place[:100], code="unknown_field")
    return kept
