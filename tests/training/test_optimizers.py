"""Which optimizer learns which weights."""

from __future__ import annotations

import torch

from aurora_rl.cli.config import Config
from aurora_rl.models.draft_vocab import DRAFT_VOCAB_SIZE
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.policies.adapters import add_adapters
from aurora_rl.testing import tiny_target
from aurora_rl.training.optimizers import drafter_optimizers


def test_the_defaults_are_those_of_the_configuration() -> None:
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).float()
    learner = Config().learner
    assert [o.defaults["lr"] for o in drafter_optimizers(drafter)] == [learner.muon_lr, learner.adam_lr]
    assert Config().drafter.vocab_size == DRAFT_VOCAB_SIZE


def test_muon_has_the_matrices_and_adam_the_rest() -> None:
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).float()
    muon, adam = drafter_optimizers(drafter, muon_lr=0.1, adam_lr=0.2)
    names = {id(p): name for name, p in drafter.named_parameters()}
    of = [{names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adam)]
    assert of[0] == {n for n, p in drafter.named_parameters() if p.ndim == 2 and n != "lm_head.weight"}
    assert of[0] | of[1] == set(names.values()) and not of[0] & of[1]


def test_adapters_learn_ten_times_as_fast_as_what_adam_has_else() -> None:
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).float()
    before = drafter_optimizers(drafter)
    add_adapters(drafter, ["acme"], rank=2)
    muon, adam = drafter_optimizers(drafter, adam_lr=0.25)
    (rest, adapters) = adam.param_groups
    assert (rest["lr"], adapters["lr"]) == (0.25, 2.5)
    names = {id(p): name for name, p in drafter.named_parameters()}
    assert {names[id(p)] for p in adapters["params"]} == {name for name in names.values() if "lora_" in name}
    sizes = [[p.shape for p in group["params"]] for group in (muon.param_groups[0], rest)]
    assert sizes == [[p.shape for p in optimizer.param_groups[0]["params"]] for optimizer in before]
