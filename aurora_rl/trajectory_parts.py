"""Parts of a request that is learned from while its answer is written.

A part is a packed trajectory of its own: its prompt is all text before it, and its rounds are those since then.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase

from aurora_rl.trajectories import TOPK_ENTRIES

_TARGET_ENTRIES = {"hidden", *TOPK_ENTRIES}
_SHARE = 4  # a part has at least this share of the text before it, as that is sent with it


def part_is_due(length: int, first: int, part_tokens: int) -> bool:
    """Return whether the tokens from ``first`` on of a text of ``length`` tokens are enough for a part.

    Enough are ``part_tokens``, and a quarter of the text before: all parts of a request together have at most six times
    its tokens, as each part brings the text before it along.

    Example:
        >>> part_is_due(400, 144, part_tokens=256), part_is_due(4256, 4000, part_tokens=256)
        (True, False)
    """
    return length - first >= max(part_tokens, first / _SHARE)


def part_of(trajectory: TensorDictBase, first: int, end: int | None = None) -> TensorDict:
    """Return tokens ``first`` to ``end - 1`` of a trajectory, as that of a request whose prompt is all before them.

    A round belongs to the part in which its root's first successor stands. It keeps all its nodes, also where its path
    goes beyond the end.

    Args:
        trajectory: Packed trajectory (``aurora_rl.trajectories``).
        first: Place of the first token, behind the prompt.
        end: Place after the last; None takes all that follow.

    Returns:
        A packed trajectory, whose tensors are views.

    Raises:
        ValueError: There is no such part of the completion.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> from aurora_rl.trajectories import unpack
        >>> whole = unpack(tiny_batch()[2])[0]
        >>> part = part_of(whole, int(whole["sequence", "prompt_length"]) + 3)
        >>> int(part["sequence", "prompt_length"]) - int(whole["sequence", "prompt_length"])
        3
    """
    sequence, rounds, nodes = trajectory["sequence"], trajectory["rounds"], trajectory["nodes"]
    prompt, length = int(sequence["prompt_length"]), len(sequence["tokens"])
    end = length if end is None else end
    if not prompt <= first < end <= length:
        raise ValueError(f"a part lies in the completion, tokens {prompt} to {length - 1}; got {first} to {end - 1}")
    low, high = torch.searchsorted(rounds["anchor"], torch.tensor([first - 1, end - 1])).tolist()
    offset = rounds["offset"][low : high + 1]
    kept = slice(int(offset[0]), int(offset[-1]))
    part = trajectory.copy()
    part["sequence"] = TensorDict(
        {
            key: value[first - prompt : end - prompt] if key in _TARGET_ENTRIES else value
            for key, value in sequence.items()
        }
    )
    part["sequence", "tokens"], part["sequence", "features"] = sequence["tokens"][:end], sequence["features"][: end - 1]
    part["sequence", "prompt_length"] = torch.tensor(first)
    part["rounds"] = TensorDict({key: rounds[key][low:high] for key in rounds.keys() if key != "offset"})
    part["rounds", "offset"] = offset - offset[0]
    part["nodes"] = TensorDict({key: value[kept] for key, value in nodes.items()})
    return part
