"""The gate: a candidate replaces the incumbent only if it is better beyond noise.

Both sides are scored on the same problems, and a one-sided paired test asks whether the candidate is better.
The level `alpha` (0.05) is for the whole run: a run may open the gate up to K times, and each gate spends
alpha / K.

Why equal shares of a plain union bound: it needs nothing of how candidates come about, neither their number
in advance of the K-th nor their independence. A run's last gates are as worth winning as its first, so no
schedule that favours early ones.

Guarantees, if every gate draws problems that nothing before it has seen (`fresh_dev`): whatever the run
learned from earlier gates, the problems of this one are new to it, so a candidate no better than the
incumbent passes it with probability at most alpha / K; over the run, the chance that any such candidate
passes is at most alpha.

If a block is fresh in part, so is the claim.

Does not guarantee, if dev problems are used again (a fixed dev split): then a candidate may have been chosen
because of how its relatives did on these very problems, and the bound holds only for candidates fixed
beforehand. The overfit is limited by how little a gate tells, but not by alpha. The sealed test, scored once,
is what counts there. Nor does passing say how large the gain is (the estimate of a winner is biased upward),
nor failing that there is none: `minimum_detectable` says what the gate could have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verifiers.statistics import (
    is_binary,
    minimum_detectable_difference,
    minimum_detectable_mean,
    paired_difference,
    paired_p_value,
)


class GateError(ValueError):
    """Raised when two sides cannot be compared: different problems, or a gate beyond the schedule."""


@dataclass(frozen=True)
class GateSchedule:
    """How a run spends its one-sided `alpha` over at most `gates` gates: alpha / gates at each.

    Raises:
        GateError: no gates, or alpha not in (0, 0.5).
    """

    alpha: float = 0.05
    gates: int = 1

    def __post_init__(self) -> None:
        if self.gates < 1:
            raise GateError(f"a schedule needs at least 1 gate, got {self.gates}")
        if not 0.0 < self.alpha < 0.5:
            raise GateError(f"alpha must lie between 0 and 0.5, got {self.alpha}")

    def alpha_at(self, gate_number: int) -> float:
        """The level of gate `gate_number`, counted from 1.

        Raises:
            GateError: the schedule has no such gate.
        """
        if not 1 <= gate_number <= self.gates:
            raise GateError(f"gate {gate_number} of a schedule of {self.gates}: its alpha is spent")
        return self.alpha / self.gates


@dataclass(frozen=True)
class Verdict:
    """What a gate said, with all that is needed to check it.

    `difference` is candidate minus incumbent with its two-sided 95 % interval [`low`, `high`] (the test is
    one-sided at `alpha`, so a rejected candidate's interval may well lie above 0). `discordance` is the share
    of the `n` problems whose rewards differ. `minimum_detectable` is the smallest true difference that this
    gate would have found four times in five, None if so few problems could show none.
    """

    accepted: bool
    p_value: float
    alpha: float
    difference: float
    low: float
    high: float
    n: int
    discordance: float
    minimum_detectable: float | None
    text: str


def judge(
    candidate: Mapping[str, float],
    incumbent: Mapping[str, float],
    schedule: GateSchedule,
    gate_number: int,
) -> Verdict:
    """Decide whether the candidate replaces the incumbent.

    Args:
        candidate: reward in [0, 1] by problem (or by the unit of pairing that the task declares).
        incumbent: rewards of the same units.
        schedule: the run's alpha and number of gates, fixed before its first gate.
        gate_number: which of them this is, from 1; each number is used once.

    Returns:
        The verdict, the same for any order of the problems. Accepted if and only if p <= alpha / gates.

    Raises:
        GateError: the two sides have different problems or none, or there is no such gate.
        ValueError: a reward lies outside [0, 1].
    """
    alpha = schedule.alpha_at(gate_number)
    _check_same_problems(candidate, incumbent)
    ids = sorted(candidate)
    ours, theirs = [candidate[i] for i in ids], [incumbent[i] for i in ids]
    interval = paired_difference(ours, theirs)
    p_value = paired_p_value(ours, theirs)
    discordance = sum(x != y for x, y in zip(ours, theirs, strict=True)) / len(ids)
    accepted = p_value <= alpha
    detectable: float | None
    if is_binary(ours) and is_binary(theirs):
        detectable = minimum_detectable_difference(len(ids), discordance, alpha)
    else:
        detectable = _detectable_mean(ours, theirs, alpha)
    shown = (
        "too few problems to find any difference"
        if detectable is None
        else f"would find {detectable:.3f} four times in five"
    )
    text = (
        f"gate {gate_number} of {schedule.gates}: {'accepted' if accepted else 'rejected'}, "
        f"{interval.mean:+.3f} (95 % interval {interval.low:+.3f} to {interval.high:+.3f}) "
        f"on n = {len(ids)} problems, "
        f"p = {_short(p_value)} against alpha {_short(alpha)}; {shown}"
    )
    return Verdict(
        accepted=accepted,
        p_value=p_value,
        alpha=alpha,
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        n=len(ids),
        discordance=discordance,
        minimum_detectable=detectable,
        text=text,
    )


def _check_same_problems(candidate: Mapping[str, float], incumbent: Mapping[str, float]) -> None:
    if not candidate:
        raise GateError("the gate got no rewards; score both sides on a dev block first")
    if candidate.keys() != incumbent.keys():
        only_one = sorted(candidate.keys() ^ incumbent.keys())
        raise GateError(
            f"candidate ({len(candidate)}) and incumbent ({len(incumbent)}) were scored on different "
            f"problems: {len(only_one)} have one side only, such as {only_one[0]!r}; score both on the same dev block"
        )


def _detectable_mean(ours: list[float], theirs: list[float], alpha: float) -> float | None:
    """By the spread of the differences; None if there is no spread to go by."""
    import statistics

    differences = [x - y for x, y in zip(ours, theirs, strict=True)]
    if len(differences) < 2 or min(differences) == max(differences):
        return None
    return min(1.0, minimum_detectable_mean(len(differences), statistics.stdev(differences), alpha))


def _short(probability: float) -> str:
    return f"{probability:.4f}" if probability >= 1e-4 else f"{probability:.1e}"
