"""Settings: where things live (`Places`), and what a Run was asked to do (`RunSettings`).

Both are read once at the edge. A Run's settings come from its profile (a TOML file in `flows/profiles/` or in the
user's `<home>/profiles/`), then `SIA_RUN_*` environment variables, then the command line, later ones winning, and
are stored with the Run; a resumed Run uses the stored ones.
"""

from __future__ import annotations

import os
import tomllib
from enum import StrEnum
from pathlib import Path

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from agents.feedback_agent import SearchRules

PROFILES = Path(__file__).parent / "profiles"


class SettingsError(Exception):
    """Raised when a profile or an option cannot be used; the message names it and the fix."""


class Places(BaseModel):
    """Where state and caches live. `SIA_HOME`, `SIA_CACHE` and `SIA_DATABASE_URL` override."""

    model_config = ConfigDict(frozen=True)
    home: Path
    cache: Path
    database_url: str

    @classmethod
    def from_environment(cls) -> Places:
        """Read the places once, at the edge."""
        home = Path(os.environ.get("SIA_HOME") or platformdirs.user_data_path("sia")).expanduser()
        cache = Path(os.environ.get("SIA_CACHE") or platformdirs.user_cache_path("sia")).expanduser()
        url = os.environ.get("SIA_DATABASE_URL") or f"sqlite:///{home / 'sia.db'}"
        return cls(home=home, cache=cache, database_url=url)

    @property
    def scaffolds(self) -> Path:
        """Content-addressed Scaffold folders."""
        return self.home / "scaffolds"

    @property
    def adapters(self) -> Path:
        """Content-addressed Adapter folders."""
        return self.home / "adapters"

    def run_folder(self, run_id: str) -> Path:
        """A Run's own folder: lock, checkpoints, program outputs, report."""
        return self.home / "runs" / run_id


class SandboxKind(StrEnum):
    """How scaffold code is confined. NONE is explicit and shown everywhere."""

    BUBBLEWRAP = "bubblewrap"
    NONE = "none"


EVAL_PROFILE = "eval"
"""The profile of a `sia eval`, which is recorded as a Run of one Generation but is none to go on with."""


class WeightSettings(BaseModel):
    """Size of one WeightUpdate; the objective is chosen by evidence."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    iterations: int = Field(default=10, ge=1)
    problems: int = Field(default=32, ge=1)
    samples: int = Field(default=8, ge=2)
    learning_rate: float = Field(default=1e-4, gt=0)
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)


class RunSettings(BaseModel):
    """What a Run was asked to do; frozen with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    profile: str = "offline"
    generations: int = Field(default=8, ge=1, description="Candidates in all, the first Scaffold included.")
    seed: int = Field(default=0, ge=0, description="Varies search and sampling, never the problems.")
    sandbox: SandboxKind = SandboxKind.BUBBLEWRAP
    deterministic: bool = Field(
        default=False,
        description="Compute every model call alone, so that a Run is a function of its settings. Slower.",
    )
    model: str | None = Field(
        default="smollm2-135m-instruct",
        description="Name of a base model, or path of a folder with model.safetensors and tokenizer.json.",
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="One-sided error of the whole Run's gates.")
    harness_patience: int = Field(default=2, ge=1, description="Rejected harness candidates before weights.")
    dev_block: int | None = Field(default=None, ge=2, description="Problems a gate; the task's own if unset.")
    test_problems: int | None = Field(default=None, ge=1, description="First so many test problems; all if unset.")
    shard_episodes: int = Field(default=64, ge=1, description="Episodes in one sandbox.")
    parallel_shards: int = Field(default=4, ge=1)
    weights: WeightSettings = WeightSettings()
    search: SearchRules = SearchRules()


def load_run_settings(profile: str, overrides: dict[str, JsonValue], home: Path) -> RunSettings:
    """Settings of a new Run: profile file < `SIA_RUN_<FIELD>` < overrides (None means not given).

    Args:
        profile: name of a TOML file in `<home>/profiles/` or in the package's profiles.
        overrides: field name, dotted for nested ones (`weights.iterations`), to value.

    Raises:
        SettingsError: unknown profile, unknown field or a value out of range.
    """
    found = [d / f"{profile}.toml" for d in (home / "profiles", PROFILES)]
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        known = sorted({p.stem for d in (home / "profiles", PROFILES) for p in d.glob("*.toml")})
        raise SettingsError(f"no profile '{profile}'; there are: {', '.join(known)}")
    try:
        values: dict[str, JsonValue] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    for name in RunSettings.model_fields:
        from_environment = os.environ.get(f"SIA_RUN_{name.upper()}")
        if from_environment is not None:
            values[name] = from_environment
    for dotted, value in overrides.items():
        if value is not None:
            _assign(values, dotted.split("."), value)
    values["profile"] = profile
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"setting '{where}': {first['msg']}") from None


def _assign(values: dict[str, JsonValue], path: list[str], value: JsonValue) -> None:
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"setting '{'.'.join(path)}': '{key}' has no parts")
        values = inner
    values[path[-1]] = value
