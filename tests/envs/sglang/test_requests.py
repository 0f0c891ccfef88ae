"""Which of SGLang's requests are learned from, and the sampling that is recorded with them."""

from types import SimpleNamespace

import pytest

from aurora_rl.envs.remote.assembler import request_number
from aurora_rl.envs.sglang.requests import sampling_of, unwanted
from aurora_rl.sampling_params import SamplingParams

EVERY_TOKEN = 1 << 30  # SGLang's top-k where there is none


def req(rid="7", output_ids=(), grammar=None, **params):
    """A request as SGLang's scheduler has it, sampled at temperature 1."""
    plain = dict(
        temperature=1.0, top_k=EVERY_TOKEN, top_p=1.0, min_p=0.0, sampling_seed=None, custom_params=None,
        logit_bias=None, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0,
        json_schema=None, regex=None, ebnf=None, structural_tag=None,
    )  # fmt: skip
    assert params.keys() <= plain.keys()
    return SimpleNamespace(
        rid=rid, output_ids=list(output_ids), grammar=grammar, sampling_params=SimpleNamespace(**plain | params)
    )


@pytest.mark.parametrize(
    ("request_of_sglang", "reason"),
    [
        (req(), None),
        (req(temperature=0.3, top_k=20, top_p=0.9, sampling_seed=5), None),
        (req(custom_params={"aurora_rl": True}), None),
        (req(custom_params="aurora_rl"), None),
        (req(rid="HEALTH_CHECK_3"), "health_check"),
        (req(custom_params={"aurora_rl": False}), "opt_out"),
        (req(output_ids=[4]), "retracted"),
        (req(logit_bias={"7": 5.0}), "penalty"),
        (req(frequency_penalty=0.5), "penalty"),
        (req(presence_penalty=-0.5), "penalty"),
        (req(repetition_penalty=1.2), "penalty"),
        (req(min_new_tokens=1), "penalty"),
        (req(grammar=object()), "grammar"),
        (req(json_schema="{}"), "grammar"),
        (req(regex="a*"), "grammar"),
        (req(ebnf="root ::= 'a'"), "grammar"),
        (req(structural_tag="{}"), "grammar"),
        (req(min_p=0.1), "min_p"),
    ],
)
def test_requests_with_another_distribution_are_not_learned_from(request_of_sglang, reason):
    assert unwanted(request_of_sglang, capture_rate=1.0, greedy_only=False) == reason


def test_an_engine_that_answers_with_the_argmax_teaches_greedy_requests_only():
    assert unwanted(req(temperature=0.7), capture_rate=1.0, greedy_only=True) == "temperature"
    assert unwanted(req(top_k=1), capture_rate=1.0, greedy_only=True) is None


def test_a_share_of_requests_is_captured_and_the_same_ones_again():
    def captured(rate):
        return {n for n in range(4000) if unwanted(req(rid=str(n)), capture_rate=rate, greedy_only=False) is None}

    assert unwanted(req(), capture_rate=0.0, greedy_only=False) == "not_captured"
    few, half = captured(0.1), captured(0.5)
    assert few == captured(0.1) and few <= half, "a greater share adds requests and takes none away"
    assert len(few) == pytest.approx(400, abs=60) and len(half) == pytest.approx(2000, abs=100)


def test_an_id_that_is_no_number_is_captured_as_the_number_that_it_is_recorded_by():
    def captured(rid):
        return unwanted(req(rid=rid), capture_rate=0.5, greedy_only=False) is None

    ids = [f"chat-{n}" for n in range(200)]
    shares = [captured(rid) for rid in ids]
    assert shares == [captured(str(request_number(rid))) for rid in ids] and 60 < sum(shares) < 140


@pytest.mark.parametrize(
    ("request_of_sglang", "sampling"),
    [
        (req(temperature=0.7, top_k=20, top_p=0.9, sampling_seed=5), SamplingParams(0.7, 20, 0.9, 5)),
        (req(), SamplingParams(1.0, 0, 1.0, 0)),
        (req(temperature=0.7, top_k=1, top_p=0.5), SamplingParams(0.0, 0, 1.0, 0)),  # how SGLang writes temperature 0
        (req(sampling_seed=-3), SamplingParams(1.0, seed=-3)),
        (req(sampling_seed=2**64 + 3), SamplingParams(1.0, seed=3)),
    ],
)
def test_sampling_is_recorded_as_trajectories_hold_it(request_of_sglang, sampling):
    assert sampling_of(request_of_sglang) == sampling
