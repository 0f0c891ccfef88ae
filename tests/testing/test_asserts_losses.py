"""What the checks of objectives read off a loss, and which refusals they accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.testing.asserts import refuses, total_loss


class Answers:
    """Stands for an objective that returns or raises what it is told."""

    name = "kl"

    def __init__(self, answer: dict[str, torch.Tensor] | Exception) -> None:
        self.answer = answer

    def __call__(self, batch: TensorDict) -> TensorDict:
        if isinstance(self.answer, Exception):
            raise self.answer
        return TensorDict(self.answer)


def test_all_losses_are_summed_and_metrics_are_not() -> None:
    values = {"loss_kl": torch.tensor([1.0, 2.0]), "loss_extra": torch.tensor(4.0), "agreement": torch.tensor(8.0)}
    objective: Any = Answers(values)
    assert total_loss(objective, TensorDict()) == 7


@pytest.mark.parametrize(
    ("error", "naming"),
    [
        (ValueError("objective 'kl' needs more"), "colour"),  # does not name what it has to
        (ValueError("needs colour"), "colour"),  # nor itself
        (KeyError("objective 'kl' needs colour"), "colour"),  # another kind of error
    ],
    ids=["what it needs", "itself", "as a ValueError"],
)
def test_a_refusal_in_other_words_is_an_error(error: Exception, naming: str) -> None:
    objective: Any = Answers(error)
    with pytest.raises(
        AssertionError, match="^a batch ends in .*, and not in a ValueError that names 'kl' and colour$"
    ):
        refuses(objective, TensorDict(), "a batch", naming=naming)


def test_a_refusal_by_name_is_told_from_a_loss_and_from_a_fault() -> None:
    refusal: Any = Answers(ValueError("objective 'kl' needs colour"))
    loss: Any = Answers({"loss_kl": torch.tensor(1.0)})
    fault: Any = Answers(RuntimeError("objective 'kl' needs colour"))
    assert refuses(refusal, TensorDict(), "a batch", naming="colour") is True
    assert refuses(loss, TensorDict(), "a batch") is False
    with pytest.raises(RuntimeError):
        refuses(fault, TensorDict(), "a batch")
