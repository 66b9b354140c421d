"""Rendered `solve` Scaffolds really run: their text is executed with a small stand-in for the gateway's tools."""

from __future__ import annotations

import ast
import itertools
import random
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from agents.decision import SHOT_POOL
from agents.solve_recipes import (
    EXTRACTIONS,
    SHOT_CHARS,
    Extraction,
    Instruction,
    Layout,
    Opening,
    SolveRecipe,
    SolveSpace,
    Style,
    choose_examples,
    render_solve,
    task_sentence,
)
from tasks.contract import AnswerKind, EpisodeLimits, Example, Problem, Split, TaskKind, TaskSpec


def make_task(answer: AnswerKind = AnswerKind.INTEGER, limits: EpisodeLimits | None = None) -> TaskSpec:
    return TaskSpec(
        name="sums",
        title="Sums of two numbers",
        kind=TaskKind.SOLVE,
        answer=answer,
        dev_block=100,
        sizes={Split.TRAIN: 200, Split.DEV: 100, Split.TEST: 100},
        text="# Sums\n\nAdd the two numbers\nof each problem:\n\nMore of it.",
        limits=limits or EpisodeLimits(),
    )


EXAMPLES = [Example(Problem(f"t{i}", f"State the answer: {i} + {i + 1} ="), str(2 * i + 1)) for i in range(200)]


class Tools:
    """Answers each call with the next reply and keeps what was asked."""

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = itertools.cycle(replies)
        self.chats: list[list[dict[str, str]]] = []
        self.prompts: list[str] = []
        self.sampling: list[dict[str, object]] = []
        self.events: list[JsonValue] = []
        self.given: list[str] = []

    def _reply(self, sampling: dict[str, object]) -> str:
        self.sampling.append(sampling)
        self.given.append(next(self.replies))
        return self.given[-1]

    def chat(self, messages: list[dict[str, str]], **sampling: object) -> str:
        self.chats.append(messages)
        return self._reply(sampling)

    def complete(self, prompt: str, **sampling: object) -> str:
        self.prompts.append(prompt)
        return self._reply(sampling)

    def log(self, event: JsonValue) -> None:
        self.events.append(event)


def load(recipe: SolveRecipe, task: TaskSpec, examples: Sequence[Example] = EXAMPLES) -> dict[str, object]:
    source = render_solve(recipe, task, examples).files["agent.py"]
    names: dict[str, object] = {}
    exec(compile(source, "agent.py", "exec"), names)
    return names


def solve(recipe: SolveRecipe, tools: Tools, prompt: str = "State the answer: 15 + 22 =") -> JsonValue:
    function = load(recipe, make_task())["solve"]
    assert callable(function)
    answer: JsonValue = function({"id": "d1", "prompt": prompt}, tools)
    return answer


def recipe(**choices: object) -> SolveRecipe:
    base: dict[str, object] = {"extraction": "first_integer", "max_tokens": 8}
    return SolveRecipe.model_validate(base | choices)


def test_the_first_scaffold_asks_in_plain_chat_and_reads_the_last_integer() -> None:
    tools = Tools(["15 + 22 is 37."])
    assert solve(SolveSpace(make_task()).first(), tools) == "37"
    (messages,) = tools.chats
    assert [m["role"] for m in messages] == ["system", "user"]
    assert messages[0]["content"].startswith("Add the two numbers of each problem. Reply with one integer")
    assert messages[1]["content"] == "State the answer: 15 + 22 ="
    assert tools.sampling == [{"temperature": 0.0, "max_tokens": 64}]


def test_completion_is_a_plain_document_of_worked_examples() -> None:
    tools = Tools([" -37"])
    assert solve(recipe(style="completion", instruction="none", shots=2), tools) == "-37"
    shown = choose_examples(EXAMPLES, 2, 0)
    expected = "".join(f"Q: {e.problem.prompt}\nA: {e.answer}\n\n" for e in shown)
    assert tools.prompts == [expected + "Q: State the answer: 15 + 22 =\nA:"]
    assert tools.sampling == [{"temperature": 0.0, "max_tokens": 8, "stop": ["\n"]}]


@pytest.mark.parametrize(
    ("layout", "end"),
    [
        (Layout.QA, "Q: State the answer: 15 + 22 =\nA:"),
        (Layout.QUESTION_ANSWER, "Question: State the answer: 15 + 22 =\nAnswer:"),
        (Layout.PLAIN, "\nState the answer: 15 + 22 ="),
        (Layout.RESTATE, "\n15 + 22 ="),
    ],
)
def test_every_layout_ends_where_the_answer_belongs(layout: Layout, end: str) -> None:
    tools = Tools([" 37"])
    assert solve(recipe(style="completion", layout=layout, shots=4), tools) == "37"
    assert tools.prompts[0].endswith(end)
    assert len(tools.prompts[0]) > len(end)


@pytest.mark.parametrize(
    ("opening", "begun"),
    [(Opening.ANSWER, "Answer:"), (Opening.ANSWER_IS, "The answer is"), (Opening.RESTATE, "15 + 22 =")],
)
def test_a_begun_answer_is_the_last_turn_and_stands_in_the_examples_too(opening: Opening, begun: str) -> None:
    tools = Tools([" 37"])
    assert solve(recipe(style="chat_prefill", instruction="short", opening=opening, shots=2), tools) == "37"
    (messages,) = tools.chats
    assert messages[-1] == {"role": "assistant", "content": begun}
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    shown = choose_examples(EXAMPLES, 2, 0)[0]
    assert messages[1]["content"].endswith(f" {shown.answer}")


def test_voting_returns_the_commonest_answer_and_logs_all() -> None:
    tools = Tools(["40", "37", "no idea", "37", "41"])
    assert solve(recipe(votes=5, temperature=0.7), tools) == "37"
    assert tools.events == [{"votes": ["40", "37", None, "37", "41"]}]
    assert all(s["temperature"] == 0.7 for s in tools.sampling)


def test_no_answer_is_none() -> None:
    assert solve(recipe(), Tools(["I do not know"])) is None
    assert solve(recipe(votes=3), Tools(["?"])) is None


@pytest.mark.parametrize(
    ("extraction", "text", "answer"),
    [
        (Extraction.FIRST_INTEGER, "46-8=38", "46"),
        (Extraction.LAST_INTEGER, "46-8", "8"),
        (Extraction.LAST_INTEGER, "46 - 83 = -37.", "-37"),
        (Extraction.FIRST_LINE, '\n "Theft." \nmore', "Theft"),
        (Extraction.FIRST_LINE, "   ", None),
        (Extraction.LAST_LINE, "I think\nAnswer: theft\n", "theft"),
        (Extraction.LAST_LINE, "one\ntwo", "two"),
        (Extraction.FIRST_WORD, " Yes, it is", "Yes"),
        (Extraction.FIRST_WORD, "", None),
        (Extraction.FIRST_LABEL, "robbery, not theft", "robbery"),
        (Extraction.LAST_LABEL, "robbery, not armed theft", "armed theft"),
        (Extraction.FIRST_LABEL, "neither", None),
    ],
)
def test_extractions(extraction: Extraction, text: str, answer: str | None) -> None:
    labels = ["theft", "armed theft", "robbery"]
    examples = [Example(Problem(str(i), "?"), label) for i, label in enumerate(labels)]
    extract = load(recipe(extraction=extraction), make_task(), examples)["extract"]
    assert callable(extract)
    assert extract(text) == answer


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80) | st.from_regex(r"[-0-9 =.\n]{0,40}"), extraction=st.sampled_from(Extraction))
def test_an_answer_always_occurs_in_the_completion(text: str, extraction: Extraction) -> None:
    extract = load(recipe(extraction=extraction), make_task())["extract"]
    assert callable(extract)
    answer = extract(text)
    assert answer is None or (answer != "" and answer in text)


def every_canonical(answer: AnswerKind, count: int) -> list[SolveRecipe]:
    space = SolveSpace(make_task(answer))
    draw = random.Random(7)
    return [space.build({axis: draw.choice(values) for axis, values in space.axes.items()}) for _ in range(count)]


@pytest.mark.parametrize("answer", AnswerKind)
def test_any_point_of_the_space_renders_an_agent_that_runs_and_needs_the_standard_library_only(
    answer: AnswerKind,
) -> None:
    for point in every_canonical(answer, 80):
        assert point.canonical() == point
        draft = render_solve(point, make_task(answer), EXAMPLES)
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(draft.files["agent.py"]))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert imported <= set(sys.stdlib_module_names)
        tools = Tools([" 37\n"])
        names = load(point, make_task(answer))
        function = names["solve"]
        assert callable(function)
        function({"id": "d", "prompt": "State the answer: 15 + 22 ="}, tools)
        assert len(tools.given) == point.votes
        assert draft.recipe == point.model_dump(mode="json")
        assert draft.note == point.describe()


def test_equal_agents_have_equal_recipes() -> None:
    seen: dict[str, SolveRecipe] = {}
    for point in every_canonical(AnswerKind.INTEGER, 400):
        text = render_solve(point, make_task(), EXAMPLES).files["agent.py"]
        assert seen.setdefault(text, point) == point


def test_contradictions_are_resolved() -> None:
    steps = recipe(instruction="steps", one_line=True).canonical()
    assert (steps.extraction, steps.one_line) == (Extraction.LAST_INTEGER, False)
    assert SolveSpace(make_task()).build(steps.model_dump(mode="json")).max_tokens == 64
    assert recipe(instruction="steps", shots=4).canonical().instruction is Instruction.SHORT
    assert recipe(style="completion").canonical().one_line
    assert recipe(votes=3).canonical().temperature > 0
    assert recipe(votes=3).canonical().one_line
    assert not recipe(votes=3, instruction="steps").canonical().one_line
    assert recipe(temperature=1.0).canonical().temperature == 0


def test_a_recipe_that_asks_for_more_costs_more() -> None:
    one = recipe(one_line=True)
    for dearer in (recipe(one_line=True, votes=3), recipe(one_line=True, max_tokens=64), recipe(max_tokens=64)):
        assert dearer.price() > one.price()
    assert one.price() < 0.002


def test_limits_of_the_task_bound_the_space() -> None:
    task = make_task(limits=EpisodeLimits(max_calls=2, max_tokens_per_call=16))
    space = SolveSpace(task)
    assert space.axes["votes"] == (1,)
    assert space.axes["max_tokens"] == (8,)
    assert SolveSpace(make_task(limits=EpisodeLimits(max_tokens_per_call=5))).first().max_tokens == 5


def test_openings_ask_in_every_style() -> None:
    for answer in AnswerKind:
        openings = SolveSpace(make_task(answer)).openings()
        assert {opening.style for opening in openings} == set(Style)
        assert all(opening.extraction in EXTRACTIONS[answer] for opening in openings)


def test_examples_come_from_the_shot_pool_and_are_nested() -> None:
    pool = {e.problem.id for e in EXAMPLES[:SHOT_POOL]}
    for seed in range(4):
        six, eight = choose_examples(EXAMPLES, 6, seed), choose_examples(EXAMPLES, 8, seed)
        assert six == eight[:6]
        assert {e.problem.id for e in eight} <= pool
    assert choose_examples(EXAMPLES, 6, 0) != choose_examples(EXAMPLES, 6, 1)
    long = [Example(Problem("x", "a" * SHOT_CHARS), "b")] * 4
    assert choose_examples(long, 4, 0) == []


def test_nothing_beyond_the_shot_pool_reaches_a_scaffold() -> None:
    secret = [Example(Problem(f"s{i}", f"secret problem {i}"), f"secret answer {i}") for i in range(50)]
    examples: Sequence[Example] = [*EXAMPLES[:SHOT_POOL], *secret]
    for answer in AnswerKind:
        for point in every_canonical(answer, 60):
            assert "secret" not in render_solve(point, make_task(answer), examples).files["agent.py"]


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=60), answer=st.text(max_size=20), title=st.text(max_size=30))
def test_no_text_of_a_task_becomes_code(prompt: str, answer: str, title: str) -> None:
    task = make_task().model_copy(update={"text": title, "title": title})
    examples = [Example(Problem("t", prompt), answer)] * 3
    for style in Style:
        names = load(recipe(style=style, shots=2), task, examples)
        assert names["EXAMPLES"] == [(prompt, answer)] * 2


def test_the_task_sentence_is_the_first_paragraph_or_the_title() -> None:
    assert task_sentence(make_task()) == "Add the two numbers of each problem."
    assert task_sentence(make_task().model_copy(update={"text": "# only a heading"})) == "Sums of two numbers"
    assert len(task_sentence(make_task().model_copy(update={"text": "word " * 500}))) <= 400


def test_rendering_is_a_function_of_its_arguments() -> None:
    make: Callable[[], Mapping[str, str]] = lambda: render_solve(recipe(shots=6), make_task(), EXAMPLES).files  # noqa: E731
    assert make() == make()
