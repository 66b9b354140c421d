"""Recipes of `solve` Scaffolds: how a small language model is asked, and how its answer is read.

A `SolveRecipe` is a point in a search space of a few thousand: chat, chat with a begun answer, or plain completion
of worked examples; how the task is put; which train examples are shown; where in the reply the answer stands; how
tokens are drawn and whether several replies vote. `render` writes it as a stand-alone `agent.py`.

A base model of this size continues a pattern better than it obeys an instruction, so worked examples as plain text
and begun answers are in the space beside chat; which of them is best is for the search to find, not assumed here.

Guarantees: what a rendered Scaffold returns occurs literally in a completion (it is cut out, never composed), and
the only answers in its text are those of the first `SHOT_POOL` train examples.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from agents import solve_template as template
from agents.decision import SHOT_POOL, ScaffoldDraft
from tasks.contract import AnswerKind, Example, TaskSpec

SHOT_CHARS = 5000
"""Worked examples are dropped from the end until they fit in so many characters: a prompt has to fit its context."""


class Style(StrEnum):
    """How the model is asked."""

    CHAT = "chat"
    CHAT_PREFILL = "chat_prefill"
    COMPLETION = "completion"


class Instruction(StrEnum):
    """What is said besides the problem."""

    NONE = "none"
    SHORT = "short"
    CAREFUL = "careful"
    STEPS = "steps"
    TASK = "task"


class Opening(StrEnum):
    """How the assistant's turn is begun for it (chat_prefill)."""

    ANSWER = "answer"
    ANSWER_IS = "answer_is"
    RESTATE = "restate"


class Layout(StrEnum):
    """How a problem and its answer stand in a plain document (completion)."""

    QA = "qa"
    QUESTION_ANSWER = "question_answer"
    PLAIN = "plain"
    RESTATE = "restate"


class Extraction(StrEnum):
    """Which part of the reply is the answer."""

    FIRST_INTEGER = "first_integer"
    LAST_INTEGER = "last_integer"
    FIRST_LINE = "first_line"
    LAST_LINE = "last_line"
    FIRST_WORD = "first_word"
    FIRST_LABEL = "first_label"
    LAST_LABEL = "last_label"


EXTRACTIONS: Mapping[AnswerKind, tuple[Extraction, ...]] = {
    AnswerKind.INTEGER: (Extraction.FIRST_INTEGER, Extraction.LAST_INTEGER),
    AnswerKind.LABEL: (
        Extraction.FIRST_LABEL,
        Extraction.LAST_LABEL,
        Extraction.FIRST_LINE,
        Extraction.FIRST_WORD,
    ),
    AnswerKind.TEXT: (Extraction.FIRST_LINE, Extraction.LAST_LINE),
}

MAX_TOKENS: Mapping[AnswerKind, tuple[int, ...]] = {
    AnswerKind.INTEGER: (8, 24, 64),
    AnswerKind.LABEL: (16, 32, 64),
    AnswerKind.TEXT: (32, 64, 128),
}

ANSWER_FORM: Mapping[AnswerKind, str] = {
    AnswerKind.INTEGER: "one integer",
    AnswerKind.LABEL: "the label",
    AnswerKind.TEXT: "the answer",
}

_TO_LAST = {
    Extraction.FIRST_INTEGER: Extraction.LAST_INTEGER,
    Extraction.FIRST_LABEL: Extraction.LAST_LABEL,
    Extraction.FIRST_LINE: Extraction.LAST_LINE,
    Extraction.FIRST_WORD: Extraction.LAST_LINE,
}

_EXTRACT = {
    Extraction.FIRST_INTEGER: template.FIRST_INTEGER,
    Extraction.LAST_INTEGER: template.LAST_INTEGER,
    Extraction.FIRST_LINE: template.FIRST_LINE,
    Extraction.LAST_LINE: template.LAST_LINE,
    Extraction.FIRST_WORD: template.FIRST_WORD,
    Extraction.FIRST_LABEL: template.FIRST_LABEL,
    Extraction.LAST_LABEL: template.LAST_LABEL,
}

_LAYOUT = {
    Layout.QA: template.COMPLETION_QA,
    Layout.QUESTION_ANSWER: template.COMPLETION_QUESTION_ANSWER,
    Layout.PLAIN: template.COMPLETION_PLAIN,
    Layout.RESTATE: template.COMPLETION_RESTATE,
}

_PREFILL = {Opening.ANSWER: "Answer:", Opening.ANSWER_IS: "The answer is"}


class SolveRecipe(BaseModel):
    """One way to ask. Two recipes that would write the same Scaffold have equal `canonical()` forms."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["solve"] = "solve"
    style: Style = Style.CHAT
    instruction: Instruction = Instruction.TASK
    shots: int = 0
    shot_seed: int = 0
    opening: Opening = Opening.ANSWER
    layout: Layout = Layout.QA
    extraction: Extraction
    max_tokens: int
    one_line: bool = False
    votes: int = 1
    temperature: float = 0.0

    def canonical(self) -> SolveRecipe:
        """The same recipe with choices that have no effect set to one value, and contradictions resolved.

        Thinking in steps needs a free form: it is kept only in chat without examples, and the answer then
        stands last. Completion always ends at the line's end, or the model would go on to invent problems.
        One reply is drawn greedily; several must differ, so they are sampled, and each is one line unless it shows
        its steps: without steps, length buys votes nothing and costs the most of all choices.
        """
        change: dict[str, object] = {}
        free = self.style is Style.CHAT and self.shots == 0
        instruction = self.instruction
        if instruction is Instruction.STEPS and not free:
            instruction = change["instruction"] = Instruction.SHORT
        if instruction is Instruction.STEPS:
            change["one_line"] = False
            change["extraction"] = _TO_LAST.get(self.extraction, self.extraction)
        elif self.style is Style.COMPLETION or self.votes > 1:
            change["one_line"] = True
        if self.style is not Style.CHAT_PREFILL:
            change["opening"] = Opening.ANSWER
        if self.style is not Style.COMPLETION:
            change["layout"] = Layout.QA
        if self.shots == 0:
            change["shot_seed"] = 0
        if self.votes == 1:
            change["temperature"] = 0.0
        elif self.temperature <= 0:
            change["temperature"] = 0.7
        return self.model_copy(update=change)

    def describe(self) -> str:
        """One line for a reader, e.g. `completion (qa), 6 examples (set 0), greedy, first integer`."""
        how = {
            Style.CHAT: "chat",
            Style.CHAT_PREFILL: f"chat with the answer begun ({self.opening.replace('_', ' ')})",
            Style.COMPLETION: f"completion ({self.layout.replace('_', ' ')})",
        }[self.style]
        shown = f"{self.shots} examples (set {self.shot_seed})" if self.shots else "no examples"
        drawn = "greedy" if self.votes == 1 else f"{self.votes} votes at temperature {self.temperature:g}"
        read = self.extraction.replace("_", " ")
        end = " of one line" if self.one_line else ""
        said = f"instruction {self.instruction}"
        return f"{how}, {said}, {shown}, {drawn}, {read}{end}, {self.max_tokens} tokens"

    @property
    def asks_often(self) -> bool:
        """Whether an Episode makes more than one call: a search takes only a few such recipes into a batch."""
        return self.votes > 1

    def price(self) -> float:
        """What the recipe's cost is worth in mean reward: 0.01 a further reply and 0.02 a hundred tokens asked for.

        Without it, a search would buy any gain within its noise with many times the calls and tokens, which every
        later Episode and each training rollout pays for; and replies that only vote together share one reward.
        """
        length = min(self.max_tokens, 16) if self.one_line else self.max_tokens
        return 0.01 * (self.votes - 1) + 2e-4 * self.votes * length + 1e-6 * self.max_tokens


class SolveSpace:
    """The recipes that make sense for one `solve` task."""

    def __init__(self, task: TaskSpec) -> None:
        self.task = task
        limits = task.limits
        tokens = tuple(n for n in MAX_TOKENS[task.answer] if n <= limits.max_tokens_per_call)
        self.tokens = tokens or (limits.max_tokens_per_call,)
        self.axes: dict[str, tuple[str | int | float | bool, ...]] = {
            "style": tuple(s.value for s in Style),
            "instruction": tuple(i.value for i in Instruction),
            "shots": (0, 2, 4, 6, 8, 12),
            "shot_seed": (0, 1, 2, 3),
            "opening": tuple(o.value for o in Opening),
            "layout": tuple(x.value for x in Layout),
            "extraction": tuple(e.value for e in EXTRACTIONS[task.answer]),
            "max_tokens": self.tokens,
            "one_line": (False, True),
            "votes": tuple(v for v in (1, 3, 5) if v <= limits.max_calls) or (1,),
            "temperature": (0.0, 0.4, 0.7, 1.0),
        }

    def build(self, choices: Mapping[str, JsonValue]) -> SolveRecipe:
        """The canonical recipe of one value an axis; steps get all the room there is.

        Raises:
            pydantic.ValidationError: a value that no recipe can have.
        """
        recipe = SolveRecipe.model_validate(choices).canonical()
        if recipe.instruction is Instruction.STEPS:
            return recipe.model_copy(update={"max_tokens": self.tokens[-1]})
        return recipe

    def first(self) -> SolveRecipe:
        """The plain first Scaffold: the task said in one instruction, room to answer, the last answer counts."""
        first = EXTRACTIONS[self.task.answer][0]
        return self.build({"extraction": _TO_LAST[first], "max_tokens": self.tokens[-1]})

    def openings(self) -> Sequence[SolveRecipe]:
        """Ordinary recipes of each way of asking, for the search to start from when it knows nothing."""
        first = EXTRACTIONS[self.task.answer][0].value
        common: dict[str, JsonValue] = {"extraction": first, "one_line": True, "max_tokens": self.tokens[0]}
        ways: tuple[dict[str, JsonValue], ...] = (
            {"style": "completion", "instruction": "none", "layout": "qa", "shots": 6},
            {"style": "chat_prefill", "instruction": "none", "opening": "restate"},
            {"style": "completion", "instruction": "none", "layout": "plain", "shots": 6},
            {"style": "chat", "instruction": "short", "shots": 4},
        )
        return [self.build(common | way) for way in ways]


def task_sentence(task: TaskSpec) -> str:
    """The task in at most 400 characters: the first paragraph of its text, or its title."""
    for paragraph in task.text.split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        words = " ".join(line for line in lines if line and not line.startswith(("#", "|", "```", "<!--")))
        if words:
            words = words if len(words) <= 400 else words[:400].rsplit(" ", 1)[0]
            return f"{words[:-1]}." if words.endswith(":") else words
    return task.title


def wording(instruction: Instruction, task: TaskSpec) -> tuple[str, str]:
    """What the system turn says and what is added below each problem; either may be empty."""
    form = ANSWER_FORM[task.answer]
    only = f"Reply with {form} and nothing else."
    return {
        Instruction.NONE: ("", ""),
        Instruction.SHORT: ("", only),
        Instruction.CAREFUL: (f"You are precise. You check your work, then give {form} only.", only),
        Instruction.STEPS: (
            "",
            f'Think in one or two short steps. Then write "Answer:" and {form}.',
        ),
        Instruction.TASK: (f"{task_sentence(task)} {only}", ""),
    }[instruction]


def choose_examples(examples: Sequence[Example], shots: int, shot_seed: int) -> list[Example]:
    """`shots` of the first `SHOT_POOL` train examples in the order that `shot_seed` shuffles them into.

    Sets of one seed are nested: six examples are the first six of eight. Fewer are returned where they would take
    more than `SHOT_CHARS` characters.
    """
    pool = list(examples[:SHOT_POOL])
    random.Random(f"shots-{shot_seed}").shuffle(pool)
    chosen: list[Example] = []
    used = 0
    for example in pool[:shots]:
        used += len(example.problem.prompt) + len(example.answer)
        if used > SHOT_CHARS:
            break
        chosen.append(example)
    return chosen


def render_solve(recipe: SolveRecipe, task: TaskSpec, examples: Sequence[Example]) -> ScaffoldDraft:
    """Write a recipe as `agent.py`.

    Args:
        recipe: the choices; brought to its canonical form first.
        task: its text, title and answer kind word the instruction.
        examples: train examples with answers; only the first `SHOT_POOL` are looked at.

    Returns:
        A draft of one file that needs the standard library only. Same arguments, same text.
    """
    recipe = recipe.canonical()
    system, ask = wording(recipe.instruction, task)
    if recipe.style is Style.COMPLETION:
        system = system or ask
    shown = choose_examples(examples, recipe.shots, recipe.shot_seed)
    sampling: dict[str, JsonValue] = {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens}
    if recipe.one_line:
        sampling["stop"] = ["\n"]

    constants = [f"SYSTEM = {system!r}"]
    if recipe.style is not Style.COMPLETION:
        constants.append(f"ASK = {ask!r}")
    if shown:
        rows = "".join(f"    ({e.problem.prompt!r}, {e.answer!r}),\n" for e in shown)
        constants.append(f"EXAMPLES = [\n{rows}]")
    else:
        constants.append("EXAMPLES = []")
    if recipe.style is Style.CHAT_PREFILL and recipe.opening is not Opening.RESTATE:
        constants.append(f"PREFILL = {_PREFILL[recipe.opening]!r}")
    if recipe.style is Style.COMPLETION:
        gap = "\n\n" if recipe.layout in (Layout.QA, Layout.QUESTION_ANSWER) else "\n"
        constants.append(f"GAP = {gap!r}")
    constants.append(f"SAMPLING = {sampling!r}")
    imports = []
    if recipe.extraction in EXTRACTIONS[AnswerKind.INTEGER]:
        imports.append("import re")
    if recipe.extraction in (Extraction.FIRST_LABEL, Extraction.LAST_LABEL):
        labels = sorted({e.answer for e in examples[:SHOT_POOL]})
        constants.append(f"LABELS = {labels!r}")
    if recipe.votes > 1:
        constants.append(f"SAMPLES = {recipe.votes}")
        imports.append("from collections import Counter")

    pieces = _asking(recipe)
    pieces.append(_EXTRACT[recipe.extraction])
    pieces.append(template.SOLVE_ONCE if recipe.votes == 1 else template.SOLVE_BY_VOTE)
    note = recipe.describe()
    text = template.assemble(note[0].upper() + note[1:] + ".", imports, constants, pieces)
    return ScaffoldDraft(files={"agent.py": text}, note=note, recipe=recipe.model_dump(mode="json"))


def _asking(recipe: SolveRecipe) -> list[str]:
    """The functions up to `ask`, for the recipe's style."""
    if recipe.style is Style.CHAT:
        return [template.CHAT]
    if recipe.style is Style.CHAT_PREFILL:
        if recipe.opening is Opening.RESTATE:
            return [template.RESTATE, template.CHAT_PREFILL_RESTATE, template.CHAT_PREFILL]
        return [template.CHAT_PREFILL_FIXED, template.CHAT_PREFILL]
    before = [template.RESTATE] if recipe.layout is Layout.RESTATE else []
    return [*before, _LAYOUT[recipe.layout], template.COMPLETION]
