"""What the Prefect UI shows of a Run: content for its table and markdown artifacts. Pure; `flows.publish` files it."""

from __future__ import annotations

import re

from flows import words
from flows.records import RunView
from flows.settings import SandboxKind


def result_table(view: RunView) -> list[dict[str, str]]:
    """Rows of the result table: the arms of the sealed test and their paired differences; before the test is scored,
    the Generations. Every row has the same columns."""
    rows = [
        _row(
            f"{words.ARM_NAMES[arm.arm]}: {arm.words}",
            f"generation {arm.generation}",
            words.percent(arm.mean),
            words.bounds(arm.low, arm.high),
            arm.n,
            "",
        )
        for arm in view.test
    ]
    rows += [
        _row(
            f"{words.ARM_NAMES[d.left]} - {words.ARM_NAMES[d.right]}",
            "paired by problem",
            words.points(d.mean),
            words.signed_bounds(d.low, d.high),
            d.n,
            "same candidate" if d.same else "beyond noise" if d.beyond_noise else "not beyond noise",
        )
        for d in view.test_differences
    ]
    if rows:
        return rows
    return [
        _row(
            f"generation {g.number}",
            words.lever(g),
            words.percent(g.dev.mean) if g.dev else "-",
            words.bounds(g.dev.low, g.dev.high) if g.dev else "-",
            g.dev.n if g.dev else 0,
            words.accepted(g),
        )
        for g in view.generations
    ]


def _row(what: str, how: str, value: str, interval: str, n: int, remark: str) -> dict[str, str]:
    return {"what": what, "how": how, "score %": value, "95 % interval": interval, "n": str(n), "remark": remark}


def decision_log_markdown(view: RunView) -> str:
    """The Run's decisions with their reasons and the gate's verdicts, in markdown. Untrusted text is escaped."""
    lines = [f"# {_plain(view.id)}: {_plain(view.title)}", ""]
    if view.sandbox is SandboxKind.NONE:
        lines += [f"**{words.UNCONFINED}**", ""]
    lines += [*words.headline(view), ""]
    for generation in view.generations:
        lines += [f"## Generation {generation.number}: {_plain(words.lever(generation))}", ""]
        if generation.note:
            lines += [_plain(generation.note), ""]
        lines.append(f"- dev: {words.dev_score(generation)}, {words.accepted(generation)}")
        verdict = view.verdict_on(generation.number)
        if verdict is not None:
            lines.append(f"- {words.verdict(verdict)}")
        for decision in view.decisions:
            if decision.after_generation == generation.number:
                lines += ["", f"**Next: {_plain(words.LEVERS.get(decision.lever, decision.lever))}**, because", ""]
                lines += [f"- {_plain(reason)}" for reason in decision.reasons]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that markdown shows as it is: one line, no markup, no HTML."""
    line = " ".join(words.visible(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", line)
