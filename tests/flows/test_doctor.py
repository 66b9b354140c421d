"""`sia doctor`: finds what is wrong, names the fix, changes nothing and shows no key."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from flows import doctor
from flows.doctor import KEYS, PACKAGES, Check, Status, examine
from flows.settings import Places
from flows.state.database import Database, connect


def places_in(folder: Path) -> Places:
    home = folder / "home"
    return Places(home=home, cache=folder / "cache", database_url=f"sqlite:///{home / 'sia.db'}")


@pytest.fixture(autouse=True)
def a_plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*KEYS, "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIA_CACHE", str(tmp_path / "cache"))


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_a_fresh_machine_is_told_all_and_left_alone(tmp_path: Path) -> None:
    found = by_name(examine(places_in(tmp_path)))
    assert {"python", "sandbox", "home", "cache", "model", "database", "prefect server", *PACKAGES, *KEYS} == set(found)
    assert all("\n" not in check.text + check.fix for check in found.values())
    assert all(found[name].status is Status.OK for name in ("python", "home", "cache", "database", *KEYS))
    assert found["model"].status is Status.WARN
    assert "sia tasks fetch" in found["model"].fix
    assert list(tmp_path.iterdir()) == []


def test_keys_are_named_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-very-secret")
    checks = list(doctor.keys(places_in(tmp_path)))
    assert by_name(checks)["ANTHROPIC_API_KEY"].text == "set"
    assert by_name(checks)["OPENAI_API_KEY"].text.startswith("not set")
    assert "very-secret" not in str(checks)


def test_a_version_that_moved_is_a_warning_and_a_missing_package_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# reasons\nprefect==0.0.1\ntorch==2.13.0  # exact\n")
    monkeypatch.setattr(doctor, "PACKAGES", ("prefect", "torch", "no-such-package"))
    found = by_name(list(doctor.packages(places_in(tmp_path), pins)))
    assert found["prefect"].status is Status.WARN
    assert "0.0.1" in found["prefect"].text
    assert found["torch"].status is Status.OK, "a local build tag such as +cpu is no other version"
    assert found["no-such-package"].status is Status.FAIL
    assert found["no-such-package"].fix


def test_the_pins_that_it_compares_with_are_there() -> None:
    pinned = doctor._pins(doctor.CONSTRAINTS)
    assert set(PACKAGES) <= set(pinned)


def test_a_database_of_this_version_is_fine_and_a_newer_one_is_not(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    Database.open(places.database_url).close()
    [check] = doctor.database(places)
    assert check.status is Status.OK
    assert "schema" in check.text
    engine = connect(places.database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    [check] = doctor.database(places)
    assert check.status is Status.FAIL
    assert "newer" in check.text


def test_an_unusable_database_is_a_failure_without_its_password(tmp_path: Path) -> None:
    for url in ("mysql://u:pass-word@h/d", "postgresql://u:pass-word@127.0.0.1:9/d"):
        places = places_in(tmp_path).model_copy(update={"database_url": url})
        [check] = doctor.database(places)
        assert check.status is Status.FAIL
        assert "SIA_DATABASE_URL" in check.fix
        assert "pass-word" not in check.text


def test_a_sandbox_that_does_not_hold_is_a_failure_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agents.sandbox import BubblewrapSandbox, SandboxUnavailable

    def fails(_self: object) -> None:
        raise SandboxUnavailable("no user namespaces:\n allow them")

    monkeypatch.setattr(BubblewrapSandbox, "preflight", fails)
    [check] = doctor.sandbox(places_in(tmp_path))
    assert check.status is Status.FAIL
    assert check.text == "no user namespaces: allow them"


def test_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, needed, level in ((1e9, 0.0, Status.WARN), (1e9, 1e8, Status.FAIL)):
        monkeypatch.setattr(doctor, "DISK_WANTED_GB", wanted)
        monkeypatch.setattr(doctor, "DISK_NEEDED_GB", needed)
        assert {check.status for check in doctor.disk(places_in(tmp_path))} == {level}


def test_a_foreign_prefect_that_is_silent_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    [check] = doctor.prefect_server(places_in(tmp_path))
    assert check.status is Status.FAIL
    assert "unset PREFECT_API_URL" in check.fix


def test_a_check_that_breaks_is_a_failed_check_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk(_places: Places) -> list[Check]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "disk", disk)
    found = by_name(examine(places_in(tmp_path)))
    assert found["disk"].status is Status.FAIL
    assert found["disk"].text == "RuntimeError: two lines"
    assert "database" in found
