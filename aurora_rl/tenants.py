"""Tenants: names of those whose requests share a server, and the salt that keeps what they leave there apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

TENANT_HEADER = "X-Aurora-Tenant"
"""Header of an HTTP request that names its tenant."""
MAX_DELETIONS = 4096
"""Deletions of tenants that are remembered, the latest."""

_NAME = re.compile(r"[A-Za-z0-9._:+=-]{1,128}")
_JOINT = "@"  # in no name


def check_tenant(name: object) -> str:
    """Return the name of a tenant.

    Raises:
        ValueError: The name is malformed.

    Example:
        >>> check_tenant("tenant-7")
        'tenant-7'
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ValueError(
        f"the tenant is {str(name)[:50]!r}; give 1 to 128 letters, digits and characters of ._:+=-, such as a digest"
    )


def check_adapters(names: Sequence[str]) -> None:
    """Raise ValueError unless these can be adapters of a drafter: names of tenants, and of folders, all different.

    Example:
        >>> check_adapters(["acme", "globex"])
    """
    for name in names:
        if check_tenant(name) in (".", ".."):
            raise ValueError(f"an adapter cannot be called {name!r}, as it is kept in a folder of its name")
    if len(set(names)) < len(names):
        raise ValueError(f"names of adapters must differ, got {', '.join(names)}")


def joint_salt(tenant: str | None, salt: str | None) -> str | None:
    """Return the salt by which caches keep requests apart: that of a tenant's requests is no other tenant's.

    Args:
        tenant: Tenant of the request; None if it names none.
        salt: The request's own ``cache_salt``.

    Example:
        >>> joint_salt("a", "x"), joint_salt("a", None), joint_salt(None, "x"), joint_salt(None, "a@x")
        ('a@x', 'a@', 'x', '@a@x')
    """
    if tenant is None:
        return salt if salt is None or _JOINT not in salt else _JOINT + salt
    return f"{tenant}{_JOINT}{salt or ''}"


def tenant_of_salt(salt: str | None) -> str | None:
    """Return the tenant of a salt of :func:`joint_salt`, None if it has none.

    Example:
        >>> tenant_of_salt("a@x"), tenant_of_salt("x"), tenant_of_salt("@a@x"), tenant_of_salt(None)
        ('a', None, None, None)
    """
    return None if salt is None or _JOINT not in salt else salt.partition(_JOINT)[0] or None
