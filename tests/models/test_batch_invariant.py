"""A model's products, activations and attention are replaced by those that treat rows alone, and compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aurora_rl.models.batch_invariant import BatchInvariantLinear, make_batch_invariant, whole_blocks
from aurora_rl.models.inference_modules import PackedLinear, prepare_for_inference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_layer_do_not_depend_on_each_other(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1536, 40, bias=bias).to(dtype).requires_grad_(False), nn.Sequential())
    prepare_for_inference(model)
    plain, x = model[0], 100 * torch.randn(150, 1536).to(dtype)
    make_batch_invariant(model)
    make_batch_invariant(model)  # another engine on the same model
    layer = model[0]
    assert (
        isinstance(layer, BatchInvariantLinear) and layer.linear is plain and type(plain) in (nn.Linear, PackedLinear)
    )
    assert torch.equal(layer.weight, plain.weight)
    every = layer(x.view(3, 50, -1)).view(150, -1)
    torch.testing.assert_close(every, plain(x), rtol=0.02, atol=0.5)
    for start, count in ((0, 1), (7, 2), (100, 21)):
        assert torch.equal(layer(x[start : start + count]), every[start : start + count])


def test_columns_come_in_whole_blocks() -> None:
    assert [whole_blocks(n, True) for n in (1, 512, 513)] == [512, 512, 1024]
    assert whole_blocks(513, False) == 513
