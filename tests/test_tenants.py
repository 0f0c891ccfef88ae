"""Names of tenants, and salts that no other tenant has."""

from __future__ import annotations

import itertools

import pytest

from aurora_rl.tenants import check_tenant, joint_salt, tenant_of_salt


@pytest.mark.parametrize("name", ["a", "Tenant-7", "6f1c:9.x_=+", "x" * 128])
def test_a_name_is_taken(name: str) -> None:
    assert check_tenant(name) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a@b", "a b", "a/b", "ä", "a\n", None, 7])
def test_what_is_no_name_is_told(name: object) -> None:
    with pytest.raises(ValueError, match="^the tenant is '.*'; give 1 to 128 letters, digits and"):
        check_tenant(name)


def test_no_two_tenants_share_a_salt_whatever_their_requests_say() -> None:
    tenants, salts = [None, "a", "b", "aa"], [None, "x", "a", "a@", "@", "a@x", "@a@x", "b@x"]
    joint = {pair: joint_salt(*pair) for pair in itertools.product(tenants, salts)}
    assert len(set(joint.values())) == len(joint)
    for (tenant, _), salt in joint.items():
        assert tenant_of_salt(salt) == tenant
    assert joint_salt(None, "x") == "x" and joint_salt(None, None) is None
