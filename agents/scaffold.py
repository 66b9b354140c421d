"""A Scaffold: the folder of files that makes a Task-Specific Agent out of a model.

Its identity is the sha256 of its files, so that two authors who write the same files wrote the same Scaffold, and a
stored one can be checked against its own name. Stored Scaffolds are never changed: `store_scaffold` writes a temporary
folder and renames it.

    scaffold = store_scaffold(ScaffoldDraft(files={"agent.py": "..."}, note="plain chat"), root)
    same = read_scaffold(scaffold.path)

Storing guarantees: relative names that stay inside the folder, bounded size, UTF-8 text, no links, an `agent.py` that
compiles (tried in a process of its own, since compiling hostile text can crash an interpreter). It does not look at
what the code does: that is the sandbox's business, and nothing here ever imports or runs a Scaffold.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agents.decision import ScaffoldDraft
from tasks.contract import TaskKind

__all__ = ["Scaffold", "ScaffoldError", "read_draft", "read_scaffold", "scaffold_digest", "store_scaffold"]

MAX_FILES = 200
MAX_FILE_BYTES = 1_000_000
MAX_TOTAL_BYTES = 4_000_000
MAX_NAME_CHARS = 200
COMPILE_TIMEOUT_S = 20.0

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_COMPILE = """
import ast, sys
tree = compile(sys.stdin.buffer.read(), "agent.py", "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
compile(tree, "agent.py", "exec", dont_inherit=True)
names = {getattr(n, "name", "") for n in tree.body} | {
    a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
print("solve" if "solve" in names else "program")
"""


class ScaffoldError(Exception):
    """Raised when files cannot be a Scaffold; the message says in one line what to change."""


@dataclass(frozen=True)
class Scaffold:
    """A stored Scaffold: `id` is its digest, `path` the folder that holds its files."""

    id: str
    kind: TaskKind
    path: Path


def scaffold_digest(files: Mapping[str, bytes]) -> str:
    """sha256 over the files in name order, each as length-prefixed name and content.

    The prefixes make the encoding unambiguous: no two different sets of files share their bytes.
    """
    digest = hashlib.sha256(b"sia scaffold 1\n")
    for name in sorted(files):
        encoded = name.encode()
        digest.update(b"%d:" % len(encoded) + encoded + b"%d:" % len(files[name]) + files[name])
    return digest.hexdigest()


def store_scaffold(draft: ScaffoldDraft, root: Path) -> Scaffold:
    """Check a draft and put it at `<root>/<digest>`; storing the same files twice is one folder.

    Raises:
        ScaffoldError: a name leaves the folder, files are too many or too large, `agent.py` is missing or wrong.
    """
    files = {name: _encode(name, text) for name, text in draft.files.items()}
    kind = _check(files)
    digest = scaffold_digest(files)
    root.mkdir(parents=True, exist_ok=True)
    target = root / digest
    if not _intact(target, digest):
        # A folder that does not hold what its name says is left over from a fault: it is replaced, never used.
        _replace(target, files)
    return Scaffold(digest, kind, target)


def read_scaffold(path: Path) -> Scaffold:
    """The Scaffold in a folder, stored by us or written by a user (its name need not be the digest).

    Raises:
        ScaffoldError: the folder is missing or is no Scaffold.
    """
    if not path.is_dir():
        raise ScaffoldError(f"{path} is no folder: give the folder that holds the scaffold's agent.py")
    files = _read(path)
    return Scaffold(scaffold_digest(files), _check(files), path)


def read_draft(path: Path) -> ScaffoldDraft:
    """The files of a user's folder as a draft: storing it gives the Scaffold that `read_scaffold` finds there.

    Python's own `__pycache__` folders are no part of it.

    Raises:
        ScaffoldError: the folder is missing or is no Scaffold.
    """
    files = _read(read_scaffold(path).path)
    return ScaffoldDraft(files={name: _decode(name, content) for name, content in files.items()}, note=path.name)


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ScaffoldError(f"{name} is no UTF-8 text: remove it, a scaffold holds text files only") from error


def _encode(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ScaffoldError(f"{name!r} cannot be written as UTF-8: remove the characters that are no text") from error


def _check(files: Mapping[str, bytes]) -> TaskKind:
    if len(files) > MAX_FILES:
        raise ScaffoldError(f"{len(files)} files: a scaffold holds at most {MAX_FILES}")
    for name, content in files.items():
        _check_name(name)
        if len(content) > MAX_FILE_BYTES:
            raise ScaffoldError(f"{name} has {len(content)} bytes: at most {MAX_FILE_BYTES} are allowed")
        _decode(name, content)
    clash = next((n for n in files for p in PurePosixPath(n).parents if str(p) in files), None)
    if clash is not None:
        raise ScaffoldError(f"{clash} lies below another file of the same name: rename one of them")
    if sum(map(len, files.values())) > MAX_TOTAL_BYTES:
        raise ScaffoldError(f"the files have more than {MAX_TOTAL_BYTES} bytes together: remove some")
    if "agent.py" not in files:
        raise ScaffoldError("no agent.py: add one with `def solve(problem, tools)`, or a program")
    return _compile(files["agent.py"])


def _check_name(name: str) -> None:
    parts = name.split("/")
    if len(name) > MAX_NAME_CHARS or not all(_PART.fullmatch(part) for part in parts):
        shown = name if len(name) <= 80 else name[:80] + "..."
        raise ScaffoldError(
            f"{shown!r} is no file name a scaffold may have: use a relative path of letters, digits, _ - and ."
        )


def _compile(source: bytes) -> TaskKind:
    """Compile in another process and learn the kind: a module that defines or imports `solve` is asked per Problem."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _COMPILE],
            input=source,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ScaffoldError(f"agent.py took over {COMPILE_TIMEOUT_S:.0f} s to compile: shorten it") from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else f"the compiler died with status {done.returncode}"
        where = next((line.strip() for line in lines if 'File "agent.py"' in line), "agent.py")
        raise ScaffoldError(f"agent.py does not compile: {reason} ({where})")
    return TaskKind(done.stdout.decode().strip())


def _read(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in [*folders, *names]:
            entry = Path(folder) / name
            relative = entry.relative_to(path).as_posix()
            if entry.is_symlink():
                raise ScaffoldError(f"{relative} is a link: a scaffold holds plain files only")
            if name in folders:
                continue
            if not entry.is_file() or entry.stat().st_size > MAX_FILE_BYTES:
                raise ScaffoldError(f"{relative} is no plain file of at most {MAX_FILE_BYTES} bytes")
            files[relative] = entry.read_bytes()
            if len(files) > MAX_FILES:
                raise ScaffoldError(f"more than {MAX_FILES} files: give the scaffold a folder of its own")
    return files


def _intact(target: Path, digest: str) -> bool:
    try:
        return target.is_dir() and scaffold_digest(_read(target)) == digest
    except (ScaffoldError, OSError):
        return False


def _replace(target: Path, files: Mapping[str, bytes]) -> None:
    building = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        for name, content in files.items():
            file = building / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        # Whatever the umask: the unprivileged user of the sandbox reads these.
        for folder, _, names in os.walk(building):
            os.chmod(folder, 0o755)
            for name in names:
                os.chmod(Path(folder) / name, 0o644)
        if target.exists():
            os.rename(target, Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent)) / "was")
        try:
            os.rename(building, target)
        except OSError:
            if not target.is_dir():
                raise  # otherwise another process stored the same files a moment earlier
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for old in target.parent.glob(".old-*"):
            shutil.rmtree(old, ignore_errors=True)
