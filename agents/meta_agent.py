"""The offline Meta-Agent: writes a run's first Scaffold from the task's public text, without any model of its own.

It is plain on purpose and sensible all the same: for `solve`, one chat call with the task's first paragraph as the
instruction, room to answer and the last answer in the reply; for `program`, TF-IDF and naive Bayes. What the search
gains is measured against this, so it must neither be crippled nor tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

from agents.decision import ScaffoldDraft
from agents.recipes import render, space_for
from tasks.contract import Example, TaskSpec


class OfflineMetaAgent:
    """Implements `agents.decision.MetaAgent`. The seed changes nothing: there is one plain first Scaffold a task."""

    def first_scaffold(self, task: TaskSpec, examples: Sequence[Example], seed: int) -> ScaffoldDraft:
        """Render the task's plain recipe; no train example is shown in it."""
        return render(space_for(task).first(), task, examples)
