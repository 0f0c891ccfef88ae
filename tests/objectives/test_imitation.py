"""ImitationLoss: literal values, independence of the batch, gradients by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from warped import warp_logits

from aurora_rl.objectives.divergences import Divergence, total_variation
from aurora_rl.objectives.imitation import ImitationLoss, expected_length_weights
from aurora_rl.objectives.objective import SAMPLING_KEYS
from aurora_rl.policies import Drafter, Eagle3Drafter, EagleDrafter, MedusaDrafter, TreeShape
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import pack

KINDS = [Eagle3Drafter, EagleDrafter, MedusaDrafter]


@pytest.fixture(scope="module")
def trajectories() -> list[TensorDict]:
    drafter, _ = noisy_drafter_and_head()
    sizes = [(5, 7), (1, 4), (2, 1), (9, 10)]
    return [trajectory_of(drafter, prompt_length=p, max_new_tokens=n, request=i) for i, (p, n) in enumerate(sizes)]


@pytest.fixture(scope="module")
def medusa_trajectories() -> list[TensorDict]:
    drafter, _ = noisy_drafter_and_head(MedusaDrafter)
    return [trajectory_of(drafter, prompt_length=p, max_new_tokens=6, request=p) for p in (1, 4)]


def test_mean_averages_each_step_over_its_own_positions(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    batch = pack(trajectories)
    values = ImitationLoss(drafter, head, steps=3, decay=0.5, reduction="none")(batch)["loss_imitation"]
    logits, valid, _ = drafter.unroll(batch, 3)
    assert values.shape == (3, 22)
    assert not values[~valid].any()
    target = batch["sequence", "hidden"] @ head.weight[drafter.draft_vocab].T
    at = int(valid[2].nonzero()[0])
    p, q = target[at].softmax(-1), logits[2][at].softmax(-1)
    torch.testing.assert_close(values[2, at], 0.25 * (p * (p / q).log()).sum())

    expected = sum(values[j].sum() / valid[j].sum() for j in range(3))
    out = ImitationLoss(drafter, head, steps=3, decay=0.5)(batch)
    torch.testing.assert_close(out["loss_imitation"], expected)
    total = ImitationLoss(drafter, head, steps=3, decay=0.5, reduction="sum")(batch)["loss_imitation"]
    torch.testing.assert_close(total, values.sum())
    agree = [(logits[j].argmax(-1) == target.argmax(-1))[valid[j]].double().mean().item() for j in range(3)]
    assert out["agreement"].tolist() == pytest.approx(agree)
    assert out["loss_imitation"].requires_grad and not out["agreement"].requires_grad


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("divergence", ["reverse_kl", total_variation])
def test_any_divergence_in_either_convention(
    trajectories: list[TensorDict], divergence: str | Divergence, renormalize: bool
) -> None:
    drafter, head = noisy_drafter_and_head()
    batch, vocab = pack(trajectories), torch.arange(0, 32, 2)
    loss = ImitationLoss(drafter, head, divergence=divergence, renormalize=renormalize, steps=2, reduction="none")
    values = loss(batch)["loss_imitation"]
    logits, valid, _ = drafter.unroll(batch, 2)
    p = (batch["sequence", "hidden"] @ head.weight.T).softmax(-1)[:, vocab]
    if renormalize:
        p = p / p.sum(-1, keepdim=True)
    q = logits[0].softmax(-1)
    expected = (q * (q / p).log()).sum(-1) if divergence == "reverse_kl" else 1 - torch.minimum(p, q).sum(-1)
    torch.testing.assert_close(values[0][valid[0]], expected[valid[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_counts_the_same_alone_and_in_a_batch(
    kind: type[Drafter], trajectories: list[TensorDict], medusa_trajectories: list[TensorDict]
) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    chosen = trajectories if kind is Eagle3Drafter else medusa_trajectories
    loss = ImitationLoss(drafter, head, steps=3, reduction="none")
    together = loss(pack(chosen))["loss_imitation"]
    alone = torch.cat([loss(pack([t]))["loss_imitation"] for t in chosen], dim=1)
    torch.testing.assert_close(together, alone)


def test_rounds_and_nodes_do_not_matter(trajectories: list[TensorDict]) -> None:
    """The loss reads accepted contexts only: another tree over the same text has the same loss."""
    drafter, head = noisy_drafter_and_head()
    wide = trajectory_of(drafter, prompt_length=5, max_new_tokens=7, request=0, shape=TreeShape(2, 3))
    assert torch.equal(wide["sequence", "tokens"], trajectories[0]["sequence", "tokens"])
    loss = ImitationLoss(drafter, head)
    torch.testing.assert_close(loss(pack([wide]))["loss_imitation"], loss(pack(trajectories[:1]))["loss_imitation"])


def test_the_batch_is_not_changed(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    batch = pack(trajectories)
    before = batch.clone()
    ImitationLoss(drafter, head)(batch)["loss_imitation"].backward()
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert all(torch.equal(batch[key], before[key]) for key in before.keys(True, True))


def test_keys(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    loss = ImitationLoss(drafter, head)
    batch = pack(trajectories)
    assert set(loss.in_keys) == {
        ("sequence", "tokens"), ("sequence", "offset"), ("sequence", "prompt_length"), ("sequence", "features"),
        ("sequence", "hidden"),
    }  # fmt: skip
    assert set(loss.out_keys) == set(loss(batch).keys())
    # Nothing else is read.
    torch.testing.assert_close(loss(batch.select(*loss.in_keys))["loss_imitation"], loss(batch)["loss_imitation"])
    expected = loss(batch)["loss_imitation"]
    loss.set_keys(hidden=("teacher", "hidden"))
    assert ("teacher", "hidden") in loss.in_keys and ("sequence", "hidden") not in loss.in_keys
    batch["teacher"] = {"hidden": batch["sequence"].pop("hidden")}
    torch.testing.assert_close(loss(batch)["loss_imitation"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(
    kind: type[Drafter], trajectories: list[TensorDict], medusa_trajectories: list[TensorDict]
) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    batch = pack(trajectories if kind is Eagle3Drafter else medusa_trajectories)
    loss = ImitationLoss(drafter, head, steps=3)
    loss(batch)["loss_imitation"].backward()
    for name, parameter in drafter.named_parameters():
        if parameter.grad is None:
            assert name.startswith(("blocks.3", "lm_heads.3"))  # three steps use three of four heads
            continue
        direction, start = torch.randn_like(parameter), parameter.detach().clone()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.copy_(start + step * direction)
                values.append(loss(batch)["loss_imitation"])
        with torch.no_grad():
            parameter.copy_(start)
        expected = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_the_head_is_frozen(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    head = head.weight.clone().requires_grad_(True)
    loss = ImitationLoss(drafter, head)
    loss(pack(trajectories))["loss_imitation"].backward()
    assert head.grad is None
    assert {id(p) for p in loss.parameters()} == {id(p) for p in drafter.parameters()}
    assert "head" not in loss.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token_and_a_completion_of_one(kind: type[Drafter]) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    trajectory = trajectory_of(drafter, prompt_length=1, max_new_tokens=1)
    out = ImitationLoss(drafter, head, steps=2)(pack([trajectory]))
    # The only completion token has nothing before its root, so there is nothing to learn, and no division by zero.
    assert out["loss_imitation"].item() == 0.0 and out["agreement"].tolist() == [0.0, 0.0]
    out["loss_imitation"].backward()
    assert all(torch.isfinite(p.grad).all() for p in drafter.parameters() if p.grad is not None)


def test_a_drafter_with_fewer_steps_ends_the_loss(medusa_trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head(MedusaDrafter)
    out = ImitationLoss(drafter, head, steps=9)(pack(medusa_trajectories))
    assert out["agreement"].shape == (4,)


def test_every_medusa_head_learns(medusa_trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head(MedusaDrafter)
    loss = ImitationLoss(drafter, head)
    assert loss.steps == drafter.num_heads == 4
    loss(pack(medusa_trajectories))["loss_imitation"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\], got 0.0"),
        ({"decay": 1.5}, r"decay must lie in \(0, 1\], got 1.5"),
        ({"regression": math.inf}, "regression must be finite and not negative, got inf"),
        ({"divergence": "forwardkl"}, "no divergence is called 'forwardkl'; did you mean 'forward_kl'[?] There are cr"),
        ({"reduction": "average"}, "'mean', 'sum' or 'none', got 'average'"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, message: str) -> None:
    drafter, head = noisy_drafter_and_head()
    with pytest.raises(ValueError, match=message):
        ImitationLoss(drafter, head, **arguments)


def test_expected_length_weights_by_loops() -> None:
    """D-PACE: the weight of a token is how much of its window's length hangs on it."""
    torch.manual_seed(0)
    ends, steps = [4, 6], 3  # two requests of four and two completion tokens
    log_q = torch.rand(steps, 6, dtype=torch.float64).log()
    valid = torch.tensor([[True] * 6, [False, True, True, True, False, True], [False, False, True, True, False, False]])
    got = expected_length_weights(log_q, valid)
    expected = torch.zeros(steps, 6, dtype=torch.float64)
    for start in range(6):
        end = min(next(e for e in ends if e > start), start + steps)
        share = [0.5 + 0.5 * float(log_q[j, start + j].exp()) for j in range(end - start)]
        for j in range(len(share)):
            expected[j, start + j] = sum(math.prod(share[: m + 1]) for m in range(j, len(share)))
    torch.testing.assert_close(got, torch.where(valid, expected, 0.0))


def test_the_gradient_of_dpace_is_near_that_of_the_expected_length() -> None:
    """With nothing granted the weights are those of d(sum of reaches) / d(log q), as the name promises."""
    log_q = torch.rand(3, 1, dtype=torch.float64).log().requires_grad_()
    length = torch.stack([log_q[:m].sum().exp() for m in range(1, 4)]).sum()
    (gradient,) = torch.autograd.grad(length, log_q)
    reach = log_q.detach().exp().cumprod(0)[:, 0]
    torch.testing.assert_close(gradient[:, 0], reach.flip(0).cumsum(0).flip(0))


def test_weighting_by_expected_length(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    batch = pack(trajectories)
    plain = ImitationLoss(drafter, head, decay=1.0, reduction="none")(batch)["loss_imitation"]
    weighed = ImitationLoss(drafter, head, weighting="expected_length", reduction="none")(batch)["loss_imitation"]
    unroll = drafter.unroll(batch, 3)
    # Completion tokens of four requests: prompts of 5, 1, 2, 9, then 7, 4, 1, 10 tokens.
    offset, prompt = batch["sequence", "offset"].tolist(), batch["sequence", "prompt_length"].tolist()
    text = torch.cat(
        [batch["sequence", "tokens"][s + p : e] for s, e, p in zip(offset, offset[1:], prompt, strict=False)]
    )
    rows = {int(token): i for i, token in enumerate(drafter.draft_vocab)}
    log_q = torch.stack([
        torch.stack([
            logits[c].log_softmax(-1)[rows[int(t)]] if int(t) in rows else torch.tensor(-math.inf).double()
            for c, t in enumerate(text)
        ]) for logits in unroll.logits
    ])  # fmt: skip
    torch.testing.assert_close(weighed, plain * expected_length_weights(log_q, unroll.valid))


def test_regression_is_a_distance_of_states(trajectories: list[TensorDict]) -> None:
    drafter, head = noisy_drafter_and_head()
    batch = pack(trajectories)
    plain, more = (
        ImitationLoss(drafter, head, decay=1.0, regression=r, reduction="none")(batch)["loss_imitation"]
        for r in (0.0, 0.5)
    )
    unroll = drafter.unroll(batch, 3)
    assert unroll.states is not None
    gap = (torch.stack(unroll.states) - batch["sequence", "hidden"]).abs()
    huber = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
    torch.testing.assert_close(more - plain, torch.where(unroll.valid, 0.5 * huber, 0.0))


def test_states_lead_to_the_logits(trajectories: list[TensorDict]) -> None:
    drafter, _ = noisy_drafter_and_head()
    unroll = drafter.unroll(pack(trajectories), 2)
    assert unroll.states is not None
    for states, logits in zip(unroll.states, unroll.logits, strict=True):
        torch.testing.assert_close(drafter.lm_head(states), logits)


def test_regression_needs_states(trajectories: list[TensorDict], monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, head = noisy_drafter_and_head()
    whole = drafter.unroll
    monkeypatch.setattr(drafter, "unroll", lambda batch, steps: whole(batch, steps)._replace(states=None))
    with pytest.raises(ValueError, match="'imitation': regression needs a drafter whose unroll has states"):
        ImitationLoss(drafter, head, regression=1.0)(pack(trajectories))


@pytest.mark.parametrize("sampling", [SamplingParams(0.3, top_k=1, seed=1), SamplingParams(0.7, top_p=0.1, seed=1)])
def test_the_overlap_of_the_served_law_is_what_rejection_accepts(sampling: SamplingParams) -> None:
    drafter, head = noisy_drafter_and_head()
    recorded = trajectory_of(drafter, sampling_params=sampling)
    batch = pack([recorded])
    settings = dict(divergence="total_variation", steps=1, reduction="none")
    served = ImitationLoss(drafter, head, target="served", **settings)
    got = 1 - served(batch)["loss_imitation"][0]
    logits = recorded["sequence", "hidden"] @ head.weight.T
    p = warp_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p).exp()[:, drafter.draft_vocab]
    unroll = drafter.unroll(batch, 1)
    counts = unroll.valid[0] & (p.sum(-1) > 0)
    expected = torch.minimum(p, unroll.logits[0].softmax(-1)).sum(-1)
    assert 0 < int(counts.sum()) < len(counts)  # somewhere the draft vocabulary has nothing of the nucleus
    torch.testing.assert_close(got[counts], expected[counts])
    model = 1 - ImitationLoss(drafter, head, **settings)(batch)["loss_imitation"][0]
    assert (model - got)[counts].abs().max() > 0.01
    assert set(served.in_keys) - set(ImitationLoss(drafter, head, **settings).in_keys) == set(SAMPLING_KEYS)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0, top_k=2, seed=1)], ids=["greedy", "top_k"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_served_law_counts_where_the_draft_vocabulary_has_any_of_it(
    sampling: SamplingParams, renormalize: bool
) -> None:
    drafter, head = noisy_drafter_and_head()
    batch = pack([trajectory_of(drafter, request=i, sampling_params=sampling) for i in range(4)])
    loss = ImitationLoss(drafter, head, target="served", renormalize=renormalize, steps=2, decay=1.0, reduction="none")
    out, (logits, valid, _) = loss(batch), drafter.unroll(batch, 2)
    law = (batch["sequence", "hidden"] @ head.weight.T).log_softmax(-1)
    least = law.topk(sampling.top_k or 1, dim=-1).values[:, -1:]
    p = law.masked_fill(law < least, -math.inf).softmax(-1)[:, drafter.draft_vocab]
    covered = p.sum(-1) > 0
    assert covered.any() and not covered.all()
    p = (p / p.sum(-1, keepdim=True) if renormalize else p)[covered]
    for step in range(2):
        values, counts = out["loss_imitation"][step], valid[step] & covered
        assert not values[~counts].any()
        q = logits[step].log_softmax(-1)[covered]
        expected = torch.special.xlogy(p, p).sum(-1) - (p * q).sum(-1)
        torch.testing.assert_close(values[counts], expected[valid[step][covered]])
        agree = (p.argmax(-1) == q.argmax(-1))[valid[step][covered]].double().mean()
        torch.testing.assert_close(out["agreement"][step].double(), agree)
