"""How figures and findings are worded, once for the terminal, the report and the Prefect artifacts.

A score never stands without its interval and n, and a difference whose interval holds 0 is never called better.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from agents.archive import Estimate, Lever
from flows.records import ARMS, KILLED, DecisionView, Difference, GenerationView, RunView, TestArm, VerdictView
from flows.settings import EVAL_PROFILE, SandboxKind
from flows.state.tables import RunStatus

LEVERS: Mapping[str, str] = {
    Lever.FIRST: "first scaffold",
    Lever.HARNESS: "harness",
    Lever.WEIGHTS: "weights",
    Lever.STOP: "stop",
}

ARM_NAMES: Mapping[str, str] = {arm: name.short for arm, name in ARMS.items()}
"""Short names of the arms of the sealed test."""

UNCONFINED = "SANDBOX OFF: scaffold code ran unconfined on this machine, with the user's own rights."
"""Said loudly wherever a Run with `--sandbox none` is shown."""


def percent(value: float) -> str:
    """0.5425 -> "54.2 %"."""
    return f"{100 * value:.1f} %"


def percent_points(score: float) -> str:
    """A Baseline's score, which is in percent already: 70.1 -> "70.1", 0.55 -> "0.55"."""
    return f"{score:.1f}" if score >= 1 else f"{score:.2g}"


def points(value: float) -> str:
    """0.195 -> "+19.5": percentage points with their sign."""
    return f"{100 * value:+.1f}"


def bounds(low: float, high: float) -> str:
    """An interval of scores in percent: "[47.1, 61.0]"."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def signed_bounds(low: float, high: float) -> str:
    """An interval of differences in points: "[+12.0, +27.0]"."""
    return f"[{points(low)}, {points(high)}]"


def score(estimate: Estimate | TestArm) -> str:
    """ "54.2 % [47.1, 61.0]"."""
    return f"{percent(estimate.mean)} {bounds(estimate.low, estimate.high)}"


def dev_score(generation: GenerationView) -> str:
    """A Generation's dev score, or how far it has come."""
    if generation.dev is not None:
        return score(generation.dev)
    done, total = sum(b.done for b in generation.blocks), sum(b.episodes for b in generation.blocks)
    return f"{done}/{total} episodes" if total else "-"


def duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def count(number: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{number:,}"


def accepted(generation: GenerationView) -> str:
    """What the gate made of a Generation."""
    if generation.accepted is None:
        return "open"
    if generation.accepted:
        return "first" if generation.lever == Lever.FIRST else "accepted"
    return "rejected"


def lever(generation: GenerationView) -> str:
    """ "weights (grpo)", "harness"."""
    name = LEVERS.get(generation.lever, generation.lever)
    return f"{name} ({generation.objective})" if generation.objective else name


def verdict(found: VerdictView) -> str:
    """The gate's figures in one line."""
    if found.n == 0:
        return f"gate {found.gate}: {found.text}"
    return (
        f"gate {found.gate}: {points(found.difference)} points {signed_bounds(found.low, found.high)}, n = {found.n}, "
        f"p = {found.p_value:.3g}, alpha = {found.alpha:.3g}, "
        f"minimum detectable {detectable(found)}: {'accepted' if found.accepted else 'rejected'}"
    )


def detectable(found: VerdictView) -> str:
    """The minimum detectable difference in points, or "none" for a gate of too few problems to find any."""
    return "none" if found.minimum_detectable >= 1 else points(found.minimum_detectable)


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def headline(view: RunView) -> tuple[str, ...]:
    """The result in a few plain sentences; honest about what is unfinished and what is noise."""
    winner, initial = view.arm("winner"), view.arm("initial")
    if winner is None or initial is None:
        return (_unfinished(view),)
    sentences = [
        f"On {winner.n} sealed test problems the winner (generation {winner.generation}) scores {score(winner)}; "
        f"the first scaffold scored {score(initial)}."
    ]
    by_pair = {(d.left, d.right): d for d in view.test_differences}
    harness = by_pair.get(("harness_only", "initial"))
    weights = by_pair.get(("winner", "harness_only"))
    if harness is not None:
        sentences.append(
            "No harness candidate did better on dev than the first scaffold, so H is the first scaffold."
            if harness.same
            else f"The best harness-only candidate (H) against the first scaffold: {_finding(harness)}."
        )
    if weights is not None:
        made = view.generation(winner.generation)
        if weights.same:
            sentences.append("The gate kept H: no weight update was better beyond noise, so the winner is H itself.")
        elif made is not None and made.adapter_id is None:
            sentences.append(
                f"No weight update was accepted, so the winner has the base weights; against H: {_finding(weights)}."
            )
        else:
            sentences.append(f"The winner with updated weights (W+H) against H: {_finding(weights)}.")
    return tuple(sentences)


def _finding(found: Difference) -> str:
    word = ("better" if found.mean > 0 else "worse") if found.beyond_noise else "a difference not beyond noise"
    return f"{points(found.mean)} points, 95 % interval {signed_bounds(found.low, found.high)}, {word}"


def _unfinished(view: RunView) -> str:
    if view.profile == EVAL_PROFILE or (view.evaluations and not view.generations):
        return "An evaluation of one scaffold; no search and no sealed test."
    if view.status in (RunStatus.FAILED, KILLED):
        how = "failed" if view.status == RunStatus.FAILED else "was killed"
        return f"This run {how} before its sealed test was scored; `sia resume {view.id}` goes on from there."
    return f"The sealed test is not scored yet; the run is {view.status}."


def way_on(view: RunView) -> str | None:
    """What to do about a Run that stopped before its end; None for one that works or is done."""
    if view.status not in (RunStatus.INTERRUPTED, RunStatus.FAILED, KILLED):
        return None
    if view.profile == EVAL_PROFILE:
        return "An evaluation cannot be resumed; do it again with `sia eval`."
    return f"Go on with: sia resume {view.id}"


def standing(view: RunView) -> str:
    """Where a Run stands, in a word: one whose test is scored and that has nothing open is finished, even in the last
    second while its process is still tidying up."""
    if view.status == RunStatus.RUNNING and view.arm("winner") is not None and not view.open_work:
        return RunStatus.FINISHED.capitalize()
    return view.status.capitalize()


def decision_title(found: DecisionView) -> str:
    """ "After generation 3: harness"."""
    return f"After generation {found.after_generation}: {LEVERS.get(found.lever, found.lever)}"


def sandbox_line(kind: SandboxKind) -> str:
    """One line about how scaffold code was confined."""
    if kind is SandboxKind.NONE:
        return UNCONFINED
    return f"Sandbox: {kind.value}; scaffold code ran without network, host files or secrets."


def visible(text: str, lines: bool = True) -> str:
    """Untrusted text made safe to look at: what would move the cursor, recolour the screen or reorder the line is
    shown as an escape instead. Line ends and tabs stay, unless `lines` is False."""
    return "".join(
        character if character.isprintable() or (lines and character in "\n\t") else _escaped(character)
        for character in (text.replace("\r\n", "\n") if lines else text)
    )


def _escaped(character: str) -> str:
    """Spaces of other widths stay as a space; controls, bidirectional marks, surrogates and private use do not."""
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")


def short(identity: str | None) -> str:
    """The first 10 characters of a sha256, or "base" for the base model's weights."""
    return identity[:10] if identity else "base"
