"""Rows of the draft vocabulary go to the tokens that are said, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from learner_loops import PARTS, TARGET, Make, day0, drain, publish_first, send, step_until
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.codec import checksum
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, NgramDrafter, TreeShape
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import serve
from aurora_rl.training.moving_vocab import MovingVocab, vocab_of_traffic
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.states import states

FIRST = range(0, 32, 2)  # the draft vocabulary of the start


def said(trajectories: list[TensorDict]) -> Counter[int]:
    sequences = [each["sequence"] for each in trajectories]
    return Counter(token for s in sequences for token in s["tokens"][int(s["prompt_length"]) :].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_the_vocabulary_is_that_of_the_tokens_said_most_often(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(4, (40,), generator=generator)
    vocab = torch.randperm(40, generator=generator)[: 5 + seed].sort().values
    inside = set(vocab.tolist())
    # Slowly: one after the other, by how often it was said, whether it is there, and its id.
    order = sorted(range(40), key=lambda token: (-int(counts[token]), token not in inside, token))
    found = vocab_of_traffic(vocab, counts)
    assert found.tolist() == sorted(order[: len(vocab)])
    assert torch.equal(vocab_of_traffic(found, counts), found)  # where nothing new is said, nothing moves


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_rows_that_stay_keep_weights_and_optimizer_states_and_those_that_enter_start_as_the_targets(
    kind: type[Drafter], served: list[TensorDict]
) -> None:
    torch.manual_seed(0)
    drafter = kind.from_target(PARTS, draft_vocab=torch.tensor(FIRST))
    optimizers = drafter_optimizers(drafter)
    for _ in range(3):
        for parameter in drafter.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    before, old = copy.deepcopy(drafter), drafter.draft_vocab.tolist()
    moments = {
        (place, key): value.clone()
        for place, table in enumerate(drafter.vocab_tables)
        for optimizer in optimizers
        for key, value in optimizer.state.get(table, {}).items()
        if value.ndim
    }
    assert len(moments) == 2 * len(drafter.vocab_tables)

    entered = MovingVocab(drafter, PARTS.head, optimizers).follow(served)
    new = drafter.draft_vocab.tolist()
    counts = said(served)
    assert new == sorted(new) and entered == len(set(new) - set(old)) > 3
    assert min(counts[token] for token in set(new) - set(old)) >= max(
        counts[token] for token in set(range(32)) - set(new)
    )
    for place, (table, was) in enumerate(zip(drafter.vocab_tables, before.vocab_tables, strict=True)):
        for row, token in enumerate(new):
            source = was[old.index(token)] if token in old else PARTS.head.rows(torch.tensor([token]))[0]
            assert torch.equal(table[row], source)
            for key in ("exp_avg", "exp_avg_sq"):
                state = next(o.state[table][key] for o in optimizers if table in o.state)[row]
                assert torch.equal(
                    state,
                    moments[place, key][old.index(token)] if token in old else state.new_zeros(()).expand_as(state),
                )
    tables = {id(table) for table in drafter.vocab_tables}
    for (name, value), was in zip(drafter.named_parameters(), before.parameters(), strict=True):
        assert id(value) in tables or torch.equal(value, was), name
    assert MovingVocab(drafter, PARTS.head, optimizers).follow(served) == 0
    assert MovingVocab(drafter, PARTS.head, optimizers).follow([]) == 0


def test_a_drafter_whose_rows_are_no_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="NgramDrafter has no rows that could be another token's"):
        MovingVocab(NgramDrafter(32), PARTS.head, [])


def test_a_table_that_cannot_take_the_targets_rows_is_refused_at_the_start() -> None:
    class Narrow(Eagle3Drafter):
        @property
        def vocab_tables(self) -> tuple[torch.Tensor, ...]:
            return (*super().vocab_tables, torch.nn.Parameter(torch.zeros(len(self.draft_vocab), 3)))

    drafter = Narrow.from_target(PARTS, draft_vocab=torch.tensor(FIRST))
    with pytest.raises(ValueError, match=r"a table in vocab_tables of Narrow is \(16, 3\), and the target's rows"):
        MovingVocab(drafter, PARTS.head, [])


def test_what_could_never_be_drafted_is_drafted_by_the_next_weights(make: Make, served: list[TensorDict]) -> None:
    loop = make(vocab=FIRST, follows=True, batch_size=2, gate=2, publish_every=4)
    send(loop, served[:4])
    step_until(loop, lambda: loop.events("candidate"))
    (candidate,) = loop.events("candidate")
    new = set(loop.drafter.draft_vocab.tolist())
    assert candidate["tokens_entered"] == len(new - set(FIRST)) > 0
    assert new - set(FIRST) <= set(said(served[:4]))
    send(loop, served[4:6])
    step_until(loop, lambda: loop.learner.version == 1)

    found: list[tuple[int, TensorDict]] = []
    wait(lambda: (latest := loop.receiver.latest()) is not None and (found.append(latest) or latest[0] == 1))
    engine = day0(FIRST).serving_copy(torch.float32)
    engine.install(dict(found[-1][1].flatten_keys(".").items()))
    assert set(engine.draft_vocab.tolist()) == new
    prompts = [each["sequence", "tokens"][: int(each["sequence", "prompt_length"])] for each in served[6:40]]
    again = serve(engine, TARGET, prompts, shape=TreeShape(3, 4), max_new_tokens=24)
    drafted = set(torch.cat([each["nodes", "tokens"] for each in again]).tolist())
    assert drafted & (new - set(FIRST)) and drafted <= new


def test_without_it_the_vocabulary_stays(make: Make, served: list[TensorDict]) -> None:
    loop = make(vocab=FIRST, batch_size=2, gate=2, publish_every=4)
    send(loop, served[:4])
    step_until(loop, lambda: loop.events("candidate"))
    assert loop.events("candidate")[0]["tokens_entered"] == 0
    assert loop.drafter.draft_vocab.tolist() == list(FIRST)


@pytest.fixture
def moved(make: Make, served: list[TensorDict]) -> SimpleNamespace:
    """A learner whose vocabulary has moved before it was published, and again after that, and which has saved."""
    loop = make(vocab=FIRST, follows=True, batch_size=2, gate=2, publish_every=2)
    publish_first(loop, served)
    send(loop, served[4:40])
    drain(loop)
    assert loop.learner._vocab.follow(served[:40]) > 0
    loop.learner.save()
    loop.learner.close()
    return loop


def test_a_learner_that_resumes_has_the_vocabulary_in_training_and_the_one_that_is_served(
    make: Make, moved: SimpleNamespace
) -> None:
    second = make(vocab=FIRST, follows=True)
    second.learner.resume(moved.states)
    assert torch.equal(second.drafter.draft_vocab, moved.drafter.draft_vocab)
    assert torch.equal(second.drafter.lm_head.weight, moved.drafter.lm_head.weight)
    served_vocab = second.learner._serving["d2t"] + torch.arange(len(FIRST))
    assert torch.equal(second.learner._serving["d2t"], moved.learner._serving["d2t"])
    assert not torch.equal(served_vocab, moved.drafter.draft_vocab)
    # The drafter next to the state has the vocabulary that is served, and a run may start from it.
    kept = load_drafter(states(moved.states)[0] / "drafter", PARTS)
    assert torch.equal(kept.draft_vocab, served_vocab)


def test_a_learner_that_is_started_again_from_the_drafter_that_is_served_goes_on(
    make: Make, moved: SimpleNamespace
) -> None:
    # `--resume`, and a server whose learner died, start from the drafter that was served last, see `go_on`.
    kept = load_drafter(states(moved.states)[0] / "drafter", PARTS)
    second = make(vocab=kept.draft_vocab.tolist(), follows=True)
    second.learner.resume(moved.states)
    assert torch.equal(second.drafter.draft_vocab, moved.drafter.draft_vocab)
    assert torch.equal(second.drafter.lm_head.weight, moved.drafter.lm_head.weight)
    second.learner.save()
    again = make(vocab=FIRST, follows=True)
    again.learner.resume(second.states)
    assert torch.equal(again.drafter.draft_vocab, moved.drafter.draft_vocab)


def test_a_learner_whose_vocabulary_stays_takes_no_state_of_another(make: Make, moved: SimpleNamespace) -> None:
    second = make(vocab=FIRST)
    before = {name: value.clone() for name, value in second.drafter.published().items()}
    with pytest.raises(CheckpointError, match="is of another draft vocabulary.* drafter.vocab_follows=true"):
        second.learner.resume(moved.states)
    assert all(torch.equal(value, before[name]) for name, value in second.drafter.published().items())
    third = make(vocab=moved.drafter.draft_vocab.tolist())
    third.learner.resume(moved.states)
    assert torch.equal(third.drafter.lm_head.weight, moved.drafter.lm_head.weight)


def test_training_on_recordings_takes_no_state_whose_rows_are_of_other_tokens(moved: SimpleNamespace) -> None:
    progress = json.loads((states(moved.states)[0] / "progress.json").read_text())
    assert progress["draft_vocab"] == checksum({"draft_vocab": moved.drafter.draft_vocab})


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_a_drafter_of_day_0_that_moves_is_one_that_started_there(kind: type[Drafter], served: list[TensorDict]) -> None:
    torch.manual_seed(0)
    drafter = kind.from_target(PARTS, draft_vocab=torch.tensor(FIRST))
    assert MovingVocab(drafter, PARTS.head, []).follow(served) > 3
    torch.manual_seed(0)
    started = kind.from_target(PARTS, draft_vocab=drafter.draft_vocab)
    for name, value in started.published().items():
        assert torch.equal(drafter.published()[name], value), name


def test_a_learner_goes_on_from_the_state_of_one_whose_vocabulary_has_moved(make: Make, moved: SimpleNamespace) -> None:
    second = make(vocab=FIRST, follows=True)
    second.learner.load_state_dict(moved.learner.state_dict())
    assert torch.equal(second.drafter.draft_vocab, moved.drafter.draft_vocab)
