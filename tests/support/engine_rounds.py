"""Rounds in SGLang's form, made from trajectories that the embedded engine recorded."""

import torch

from aurora_rl.envs.remote.assembler import EngineRound
from aurora_rl.sampling_params import SamplingParams


def links(parents):
    """First child and next sibling of each node, the root first, as SGLang has them."""
    size = len(parents) + 1
    child, sibling = [-1] * size, [-1] * size
    for node in range(size - 1, 0, -1):
        above = parents[node - 1] + 1
        sibling[node], child[above] = child[above], node
    return child, sibling


def rounds_of(trajectory, *, version=0, joint=True):
    """The rounds of a trajectory but the first, whose token an engine makes in prefill."""
    offset, anchor = trajectory["rounds", "offset"], trajectory["rounds", "anchor"]
    length, prompt = len(trajectory["sequence", "tokens"]), int(trajectory["sequence", "prompt_length"])
    features, hidden = trajectory["sequence", "features"], trajectory["sequence", "hidden"]
    for r in range(1, len(anchor)):
        nodes = slice(int(offset[r]), int(offset[r + 1]))
        at, n = int(anchor[r]), nodes.stop - nodes.start
        parents = trajectory["nodes", "parents"][nodes].tolist()
        accepted = trajectory["nodes", "accepted"][nodes]
        path = [0, *(accepted.nonzero().flatten() + 1).tolist()]
        log_probs = trajectory["nodes", "log_probs"][nodes].tolist()
        total = []
        for node, parent in enumerate(parents):
            total.append(log_probs[node] + (total[parent] if parent >= 0 else 0.0))
        child, sibling = links(parents)
        rows = torch.zeros(n + 1, features.shape[1], dtype=features.dtype)
        for step, place in enumerate(path):
            if at + step < length - 1:
                rows[place] = features[at + step]
        root = hidden[at - (prompt - 1)][None]
        yield EngineRound(
            anchor=torch.tensor(at),
            tokens=torch.cat([trajectory["sequence", "tokens"][at : at + 1], trajectory["nodes", "tokens"][nodes]]),
            first_child=torch.tensor(child),
            next_sibling=torch.tensor(sibling),
            path=torch.tensor([*path, *([-1] * (4 - len(path)))]),
            path_length=torch.tensor(len(path)),
            joint_log_probs=torch.tensor(total) if joint else None,
            features=rows,
            target={"hidden": torch.cat([root, trajectory["nodes", "hidden"][nodes]])},
            policy_version=version,
            ready=lambda: None,
        )


def sampling_of(trajectory):
    s = trajectory["sampling"]
    return SamplingParams(float(s["temperature"]), int(s["top_k"]), float(s["top_p"]), int(s["seed"]))


def without_first_round(trajectory):
    """What remains where prefill makes the first token."""
    out = trajectory.clone()
    offset = out["rounds", "offset"]
    first = int(offset[1])
    for key in ("anchor", "policy_version", "cache_version"):
        out["rounds", key] = out["rounds", key][1:]
    out["rounds", "offset"] = offset[1:] - first
    for key in list(out["nodes"].keys()):
        out["nodes", key] = out["nodes", key][first:]
    return out


def assert_same(recorded, expected):
    assert set(recorded.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        torch.testing.assert_close(
            recorded[key], expected[key].to(recorded[key].dtype), msg=lambda m, key=key: f"{key}: {m}"
        )
