"""Where settings come from, which of them wins, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue, ValidationError

from flows.settings import PROFILES, Places, RunSettings, SandboxKind, SettingsError, load_run_settings


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RunSettings.model_fields:
        monkeypatch.delenv(f"SIA_RUN_{name.upper()}", raising=False)


def test_every_profile_of_the_package_loads(tmp_path: Path) -> None:
    names = sorted(path.stem for path in PROFILES.glob("*.toml"))
    assert "offline" in names
    for name in names:
        assert load_run_settings(name, {}, tmp_path).profile == name


def test_the_later_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.toml").write_text("generations = 3\nseed = 5\n[weights]\nrank = 4\n")
    assert load_run_settings("mine", {}, tmp_path).generations == 3
    monkeypatch.setenv("SIA_RUN_GENERATIONS", "6")
    found = load_run_settings("mine", {"seed": 9, "weights.iterations": 2}, tmp_path)
    assert (found.generations, found.seed) == (6, 9)
    assert (found.weights.rank, found.weights.iterations) == (4, 2), "a dotted override leaves its neighbours alone"
    assert load_run_settings("mine", {"generations": 7, "seed": None}, tmp_path).generations == 7
    assert load_run_settings("mine", {"seed": None}, tmp_path).seed == 5, "None means not given"


def test_a_profile_of_the_home_replaces_the_package_one(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "offline.toml").write_text("generations = 2\n")
    assert load_run_settings("offline", {}, tmp_path).generations == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"generations": 0}, "generations"),
        ({"nonsense": 1}, "nonsense"),
        ({"weights.nonsense": 1}, "weights.nonsense"),
        ({"seed.part": 1}, "no parts"),
        ({"sandbox": "docker"}, "sandbox"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_a_wrong_setting_is_named(overrides: dict[str, JsonValue], said: str, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "plain.toml").write_text("seed = 1\n")
    with pytest.raises(SettingsError, match=said) as caught:
        load_run_settings("plain", overrides, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="offline"):
        load_run_settings("online", {}, tmp_path)


def test_a_profile_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "torn.toml").write_text("generations = ")
    with pytest.raises(SettingsError, match=r"torn\.toml is not TOML"):
        load_run_settings("torn", {}, tmp_path)


def test_settings_survive_the_database(tmp_path: Path) -> None:
    settings = load_run_settings("offline", {"sandbox": "none", "weights.learning_rate": 2e-5}, tmp_path)
    assert settings.sandbox is SandboxKind.NONE
    assert RunSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load_run_settings("offline", {}, tmp_path)
    with pytest.raises(ValidationError):
        settings.seed = 3


def test_places_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIA_HOME", str(tmp_path / "h"))
    monkeypatch.setenv("SIA_CACHE", str(tmp_path / "c"))
    monkeypatch.delenv("SIA_DATABASE_URL", raising=False)
    places = Places.from_environment()
    assert (places.home, places.cache) == (tmp_path / "h", tmp_path / "c")
    assert places.database_url == f"sqlite:///{tmp_path / 'h' / 'sia.db'}"
    assert places.run_folder("r").is_relative_to(places.home)
    monkeypatch.setenv("SIA_DATABASE_URL", "postgresql://db/sia")
    assert Places.from_environment().database_url == "postgresql://db/sia"
