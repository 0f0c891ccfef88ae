"""Which of vLLM's requests are learned from, the sampling that is recorded with them, and how they ended."""

from types import SimpleNamespace
from typing import Any

import pytest

from aurora_rl.envs.vllm.requests import client_id, how_it_ended, sampling_of, unwanted
from aurora_rl.sampling_params import SamplingParams


def new(rid: str = "cmpl-7-0-0a1b2c3d", **fields: Any) -> SimpleNamespace:
    """A request as vLLM's scheduler hands it to the worker, sampled at temperature 1."""
    params: dict[str, Any] = dict(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None, extra_args=None, logit_bias=None,
        frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_tokens=0, allowed_token_ids=None,
        bad_words=None, thinking_token_budget=None, structured_outputs=None,
    )  # fmt: skip
    own = dict(req_id=rid, lora_request=None, mm_features=[], prompt_embeds=None, prompt_token_ids=[1, 2])
    assert fields.keys() <= params.keys() | own.keys() | {"sampling_params"}
    own |= {name: value for name, value in fields.items() if name in own}
    params |= {name: value for name, value in fields.items() if name in params}
    return SimpleNamespace(**own, sampling_params=fields.get("sampling_params", SimpleNamespace(**params)))


@pytest.mark.parametrize(
    ("request_of_vllm", "reason"),
    [
        (new(), None),
        (new(temperature=0.3, top_k=20, top_p=0.9, seed=5), None),
        (new(extra_args={"aurora_rl": "true"}), None),
        (new(extra_args={"other": 0}), None),
        (new(extra_args={"aurora_rl": "false"}), "opt_out"),
        (new(extra_args={"aurora_rl": 0}), "opt_out"),
        (new(extra_args={"aurora_rl": "False"}), "opt_out"),
        (new(extra_args={"aurora_rl": "no"}), "opt_out"),
        (new(extra_args={"aurora_rl": "True"}), None),
        (new(extra_args={"aurora_rl": 1}), None),
        (new(sampling_params=None), "pooling"),
        (new(lora_request=object()), "adapter"),
        (new(mm_features=[object()]), "multimodal"),
        (new(prompt_token_ids=None), "multimodal"),
        (new(logit_bias={7: 5.0}), "penalty"),
        (new(frequency_penalty=0.5), "penalty"),
        (new(presence_penalty=-0.5), "penalty"),
        (new(repetition_penalty=1.2), "penalty"),
        (new(min_tokens=1), "penalty"),
        (new(allowed_token_ids=[4]), "penalty"),
        (new(bad_words=["no"]), "penalty"),
        (new(thinking_token_budget=8), "penalty"),
        (new(structured_outputs=object()), "grammar"),
        (new(min_p=0.1), "min_p"),
    ],
)
def test_requests_with_another_distribution_are_not_learned_from(request_of_vllm: Any, reason: str | None) -> None:
    assert unwanted(request_of_vllm, capture_rate=1.0) == reason


def test_a_share_of_requests_is_captured_by_the_ids_that_clients_gave() -> None:
    def captured(rate: float, suffix: str) -> list[str | None]:
        return [unwanted(new(f"cmpl-{i}-0-{suffix}"), capture_rate=rate) for i in range(1000)]

    some = captured(0.25, "0a1b2c3d")
    assert 200 < some.count(None) < 300 and set(some) == {None, "not_captured"}
    assert some == captured(0.25, "ffffffff") and captured(0.0, "0a1b2c3d").count(None) == 0


def test_the_client_s_id_is_found() -> None:
    # Its own dashes, digits and eight characters stay.
    ids = ["cmpl-a-1-0-0a1b2c3d", "cmpl-req-12345678-0-0a1b2c3d", "chatcmpl-9-0a1b2c3d", "plain", "0-0a1b2c3d"]
    assert [client_id(rid) for rid in ids] == ["a-1", "req-12345678", "9", "plain", "0-0a1b2c3d"]
    chats = ["chatcmpl-user-42-0a1b2c3d", "chatcmpl-user-43-0a1b2c3d"]  # without the number of a prompt
    assert [client_id(rid) for rid in chats] == ["user-42", "user-43"]
    assert {client_id(f"{choice}_cmpl-17-0-0a1b2c3d") for choice in range(3)} == {"17"}


def test_the_sampling_is_recorded() -> None:
    sampled = new(temperature=0.5, top_k=-1, top_p=0.9, seed=-5).sampling_params
    assert sampling_of(sampled) == SamplingParams(temperature=0.5, top_k=0, top_p=0.9, seed=-5)
    assert sampling_of(new(temperature=0.0, top_k=0, top_p=1.0).sampling_params) == SamplingParams(seed=0)


@pytest.mark.parametrize(
    ("status", "stops", "how"),
    [
        ("FINISHED_STOPPED", False, "terminated"),
        ("FINISHED_REPETITION", False, "terminated"),
        ("FINISHED_LENGTH_CAPPED", True, "budget"),
        ("FINISHED_ABORTED", True, "terminated"),  # at a stop string, which vLLM's engine does not see
        ("FINISHED_ABORTED", False, "aborted"),
        ("FINISHED_ERROR", True, "aborted"),
        ("", True, "aborted"),  # of which the scheduler said nothing
    ],
)
def test_how_a_request_ended(status: str, stops: bool, how: str) -> None:
    assert how_it_ended(status, stops=stops) == how
