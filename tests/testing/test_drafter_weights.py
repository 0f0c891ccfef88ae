"""check_drafter names what a drafter breaks with its weights: installed, staged, swapped and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_drafters import drafter_for
from torch import Tensor

from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.testing import check_drafter, tiny_target
from aurora_rl.testing.drafter_weights import check_swap


class InstallsUntilItFails(Eagle3Drafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        if "fc.weight" in weights and weights["fc.weight"].shape == self.fc.weight.shape:
            self.fc.weight.data.copy_(weights["fc.weight"])
        return super().stage(weights)


class TakesAnyMap(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return super().stage({**weights, "d2t": self.published()["d2t"]} if "d2t" in weights else weights)


class InstallsWhileItStages(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        put = super().stage(weights)
        put()
        return put


class KeepsTheCallersTensors(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        put = super().stage(weights)

        def install() -> None:
            put()
            for name, parameter in self.named_parameters():
                parameter.data = weights[name].to(parameter.dtype)

        return install


class KnowsNoFolder(MedusaDrafter):
    @classmethod
    def recognizes(cls, config) -> bool:
        return False


class LosesItsOptions(MedusaDrafter):
    @classmethod
    def read(cls, checkpoint, parts: TargetParts, format: str, **options) -> LosesItsOptions:
        drafter = super().read(checkpoint, parts, format, **options)
        drafter.options = {}
        return drafter


class AddsByRow(MedusaDrafter):
    """Has a number for each row, which `vocab_tables` of its base class does not name."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.by_row = torch.nn.Parameter(torch.zeros(len(self.draft_vocab)))

    def _log_probs(self, features: Tensor, depths: int) -> list[Tensor]:
        return [(each + self.by_row).log_softmax(-1) for each in super()._log_probs(features, depths)]

    def context_logits(self, batch, trees, wanted) -> Tensor:
        return super().context_logits(batch, trees, wanted) + self.by_row

    def unroll(self, batch, steps: int):
        unrolled = super().unroll(batch, steps)
        return unrolled._replace(logits=[each + self.by_row for each in unrolled.logits])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AddsByRow, "logits of tokens that stay change when the rows of vocab_tables become other tokens'"),
        (TakesAnyMap, "install takes weights whose tensor 'd2t' is missing, misshapen, unknown or false"),
        (InstallsWhileItStages, "proposals change when weights are staged, and not only when they are installed"),
        (KeepsTheCallersTensors, "proposals change with the tensors that were given to stage"),
        (KnowsNoFolder, "recognizes is false for the drafter's own folder"),
        (LosesItsOptions, "options change to {} by way of the format"),
        (InstallsUntilItFails, "'fc.weight' changes when weights are refused for"),
    ],
)
def test_check_names_what_a_drafter_breaks(kind: type[Drafter], message: str) -> None:
    target = tiny_target()
    with pytest.raises(AssertionError, match=message):
        check_drafter(drafter_for(kind, target), target)


class DraftsWithTheOldWeights(MedusaDrafter):
    """Serves with the heads that it began with, whatever is installed."""

    def _log_probs(self, features: Tensor, depths: int) -> list[Tensor]:
        (first,) = self.__dict__.setdefault("_first", (copy.deepcopy(self.lm_heads),))  # in a tuple: no submodule
        installed, self.lm_heads = self.lm_heads, first
        try:
            return super()._log_probs(features, depths)
        finally:
            self.lm_heads = installed


def test_drafts_of_replaced_weights_are_caught() -> None:
    target = tiny_target()
    drafter = drafter_for(DraftsWithTheOldWeights, target)
    for parameter in drafter.blocks.parameters():
        parameter.data.zero_()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7, 8])]
    with pytest.raises(AssertionError, match="drafts made after a swap differ by .* nats"):
        check_swap(drafter, target, prompts, generator)
