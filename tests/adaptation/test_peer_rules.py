"""Learning rules of other systems: what they learn from, against a walk through every window."""

from __future__ import annotations

import torch

from aurora_rl.adaptation.peer_rules import osd
from aurora_rl.objectives import Windows, get_objective
from aurora_rl.testing import check_objective


def test_osd_learns_from_the_first_wrong_draft_of_each_window_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(4, 50, 3, generator=generator).double().log_softmax(-1) for _ in range(2))
    valid = torch.arange(50) + torch.arange(4)[:, None] < 50
    windows = Windows(torch.zeros(4, 50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64), valid)
    values, mask = osd(log_p, log_q, windows)
    counts = []
    for start in range(50):
        wrong = [
            depth
            for depth in range(4)
            if valid[depth, start] and int(log_p[depth, start].argmax()) != int(log_q[depth, start].argmax())
        ]
        assert mask[:, start].nonzero().flatten().tolist() == wrong[:1]
        counts.append(len(wrong))
    assert max(counts) > 1 and min(counts) == 0
    p = log_p.exp()
    torch.testing.assert_close(values[mask], (p * (log_p - log_q)).sum(-1)[mask], rtol=1e-12, atol=1e-12)


def test_it_is_an_objective_by_its_import_path() -> None:
    check_objective(get_objective("aurora_rl.adaptation.peer_rules:osd"), differentiable=False)
