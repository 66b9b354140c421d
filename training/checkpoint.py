"""Folders that exist whole or not at all.

A checkpoint is written under a temporary name, flushed to the disk file by file, sealed with a manifest of sha256 sums,
and only then renamed. What a crash leaves behind is a hidden temporary folder that nobody reads.

Guarantees: `verify` accepts a folder only if every file is there with the bytes that were written. Not covered: a disk
that acknowledges a flush it has not done (the sums then reveal the damage, but cannot mend it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """Raised when a checkpoint is missing, half-written, damaged, or belongs to something else."""


def write(directory: Path, fill: Callable[[Path], None]) -> None:
    """Make `directory` with what `fill` writes into it. An earlier folder of that name is replaced.

    Replacing is two renames: a crash between them leaves no folder of that name, never a mixture.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        fill(work)
        names = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
        for name in names:
            _flush(work / name)
        manifest = work / MANIFEST
        manifest.write_text(json.dumps({name: _sha256(work / name) for name in names}, indent=2) + "\n")
        _flush(manifest)
        for folder in [path for path in work.rglob("*") if path.is_dir()]:
            _flush(folder)
        work.chmod(0o755)
        _flush(work)
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
            directory.rename(old / "replaced")
            work.rename(directory)
            shutil.rmtree(old)
        else:
            work.rename(directory)
        _flush(directory.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def verify(directory: Path) -> None:
    """Check a folder against its manifest.

    Raises:
        CheckpointError: no folder, no manifest, or a file that is missing or altered.
    """
    try:
        manifest: dict[str, str] = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint (it has no manifest)") from None
    except ValueError:
        raise CheckpointError(f"{directory} has a damaged manifest") from None
    for name, digest in manifest.items():
        path = directory / name
        if not path.is_file() or _sha256(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
