"""Read the `submission.csv` that a program left behind: a file written by code that nobody trusts.

The contract is the one of the paper's agents: columns `id` and `label`, one row a problem. A wrong file is a
wrong answer, never an error of ours: what cannot be read leaves its problems unanswered, which scores 0.

Refused whole (read as no answers): a link, a pipe, a device or folder in the file's place; a file over the
size limit; a file without the two columns. Dropped alone: rows of an unknown id, every row of an id given
twice, and labels of absurd length. Nothing in the file is executed or followed.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

SUBMISSION = "submission.csv"
MAX_BYTES = 8 << 20
MAX_LABEL_CHARS = 1000


def read_submission(working_dir: Path, known_ids: Collection[str]) -> dict[str, str]:
    """Problem id -> label from `working_dir/submission.csv`; an empty dictionary when there is none to trust.

    Args:
        working_dir: the folder that the program could write to.
        known_ids: ids that may be answered.

    Returns:
        One label for each id that occurs exactly once, surrounding blanks removed. No file makes it raise.
    """
    text = _read_plain_file(working_dir / SUBMISSION)
    if text is None:
        return {}
    rows = csv.reader(io.StringIO(text, newline=""))
    header = _next_row(rows)
    columns = [column.strip().lower() for column in header or ()]
    if "id" not in columns or "label" not in columns:
        return {}
    id_column, label_column = columns.index("id"), columns.index("label")
    answers: dict[str, str] = {}
    repeated: set[str] = set()
    while (row := _next_row(rows)) is not None:
        if len(row) <= max(id_column, label_column):
            continue
        problem_id, label = row[id_column].strip(), row[label_column].strip()
        if problem_id not in known_ids:
            continue
        if problem_id in answers or problem_id in repeated:
            repeated.add(problem_id)
        elif label and len(label) <= MAX_LABEL_CHARS:
            answers[problem_id] = label
    return {problem_id: label for problem_id, label in answers.items() if problem_id not in repeated}


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, an empty one for a row that is no CSV, None at the end."""
    try:
        return next(rows, None)
    except csv.Error:  # a field over the module's limit; the reader goes on with the next line
        return []


def _read_plain_file(path: Path) -> str | None:
    """The text of a regular file of tolerable size, opened without following a link; else None."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang the verifier.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(MAX_BYTES + 1)  # the size may have grown since
    if len(raw) > MAX_BYTES:
        return None
    return raw.decode("utf-8-sig", errors="replace")
