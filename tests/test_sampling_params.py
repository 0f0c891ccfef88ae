"""Parameters of a request: out of range they name value and cure, and of a batch they are stacked."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from aurora_rl.sampling_params import SamplingBatch, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("temperature", -0.5, "give a finite number >= 0"),
        ("temperature", math.inf, "give a finite number >= 0"),
        ("temperature", math.nan, "give a finite number >= 0"),
        ("temperature", 10**39, "give a finite number >= 0"),  # no float32
        ("top_k", -2, "0 <= top_k"),
        ("top_k", 2**63, r"0 <= top_k < 2\*\*63"),
        ("top_k", 2.5, "give an integer"),
        ("top_k", True, "give an integer"),
        ("seed", 1.0, "give an integer"),
        ("top_p", None, "give a number"),
        ("top_p", 0.0, "0 < top_p <= 1"),
        ("top_p", 1.5, "0 < top_p <= 1"),
        ("top_p", math.nan, "0 < top_p <= 1"),
        ("min_p", None, "give a number"),
        ("min_p", -0.1, "0 <= min_p <= 1"),
        ("min_p", 1.5, "0 <= min_p <= 1"),
        ("min_p", math.nan, "0 <= min_p <= 1"),
        ("n", 0, "give an integer >= 1"),
        ("n", 2.0, "give an integer"),
        ("n", True, "give an integer"),
        ("max_tokens", 0, "give an integer >= 1"),
        ("seed", -(2**63) - 1, r"-2\*\*63 <= seed < 2\*\*63"),
        ("seed", 2**63, r"-2\*\*63 <= seed < 2\*\*63"),
        ("ignore_eos", 1, "give true or false"),
        ("ignore_eos", None, "give true or false"),
    ],
)
def test_params_out_of_range_name_value_and_cure(field: str, value: Any, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; .*{cure}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_python_s(kind: type) -> None:
    params = SamplingParams(np.float32(0.5), kind(7), np.float64(0.25), n=kind(2), seed=kind(5), max_tokens=kind(9))
    assert params == SamplingParams(0.5, 7, 0.25, n=2, seed=5, max_tokens=9)
    assert json.loads(json.dumps(asdict(params))) == {**asdict(params), "stop": []}
    assert [each.seed for each in params.copies()] == [5, 6]


def test_batch_of_params() -> None:
    batch = SamplingBatch.from_params([SamplingParams(0.5, 7, 0.25, 2**63 - 1, min_p=0.125), None])
    assert batch.temperature.tolist() == [0.5, 0.0] and batch.temperature.dtype == torch.float32
    assert batch.top_k.tolist() == [7, 0] and batch.top_k.dtype == torch.int64
    assert batch.top_p.tolist() == [0.25, 1.0] and batch.top_p.dtype == torch.float32
    assert batch.min_p.tolist() == [0.125, 0.0] and batch.min_p.dtype == torch.float32
    assert batch.seed.tolist() == [2**63 - 1, 0] and batch.seed.dtype == torch.int64


def test_every_seed_of_64_bits_is_kept_as_it_is() -> None:
    seeds = [-(2**63), -(2**32), -1, 0, 2**63 - 1]
    batch = SamplingBatch.from_params([SamplingParams(1.0, seed=seed) for seed in seeds])
    assert batch.seed.tolist() == seeds


def test_copies_differ_in_their_seeds_alone() -> None:
    params = SamplingParams(1.0, 7, 0.5, 2**63 - 2, min_p=0.1, n=3, stop="x")
    copies = params.copies()
    assert [each.seed for each in copies] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert all(replace(each, n=3, seed=params.seed) == params for each in copies)
    assert [each.seed for each in SamplingParams(n=2).copies()] == [None, None]
    assert SamplingParams().copies() == [SamplingParams()]


def test_top_k_of_minus_one_keeps_all_as_in_vllm() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_without_a_seed_only_greedy_decoding_has_noise() -> None:
    assert SamplingParams().seed is None and SamplingParams().noise_seed == 0
    assert SamplingBatch.from_params([SamplingParams(), SamplingParams(1.0, seed=5)]).seed.tolist() == [0, 5]
    with pytest.raises(ValueError, match="seed is None; give a seed, or the sampling of a new Request"):
        SamplingBatch.from_params([SamplingParams(temperature=1.0)])


@pytest.mark.parametrize("stop", [("",), ("a", ""), (3,), ("a", None)])
def test_a_stop_string_that_every_text_or_none_has_is_refused(stop: tuple) -> None:
    with pytest.raises(ValueError, match="stop has .*; give strings that are not empty"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("stop", [3, b"x"])
def test_a_stop_that_is_no_string_and_no_strings_is_refused(stop: object) -> None:
    with pytest.raises(ValueError, match=f"stop is {stop!r}; give a string or a sequence of strings"):
        SamplingParams(stop=stop)  # type: ignore[arg-type]


def test_none_stops_at_no_string_as_in_vllm() -> None:
    assert SamplingParams(stop=None).stop == ()


def test_a_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",) == SamplingParams(stop=["abc"]).stop
    assert SamplingParams().stop == ()
