"""The durable record of model calls: `agents.calls.CallRecorder` over SQL.

Guarantees: a call's intent is committed before it is sent, its completion before the Scaffold sees it; a completion on
record is never sampled again, replaced or reset to an intent. Not guaranteed: a call in flight at a kill is sent again
(`sends` counts that, and repeats after a failing model; a request that the model refused as bad counts once, however
often it is made again).
Token ids and log-probabilities are kept as little-endian int32 and float32 arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, and_, case, insert, select, update

from agents.calls import CallKey
from agents.model import Completion, ModelRequest, RequestError, Sampling
from flows.state.database import Database
from flows.state.tables import ModelCallRow, WorkStatus, now

_calls = ModelCallRow.__table__  # type: ignore[attr-defined]


class SqlCallRecorder:
    """Thread-safe: each method is one short transaction of its own, in plain SQL Core for speed."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def recorded(self, key: CallKey) -> Completion | None:
        """See `CallRecorder.recorded`."""
        with self._engine.connect() as connection:
            return _done(connection, key)

    def begin(self, key: CallKey, asked: Sampling, request: ModelRequest) -> Completion | None:
        """See `CallRecorder.begin`."""
        refused = and_(_calls.c.status == WorkStatus.FAILED, _calls.c.error.startswith(f"{RequestError.__name__}:"))
        with self._engine.begin() as connection:
            again = connection.execute(
                update(_calls)
                .where(*_where(key), _calls.c.status != WorkStatus.DONE)
                .values(sends=_calls.c.sends + case((refused, 0), else_=1), status=WorkStatus.INTENDED)
            )
            if again.rowcount == 0:
                if (found := _done(connection, key)) is not None:
                    return found
                connection.execute(
                    insert(_calls).values(
                        episode_id=key.episode_id,
                        digest=key.digest,
                        occurrence=key.occurrence,
                        problem_id=key.problem_id,
                        status=WorkStatus.INTENDED,
                        sends=1,
                        asked=_sampling(asked),
                        effective=_sampling(request.sampling) | {"seed": request.seed},
                        request=_request(request),
                        adapter_id=request.adapter,
                        prompt_tokens=0,
                        completion_tokens=0,
                        wall_s=0.0,
                        created_at=now(),
                    )
                )
        return None

    def finish(self, key: CallKey, completion: Completion, wall_s: float) -> Completion:
        """See `CallRecorder.finish`."""
        with self._engine.begin() as connection:
            written = connection.execute(
                update(_calls)
                .where(*_where(key), _calls.c.status != WorkStatus.DONE)
                .values(
                    status=WorkStatus.DONE,
                    text=completion.text,
                    finish_reason=completion.finish_reason,
                    prompt_ids=pack_ids(completion.prompt_ids),
                    completion_ids=pack_ids(completion.completion_ids),
                    logprobs=pack_logprobs(completion.logprobs),
                    prompt_tokens=len(completion.prompt_ids),
                    completion_tokens=len(completion.completion_ids),
                    wall_s=wall_s,
                    error=None,
                )
            )
            earlier = _done(connection, key) if written.rowcount == 0 else None
        return completion if earlier is None else earlier

    def failed(self, key: CallKey, reason: str) -> None:
        """See `CallRecorder.failed`."""
        with self._engine.begin() as connection:
            connection.execute(
                update(_calls)
                .where(*_where(key), _calls.c.status != WorkStatus.DONE)
                .values(status=WorkStatus.FAILED, error=reason[:2000])
            )


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(packed: bytes | None) -> tuple[int, ...]:
    """The inverse of `pack_ids`."""
    return tuple(np.frombuffer(packed or b"", dtype="<i4").tolist())


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Log-probabilities (nats) as little-endian float32, the precision they are computed in."""
    return np.asarray(logprobs, dtype="<f4").tobytes()


def unpack_logprobs(packed: bytes | None) -> tuple[float, ...]:
    """The inverse of `pack_logprobs`."""
    return tuple(np.frombuffer(packed or b"", dtype="<f4").tolist())


def _done(connection: Connection, key: CallKey) -> Completion | None:
    query = select(
        _calls.c.text, _calls.c.prompt_ids, _calls.c.completion_ids, _calls.c.logprobs, _calls.c.finish_reason
    ).where(*_where(key), _calls.c.status == WorkStatus.DONE)
    row = connection.execute(query).first()
    if row is None:
        return None
    return Completion(
        text=row.text,
        prompt_ids=unpack_ids(row.prompt_ids),
        completion_ids=unpack_ids(row.completion_ids),
        logprobs=unpack_logprobs(row.logprobs),
        finish_reason=row.finish_reason,
    )


def _where(key: CallKey) -> tuple[ColumnElement[bool], ...]:
    return (
        _calls.c.episode_id == key.episode_id,
        _calls.c.digest == key.digest,
        _calls.c.occurrence == key.occurrence,
    )


def _sampling(sampling: Sampling) -> dict[str, JsonValue]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
    }


def _request(request: ModelRequest) -> JsonValue:
    if request.prompt is not None:
        return {"prompt": request.prompt}
    return {"messages": [{"role": m.role, "content": m.content} for m in request.messages]}
