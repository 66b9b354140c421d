"""What a Generation changed in the Scaffold: a unified diff against its parent, from the content-addressed folders."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from flows.records import GenerationView, RunView

MAX_FILE_BYTES = 200_000
"""Larger files of a Scaffold are named, not shown."""


def scaffold_diff(view: RunView, generation: GenerationView, scaffolds: Path) -> tuple[str, ...]:
    """Lines of a unified diff from the parent's Scaffold to the Generation's; the whole files for the first one.

    Args:
        scaffolds: the folder that holds `<scaffold id>/` folders.

    Returns:
        Lines without line ends; one plain sentence where there is nothing to compare.
    """
    if generation.scaffold_id is None:
        return ("No scaffold yet: this generation is not made.",)
    parent = view.generation(generation.parent) if generation.parent is not None else None
    before = parent.scaffold_id if parent else None
    if before == generation.scaffold_id:
        return ("The scaffold is its parent's; only the weights changed.",)
    new = read_scaffold(scaffolds / generation.scaffold_id)
    old = read_scaffold(scaffolds / before) if before else {}
    if not new:
        return (f"The files of scaffold {generation.scaffold_id[:10]} are not on this machine.",)
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        lines += difflib.unified_diff(
            old.get(name, "").splitlines(),
            new.get(name, "").splitlines(),
            f"a/{name}" if name in old else "nothing",
            f"b/{name}" if name in new else "nothing",
            lineterm="",
        )
    return tuple(lines) or ("No line differs.",)


def read_scaffold(folder: Path) -> Mapping[str, str]:
    """Relative path -> text of every file of a Scaffold; empty if the folder is not there. Links are not followed."""
    found: dict[str, str] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts:
            continue
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            found[str(path.relative_to(folder))] = f"({size} bytes, not shown)"
        else:
            found[str(path.relative_to(folder))] = path.read_text(encoding="utf-8", errors="replace")
    return found
