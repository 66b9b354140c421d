"""The gateway over its real socket: identity, record, limits, what is refused, and failures."""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.calls import CallKey, CallPolicy
from agents.gateway import Gateway, GatewayError, call_seed
from agents.model import Completion, EngineError, ModelRequest, Sampling
from agents.requests import BadRequest, asked_digest, parse_asked

POLICY = CallPolicy(adapter="lora-1", train=False, max_calls=50, max_tokens_per_call=40)
TRAIN = CallPolicy(adapter="lora-1", train=True, max_calls=50, max_tokens_per_call=40)


@dataclass
class Reply:
    status: int
    body: Any

    @property
    def text(self) -> str:
        choice = self.body["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    @property
    def error(self) -> str:
        return str(self.body["error"]["code"])


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("gateway", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def post(gateway: Gateway, path: str, body: object, method: str = "POST") -> Reply:
    connection = UnixConnection(gateway.socket_path)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data if method == "POST" else None)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return Reply(response.status, json.loads(content) if content.startswith(b"{") else content)


def chat(gateway: Gateway, token: str, text: str, **fields: object) -> Reply:
    body = {"model": "any", "messages": [{"role": "user", "content": text}], **fields}
    return post(gateway, f"/e/{token}/v1/chat/completions", body)


@pytest.fixture
def fresh(lab: Any) -> Any:
    lab.engine.requests.clear()
    for kept in (lab.recorder.finished, lab.recorder.begun, lab.recorder.story):
        kept.clear()
    lab.recorder.delay_s = 0.0
    return lab


def test_a_chat_and_a_completion(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 9, POLICY)
    reply = chat(fresh.gateway, token, "20+3", temperature=0.7, max_tokens=5, stop="\n")
    assert (reply.status, reply.text) == (200, "23")
    assert reply.body["object"] == "chat.completion"
    assert reply.body["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert reply.body["choices"][0]["finish_reason"] == "stop"
    raw = post(fresh.gateway, f"/e/{token}/v1/completions", {"prompt": "1+1", "stop": ["a", "b"]})
    assert (raw.status, raw.text, raw.body["object"]) == (200, "2", "text_completion")
    chat_request, raw_request = fresh.engine.requests
    assert chat_request.sampling == Sampling(0.7, 1.0, 5, ("\n",))
    assert chat_request.adapter == "lora-1"
    assert raw_request.sampling == Sampling(0.0, 1.0, 40, ("a", "b"))
    totals = fresh.gateway.close_episode(token)
    assert (totals.calls, totals.prompt_tokens, totals.completion_tokens) == (2, 7, 4)
    models = post(fresh.gateway, f"/e/{fresh.gateway.open(2, 'p', 9, POLICY)}/v1/models", None, "GET")
    assert models.body["data"][0]["id"] == "adding-machine"


def test_tokens_admit_only_while_open(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    assert chat(fresh.gateway, token, "1+1").status == 200
    fresh.gateway.close_episode(token)
    for wrong in (token, "0" * 32, "%2e%2e"):
        reply = chat(fresh.gateway, wrong, "1+1")
        assert (reply.status, reply.error) == (401, "unknown_token")
    assert post(fresh.gateway, "/", {}).status == 404


def test_the_record_answers_a_repeated_run(fresh: Any) -> None:
    first = fresh.gateway.open(7, "p", 1, POLICY)
    texts = [chat(fresh.gateway, first, text).text for text in ("1+1", "1+1", "2+2")]
    fresh.gateway.close_episode(first)
    assert len(fresh.engine.requests) == 3, "equal requests of one Episode are different calls"
    assert len({request.seed for request in fresh.engine.requests}) == 3
    again = fresh.gateway.open(7, "p", 1, POLICY)
    assert [chat(fresh.gateway, again, text).text for text in ("2+2", "1+1", "1+1")] == [texts[2], *texts[:2]]
    assert len(fresh.engine.requests) == 3, "in another order, all from the record"
    assert chat(fresh.gateway, again, "1+1").status == 200
    assert len(fresh.engine.requests) == 4, "a third equal call is a new one"
    assert fresh.gateway.totals(again).replayed == 3
    other = fresh.gateway.open(8, "p", 1, POLICY)
    chat(fresh.gateway, other, "1+1")
    assert len(fresh.engine.requests) == 5, "another Episode's record is not ours"


class Slow:
    """An engine that answers when told to, each asking with a text of its own."""

    name = "slow"
    trainable = False

    def __init__(self) -> None:
        self.asked: list[Future[Completion]] = []
        self.told = threading.Event()

    def submit(self, request: ModelRequest) -> Future[Completion]:
        self.asked.append(Future())
        self.told.set()
        return self.asked[-1]

    def answer(self) -> None:
        for number, future in enumerate(self.asked):
            future.set_result(Completion(f"answer {number}", (1,), (2,), (-0.5,), "stop"))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("leaves", [False, True])
def test_a_call_in_flight_is_not_sent_again(fresh: Any, leaves: bool) -> None:
    engine = Slow()
    with Gateway(engine, fresh.recorder) as gateway, ThreadPoolExecutor(2) as pool:
        lost = gateway.open(1, "p", 0, POLICY)
        if leaves:  # as the sandbox does, with the call in the engine
            connection = UnixConnection(gateway.socket_path)
            connection.request("POST", f"/e/{lost}/v1/completions", b'{"prompt": "x"}')
            assert engine.told.wait(10)
            connection.close()
        else:
            first = pool.submit(post, gateway, f"/e/{lost}/v1/completions", {"prompt": "x"})
            assert engine.told.wait(10)
        gateway.close_episode(lost)
        retried = gateway.open(1, "p", 0, POLICY)
        again = pool.submit(post, gateway, f"/e/{retried}/v1/completions", {"prompt": "x"})
        while gateway.totals(retried).calls == 0:
            time.sleep(0.01)
        time.sleep(0.2)
        engine.answer()
        assert again.result(10).text == "answer 0"
        assert leaves or first.result(10).text == "answer 0"
        assert len(engine.asked) == 1
        totals = gateway.totals(retried)
        assert (totals.calls, totals.replayed, totals.failures) == (1, 1, 0)
        assert totals.waited_s >= 0.2, "waiting for an earlier asking is waiting for the model"
        assert [what for what, _ in fresh.recorder.story] == ["begin", "finish"]
        (kept,) = fresh.recorder.finished.values()
        assert kept.text == "answer 0"


def test_what_fails_in_flight_fails_for_all_who_wait_and_is_then_asked_afresh(fresh: Any) -> None:
    engine = Slow()
    with Gateway(engine, fresh.recorder) as gateway, ThreadPoolExecutor(2) as pool:
        tokens = [gateway.open(1, "p", 0, POLICY) for _ in range(2)]
        replies = []
        for token in tokens:
            replies.append(pool.submit(post, gateway, f"/e/{token}/v1/completions", {"prompt": "x"}))
            while gateway.totals(token).calls == 0:
                time.sleep(0.01)
        for attempt in range(2):
            while len(engine.asked) <= attempt:
                time.sleep(0.01)
            engine.asked[attempt].set_exception(EngineError("out of memory"))
        assert [reply.result(10).status for reply in replies] == [503, 503]
        assert [gateway.failures(token) for token in tokens] == [1, 1]
        engine.asked.clear()
        engine.told.clear()
        once_more = pool.submit(post, gateway, f"/e/{gateway.open(1, 'p', 0, POLICY)}/v1/completions", {"prompt": "x"})
        assert engine.told.wait(10)
        engine.answer()
        assert once_more.result(10).status == 200


@pytest.mark.parametrize("when", ["begin", "finish"])
def test_the_scaffold_gets_what_is_on_record(fresh: Any, when: str) -> None:
    """Another writer of the same record is faster: between our look and our intent, or while we draw."""
    theirs = Completion("theirs", (1,), (2,), (-0.5,), "stop")

    class Contested(type(fresh.recorder)):  # type: ignore[misc]
        def begin(self, key: CallKey, asked: Sampling, request: ModelRequest) -> Completion | None:
            if when == "begin":
                self.finished[key] = theirs
            return super().begin(key, asked, request)  # type: ignore[no-any-return]

        def finish(self, key: CallKey, completion: Completion, wall_s: float) -> Completion:
            self.finished.setdefault(key, theirs)
            return super().finish(key, completion, wall_s)  # type: ignore[no-any-return]

    with Gateway(fresh.engine, Contested()) as gateway:
        assert chat(gateway, gateway.open(1, "p", 0, POLICY), "1+1").text == "theirs"
    assert len(fresh.engine.requests) == (0 if when == "begin" else 1)


def test_intent_before_and_completion_before_the_reply(fresh: Any) -> None:
    fresh.recorder.delay_s = 0.3
    token = fresh.gateway.open(1, "p", 0, POLICY)
    began = time.monotonic()
    assert chat(fresh.gateway, token, "1+2").status == 200
    assert time.monotonic() - began >= 0.3
    assert [what for what, _ in fresh.recorder.story] == ["begin", "finish"]
    key, asked, request = fresh.recorder.begun[0]
    assert key == CallKey(1, key.digest, 0, "p")
    assert asked == request.sampling
    assert request.seed == call_seed(0, key.digest, 0)


def test_a_slow_record_blocks_nobody_else(fresh: Any) -> None:
    fresh.recorder.delay_s = 0.5
    tokens = [fresh.gateway.open(i, "p", 0, POLICY) for i in range(4)]
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda token: chat(fresh.gateway, token, "1+2"), tokens))
    assert {reply.status for reply in replies} == {200}
    assert time.monotonic() - began < 1.5


def test_training_forces_temperature_and_top_p_and_records_both(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, TRAIN)
    chat(fresh.gateway, token, "1+2", temperature=0, top_p=0.5, max_tokens=1000, stop=["x"])
    _, asked, request = fresh.recorder.begun[0]
    assert asked == Sampling(0.0, 0.5, 1000, ("x",))
    assert request.sampling == Sampling(1.0, 1.0, 40, ("x",))


def test_the_call_limit_holds_under_parallel_calls(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, CallPolicy(None, False, 5, 10))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: chat(fresh.gateway, token, f"{i}+1"), range(20)))
    assert sorted(reply.status for reply in replies) == [200] * 5 + [429] * 15
    assert {reply.error for reply in replies if reply.status == 429} == {"call_limit"}
    totals = fresh.gateway.totals(token)
    assert (totals.calls, totals.refused, len(fresh.engine.requests)) == (5, 15, 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not json", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "JSON object"),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "object with role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        (b'{"temperature": NaN}', "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a"] * 20}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n is not offered"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_what_cannot_be_answered_is_refused(fresh: Any, body: object, message: str) -> None:
    if isinstance(body, dict) and body and "messages" not in body:
        body = {"messages": [{"role": "user", "content": "1+1"}], **body}
    token = fresh.gateway.open(1, "p", 0, POLICY)
    reply = post(fresh.gateway, f"/e/{token}/v1/chat/completions", body)
    assert (reply.status, reply.error) == (400, "bad_request")
    assert message in reply.body["error"]["message"]
    assert not fresh.engine.requests
    totals = fresh.gateway.close_episode(token)
    assert (totals.calls, totals.invalid, totals.failures) == (0, 1, 0)


def test_a_body_has_a_bound(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    reply = chat(fresh.gateway, token, "x" * 2_000_000)
    assert (reply.status, reply.error) == (400, "bad_request")


def test_what_sdks_add_is_accepted(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    extra = {"n": 1, "stream": False, "presence_penalty": 0.0, "user": "u", "seed": 3, "response_format": None}
    parts = [{"role": "developer", "content": [{"type": "text", "text": "add "}, {"type": "text", "text": "4+4"}]}]
    reply = post(
        fresh.gateway, f"/e/{token}/v1/chat/completions", {"messages": parts, "max_completion_tokens": 3, **extra}
    )
    assert reply.text == "8"
    assert fresh.engine.requests[0].messages[0].role == "system"
    assert fresh.engine.requests[0].messages[0].content == "add 4+4"


def test_a_failing_engine_is_asked_once_more(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    assert chat(fresh.gateway, token, "FAIL 1 a").text == "1"
    assert [what for what, _ in fresh.recorder.story] == ["begin", "failed", "begin", "finish"]
    seeds = [request.seed for request in fresh.engine.requests]
    assert seeds[0] == seeds[1], "asked again, not drawn again"
    assert fresh.gateway.failures(token) == 0
    reply = chat(fresh.gateway, token, "FAIL 2 b")
    assert (reply.status, reply.error) == (503, "engine_failed")
    assert fresh.gateway.failures(token) == 1
    assert len(fresh.engine.requests) == 4
    assert chat(fresh.gateway, token, "FAIL 2 b").text == "2", "the next call is asked afresh"


def test_an_engines_refusal_is_the_scaffolds_fault(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    reply = chat(fresh.gateway, token, "REFUSE")
    assert (reply.status, reply.error) == (400, "bad_request")
    assert "too long" in reply.body["error"]["message"]
    assert [what for what, _ in fresh.recorder.story] == ["begin", "failed"]
    assert fresh.gateway.failures(token) == 0


class Broken:
    """An engine that raises what it should not, or never answers."""

    name = "broken"
    trainable = False

    def submit(self, request: ModelRequest) -> Future[Completion]:
        if "never" in (request.prompt or ""):
            return Future()
        raise ZeroDivisionError("a bug")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("prompt", ["raise", "never"])
def test_any_engine_fault_is_infrastructure(fresh: Any, prompt: str) -> None:
    with Gateway(Broken(), fresh.recorder, call_timeout_s=0.2) as gateway:
        token = gateway.open(1, "p", 0, POLICY)
        reply = post(gateway, f"/e/{token}/v1/completions", {"prompt": prompt})
        assert (reply.status, gateway.failures(token)) == (503, 1)


def test_a_failing_record_is_infrastructure(fresh: Any) -> None:
    class Full(type(fresh.recorder)):  # type: ignore[misc]
        def finish(self, key: CallKey, completion: Completion, wall_s: float) -> Completion:
            raise OSError("disk full")

    with Gateway(fresh.engine, Full()) as gateway:
        token = gateway.open(1, "p", 0, POLICY)
        reply = chat(gateway, token, "1+1")
        assert (reply.status, gateway.failures(token)) == (503, 1)


def test_calls_carry_their_problem(fresh: Any) -> None:
    of_program, of_episode = fresh.gateway.open(1, None, 0, POLICY), fresh.gateway.open(2, "own", 0, POLICY)
    body = {"prompt": "1+1"}
    for token in (of_program, of_episode):
        assert post(fresh.gateway, f"/e/{token}/p/other%20one/v1/completions", body).status == 200
        assert post(fresh.gateway, f"/e/{token}/v1/completions", body).status == 200
    problems = [(key.episode_id, key.problem_id) for key in fresh.recorder.finished]
    assert problems == [(1, "other one"), (1, None), (2, "own"), (2, "own")], (
        "an Episode cannot claim another's problem"
    )
    assert post(fresh.gateway, f"/e/{of_program}/p/{'x' * 300}/v1/completions", body).status == 400


def test_problems_of_equal_texts_find_their_own_answers_again(fresh: Any) -> None:
    seeds: list[dict[str, int]] = []
    for order in (["one", "two"], ["two", "one"]):
        token = fresh.gateway.open(1, None, 0, POLICY)
        for problem in order:
            assert post(fresh.gateway, f"/e/{token}/p/{problem}/v1/completions", {"prompt": "1+1"}).status == 200
        assert fresh.gateway.close_episode(token).replayed == len(seeds) * 2
        assert {(key.problem_id, key.occurrence) for key in fresh.recorder.finished} == {("one", 0), ("two", 0)}
        seeds.append({key.problem_id or "": request.seed for key, _, request in fresh.recorder.begun})
    assert len(set(seeds[0].values())) == 2, "each draws its own"
    digests = {key.digest for key in fresh.recorder.finished}
    own = fresh.gateway.open(2, "own", 0, POLICY)
    for path in ("p/one/v1", "v1", "p/two/v1"):
        post(fresh.gateway, f"/e/{own}/{path}/completions", {"prompt": "1+1"})
    keys = [key for key in fresh.recorder.finished if key.episode_id == 2]
    assert [key.occurrence for key in keys] == [0, 1, 2], "an Episode of one problem has one count, whatever the path"
    assert len({key.digest for key in keys} - digests) == 1


def test_waiting_is_measured_once_for_parallel_calls(fresh: Any) -> None:
    token = fresh.gateway.open(1, "p", 0, POLICY)
    assert fresh.gateway.totals(token).waited_s == 0
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: chat(fresh.gateway, token, f"{i}+1 SLOW 0.4"), range(3)))
    assert 0.4 <= fresh.gateway.totals(token).waited_s < 1.0


def test_stopping_with_a_call_in_flight(fresh: Any) -> None:
    gateway = Gateway(Broken(), fresh.recorder).start()
    token = gateway.open(1, "p", 0, POLICY)
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(post(gateway, f"/e/{token}/v1/completions", {"prompt": "never"}))
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    gateway.stop()
    thread.join(5)
    assert outcome
    assert time.monotonic() - began < 10
    assert not gateway.socket_path.exists()


def test_socket_paths(fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="too long"):
        Gateway(fresh.engine, fresh.recorder, tmp_path / ("x" * 120))
    with pytest.raises(GatewayError, match="cannot listen"):
        Gateway(fresh.engine, fresh.recorder, Path(tempfile.gettempdir()) / "no-such-folder" / "g").start()
    assert len(str(fresh.gateway.socket_path)) < 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["messages", "prompt", "temperature", "top_p", "max_tokens", "stop", "n", "stream", "role", "content"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from(["chat", "text"]))
def test_any_body_is_read_or_refused(body: Any, route: Any) -> None:
    try:
        asked = parse_asked(body, route, 40)
    except BadRequest:
        return  # any other exception is a bug
    assert bool(asked.messages) != (asked.prompt is not None)
    assert 0 <= asked.sampling.temperature <= 5
    assert asked_digest(asked) == asked_digest(parse_asked({**body, "model": "x", "user": "y"}, route, 40))


@given(st.integers(), st.text(max_size=64), st.integers(min_value=0))
def test_call_seeds_fit_every_generator(seed: int, digest: str, occurrence: int) -> None:
    assert 0 <= call_seed(seed, digest, occurrence) < 2**63
    assert call_seed(seed, digest, occurrence) != call_seed(seed, digest, occurrence + 1)
