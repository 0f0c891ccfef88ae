"""Rejection with its noise and in the environment: the law of what is served, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from aurora_rl.envs import Request, SampleAndMatch, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.envs.verification.rejection import Rejection, RejectionWithoutReplacement, reject
from aurora_rl.envs.verification.rules import VerificationRule, get_rule, require_replayable, rule_of_code
from aurora_rl.objectives import AcceptanceRewardLoss, ExpectedLengthLoss
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import pack, rule_code, validate

RULES = {True: Rejection(), False: RejectionWithoutReplacement()}
both = pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])


# ---------------------------------------------------------------------------------------------------------------------
# With its noise
# ---------------------------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def draw_and_verify(rule: VerificationRule, count: int, seen: bool = False) -> Tensor:
    """First tokens of many requests of one prompt, drafted two at a time; ``seen``: by the coins of verification."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    replacement = rule.name == "rejection"
    tokens = torch.stack([q.multinomial(2, replacement, generator=generator) for _ in range(count)])
    sampling = SamplingBatch.from_params([SamplingParams(1.0, seed=seed) for seed in range(count)])
    position = torch.full((count,), 40)
    if seen:
        from aurora_kernels.noise import uniform

        coins = uniform(sampling.seed[:, None], position[:, None] + 1, torch.arange(4), 1)
        tokens = coins.argsort(-1)[:, :2]  # tokens whose coin is low are accepted
    verdict = rule.verify(
        logits.expand(count, 3, 4), tokens, torch.full((count, 2), -1), torch.ones(count, 2, dtype=torch.bool),
        position, sampling, q.expand(count, 2, 4),
    )  # fmt: skip
    first = torch.where(verdict.accepted[:, 0], tokens[:, 0], verdict.bonus_token)
    return torch.where(verdict.accepted[:, 1], tokens[:, 1], first).bincount(minlength=4)


@both
def test_the_noise_draws_the_law(replacement: bool) -> None:
    law = torch.tensor([1.0, 0.0, -0.5, 0.5], dtype=torch.float64).softmax(-1)
    assert chi_square(draw_and_verify(RULES[replacement], 20_000), law) < 21.1  # 3 degrees of freedom, one in 10 000
    assert chi_square(draw_and_verify(RULES[replacement], 20_000, seen=True), law) > 1000  # the drafter saw the coins


def test_without_nodes_verification_is_plain_sampling() -> None:
    logits, nodes = torch.randn(50, 1, 7), torch.zeros(50, 0, dtype=torch.int64)
    sampling = SamplingBatch.from_params([SamplingParams(0.8, 5, 0.9, seed) for seed in range(50)])
    round_ = (logits, nodes, nodes, nodes.bool(), torch.full((50,), 9), sampling)
    expected = get_rule("sample_and_match")().verify(*round_)
    assert torch.equal(Rejection().verify(*round_, torch.zeros(50, 0, 7)).bonus_token, expected.bonus_token)


def test_rejection_needs_the_drafters_distribution() -> None:
    nodes = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'rejection' needs q \[B, N, V\], got None"):
        Rejection().verify(
            torch.zeros(1, 3, 5), nodes, nodes - 1, nodes.bool(), nodes[:, 0], SamplingBatch.from_params([None])
        )
    with pytest.raises(ValueError, match="'rejection' depends on q, which is missing"):
        Rejection().acceptance(torch.ones(1, 1), None, nodes[0], nodes[0])


def test_a_sibling_that_repeats_another_takes_nothing_from_those_after_it() -> None:
    """Refused with 0.8, the first leaves r = (0, 1/2, 1/2) and q = (0, 0.6, 0.4), which the second passes on."""
    p, q = torch.tensor([[0.1, 0.5, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
    chances = RejectionWithoutReplacement().acceptance(p, q, torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(chances, torch.tensor([0.2, 0.0, 0.8 * 0.5 / 0.6]))


@pytest.mark.parametrize("replacement", [True, False])
def test_a_rejection_that_only_rounding_brings_about_leaves_the_law(replacement: bool) -> None:
    """Of equal distributions nothing is left to draw the bonus token from."""
    p = torch.tensor([[[0.0, 0.5, 0.5]] * 2])
    seen: list[Tensor] = []

    def pick(residual: Tensor, column: Tensor) -> Tensor:
        seen.append(residual)
        return residual.argmax(-1)

    coins = torch.ones(1, 1)  # a number just below 1 times the mass rounds to the mass
    parts = torch.tensor([[1]]), torch.tensor([[-1]]), torch.tensor([[True]])
    verdict = reject(p, p[:, :1], *parts, coins, pick, replacement=replacement)
    assert not verdict.accepted.any()
    torch.testing.assert_close(seen[0], p[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# In the environment
# ---------------------------------------------------------------------------------------------------------------------


def serve(
    rule: str,
    mode: str,
    temperature: float,
    count: int,
    slots: int,
    depth: int = 2,
    drawn: str | None = None,
    speculate: bool = True,
    width: int = 3,
    with_q: bool = True,
) -> tuple[list, Tensor]:
    """Requests served to their end, and the law of their first token; ``drawn`` is the policy's own draft mode."""
    model = tiny_target(seed=4)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(1, 13)).double().eval()
    engine = TransformersEngine(model, num_slots=slots, max_length=16, feature_layers=drafter.feature_layers)
    prompt = torch.tensor([3, 5, 9])
    waiting = [Request(i, prompt, SamplingParams(temperature, seed=i, max_tokens=2)) for i in range(count)]
    done: list = []
    shape = TreeShape(depth, width, mode=drawn or mode)
    env = SpecDecodeEnv(
        engine, lambda: waiting.pop() if waiting else None, num_nodes=shape.num_nodes, rule=rule, draft_mode=mode,
        on_completion=done.append,
    )  # fmt: skip
    policy = DrafterPolicy(
        drafter, engine.store, num_nodes=shape.num_nodes, shape=shape, generator=torch.Generator().manual_seed(1),
        vocab_size=engine.vocab_size if with_q else None,
    )  # fmt: skip
    policy.speculate = speculate
    td = env.reset()
    while len(done) < count:
        _, td = env.step_and_maybe_reset(policy(td))
    logits = tiny_target(seed=4)(prompt[None]).logits[0, -1]  # the engine changed the other
    return done, (logits.double() / max(temperature, 1e-9)).softmax(-1)


@pytest.mark.parametrize(
    ("rule", "mode", "width", "count"),
    [
        ("rejection", "sampled", 3, 700),
        ("rejection_without_replacement", "sampled_without_replacement", 3, 700),
        pytest.param("sample_and_match", "sampled", 3, 1500, marks=pytest.mark.stress),
        ("block", "sampled", 1, 600),
    ],
)
def test_served_text_has_the_targets_law(rule: str, mode: str, width: int, count: int) -> None:
    done, law = serve(rule, mode, temperature=0.7, count=count, slots=count // 2, width=width)  # two requests a slot
    first = torch.tensor([int(c.tokens[0]) for c in done]).bincount(minlength=len(law))
    likely = law > 0.005
    counts, expected = (
        torch.cat([first[likely], first[~likely].sum()[None]]),
        torch.cat([law[likely], law[~likely].sum()[None]]),
    )
    assert chi_square(counts, expected) < 45  # 16 degrees of freedom at most, one in 10 000
    assert sum(int(c.trajectory["nodes", "accepted"].sum()) for c in done) > 50
    assert all(int(c.trajectory["sampling", "draft_mode"]) > 0 for c in done)


@pytest.mark.parametrize(("rule", "width"), [("rejection", 3), ("block", 1)])
def test_greedy_text_under_rejection_is_the_targets_own(rule: str, width: int) -> None:
    done, _ = serve(rule, "sampled", temperature=0.0, count=3, slots=2, width=width)
    plain_, _ = serve("greedy", "topk", temperature=0.0, count=3, slots=2)
    assert {tuple(c.tokens.tolist()) for c in done} == {tuple(c.tokens.tolist()) for c in plain_}


def test_a_rule_refuses_trees_that_were_drawn_otherwise() -> None:
    with pytest.raises(
        ValueError, match="'rejection' would change the text of trees drawn by 'topk'; .* draft_mode sampled"
    ):
        serve("rejection", "topk", 1.0, 1, 1)


@pytest.mark.parametrize(
    ("rule", "mode", "drawn"),
    [
        ("rejection", "sampled", "sampled_without_replacement"),
        ("rejection", "sampled", "topk"),
        ("sample_and_match", "sampled", "topk"),
        ("sample_and_match", "topk", "sampled"),
    ],
)
def test_trees_that_were_drawn_in_another_mode_than_the_environments_are_refused(
    rule: str, mode: str, drawn: str
) -> None:
    message = f"drawn by '{drawn}', and the environment was made with draft_mode='{mode}'; .*draft_mode=policy.shape"
    with pytest.raises(ValueError, match=message):
        serve(rule, mode, 1.0, 1, 1, drawn=drawn)


def test_a_rule_refuses_trees_without_their_distribution() -> None:
    with pytest.raises(
        ValueError, match=r"'rejection' compares .* no \('draft', 'q'\); .*vocab_size=engine.vocab_size"
    ):
        serve("rejection", "sampled", 1.0, 1, 1, with_q=False)


@pytest.mark.parametrize("drawn", ["sampled", "topk"])
@pytest.mark.parametrize("with_q", [False, True])
def test_rounds_decoded_plainly_need_neither_mode_nor_distribution(drawn: str, with_q: bool) -> None:
    done, _ = serve("rejection", "sampled", 1.0, 3, 2, drawn=drawn, speculate=False, with_q=with_q)
    plain_, _ = serve("sample_and_match", "topk", 1.0, 3, 2, speculate=False)
    assert {c.request.id: c.tokens.tolist() for c in done} == {c.request.id: c.tokens.tolist() for c in plain_}


class Lenient(SampleAndMatch):  # type: ignore[misc]  # of a third party, which may derive where the library does not
    """Sample-and-match by another name: its text does not depend on the drafts either."""


def test_a_third_partys_rule_is_recorded_and_learned_from() -> None:
    path = f"{__name__}:Lenient"
    with pytest.raises(ValueError, match=f"the verification rule of code {rule_code(path)} is not known here"):
        rule_of_code(rule_code(path))
    parts, losses = TargetParts.of(tiny_target(seed=4)), {}
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(1, 13)).double()
    for rule in ("sample_and_match", path):
        torch.manual_seed(0)
        done, _ = serve(rule, "sampled", 1.0, 3, 2)
        batch = pack([c.trajectory for c in sorted(done, key=lambda c: c.request.id)])
        assert batch["sampling", "rule"].unique().tolist() == [rule_code(rule)]
        width = batch["sequence", "features"].shape[-1]
        validate(done[0].trajectory, vocab_size=len(parts.head), feature_size=width, hidden_size=16)
        kinds = (AcceptanceRewardLoss, partial(ExpectedLengthLoss, contexts="trees"))
        losses[rule] = [kind(drafter, parts.head)(batch) for kind in kinds]
    assert rule_of_code(rule_code(path)) is get_rule(path)
    for known, own in zip(losses["sample_and_match"], losses[path], strict=True):
        assert all(torch.equal(known[key], own[key]) for key in known.keys())


@pytest.mark.parametrize("name", ["rejection", "rejection_without_replacement", "block"])
def test_rules_whose_text_depends_on_the_drafts_are_not_replayed(name: str) -> None:
    with pytest.raises(ValueError, match=f"the rule '{name}' is not replayable: its text depends on what was drafted"):
        require_replayable(get_rule(name))
    require_replayable(get_rule("greedy"))
    require_replayable(get_rule("sample_and_match"))
