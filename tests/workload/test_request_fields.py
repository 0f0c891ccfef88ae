"""Fields that are not honoured: which values of them may be ignored, and how the others are refused."""

from __future__ import annotations

import pytest

from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL, FieldError, check_fields, refusal


@pytest.mark.parametrize("name", NEUTRAL)
def test_only_a_value_that_says_that_a_field_is_not_wanted_is_ignored(name: str) -> None:
    assert [refusal(name, value) for value in (None, *NEUTRAL[name])] == [None] * (1 + len(NEUTRAL[name]))
    assert str(refusal(name, "something else")).startswith(f"{name} is not supported by this server: leave it out")


def test_a_refusal_names_the_field_its_place_and_what_may_stand_there() -> None:
    assert refusal("response_format", {"type": "json_object"}) == (
        'response_format is not supported by this server: leave it out, or set it to {"type": "text"}'
    )
    assert refusal("guided_json", {}) == "guided_json is not supported by this server: leave it out"
    assert refusal("tools", [3], {"tools": ([], "")}, where="messages[0].", by="files") == (
        'messages[0].tools is not supported by files: leave it out, or set it to [] or ""'
    )


def test_what_is_unknown_is_not_refused() -> None:
    assert not HARMLESS & NEUTRAL.keys()
    assert {refusal(name, "x") for name in (*HARMLESS, "my_column", "temperature")} == {None}


@pytest.mark.parametrize(
    ("name", "value"),
    [("frequency_penalty", False), ("echo", 0), ("best_of", True), ("repetition_penalty", True), ("store", True)],
)
def test_false_is_no_zero_and_one_is_not_true(name: str, value: object) -> None:
    assert str(refusal(name, value)).startswith(f"{name} is not supported")


def test_a_float_is_as_neutral_as_an_integer() -> None:
    assert [refusal("frequency_penalty", 0.0), refusal("best_of", 1.0), refusal("store", False)] == [None] * 3


@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"tools": [3]}, "a.tools", "unsupported_field", "a.tools is not supported by files"),
        ({"temprature": 1}, "a.temprature", "unknown_field", "did you mean 'temperature'?"),
        ({"x" * 200: 1}, "a." + "x" * 98, "unknown_field", "unknown field 'a.xxx"),
    ],
)
def test_what_is_refused_has_its_place(fields: dict[str, object], param: str, code: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        check_fields({"n": 1, **fields}, ("n", "temperature"), where="a.", by="files")
    assert (caught.value.param, caught.value.code) == (param, code) and says in str(caught.value)
