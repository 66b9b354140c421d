"""The model gateway: the only way out of a sandbox, an OpenAI-compatible endpoint on a unix socket.

    with Gateway(engine, recorder) as gateway:
        token = gateway.open(episode_id, problem.id, seed, policy)
        ...                                     # POST /e/<token>/v1/chat/completions, /e/<token>/v1/completions
        gateway.close_episode(token)

What it guarantees:

- each call is identified by (Episode, sha256 of what was asked, how many equal ones came before); if that call is on
  record, the record answers and no model is asked; if it is still in flight for a sandbox that was lost, whoever asks
  again waits for that answer instead of a second one, so the record and the Scaffold agree;
- a new call's intent is recorded before it is sent and its completion is durable before the Scaffold sees it;
- its random stream is keyed by the Episode's seed and that identity alone: arrival order and batching change nothing;
- calls and tokens per call are capped; in training temperature and top-p are 1, whatever was asked (both recorded);
- a failing model is asked once more, here and nowhere else; then the call gets HTTP 503 and the Episode is marked
  (`failures`), so that the host counts it as infrastructure whatever the Scaffold makes of it.

- one sandboxed Episode holds at most `CONNECTIONS_EACH` connections, so a flood of them reaches no neighbour.

What not: it trusts the host (who can open the socket and knows a token can use it).

It runs an event loop in a thread of its own; recorder calls go to a small pool, since they wait for disks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from aiohttp import web
from pydantic import JsonValue

from agents.calls import CallKey, CallPolicy, CallRecorder
from agents.model import Completion, Engine, EngineError, ModelRequest, RequestError
from agents.requests import Asked, BadRequest, Route, asked_digest, effective_sampling, parse_asked, reply

__all__ = ["CallTotals", "Gateway", "GatewayError", "call_seed"]

T = TypeVar("T")
MAX_BODY_BYTES = 2**20
MAX_SOCKET_PATH_BYTES = 107
MAX_PROBLEM_ID_CHARS = 200
RECORDER_THREADS = 4
CONNECTIONS_EACH = 64
MANY_NAMESPACES = 256
START_TIMEOUT_S = 30.0
ATTEMPTS = 2


class GatewayError(Exception):
    """Raised when the gateway itself cannot be started or is misused; the message says how to mend it."""


@dataclass(frozen=True)
class CallTotals:
    """What an Episode asked so far. `calls` includes failed and replayed ones; `refused` came past the limit."""

    calls: int = 0
    replayed: int = 0
    refused: int = 0
    invalid: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    waited_s: float = 0.0
    """Seconds in which at least one call was being answered by the model."""


@dataclass
class _Episode:
    """State of one open token. Touched on the gateway's loop only, except `lock`-ed totals that the host reads."""

    episode_id: int
    problem_id: str | None
    seed: int
    policy: CallPolicy
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    since: float = 0.0
    waited_s: float = 0.0

    def count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.counts[what] += by

    def waiting(self, step: int) -> None:
        with self.lock:
            now = time.monotonic()
            if self.in_flight:
                self.waited_s += now - self.since
            self.since = now
            self.in_flight += step

    def totals(self) -> CallTotals:
        with self.lock:
            waited_s = self.waited_s + (time.monotonic() - self.since if self.in_flight else 0.0)
            return CallTotals(**self.counts, waited_s=waited_s)


def call_seed(episode_seed: int, digest: str, occurrence: int) -> int:
    """The seed of one call's random stream, in [0, 2**63)."""
    words = f"{episode_seed}:{digest}:{occurrence}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1


class Gateway:
    """One endpoint for many Episodes. `open`, `close_episode` and the readers may be called from any thread.

    Args:
        engine: draws completions; not closed here.
        recorder: keeps the record of calls.
        socket_path: where to listen; by default in a new private folder with a short path.
        call_timeout_s: an engine that takes longer has failed.
    """

    def __init__(
        self,
        engine: Engine,
        recorder: CallRecorder,
        socket_path: Path | None = None,
        *,
        call_timeout_s: float = 900.0,
    ) -> None:
        self._engine = engine
        self._recorder = recorder
        self._folder: Path | None = None
        if socket_path is None:
            self._folder = Path(tempfile.mkdtemp(prefix="sia-"))
            socket_path = self._folder / "gw.sock"
        if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
            raise GatewayError(
                f"the socket path {socket_path} is too long for the system: set TMPDIR to a shorter folder"
            )
        self.socket_path = socket_path
        self._call_timeout_s = call_timeout_s
        self._episodes: dict[str, _Episode] = {}
        self._in_flight: dict[CallKey, asyncio.Task[Completion]] = {}
        self._pool = ThreadPoolExecutor(RECORDER_THREADS, thread_name_prefix="sia-recorder")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    # --- The host's side ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; returns when connections are accepted.

        Raises:
            GatewayError: the socket cannot be opened.
        """
        ready = threading.Event()
        failure: list[BaseException] = []

        def main() -> None:
            try:
                asyncio.run(self._serve(ready))
            except BaseException as error:
                failure.append(error)
            finally:
                ready.set()

        self._thread = threading.Thread(target=main, name="sia-gateway", daemon=True)
        self._thread.start()
        if not ready.wait(START_TIMEOUT_S) or failure:
            raise GatewayError(
                f"the gateway cannot listen on {self.socket_path}: {failure[0] if failure else 'time-out'}"
            )
        return self

    def stop(self) -> None:
        """Stop listening; calls in flight get no answer. Harmless when not started."""
        if self._loop is not None and self._stop is not None and self._thread is not None:
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_TIMEOUT_S)
        self._pool.shutdown(wait=True)
        self.socket_path.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def open(self, episode_id: int, problem_id: str | None, seed: int, policy: CallPolicy) -> str:
        """Admit an Episode and return its token. `problem_id` None (a program): its calls name theirs."""
        token = secrets.token_hex(16)
        self._episodes[token] = _Episode(episode_id, problem_id, seed, policy)
        return token

    def close_episode(self, token: str) -> CallTotals:
        """Admit no more calls of a token; returns what it asked. Calls in flight end and are recorded."""
        return self._episodes.pop(token).totals()

    def totals(self, token: str) -> CallTotals:
        """What an open Episode asked so far."""
        return self._episodes[token].totals()

    def failures(self, token: str) -> int:
        """Calls of an open Episode that the model failed to answer."""
        return self.totals(token).failures

    # --- The endpoint -------------------------------------------------------------------------------------------------

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for prefix in ("/e/{token}/v1", "/e/{token}/p/{problem}/v1"):
            app.router.add_post(f"{prefix}/chat/completions", self._chat)
            app.router.add_post(f"{prefix}/completions", self._text)
            app.router.add_get(f"{prefix}/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            self.socket_path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.setblocking(False)
                listener.bind(str(self.socket_path))
                # The sandbox's user is not ours when we are root; a token is still needed.
                os.chmod(self.socket_path, 0o666)
                listener.listen(512)
                assert runner.server is not None
                accepting = asyncio.create_task(_accept(listener, runner.server))
                ready.set()
                await self._stop.wait()
                accepting.cancel()
        finally:
            await runner.cleanup()

    async def _chat(self, request: web.Request) -> web.Response:
        return await self._answer(request, "chat")

    async def _text(self, request: web.Request) -> web.Response:
        return await self._answer(request, "text")

    async def _models(self, request: web.Request) -> web.Response:
        if request.match_info["token"] not in self._episodes:
            return _refusal(401, "unknown_token", "this token belongs to no running episode")
        model: JsonValue = {"id": self._engine.name, "object": "model", "created": 0, "owned_by": "sia"}
        return web.json_response({"object": "list", "data": [model]})

    async def _answer(self, request: web.Request, route: Route) -> web.Response:
        episode = self._episodes.get(request.match_info["token"])
        if episode is None:
            return _refusal(401, "unknown_token", "this token belongs to no running episode")
        # Only a program names its problem; the path's word against an Episode's own problem counts for nothing.
        named = None if episode.problem_id is not None else request.match_info.get("problem")
        problem_id = episode.problem_id or named
        try:
            if problem_id is not None and len(problem_id) > MAX_PROBLEM_ID_CHARS:
                raise BadRequest("the problem's id in the path is too long")
            body = await _body(request)
            asked = parse_asked(body, route, episode.policy.max_tokens_per_call)
        except BadRequest as error:
            episode.count("invalid")
            return _refusal(400, "bad_request", str(error))
        # No await between here and the two counters: requests are numbered in the order of arrival.
        if episode.counts["calls"] >= episode.policy.max_calls:
            episode.count("refused")
            return _refusal(429, "call_limit", f"call_limit: at most {episode.policy.max_calls} model calls")
        episode.count("calls")
        digest = asked_digest(asked, named)
        occurrence = episode.seen[digest]
        episode.seen[digest] += 1
        key = CallKey(episode.episode_id, digest, occurrence, problem_id)
        try:
            completion = await self._complete(episode, key, asked)
        except RequestError as error:
            return _refusal(400, "bad_request", str(error))
        except EngineError as error:
            episode.count("failures")
            return _refusal(503, "engine_failed", f"the model failed to answer: {error}")
        episode.count("prompt_tokens", len(completion.prompt_ids))
        episode.count("completion_tokens", len(completion.completion_ids))
        return web.json_response(reply(completion, route, self._engine.name, digest, int(time.time())))

    async def _complete(self, episode: _Episode, key: CallKey, asked: Asked) -> Completion:
        """The completion of one call, which is answered once however many ask for it at the same time.

        Raises:
            RequestError: the request cannot be answered by any attempt.
            EngineError: the engine or the record failed.
        """
        episode.waiting(+1)
        try:
            task = self._in_flight.get(key)
            if task is not None:
                # Asked before, by an attempt at this Episode whose sandbox was lost.
                completion = await asyncio.shield(task)
                episode.count("replayed")
                return completion
            task = self._in_flight[key] = asyncio.create_task(self._ask(episode, key, asked))
            task.add_done_callback(partial(self._ended, key))
            return await asyncio.shield(task)
        finally:
            episode.waiting(-1)

    def _ended(self, key: CallKey, task: asyncio.Task[Completion]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # looked at, since those who waited for it may be gone

    async def _ask(self, episode: _Episode, key: CallKey, asked: Asked) -> Completion:
        """The completion of one call: from the record, or from the engine and then on record."""
        request = ModelRequest(
            sampling=effective_sampling(asked.sampling, episode.policy),
            seed=call_seed(episode.seed, key.digest, key.occurrence),
            messages=asked.messages,
            prompt=asked.prompt,
            adapter=episode.policy.adapter,
        )
        on_record = await self._off_loop(lambda: self._recorder.recorded(key))
        for attempt in range(ATTEMPTS):
            if on_record is None:
                on_record = await self._off_loop(lambda: self._recorder.begin(key, asked.sampling, request))
            if on_record is not None:
                episode.count("replayed")
                return on_record
            began = time.monotonic()
            try:
                completion = await self._submit(request)
            except (RequestError, EngineError) as error:
                reason = f"{type(error).__name__}: {error}"
                await self._off_loop(partial(self._recorder.failed, key, reason))
                if isinstance(error, RequestError) or attempt == ATTEMPTS - 1:
                    raise
                continue
            wall_s = time.monotonic() - began
            return await self._off_loop(partial(self._recorder.finish, key, completion, wall_s))
        raise AssertionError("the last attempt returns or raises")

    async def _submit(self, request: ModelRequest) -> Completion:
        try:
            future = asyncio.wrap_future(self._engine.submit(request))
            # Shielded: an engine need not expect that its futures are cancelled.
            return await asyncio.wait_for(asyncio.shield(future), self._call_timeout_s)
        except (RequestError, EngineError):
            raise
        except TimeoutError as error:
            raise EngineError(f"no answer within {self._call_timeout_s:.0f} s") from error
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    async def _off_loop(self, work: Callable[[], T]) -> T:
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(self._pool, work)
        except Exception as error:
            raise EngineError(f"the record of calls failed: {type(error).__name__}: {error}") from error


async def _accept(listener: socket.socket, server: web.Server) -> None:
    """Take connections for ever, a bounded number from each process namespace but our own."""
    loop = asyncio.get_running_loop()
    taken: dict[str, list[asyncio.BaseTransport]] = {}
    own = _namespace(os.getpid())
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError:
            await asyncio.sleep(0.1)  # out of file descriptors: those that end give theirs back
            continue
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        whose = _namespace(struct.unpack("3i", peer)[0])
        open_ones = [transport for transport in taken.get(whose, []) if not transport.is_closing()]
        if whose != own and len(open_ones) >= CONNECTIONS_EACH:
            connection.close()
            continue
        transport, _ = await loop.connect_accepted_socket(server, connection)
        taken[whose] = [*open_ones, transport]
        if len(taken) > MANY_NAMESPACES:
            taken = {name: left for name, them in taken.items() if (left := [t for t in them if not t.is_closing()])}


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return "gone"


async def _body(request: web.Request) -> JsonValue:
    try:
        body: JsonValue = json.loads(await request.read())
        return body
    except web.HTTPRequestEntityTooLarge as error:
        raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON") from error


def _refusal(status: int, code: str, message: str) -> web.Response:
    error: JsonValue = {"message": message, "type": "invalid_request_error", "code": code, "param": None}
    return web.json_response({"error": error}, status=status)
