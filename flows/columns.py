"""Reading columns that are looser than the records made from them: JSON of any shape, times without a zone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import JsonValue

from flows.settings import SandboxKind


def sandbox_of(settings: JsonValue) -> SandboxKind:
    """How scaffold code was confined; what does not say so was not."""
    value = mapping(settings).get("sandbox")
    return SandboxKind(value) if value in list(SandboxKind) else SandboxKind.NONE


def mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    """A JSON object as it is, anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def number_or_none(value: JsonValue) -> float | None:
    """A JSON number, or None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole_or_none(value: JsonValue) -> int | None:
    """A JSON number rounded to a whole one, or None."""
    number = number_or_none(value)
    return None if number is None else round(number)


def utc(moment: datetime) -> datetime:
    """SQLite forgets the time zone; the tables hold UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
