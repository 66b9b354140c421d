"""The gate: its verdicts, its errors, and how often it lets a candidate through that is no better."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from verifiers.gate import GateError, GateSchedule, Verdict, judge
from verifiers.statistics import discordant_p_value

RUNS = 10_000
ALPHA = 0.05
FOUR_ERRORS = 4 * (ALPHA * (1 - ALPHA) / RUNS) ** 0.5
"""Four standard errors of the Monte-Carlo rate, 0.0087: exactly alpha would go beyond it once in 30,000 times."""


def sides(both: int, wins: int, losses: int, neither: int) -> tuple[dict[str, float], dict[str, float]]:
    pairs = [(1.0, 1.0)] * both + [(1.0, 0.0)] * wins + [(0.0, 1.0)] * losses + [(0.0, 0.0)] * neither
    return {f"p{i}": a for i, (a, _) in enumerate(pairs)}, {f"p{i}": b for i, (_, b) in enumerate(pairs)}


def accepts(wins: NDArray[np.int64], losses: NDArray[np.int64], schedule: GateSchedule) -> NDArray[np.bool_]:
    """The decision of `judge` for arrays of counts; `test_the_twin_decides_as_the_gate` holds the two together."""
    return discordant_p_value(wins, losses) <= schedule.alpha_at(1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 12))
def test_the_twin_decides_as_the_gate(both: int, wins: int, losses: int, neither: int, gates: int) -> None:
    schedule = GateSchedule(ALPHA, gates)
    verdict = judge(*sides(both, wins, losses, neither), schedule, gates)
    assert verdict.accepted == bool(accepts(np.array(wins), np.array(losses), schedule))
    assert verdict.accepted == (verdict.p_value <= ALPHA / gates)


@pytest.mark.parametrize("gates", [1, 4, 10])
@pytest.mark.parametrize("accuracy", [0.05, 0.365, 0.6, 0.95])
def test_false_acceptance_of_identical_candidates_stays_under_alpha(accuracy: float, gates: int) -> None:
    """10,000 runs of K gates, 256 fresh problems each; both sides answer each problem alike well, independently."""
    rng = np.random.default_rng([gates, int(1000 * accuracy)])
    differ = accuracy * (1 - accuracy)
    tables = rng.multinomial(256, [differ, differ, 1 - 2 * differ], size=(RUNS, gates))
    accepted = accepts(tables[..., 0], tables[..., 1], GateSchedule(ALPHA, gates))
    assert float(accepted.any(axis=1).mean()) <= ALPHA + FOUR_ERRORS


def test_false_acceptance_with_problems_of_every_difficulty() -> None:
    """As above, problem by problem: each has its own chance to be answered, from hopeless to certain."""
    rng = np.random.default_rng(11)
    gates, problems, false = 6, 64, np.zeros(RUNS, dtype=bool)
    for _ in range(gates):
        chance = rng.beta(0.4, 0.6, size=(RUNS, problems)).astype(np.float32)
        candidate = rng.random((RUNS, problems), dtype=np.float32) < chance
        incumbent = rng.random((RUNS, problems), dtype=np.float32) < chance
        wins, losses = (candidate & ~incumbent).sum(axis=1), (incumbent & ~candidate).sum(axis=1)
        false |= accepts(wins, losses, GateSchedule(ALPHA, gates))
    assert float(false.mean()) <= ALPHA + FOUR_ERRORS


def test_false_acceptance_when_the_run_adapts_to_earlier_gates() -> None:
    """The next candidate depends on how the last block went, yet is no better than the incumbent on a fresh one."""
    rng = np.random.default_rng(12)
    gates, false = 8, np.zeros(RUNS, dtype=bool)
    chance = np.full(RUNS, 0.4)
    for _ in range(gates):
        differ = chance * (1 - chance)
        wins = rng.binomial(256, differ)
        losses = rng.binomial(256 - wins, differ / (1 - differ))
        false |= accepts(wins, losses, GateSchedule(ALPHA, gates))
        lucky = wins > losses  # go where the last block looked good: another candidate, equally worthless
        chance = np.where(lucky, 0.5, 0.3)
    assert float(false.mean()) <= ALPHA + FOUR_ERRORS


def test_power_is_what_the_verdict_promises() -> None:
    """A candidate better by the stated minimum passes four times in five, the pilot's gain nearly always."""
    schedule = GateSchedule(ALPHA, 8)
    minimum = judge(*sides(60, 45, 31, 120), schedule, 1).minimum_detectable
    assert minimum is not None
    rng = np.random.default_rng(2)
    differ = (45 + 31) / 256
    tables = rng.multinomial(256, [(differ + minimum) / 2, (differ - minimum) / 2, 1 - differ], size=RUNS)
    assert float(accepts(tables[:, 0], tables[:, 1], schedule).mean()) == pytest.approx(0.8, abs=0.02)
    pilot = rng.multinomial(256, [0.275, 0.10, 0.625], size=RUNS)  # 0.365 -> 0.54
    assert float(accepts(pilot[:, 0], pilot[:, 1], schedule).mean()) > 0.95


def test_a_verdict_tells_all_in_one_line() -> None:
    verdict = judge(*sides(80, 60, 15, 101), GateSchedule(ALPHA, 8), 3)
    assert verdict.accepted
    assert verdict.n == 256
    assert verdict.difference == pytest.approx(45 / 256)
    assert verdict.discordance == pytest.approx(75 / 256)
    assert verdict.low < verdict.difference < verdict.high
    assert verdict.text == (
        "gate 3 of 8: accepted, +0.176 (95 % interval +0.112 to +0.237) on n = 256 problems, "
        "p = 7.9e-08 against alpha 0.0063; would find 0.115 four times in five"
    )


def test_a_tie_is_rejected_and_says_what_it_could_have_found() -> None:
    verdict = judge(*sides(100, 0, 0, 156), GateSchedule(ALPHA, 1), 1)
    assert (verdict.accepted, verdict.p_value, verdict.difference, verdict.discordance) == (False, 1.0, 0.0, 0.0)
    assert verdict.minimum_detectable is not None
    assert judge(*sides(1, 1, 0, 1), GateSchedule(ALPHA, 1), 1).minimum_detectable is None
    assert "too few problems" in judge(*sides(1, 1, 0, 1), GateSchedule(ALPHA, 1), 1).text


def test_fractional_rewards_go_through_the_same_gate() -> None:
    rng = random.Random(4)
    incumbent = {f"p{i}": rng.random() * 0.6 for i in range(120)}
    better = {i: min(1.0, r + 0.1 + 0.2 * rng.random()) for i, r in incumbent.items()}
    verdict = judge(better, incumbent, GateSchedule(ALPHA, 4), 2)
    assert verdict.accepted
    assert verdict.minimum_detectable is not None
    assert not judge(incumbent, better, GateSchedule(ALPHA, 4), 2).accepted
    assert judge(incumbent, incumbent, GateSchedule(ALPHA, 4), 2).minimum_detectable is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.randoms(use_true_random=False))
def test_the_order_of_problems_does_not_matter(both: int, wins: int, losses: int, shuffler: random.Random) -> None:
    candidate, incumbent = sides(both, wins, losses, 5)
    ids = list(candidate)
    shuffler.shuffle(ids)
    shuffled: Verdict = judge({i: candidate[i] for i in ids}, incumbent, GateSchedule(), 1)
    assert shuffled == judge(candidate, incumbent, GateSchedule(), 1)


def test_what_cannot_be_compared_is_refused() -> None:
    schedule = GateSchedule(ALPHA, 2)
    with pytest.raises(GateError, match=r"candidate \(2\) and incumbent \(1\) .* such as 'b'"):
        judge({"a": 1.0, "b": 0.0}, {"a": 1.0}, schedule, 1)
    with pytest.raises(GateError, match="no rewards"):
        judge({}, {}, schedule, 1)
    for number in (0, 3):
        with pytest.raises(GateError, match=f"gate {number} of a schedule of 2"):
            judge({"a": 1.0}, {"a": 0.0}, schedule, number)
    with pytest.raises(GateError, match="at least 1 gate"):
        GateSchedule(ALPHA, 0)
    with pytest.raises(GateError, match="alpha must lie"):
        GateSchedule(0.5, 2)
    with pytest.raises(ValueError, match="outside"):
        judge({"a": 2.0}, {"a": 0.0}, schedule, 1)
