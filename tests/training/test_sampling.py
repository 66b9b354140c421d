"""Draws follow the distribution, depend on (seed, step) alone, and completions end where they should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.model import RequestError, Sampling
from training.sampling import check, cut, draw, uniform


def grid(n: int) -> list[float]:
    return [(i + 0.5) / n for i in range(n)]


def shares(tokens: list[int], size: int) -> list[float]:
    return [tokens.count(token) / len(tokens) for token in range(size)]


def test_uniform_is_a_function_of_seed_and_step() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    drawn = [uniform(seed, step) for seed in range(40) for step in range(40)]
    assert len(set(drawn)) == len(drawn)
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.03
    assert all(0 <= u < 1 for u in [uniform(-1, 0), uniform(2**200, 5)])


def test_draws_have_the_softmax_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for temperature in (1.0, 0.5):
        expected = torch.softmax(logits_V / temperature, -1).tolist()
        tokens = draw(logits_V, Sampling(temperature=temperature), grid(4000))
        assert shares(tokens, 4) == pytest.approx(expected, abs=1e-3)


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits_V = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    assert set(draw(logits_V, Sampling(temperature=1, top_p=0.5), grid(100))) == {1}
    tokens = draw(logits_V, Sampling(temperature=1, top_p=0.6), grid(800))
    assert shares(tokens, 4) == pytest.approx([0, 0.625, 0.375, 0], abs=2e-3)


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert draw(torch.tensor([1.0, 3.0, 2.0]), Sampling(), [0.1, 0.9]) == [1, 1]


@given(
    st.lists(st.floats(-60, 60) | st.just(-math.inf), min_size=2, max_size=30),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.05, 3),
    st.floats(0.01, 1),
)
def test_only_possible_tokens_are_drawn(logits: list[float], u: float, temperature: float, top_p: float) -> None:
    logits_V = torch.tensor([0.0, *logits])
    (token,) = draw(logits_V, Sampling(temperature=temperature, top_p=top_p), [u])
    assert logits_V[token] > -math.inf


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(temperature=-1), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_p=1.5), "top_p"),
        (Sampling(stop=("\n", "")), "stop"),
    ],
)
def test_meaningless_settings_are_refused(sampling: Sampling, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        check(sampling)


def test_cut_at_the_earliest_stop() -> None:
    assert cut("12 apples\nQ:", ("Q:", "\n", "zz")) == "12 apples"
    assert cut("12 apples", ("\n",)) is None
    assert cut("\n", ("\n",)) == ""
