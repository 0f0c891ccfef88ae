"""Copies on the host: what the engine writes afterwards does not reach them."""

import pytest
import torch

from aurora_rl.envs.remote.copies import copies_done, to_host

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_copy_keeps_what_stood_there_when_it_was_asked_for(device, dtype):
    source = torch.arange(12, device=device).view(3, 4).to(dtype)
    copy, strided = to_host(source), to_host(source.T)
    done = copies_done(source.device)
    source.zero_()
    done()
    expected = torch.arange(12).view(3, 4).to(dtype)
    assert copy.device.type == "cpu" and copy.dtype == dtype
    assert torch.equal(copy, expected) and torch.equal(strided, expected.T)


@pytest.mark.parametrize("device", DEVICES)
def test_waiting_twice_or_for_nothing_returns(device):
    done = copies_done(torch.device(device))
    assert done() is None and done() is None
