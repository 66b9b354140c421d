"""Find and open a task: a built-in folder by its name, or anybody's folder by its path.

    load_task("chain-sum", cache_root(), print)       # built in; chain_sum works too
    load_task("./my-task", cache_root(), print)       # a folder with task.toml, task.md and task.py

A task folder holds `task.toml` (the `TaskSpec`), `task.md` (the public text that agents read) and `task.py`
with `open_task(spec, cache, say) -> Task`. `task.py` is loaded by its path, since a folder's name may hold a
hyphen.

What this does not do: it does not confine `task.py`. A task is the verifier, so its code runs here with the
user's rights; open only task folders that you trust. (Scaffolds, which are not trusted, run in the sandbox.)
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from tasks.contract import Say, Split, Task, TaskError, TaskSpec

OpenTask = Callable[[TaskSpec, Path, Say], Task]
"""What `task.py` defines under the name `open_task`."""

SPEC_FILE, TEXT_FILE, CODE_FILE = "task.toml", "task.md", "task.py"
BUILT_IN = Path(__file__).resolve().parent


def cache_root() -> Path:
    """Where fetched and generated data lie: `SIA_CACHE`, else the user's cache folder of this system."""
    if chosen := os.environ.get("SIA_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("sia")


def list_tasks() -> list[TaskSpec]:
    """The built-in tasks by name, without opening them (nothing is fetched).

    Raises:
        TaskError: a built-in folder is malformed.
    """
    return [load_spec(file.parent) for file in sorted(BUILT_IN.glob(f"*/{SPEC_FILE}"))]


def load_task(name_or_path: str, cache: Path, say: Say) -> Task:
    """Open a task, ready to use; its data is fetched or generated into `cache` if it is not there.

    Args:
        name_or_path: a built-in task's name ('_' may stand for '-'), or a path to a task folder.
        cache: usually `cache_root()`.
        say: told in one line about anything slow.

    Raises:
        TaskError: no such task, a malformed folder, or data that cannot be had; one line with the fix.
    """
    folder = find_folder(name_or_path)
    spec = load_spec(folder)
    return _open_function(folder)(spec, cache, say)


def find_folder(name_or_path: str) -> Path:
    """The task folder that a name or path means. A built-in name wins over a folder of the same name.

    Raises:
        TaskError: neither a built-in task nor a task folder.
    """
    known = sorted(file.parent.name for file in BUILT_IN.glob(f"*/{SPEC_FILE}"))
    name = name_or_path.replace("_", "-")
    if name in known:
        return BUILT_IN / name
    path = Path(name_or_path).expanduser()
    if (path / SPEC_FILE).is_file():
        return path.resolve()
    if path.is_dir():
        raise TaskError(f"{path} is no task folder: it has no {SPEC_FILE}")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"built in are {', '.join(known)}"
    raise TaskError(f"no task {name_or_path!r}: {hint} (or give the path of a folder with a {SPEC_FILE})")


def load_spec(folder: Path) -> TaskSpec:
    """Read `task.toml` and `task.md` of a folder.

    Raises:
        TaskError: a file is missing or malformed; names the file and the field in one line.
    """
    file = folder / SPEC_FILE
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
        text = (folder / TEXT_FILE).read_text(encoding="utf-8")
        spec = TaskSpec.model_validate({**raw, "text": text})
    except FileNotFoundError as error:
        raise TaskError(f"{error.filename}: missing; a task folder needs {SPEC_FILE}, {TEXT_FILE}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: not valid TOML in UTF-8: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TaskError(f"{file}: field {field}: {first['msg']}") from error
    missing = [split.value for split in Split if spec.sizes.get(split, 0) < 1]
    if missing:
        raise TaskError(f"{file}: field sizes: {', '.join(missing)} must be at least 1")
    if not 1 <= spec.dev_block <= spec.sizes[Split.DEV]:
        raise TaskError(f"{file}: field dev_block: must be between 1 and sizes.dev = {spec.sizes[Split.DEV]}")
    return spec


def task_digest(name_or_path: str) -> str:
    """sha256 over a task folder's files: a Run stores it, so that a level moved under a Run is noticed.

    Raises:
        TaskError: no such task.
    """
    folder = find_folder(name_or_path)
    digest = hashlib.sha256()
    for name in (SPEC_FILE, TEXT_FILE, CODE_FILE):
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _open_function(folder: Path) -> OpenTask:
    """`open_task` of the folder's `task.py`."""
    file = folder / CODE_FILE
    if not file.is_file():
        raise TaskError(f"{file}: missing; it defines open_task(spec, cache, say)")
    function = getattr(_module(file), "open_task", None)
    if not callable(function):
        raise TaskError(f"{file}: defines no function open_task(spec, cache, say)")
    opened: OpenTask = function
    return opened


def _module(file: Path) -> ModuleType:
    """Import a file under a name made from its path; the same file is imported once per process."""
    name = f"sia_task_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise TaskError(f"{file}: Python cannot load it")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs: dataclasses look their own module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TaskError(f"{file}: {type(error).__name__} while loading it: {error}") from error
    return module
