"""Which JSON values are an integer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from tasks.answers import as_integer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("answer", "number"),
    [(28, 28), (-28, -28), ("28", 28), (" +28\n", 28), ("-28", -28), ("028", 28), (28.0, 28), ("-0", 0)],
)
def test_accepted(answer: JsonValue, number: int) -> None:
    assert as_integer(answer) == number


@pytest.mark.parametrize(
    "answer",
    [
        None,
        True,
        False,
        28.5,
        float("nan"),
        float("inf"),
        [28],
        {"answer": 28},
        "",
        " ",
        "28.",
        "28.0",
        "2 8",
        "1,280",
        "--28",
        "+-28",
        "= 28",
        "28 or 29",
        "twenty-eight",
        "２８",
        "0x1c",
        "2e1",
        "9" * 101,
        "1" * 10**6,
        10**200,
    ],
)
def test_refused(answer: JsonValue) -> None:
    assert as_integer(answer) is None


@given(JSON)
def test_any_json_is_read_without_an_error(answer: JsonValue) -> None:
    number = as_integer(answer)
    assert number is None or type(number) is int


@given(st.integers(-(10**30), 10**30), st.sampled_from(["", " ", "\t\n"]))
def test_every_integer_reads_back(number: int, blank: str) -> None:
    assert as_integer(f"{blank}{number}{blank}") == number == as_integer(number)
