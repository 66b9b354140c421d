"""Imports point down only, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tasks", "verifiers", "agents", "training", "flows")
"""From the bottom up: a room may import itself and those before it."""


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        above = imported_rooms(path) - allowed
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_no_other_package_at_the_top() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(ROOMS)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("flows.cli", {"torch", "transformers", "prefect", "sqlmodel", "pandas", "optuna", "sklearn", "matplotlib"}),
        ("agents.decision", {"torch", "optuna", "prefect"}),
        ("verifiers.gate", {"torch", "prefect", "modal"}),
        ("training.base_model", {"torch", "transformers"}),
    ],
)
def test_light_modules_import_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not heavy & set(loaded.stdout.split())
