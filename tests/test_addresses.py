from __future__ import annotations

import pytest

from aurora_rl.addresses import is_local


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:*", "tcp://127.9.8.7:1", "tcp://localhost:5557", "tcp://[::1]:5557", "ipc://@name"]
)
def test_addresses_of_this_host(address: str) -> None:
    assert is_local(address)


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://0.0.0.0:5557", "tcp://*:5557", "tcp://[::]:5557", "tcp://10.0.0.7:5557", "tcp://eth0:5557"),
        *("tcp://127.0.0.1.example:5557", "tcp://learner.127.0.0.1:5557", "tcp://localhost.example:1", "tcp://1:1"),
    ],
)
def test_addresses_that_other_hosts_may_reach(address: str) -> None:
    assert not is_local(address)
