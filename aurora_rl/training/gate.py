"""Replay of recorded streams, and the gate that decides with it whether new weights are published."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_kernels.trees import depths, walk
from aurora_rl.context import ContextStore
from aurora_rl.envs.verification.rules import require_replayable, rule_of_code
from aurora_rl.policies.drafter import Drafter
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.policies.merging import Chances, TreeMerger
from aurora_rl.policies.policy import DrafterPolicy, not_finite
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.statistics import mean_interval
from aurora_rl.training.replay import as_state, of_state
from aurora_rl.training.shares import engine_of
from aurora_rl.trajectories import check_features

# Both in multiples of the requests of a decision. A decision waits for the engines' shares until so many have arrived.
_LATEST = 2
_PRESENT = 8  # an engine has gone if it sends none while so many arrive from others


class Replay(NamedTuple):
    """Acceptance that a drafter would have had on recorded requests.

    Attributes:
        tokens: Committed tokens of each request, ``[n]`` int64.
        rounds: Rounds of each request, ``[n]`` int64.
    """

    tokens: Tensor
    rounds: Tensor

    @property
    def acceptance(self) -> Tensor:
        """Tokens per round of each request, ``[n]`` float64."""
        return self.tokens.double() / self.rounds

    @property
    def acceptance_length(self) -> float:
        """Tokens per round over all requests, bonus tokens included."""
        return int(self.tokens.sum()) / int(self.rounds.sum())


@torch.inference_mode()
def replay(
    drafter: Drafter,
    trajectories: Sequence[TensorDictBase],
    shape: TreeShape,
    earlier: EarlierAnswers | None = None,
    chances: Chances | None = None,
) -> Replay:
    """Compute the acceptance that a drafter would have had on recorded requests, exactly.

    Under greedy decoding and sample-and-match the text does not depend on the drafter, so the recorded text says which
    drafts the target would have accepted.

    Args:
        drafter: Drafter whose serving cache is used; pass a copy of one that serves.
        trajectories: Recorded requests.
        shape: The tree to draft at every round.
        earlier: Answers in which lookup searches.
        chances: What is known of the drafter's and lookup's nodes, which learns on; None starts anew.

    Raises:
        ValueError: The features were recorded for another drafter, or a request was served under a rule whose text
            depends on what was drafted.
    """
    n = len(trajectories)
    for trajectory in trajectories:
        require_replayable(rule_of_code(int(trajectory["sampling", "rule"])))
        if (hidden := trajectory.get(("sequence", "hidden"), None)) is not None:
            check_features(trajectory, drafter.feature_layers, hidden.shape[-1])
    ends = torch.tensor([len(t["sequence", "tokens"]) for t in trajectories])
    features = trajectories[0]["sequence", "features"]
    device = drafter.draft_vocab.device
    store = ContextStore(n, int(ends.max()) + 1, features.shape[-1], 0, features.dtype, device)
    for slot, trajectory in enumerate(trajectories):
        store.start(slot, trajectory["sequence", "tokens"].to(device))
        store.features[slot, : ends[slot] - 1] = trajectory["sequence", "features"].to(device)
        store.lengths[slot] = trajectory["sequence", "prompt_length"]
        store.adapters[slot] = trajectory.get(("sequence", "adapter"), torch.tensor(0))
    # The same draws for every drafter that is replayed, where the shape's mode samples.
    generator = torch.Generator(device).manual_seed(0)
    policy = DrafterPolicy(drafter, store, num_nodes=shape.num_nodes, shape=shape, generator=generator)
    policy.earlier, policy.merger = earlier, TreeMerger(chances)
    td = TensorDict({"is_init": torch.zeros(n, 1, dtype=torch.bool)}, batch_size=[n])
    rounds = torch.zeros(n, dtype=torch.int64)
    # What follows a text is a token that no drafter proposes.
    text = torch.cat([store.tokens, store.tokens.new_full((n, 1), -1)], dim=1)
    for slot, end in enumerate(ends.tolist()):
        text[slot, end:] = -1
    while len(slots := store.occupied):
        try:
            draft = policy(td)["draft"]
        except RuntimeError as error:
            if all(("sequence", "hidden") in trajectory.keys(True) for trajectory in trajectories):
                raise
            # Trajectories without hidden states do not say how wide a layer is.
            raise ValueError(
                f"the drafter cannot draft from the recorded features, {features.shape[-1]} wide, which it reads as "
                f"those of the layers {tuple(drafter.feature_layers)} ({error}); take the drafter that they were "
                "recorded with"
            ) from error
        parents, at = draft["parents"][slots], store.lengths[slots].to(device)
        depth = torch.cat([torch.zeros_like(at)[:, None], depths(parents)], dim=1)
        choices = text[slots.to(device)].gather(1, (at[:, None] + depth).clamp(max=text.shape[1] - 1))
        accepted = walk(draft["tokens"][slots], parents, draft["mask"][slots], choices).sum(1).cpu()
        rounds[slots] += 1
        lengths = store.lengths[slots] + accepted + 1
        store.lengths[slots] = torch.where(lengths >= ends[slots], 0, lengths)
    prompts = torch.tensor([int(t["sequence", "prompt_length"]) for t in trajectories])
    return Replay(ends - prompts, rounds)


def _request_of(trajectory: TensorDictBase) -> tuple[str, int]:
    """Return the engine and the number of a trajectory's request, which all of its parts have."""
    return engine_of(trajectory), int(trajectory["request"])


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's decision about a candidate.

    Attributes:
        publish: Whether the candidate is to be served.
        difference: Mean over the held-back requests of candidate minus serving acceptance, tokens per round.
        interval: 95% interval of that mean (normal approximation).
        candidate: Acceptance length of the candidate over these requests.
        serving: Acceptance length of the serving weights.
        requests: Number of requests held back.
        reason: Why a candidate that cannot draft is refused. It counts as plain decoding, one token per round.
    """

    publish: bool
    difference: float
    interval: tuple[float, float]
    candidate: float
    serving: float
    requests: int
    reason: str | None = None


class Gate:
    """Holds back arrivals, and compares a candidate with the serving weights on them.

    What decides was seen by neither: arrivals that are held back are learned from only after the decision. Later parts
    of a request of which a part is held are held as well, however many. Each of the engines that sent the last
    ``8 * requests`` arrivals has an equal share of them, rounded up. A decision takes ``2 * requests`` arrivals at
    most: in time for that, places that are open go to any engine, those with a share left first.

    Args:
        requests: ``K``, arrivals of a decision.
        margin: Publish if the mean paired difference in acceptance is above minus this.
        shape: The tree of the replays.
        drafter: A drafter of the served kind and dtype, used as scratch.

    Attributes:
        holding: Whether arrivals are held back.
    """

    def __init__(self, requests: int, margin: float, shape: TreeShape, drafter: Drafter) -> None:
        self._requests, self._margin, self._shape, self._drafter = requests, margin, shape, drafter
        self._held: list[TensorDictBase] = []
        self._recent: deque[str] = deque(maxlen=_PRESENT * requests)  # engines of the last arrivals
        self.holding = False
        self._arrived = 0  # since it began to hold

    def hold(self) -> None:
        """Hold back the next arrivals, for a decision."""
        self.holding = True

    def admit(self, arrivals: Sequence[TensorDictBase]) -> list[TensorDictBase]:
        """Take arrivals; return those that may be learned from now."""
        passed: list[TensorDictBase] = []
        self._recent.extend(map(engine_of, arrivals))
        share = math.ceil(self._requests / max(len(set(self._recent)), 1))
        held, requests = Counter(map(engine_of, self._held)), set(map(_request_of, self._held))
        for each in arrivals:
            engine = engine_of(each)
            room = len(self._held) < self._requests and held[engine] < share
            if self.holding and (room or _request_of(each) in requests):
                self._held.append(each)
                held[engine] += 1
                requests.add(_request_of(each))
            else:
                passed.append(each)
        if not self.holding:
            return passed
        self._arrived += len(arrivals)
        wanted = self._requests - len(self._held)
        late = max(wanted - max(_LATEST * self._requests - self._arrived, 0), 0)  # more than what is still to arrive
        self._held += passed[:late]
        requests.update(map(_request_of, passed[:late]))
        self._held += [each for each in passed[late:] if _request_of(each) in requests]
        return [each for each in passed[late:] if _request_of(each) not in requests]

    def drop(self, gone: Callable[[TensorDictBase], bool]) -> list[TensorDictBase]:
        """Hold the arrivals that meet a condition no longer, and return them; others take their place."""
        dropped = [each for each in self._held if gone(each)]
        self._held = [each for each in self._held if not gone(each)]
        return dropped

    @property
    def ready(self) -> bool:
        """Whether enough arrivals are held to decide."""
        return self.holding and len(self._held) >= self._requests

    def decide(self, candidate: dict[str, Tensor], serving: dict[str, Tensor]) -> tuple[Decision, list[TensorDictBase]]:
        """Replay a candidate and the weights that are served on the held-back requests.

        Returns:
            The decision, and the requests, which may be learned from now.

        Raises:
            RuntimeError: Too few requests are held back, see ``ready``.
            ValueError: These are not weights of this drafter, see ``Drafter.stage``.
        """
        if not self.ready:
            raise RuntimeError(
                f"the gate holds back {len(self._held)} requests of {self._requests}; call hold(), and admit() more"
            )
        new, reason = None, not_finite(candidate)
        if reason is None:
            self._drafter.install(candidate)
            try:
                new = replay(self._drafter, self._held, self._shape)
            except Exception as error:  # finite weights, too, may make a drafter fail: the served ones stay
                reason = f"the drafter fails with these weights: {error}"
        self._drafter.install(serving)
        old = replay(self._drafter, self._held, self._shape)
        if new is None:
            new = Replay(old.tokens, old.tokens)
        paired = (new.acceptance - old.acceptance).tolist()
        mean, lengths = fmean(paired), (new.acceptance_length, old.acceptance_length)
        publish = reason is None and mean > -self._margin
        decision = Decision(publish, mean, mean_interval(paired), *lengths, len(paired), reason)
        released, self._held, self.holding, self._arrived = self._held, [], False, 0
        return decision, released

    def state_dict(self) -> dict[str, Any]:
        """Return what it holds back, the engines of the last arrivals, and how many came since it began to hold."""
        held = [as_state(each) for each in self._held]
        return {"holding": self.holding, "held": held, "recent": list(self._recent), "arrived": self._arrived}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold back what :meth:`state_dict` returned."""
        self.holding = state["holding"]
        self._held = [of_state(each) for each in state["held"]]
        # A state of an earlier release has neither.
        self._recent = deque(state.get("recent", []), maxlen=self._recent.maxlen)
        self._arrived = state.get("arrived", 0)
