"""The distribution that imitation, discard sampling and objectives from functions teach."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tiny_drafters import eagle3_and_head
from tiny_recordings import trajectory_of
from torch import Tensor
from warped import warp_logits

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import DiscardSamplingLoss, ImitationLoss, Objective
from aurora_rl.objectives.distillation import DistillationObjective
from aurora_rl.objectives.objective import SAMPLING_KEYS
from aurora_rl.objectives.target_rows import target_rows
from aurora_rl.trajectories import pack

EVEN = torch.arange(0, 32, 2)  # half of the target's vocabulary
WARPED = SamplingParams(temperature=0.7, top_k=6, top_p=0.9)


class World:
    """A drafter of every second token, and a batch of two requests that are sampled in different ways."""

    def __init__(self, first: SamplingParams, then: SamplingParams) -> None:
        self.drafter, self.head = eagle3_and_head()
        self.samplings = [first, then]
        self.batch: TensorDictBase = pack(
            [trajectory_of(self.drafter, sampling_params=how, request=i) for i, how in enumerate(self.samplings)]
        )
        self.rows: TensorDict = target_rows(self.batch)
        lengths = [len(self.batch["sequence", "hidden"]) // 2] * 2
        self.request = torch.arange(2).repeat_interleave(torch.tensor(lengths))
        self.log_p = self.head(self.batch["sequence", "hidden"]).double().log_softmax(-1)

    def law(self, kind: type[DistillationObjective] = ImitationLoss, **settings: object) -> tuple[Tensor, Tensor]:
        loss = kind(self.drafter, self.head, **settings)
        law, covered = loss.target_law(self.batch, self.rows, self.request)
        return loss.log_probs(law), covered

    def served(self) -> Tensor:
        """The served distributions by their definition, `[X, V]`; a point mass where the request is greedy."""
        rows = []
        for log_p, request in zip(self.log_p, self.request.tolist(), strict=True):
            how = self.samplings[request]
            if how.temperature == 0:
                rows.append(torch.where(torch.arange(len(log_p)) == log_p.argmax(), 0.0, -torch.inf).double())
            else:
                rows.append(warp_logits(log_p, how.temperature, how.top_k, how.top_p))
        return torch.stack(rows)


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss])
@pytest.mark.parametrize("renormalize", [True, False])
def test_by_default_it_is_the_targets_own_at_temperature_1(kind: type[Objective], renormalize: bool) -> None:
    world = World(SamplingParams(), WARPED)
    law, covered = world.law(kind, renormalize=renormalize)
    expected = world.log_p[:, EVEN]
    torch.testing.assert_close(law.double(), expected.log_softmax(-1) if renormalize else expected)
    assert bool(covered.all()) and law.shape == (len(world.rows), len(EVEN))
    mass = law.double().logsumexp(-1).exp()
    assert bool((mass < 0.999).any()) != renormalize


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_served_one_is_each_requests_own(renormalize: bool) -> None:
    world = World(WARPED, SamplingParams())
    law, covered = world.law(target="served", renormalize=renormalize)
    expected = world.served()[:, EVEN]
    assert torch.equal(covered, expected.isfinite().any(-1))
    assert 0 < int(covered.sum()) < len(covered), "the case must have rows of both kinds"
    expected = expected[covered].log_softmax(-1) if renormalize else expected[covered]
    torch.testing.assert_close(law[covered].double().exp(), expected.exp())


@pytest.mark.parametrize("renormalize", [True, False])
def test_rows_without_any_of_the_mass_are_uniform(renormalize: bool) -> None:
    world = World(SamplingParams(), SamplingParams())
    law, covered = world.law(target="served", renormalize=renormalize)
    assert not bool(covered.all())
    uniform = torch.full_like(law[~covered], 1 / len(EVEN))
    torch.testing.assert_close(law[~covered].exp(), uniform)


def test_what_is_not_a_number_stays_so() -> None:
    world = World(WARPED, WARPED)
    world.rows["hidden"][3] = torch.nan
    law, covered = world.law(target="served")
    assert bool(covered[3]) and bool(law[3].isnan().all()) and not bool(law[4].isnan().any())


def test_the_law_is_a_constant() -> None:
    world = World(WARPED, SamplingParams())
    assert not any(world.law(target=target)[0].requires_grad for target in ("model", "served"))


def test_only_the_served_one_reads_how_requests_are_sampled() -> None:
    world = World(WARPED, WARPED)
    model, served = (ImitationLoss(world.drafter, world.head, target=target) for target in ("model", "served"))
    assert set(served.reads) - set(model.reads) == set(SAMPLING_KEYS)


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss])
def test_an_unknown_target_is_named(kind: type[Objective]) -> None:
    world = World(WARPED, WARPED)
    with pytest.raises(ValueError, match="target must be 'model' or 'served', got 'serving'"):
        kind(world.drafter, world.head, target="serving")
