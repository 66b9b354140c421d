"""What a difference of rewards is worth: intervals, exact paired tests, power.

The unit everywhere is the problem (or the unit a task declares instead). Rewards lie in [0, 1]; where all of
them are 0 or 1 the methods are made for that, otherwise they are the usual ones for means:

| question                 | rewards 0 or 1                               | any rewards in [0, 1]                    |
|--------------------------|----------------------------------------------|------------------------------------------|
| one mean, 95 % interval  | Wilson                                       | Student t, cut at [0, 1]                 |
| paired difference, 95 %  | Newcombe's square-and-add for paired (1)     | Student t on the differences             |
| better than? one-sided p | exact binomial on discordant pairs (McNemar) | sign-flip permutation of the differences |

(1) R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10. Closed form, so the same on every
machine, and antisymmetric.

Guarantees: the binary p-value is exact at any n for independent problems. Does not guarantee: the sign-flip p
is exact only if the two sides are exchangeable under the null, and approximate (good from some 30 problems
on) for equal means alone; no interval here knows of the noise of search or training, which shows only between
seeds (`pooled_difference`). Repeated samples of one problem are not independent: average them first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
PERMUTATIONS = 19_999
PERMUTATION_SEED = 20260527
"""Fixed, so that a verdict is the same whenever it is computed again from the same rewards."""


class Interval(NamedTuple):
    """A mean (or mean difference) over n units with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


class PooledDifference(NamedTuple):
    """One comparison made with several seeds, pooled three ways; `pooled_difference` says what each means."""

    per_seed: tuple[Interval, ...]
    by_problem: Interval
    stratified: Interval
    by_seed: Interval | None


def estimate(rewards: Sequence[float]) -> Interval:
    """A mean reward with its 95 % interval.

    Args:
        rewards: one for each problem, in [0, 1].

    Raises:
        ValueError: no rewards, or one outside [0, 1].
    """
    _check_rewards(rewards)
    n, mean = len(rewards), math.fsum(rewards) / len(rewards)
    if is_binary(rewards) or min(rewards) == max(rewards):
        # Equal fractional rewards have no spread for t. A reward in [0, 1] varies at most as a coin of its
        # mean does, so the coin's interval is on the safe side.
        low, high = _wilson(mean * n, n)
    else:
        low, high = _t_limits(rewards)
    return Interval(n, mean, max(0.0, low), min(1.0, high))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The mean of a - b over the same problems with its 95 % interval.

    Args:
        a: rewards of one side, in [0, 1].
        b: rewards of the other, `b[i]` for the same problem as `a[i]`.

    Raises:
        ValueError: no pairs, unequal lengths, or rewards outside [0, 1].
    """
    _check_pairs(a, b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), math.fsum(differences) / len(differences)
    if is_binary(a) and is_binary(b):
        low, high = _newcombe(a, b)
    elif min(differences) == max(differences):
        # No spread for t. With 97.5 % confidence at most this share of the population differs from what was
        # seen n times out of n, and where it differs, the difference lies in [-1, 1].
        share = 1.0 - (0.5 * (1.0 - CONFIDENCE)) ** (1.0 / n)
        low, high = mean - share * (1.0 + mean), mean + share * (1.0 - mean)
    else:
        low, high = _t_limits(differences)
    return Interval(n, mean, max(-1.0, low), min(1.0, high))


def paired_p_value(candidate: Sequence[float], incumbent: Sequence[float]) -> float:
    """One-sided p-value of "the candidate is no better than the incumbent", paired by problem.

    Args:
        candidate: rewards in [0, 1].
        incumbent: rewards of the same problems in the same order.

    Returns:
        Exact (binomial on the discordant pairs) for rewards 0 or 1, else by sign flips: all of them where
        there are few, else 19,999 drawn with a fixed seed. 1.0 if no pair differs.

    Raises:
        ValueError: no pairs, unequal lengths, or rewards outside [0, 1].
    """
    _check_pairs(candidate, incumbent)
    if is_binary(candidate) and is_binary(incumbent):
        pairs = list(zip(candidate, incumbent, strict=True))
        wins = sum(x > y for x, y in pairs)
        losses = sum(x < y for x, y in pairs)
        return float(discordant_p_value(wins, losses))
    differences = sorted(x - y for x, y in zip(candidate, incumbent, strict=True) if x != y)
    if not differences:
        return 1.0
    if len(differences) == 1:  # scipy wants two; there are two sign flips, one of them as seen
        return 0.5 if differences[0] > 0 else 1.0
    import numpy as np
    from scipy.stats import permutation_test

    # Sorted above: the drawn flips, and so the p-value, do not depend on the order of the problems.
    result = permutation_test(
        (np.asarray(differences),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=500,  # bounds memory: n x 500 numbers at a time
        alternative="greater",
        rng=np.random.default_rng(PERMUTATION_SEED),
    )
    return min(1.0, float(result.pvalue))


def discordant_p_value(wins: int | NDArray[np.int64], losses: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """P(at least `wins` heads in `wins + losses` tosses of a fair coin), exact; 1 for no tosses. Takes arrays
    too, so that simulations of the gate run through the very function that decides.

    Args:
        wins: problems that only the candidate got right.
        losses: problems that only the incumbent got right; same shape.
    """
    import numpy as np
    from scipy.stats import binom

    wins_, losses_ = np.asarray(wins), np.asarray(losses)
    p = np.asarray(binom.sf(wins_ - 1, wins_ + losses_, 0.5), dtype=np.float64)
    return np.where(wins_ + losses_ == 0, 1.0, p)


def minimum_detectable_difference(n: int, discordance: float, alpha: float, power: float = 0.8) -> float | None:
    """The smallest true difference that the exact paired test finds with the given power.

    Args:
        n: problems in the comparison.
        discordance: share of problems on which the sides differ; raised to the difference if it is smaller.
        alpha: one-sided level of the test.
        power: probability of finding it.

    Returns:
        A difference in (0, 1], to 1e-4, by the exact power; None if so few problems can show none at all.

    Raises:
        ValueError: n < 1, or a probability outside its range.
    """
    if n < 1 or not 0.0 <= discordance <= 1.0 or not 0.0 < alpha < 1.0 or not 0.0 < power < 1.0:
        raise ValueError(f"needs n >= 1 and probabilities, got {n=}, {discordance=}, {alpha=}, {power=}")
    import numpy as np
    from scipy.stats import binom

    tosses = np.arange(n + 1)
    # Fewest wins among m discordant pairs that reach alpha: P(wins >= k) <= alpha <=> k > isf(alpha).
    critical = binom.isf(alpha, tosses, 0.5) + 1

    def found(difference: float) -> float:
        differing = max(discordance, difference)
        win = 0.5 * (1.0 + difference / differing)
        return float(binom.pmf(tosses, n, differing) @ binom.sf(critical - 1, tosses, win))

    if found(1.0) < power:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


def minimum_detectable_mean(n: int, deviation: float, alpha: float, power: float = 0.8) -> float:
    """As `minimum_detectable_difference` for rewards that are not 0 or 1, by the normal approximation.

    Args:
        n: problems in the comparison.
        deviation: standard deviation of the paired differences.
        alpha: one-sided level of the test.
        power: probability of finding it.
    """
    from scipy.stats import norm

    return float((norm.isf(alpha) + norm.ppf(power)) * deviation / math.sqrt(n))


def pooled_difference(
    seeds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> PooledDifference:
    """Pool a comparison that was made once per seed on the same problems.

    Args:
        seeds: for each seed (rewards of a, rewards of b), by problem id, all over the same problems.

    Returns:
        `by_problem`: a problem's differences averaged over the seeds, then t over the problems. The one to
            quote: a problem that occurs in every seed counts once, so that it is not taken for replication.
            It speaks of these runs on more problems of the kind.
        `stratified`: the seeds as independent strata. Too narrow if a problem favours the same side in
            every seed (it usually does); given for comparison.
        `by_seed`: t over the seeds' mean differences, None for one seed. Speaks of more runs, and is
            wide for few seeds (3 seeds: 4.3 standard errors a side).
        `per_seed`: each seed alone.

    Raises:
        ValueError: no seeds, or mappings over different problems.
    """
    if not seeds:
        raise ValueError("pooling needs at least one seed")
    ids = list(seeds[0][0])
    for a, b in seeds:
        if a.keys() != set(ids) or b.keys() != set(ids):
            raise ValueError("pooling needs the same problems on both sides of every seed")
    columns = [([a[i] for i in ids], [b[i] for i in ids]) for a, b in seeds]
    per_seed = tuple(paired_difference(a, b) for a, b in columns)
    pooled_mean = math.fsum(interval.mean for interval in per_seed) / len(per_seed)
    if len(seeds) == 1:
        return PooledDifference(per_seed, per_seed[0], per_seed[0], None)
    a_mean = [math.fsum(row) / len(seeds) for row in zip(*(a for a, _ in columns), strict=True)]
    b_mean = [math.fsum(row) / len(seeds) for row in zip(*(b for _, b in columns), strict=True)]
    by_problem = paired_difference(a_mean, b_mean)
    # Half-widths of independent estimates add in squares; low and high apart, as the intervals are lopsided.
    down = math.hypot(*(interval.mean - interval.low for interval in per_seed)) / len(per_seed)
    up = math.hypot(*(interval.high - interval.mean for interval in per_seed)) / len(per_seed)
    pairs = len(ids) * len(seeds)
    stratified = Interval(pairs, pooled_mean, max(-1.0, pooled_mean - down), min(1.0, pooled_mean + up))
    low, high = _t_limits([interval.mean for interval in per_seed])
    by_seed = Interval(len(per_seed), pooled_mean, max(-1.0, low), min(1.0, high))
    return PooledDifference(per_seed, by_problem, stratified, by_seed)


def is_binary(rewards: Sequence[float]) -> bool:
    """True if every reward is 0 or 1."""
    return all(reward in (0.0, 1.0) for reward in rewards)


def _check_rewards(rewards: Sequence[float]) -> None:
    if not rewards:
        raise ValueError("statistics of no rewards")
    if not all(0.0 <= reward <= 1.0 for reward in rewards):
        raise ValueError("a reward lies outside [0, 1]")


def _check_pairs(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b):
        raise ValueError(f"pairs need equal lengths, got {len(a)} and {len(b)}")
    _check_rewards(a)
    _check_rewards(b)


def _wilson(right: float, n: int) -> tuple[float, float]:
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(right, n, alpha=1.0 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def _t_limits(values: Sequence[float]) -> tuple[float, float]:
    """mean -/+ t * standard error."""
    import statistics

    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    width = float(t.ppf(0.5 * (1.0 + CONFIDENCE), len(values) - 1))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean - width * error, mean + width * error


def _newcombe(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Limits of the paired difference of two proportions (Newcombe 1998, method 10)."""
    n = len(a)
    pairs = list(zip(a, b, strict=True))
    both = sum(x > 0 and y > 0 for x, y in pairs)
    only_a = sum(x > 0 and y == 0 for x, y in pairs)
    only_b = sum(x == 0 and y > 0 for x, y in pairs)
    neither = n - both - only_a - only_b
    a_right, b_right = both + only_a, both + only_b
    a_low, a_high = _wilson(a_right, n)
    b_low, b_high = _wilson(b_right, n)
    a_mean, b_mean = a_right / n, b_right / n
    # Correlation of the two sides, shrunk towards 0 where it is positive (a continuity correction).
    cross = both * neither - only_a * only_b
    shrunk = max(0.0, cross - 0.5 * n) if cross > 0 else float(cross)
    scale = math.sqrt(a_right * (n - a_right) * b_right * (n - b_right))
    phi = shrunk / scale if scale else 0.0

    def width(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2.0 * phi * x * y + y * y))

    difference = a_mean - b_mean
    return (
        difference - width(a_mean - a_low, b_high - b_mean),
        difference + width(a_high - a_mean, b_mean - b_low),
    )
