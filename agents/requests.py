"""What a Scaffold may ask the gateway, in OpenAI's words, and how an answer is worded back.

Pure functions: a JSON body becomes an `Asked`, or a `BadRequest` that says what to change. Fields that engines cannot
honour are refused rather than ignored, so that nobody believes in a penalty that was never applied.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import JsonValue

from agents.calls import CallPolicy
from agents.model import Completion, Message, Sampling

__all__ = ["Asked", "BadRequest", "asked_digest", "effective_sampling", "parse_asked", "reply"]

Route = Literal["chat", "text"]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_MESSAGES = 500
MAX_STOPS = 8
MAX_STOP_CHARS = 200
REFUSED: Mapping[str, tuple[JsonValue, ...]] = {
    # field -> the values that ask for nothing
    "stream": (None, False),
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "echo": (None, False),
}


class BadRequest(ValueError):
    """Raised when a body is no request that can be answered; the message is for the Scaffold's author."""


@dataclass(frozen=True)
class Asked:
    """A request as asked: one of `messages` and `prompt`, and the sampling with defaults filled in."""

    sampling: Sampling
    messages: tuple[Message, ...] = ()
    prompt: str | None = None


def parse_asked(body: JsonValue, route: Route, default_max_tokens: int) -> Asked:
    """Read a request body.

    Raises:
        BadRequest: something is missing, of the wrong type, out of range, or not offered.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for field, nothing in REFUSED.items():
        if body.get(field) not in nothing:
            raise BadRequest(f"{field} is not offered by this endpoint: leave it out")
    sampling = Sampling(
        temperature=_number(body, "temperature", 0.0, low=0.0, high=5.0),
        top_p=_number(body, "top_p", 1.0, low=1e-6, high=1.0),
        max_tokens=_max_tokens(body, default_max_tokens),
        stop=_stops(body.get("stop")),
    )
    if route == "chat":
        return Asked(sampling, messages=_messages(body.get("messages")))
    return Asked(sampling, prompt=_text(body.get("prompt"), "prompt"))


def effective_sampling(asked: Sampling, policy: CallPolicy) -> Sampling:
    """What is drawn instead of what was asked: tokens capped; in training at temperature 1 and top-p 1."""
    max_tokens = min(asked.max_tokens, policy.max_tokens_per_call)
    if policy.train:
        return Sampling(temperature=1.0, top_p=1.0, max_tokens=max_tokens, stop=asked.stop)
    return Sampling(asked.temperature, asked.top_p, max_tokens, asked.stop)


def asked_digest(asked: Asked, problem_id: str | None = None) -> str:
    """sha256 of the canonical request: equal for requests that ask the same, whatever SDK worded them.

    Args:
        asked: what was asked.
        problem_id: the problem that a program asks about, if it says so. Two problems may have equal texts, and each
            must find its own answer again; in an Episode of one problem there is nothing to tell apart.
    """
    fields = asdict(asked) if problem_id is None else asdict(asked) | {"problem_id": problem_id}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def reply(completion: Completion, route: Route, model: str, digest: str, created: int) -> dict[str, JsonValue]:
    """A completion as OpenAI words it."""
    choice: dict[str, JsonValue] = {"index": 0, "finish_reason": completion.finish_reason, "logprobs": None}
    if route == "chat":
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    asked_tokens, answered_tokens = len(completion.prompt_ids), len(completion.completion_ids)
    return {
        "id": f"{'chatcmpl' if route == 'chat' else 'cmpl'}-{digest[:24]}",
        "object": "chat.completion" if route == "chat" else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": asked_tokens,
            "completion_tokens": answered_tokens,
            "total_tokens": asked_tokens + answered_tokens,
        },
    }


def _number(body: Mapping[str, JsonValue], field: str, default: float, *, low: float, high: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"{field} must be a number")
    if not low <= value <= high:
        raise BadRequest(f"{field} must lie between {low:g} and {high:g}")
    return float(value)


def _max_tokens(body: Mapping[str, JsonValue], default: int) -> int:
    value = body.get("max_completion_tokens", body.get("max_tokens"))
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
        raise BadRequest("max_tokens must be a whole number of at least 1")
    return value


def _stops(value: JsonValue) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise BadRequest(f"stop must be a string or a list of at most {MAX_STOPS} strings")
    texts = tuple(_text(stop, "stop") for stop in stops)
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in texts):
        raise BadRequest(f"each stop must have 1 to {MAX_STOP_CHARS} characters")
    return texts


def _messages(value: JsonValue) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise BadRequest(f"messages must be a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise BadRequest("each message must be an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(f"a message's role must be one of {', '.join(ROLES)}")
        messages.append(Message(ROLES[role], _content(message.get("content"))))
    return tuple(messages)


def _content(value: JsonValue) -> str:
    """A message's content: a string, or SDK-style parts of which only text is understood."""
    if not isinstance(value, list):
        return _text(value, "content")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRequest("content parts must be of type text")
        texts.append(_text(part.get("text"), "text"))
    return "".join(texts)


def _text(value: JsonValue, field: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{field} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{field} holds half a surrogate pair: send valid Unicode") from error
    return value
