"""Intervals and tests against known values, their symmetries, and their coverage."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifiers.statistics import (
    Interval,
    discordant_p_value,
    estimate,
    minimum_detectable_difference,
    minimum_detectable_mean,
    paired_difference,
    paired_p_value,
    pooled_difference,
)

BINARY_PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)
REWARD = st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 3))
ANY_PAIRS = st.lists(st.tuples(REWARD, REWARD), min_size=1, max_size=40)


def split(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def counts(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[float], list[float]]:
    return split([(1.0, 1.0)] * both + [(1.0, 0.0)] * only_a + [(0.0, 1.0)] * only_b + [(0.0, 0.0)] * neither)


def test_wilson_against_the_textbook() -> None:
    interval = estimate([1.0] * 81 + [0.0] * 182)  # Newcombe 1998, table I: 81/263, score method
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert estimate([0.0] * 20) == pytest.approx((20, 0.0, 0.0, 0.1611), abs=5e-5)


def test_t_interval_of_fractional_rewards() -> None:
    interval = estimate([0.2, 0.4, 0.6])
    assert interval.mean == pytest.approx(0.4)
    assert interval.high == pytest.approx(0.4 + 4.302653 * 0.2 / math.sqrt(3))
    assert interval.low == 0.0, "cut at 0"
    same = estimate([0.5] * 30)
    assert same.low < 0.5 < same.high, "no spread is not certainty"


@given(st.lists(REWARD, min_size=1, max_size=50))
def test_an_interval_holds_its_mean_and_stays_in_bounds(rewards: list[float]) -> None:
    interval = estimate(rewards)
    assert 0.0 <= interval.low <= interval.mean + 1e-9
    assert interval.mean <= interval.high + 1e-9 <= 1.0 + 1e-9


@given(BINARY_PAIRS | ANY_PAIRS, st.randoms(use_true_random=False))
def test_differences_are_antisymmetric_bounded_and_blind_to_order(
    pairs: list[tuple[float, float]], shuffler: random.Random
) -> None:
    a, b = split(pairs)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-9)
    assert -1.0 <= one.low <= one.mean + 1e-9
    assert one.mean <= one.high + 1e-9 <= 1.0 + 1e-9
    shuffler.shuffle(pairs)
    assert paired_difference(*split(pairs)) == pytest.approx(one, abs=1e-9)


def test_newcombe_tightens_with_agreement_and_ignores_none() -> None:
    agreeing = paired_difference(*counts(50, 10, 2, 38))
    crossing = paired_difference(*counts(25, 35, 27, 13))
    assert agreeing.mean == pytest.approx(crossing.mean)
    assert agreeing.high - agreeing.low < crossing.high - crossing.low
    identical = paired_difference(*counts(100, 0, 0, 156))
    assert identical.low < 0.0 < identical.high, "no difference seen is not certainty"


def test_newcombe_covers_the_truth() -> None:
    """95 % nominal, held to within a Monte-Carlo error of 0.6 points and the method's own about 1."""
    rng = np.random.default_rng(5)
    for n, (both, only_a, only_b) in itertools.product(
        (60, 256), [(0.3, 0.05, 0.02), (0.2, 0.3, 0.1), (0.7, 0.1, 0.1)]
    ):
        tables = rng.multinomial(n, [both, only_a, only_b, 1 - both - only_a - only_b], size=1200)
        distinct, times = np.unique(tables, axis=0, return_counts=True)
        covered = 0
        for table, repeats in zip(distinct, times, strict=True):
            interval = paired_difference(*counts(*(int(x) for x in table)))
            covered += int(repeats) * (interval.low <= only_a - only_b <= interval.high)
        assert covered / 1200 >= 0.93, (n, both, only_a, only_b)


def test_binary_p_is_the_exact_binomial_tail() -> None:
    for wins, losses in [(0, 0), (1, 0), (5, 0), (9, 3), (3, 9), (30, 12)]:
        tosses = wins + losses
        exact = sum(math.comb(tosses, k) for k in range(wins, tosses + 1)) / 2**tosses
        assert paired_p_value(*counts(20, wins, losses, 20)) == pytest.approx(exact)
        assert float(discordant_p_value(wins, losses)) == pytest.approx(exact)
    grid = discordant_p_value(np.array([[0, 5], [9, 3]]), np.array([[0, 0], [3, 9]]))
    assert grid.shape == (2, 2)
    assert grid[0, 0] == 1.0
    assert grid[0, 1] == pytest.approx(1 / 32)


@given(BINARY_PAIRS, st.randoms(use_true_random=False))
def test_p_values_are_probabilities_and_blind_to_order(
    pairs: list[tuple[float, float]], shuffler: random.Random
) -> None:
    a, b = split(pairs)
    p, q = paired_p_value(a, b), paired_p_value(b, a)
    assert 0.0 < p <= 1.0
    assert p + q >= 1.0 - 1e-12, "both tails hold the tie"
    assert paired_p_value(a, a) == 1.0
    shuffler.shuffle(pairs)
    assert paired_p_value(*split(pairs)) == p


@settings(max_examples=15, deadline=None)
@given(ANY_PAIRS, st.randoms(use_true_random=False))
def test_sign_flip_p_is_a_probability_and_blind_to_order(
    pairs: list[tuple[float, float]], shuffler: random.Random
) -> None:
    a, b = split(pairs)
    p = paired_p_value(a, b)
    assert 0.0 < p <= 1.0
    assert p + paired_p_value(b, a) >= 0.97
    shuffler.shuffle(pairs)
    assert paired_p_value(*split(pairs)) == p


def test_sign_flips_against_enumeration_and_the_exact_binary_test() -> None:
    a, b = [0.9, 0.4, 0.7, 0.55, 0.6], [0.2, 0.5, 0.3, 0.5, 0.1]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    seen = sum(differences)
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=5)
    ]
    assert paired_p_value(a, b) == pytest.approx(sum(f >= seen - 1e-12 for f in flips) / 32)
    assert paired_p_value([0.5], [0.25]) == 0.5
    assert paired_p_value([0.25, 0.3], [0.5, 0.3]) == 1.0
    binary = counts(0, 12, 4, 0)
    scaled = [0.5 * x for x in binary[0]], [0.5 * x for x in binary[1]]  # the same signs, no longer 0 or 1
    assert paired_p_value(*scaled) == pytest.approx(paired_p_value(*binary), abs=0.01)


def test_minimum_detectable_difference_is_found_by_simulation() -> None:
    n, discordance, alpha = 256, 0.3, 0.05 / 8
    difference = minimum_detectable_difference(n, discordance, alpha)
    assert difference is not None
    rng = np.random.default_rng(3)
    tables = rng.multinomial(
        n, [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance], 20_000
    )
    found = float((discordant_p_value(tables[:, 0], tables[:, 1]) <= alpha).mean())
    assert found == pytest.approx(0.8, abs=0.015)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.001, 0.2))
@settings(max_examples=40, deadline=None)
def test_minimum_detectable_difference_is_a_difference_or_none(n: int, discordance: float, alpha: float) -> None:
    found = minimum_detectable_difference(n, discordance, alpha)
    assert (found is None) == (0.5**n > alpha)
    assert found is None or 0.0 < found <= 1.0


def test_minimum_detectable_shrinks_with_n_and_grows_with_strictness() -> None:
    values = [minimum_detectable_difference(n, 0.3, 0.05) for n in (50, 100, 200, 400)]
    assert values == sorted(values, key=lambda v: -(v or 0))
    assert (minimum_detectable_difference(200, 0.3, 0.005) or 0) > (values[2] or 1)
    assert minimum_detectable_mean(400, 0.5, 0.05) == pytest.approx((1.6449 + 0.8416) * 0.5 / 20, abs=1e-4)


def test_pooling_clusters_by_problem() -> None:
    """The same problems won in every seed: three seeds are no more evidence about problems than one."""
    ids = [str(i) for i in range(200)]
    b = dict.fromkeys(ids, 0.0)
    a = {i: float(int(i) % 5 == 0) for i in ids}
    pooled = pooled_difference([(a, b)] * 3)
    one = paired_difference(list(a.values()), list(b.values()))
    assert pooled.by_problem == one
    assert pooled.stratified.high - pooled.stratified.low < 0.6 * (one.high - one.low)
    assert pooled.by_seed == Interval(3, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))
    assert pooled_difference([(a, b)]).by_seed is None


def test_pooling_speaks_of_seeds_apart() -> None:
    ids = [str(i) for i in range(400)]
    rng = np.random.default_rng(1)
    seeds = []
    for gain in (0.05, 0.15, 0.25):
        b = {i: float(x) for i, x in zip(ids, rng.random(400) < 0.35, strict=True)}
        a = {i: float(x) for i, x in zip(ids, rng.random(400) < 0.35 + gain, strict=True)}
        seeds.append((a, b))
    pooled = pooled_difference(seeds)
    assert [interval.n for interval in pooled.per_seed] == [400, 400, 400]
    assert pooled.by_seed is not None
    for interval in (pooled.by_problem, pooled.stratified, pooled.by_seed):
        assert interval.mean == pytest.approx(np.mean([p.mean for p in pooled.per_seed]))
        assert interval.low < 0.15 < interval.high
    assert pooled.by_seed.high - pooled.by_seed.low > 3 * (pooled.by_problem.high - pooled.by_problem.low)
    swapped = pooled_difference([(b, a) for a, b in seeds])
    assert swapped.by_problem.low == pytest.approx(-pooled.by_problem.high)


def test_mistakes_are_plain_errors() -> None:
    with pytest.raises(ValueError, match="no rewards"):
        estimate([])
    with pytest.raises(ValueError, match="outside"):
        estimate([0.5, float("nan")])
    with pytest.raises(ValueError, match="equal lengths"):
        paired_p_value([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="same problems"):
        pooled_difference([({"a": 1.0}, {"a": 0.0}), ({"b": 1.0}, {"b": 0.0})])
    with pytest.raises(ValueError, match="at least one seed"):
        pooled_difference([])
    with pytest.raises(ValueError, match="probabilities"):
        minimum_detectable_difference(0, 0.3, 0.05)
