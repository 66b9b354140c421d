"""The Python text of `solve` Scaffolds: a few whole functions, chosen by the recipe, under a block of constants.

Nothing is formatted into the functions. What varies stands in the constants at the top of the written `agent.py`,
put there with `repr`, so that no problem text can become code; the functions below are copied as they stand. The
written file needs the standard library only and can be read, run and edited on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

RESTATE = '''
def restate(prompt):
    """The part of the prompt after its last colon on one line: for "Compute: 3 + 4 =" that is "3 + 4 ="."""
    lines = prompt.strip().splitlines() or [""]
    tail = lines[-1].strip().rsplit(": ", 1)[-1]
    return tail if len(tail) <= 200 else tail[-200:]
'''

CHAT = '''
def question(prompt):
    return f"{prompt}\\n{ASK}" if ASK else prompt


def conversation(prompt):
    """The task in a system turn (if there is one), the worked examples as earlier turns, then the problem."""
    messages = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    for shown, answer in EXAMPLES:
        messages.append({"role": "user", "content": question(shown)})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question(prompt)})
    return messages


def ask(prompt, tools):
    return tools.chat(conversation(prompt), **SAMPLING)
'''

CHAT_PREFILL_FIXED = '''
def opening(prompt):
    """How each assistant turn begins; the model continues the last one."""
    return PREFILL
'''

CHAT_PREFILL_RESTATE = '''
def opening(prompt):
    """How each assistant turn begins: with the question restated, so that the model only has to finish it."""
    return restate(prompt)
'''

CHAT_PREFILL = '''
def question(prompt):
    return f"{prompt}\\n{ASK}" if ASK else prompt


def conversation(prompt):
    """The task in a system turn (if there is one), worked examples as earlier turns, the problem, a begun answer."""
    messages = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    for shown, answer in EXAMPLES:
        messages.append({"role": "user", "content": question(shown)})
        messages.append({"role": "assistant", "content": f"{opening(shown)} {answer}"})
    messages.append({"role": "user", "content": question(prompt)})
    messages.append({"role": "assistant", "content": opening(prompt)})
    return messages


def ask(prompt, tools):
    return tools.chat(conversation(prompt), **SAMPLING)
'''

COMPLETION_QA = """
def item(prompt):
    return f"Q: {prompt}\\nA:"
"""

COMPLETION_QUESTION_ANSWER = """
def item(prompt):
    return f"Question: {prompt}\\nAnswer:"
"""

COMPLETION_PLAIN = """
def item(prompt):
    return prompt
"""

COMPLETION_RESTATE = """
def item(prompt):
    return restate(prompt)
"""

COMPLETION = '''
def document(prompt):
    """Worked examples one after another, then the problem without its answer, for the model to continue."""
    lines = [f"{item(shown)} {answer}{GAP}" for shown, answer in EXAMPLES]
    head = f"{SYSTEM}\\n\\n" if SYSTEM else ""
    return head + "".join(lines) + item(prompt)


def ask(prompt, tools):
    return tools.complete(document(prompt), **SAMPLING)
'''

FIRST_INTEGER = '''
def extract(text):
    """The first integer in the text, exactly as the model wrote it."""
    found = re.findall(r"(?<!\\d)-?\\d+", text)
    return found[0] if found else None
'''

LAST_INTEGER = '''
def extract(text):
    """The last integer in the text, exactly as the model wrote it."""
    found = re.findall(r"(?<!\\d)-?\\d+", text)
    return found[-1] if found else None
'''

FIRST_LINE = '''
def extract(text):
    """The first line that is not empty, without quotes and full stop around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].strip(" \\"'.*`") or None if lines else None
'''

LAST_LINE = '''
def extract(text):
    """What follows the last "Answer:", or else the last line that is not empty."""
    lines = [line.strip() for line in text.rsplit("Answer:", 1)[-1].splitlines() if line.strip()]
    return lines[-1].strip(" \\"'.*`") or None if lines else None
'''

FIRST_WORD = '''
def extract(text):
    """The first word, without the punctuation around it."""
    words = text.split()
    return words[0].strip(" \\"'.,;:!?()*`") or None if words else None
'''

FIRST_LABEL = '''
def extract(text):
    """The label that occurs first in the text (of two that begin at one place, the longer)."""
    found = [(text.find(label), -len(label), label) for label in LABELS if label in text]
    return min(found)[2] if found else None
'''

LAST_LABEL = '''
def extract(text):
    """The label that occurs last in the text (of two that end at one place, the longer)."""
    found = [(text.rfind(label) + len(label), len(label), label) for label in LABELS if label in text]
    return max(found)[2] if found else None
'''

SOLVE_ONCE = """
def solve(problem, tools):
    return extract(ask(problem["prompt"], tools))
"""

SOLVE_BY_VOTE = '''
def solve(problem, tools):
    """Asks SAMPLES times and returns the answer given most often (the earliest of equals)."""
    answers = [extract(ask(problem["prompt"], tools)) for _ in range(SAMPLES)]
    tools.log({"votes": answers})
    given = Counter(answer for answer in answers if answer is not None)
    return given.most_common(1)[0][0] if given else None
'''


def assemble(summary: str, imports: Sequence[str], constants: Sequence[str], pieces: Sequence[str]) -> str:
    """One source file out of its parts, with two blank lines around each function.

    Args:
        summary: one sentence for the module's docstring.
        imports: import lines, in order.
        constants: assignments, in order; each may span lines.
        pieces: texts of this module.

    Returns:
        The file's text, ending in a newline.
    """
    head = [
        '"""' + summary.replace("\\", " ").replace('"', "'"),
        "",
        'Written by SIA\'s offline search. The constants are its choices: change them and run again."""',
    ]
    blocks = ["\n".join(head)]
    if imports:
        blocks.append("\n".join(imports))
    if constants:
        blocks.append("\n".join(constants))
    text = "\n\n".join(blocks)
    for piece in pieces:
        text += "\n\n\n" + piece.strip("\n")
    return text + "\n"
