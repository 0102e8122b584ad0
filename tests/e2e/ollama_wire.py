"""What Ollama 0.33 sends on each route, as forms that a recorded answer is held against.

A form is a type, a pattern for a string, a list of one form for arrays, or a dictionary: its keys in the order in which
they are written, with a question mark after those that are left out while their value is empty.
"""

from __future__ import annotations

import json
import re
from typing import Any

from recording import Exchange

JSON = "application/json; charset=utf-8"
LINES = "application/x-ndjson"

_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z")
_LOCAL = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?(Z|[+-]\d\d:\d\d)")
_MANIFEST = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"sha256:[0-9a-f]{64}")
_CALL = re.compile(r"call_[a-z0-9]{8}")
_REASON = re.compile(r"stop|length|load|unload")
_TAGGED = re.compile(r".+:[^/]+")
_NUMBER = (int, float)

_STATISTICS = {
    "total_duration?": int,
    "load_duration?": int,
    "prompt_eval_count?": int,
    "prompt_eval_duration?": int,
    "eval_count?": int,
    "eval_duration?": int,
}
_TOP = {"token": str, "logprob": _NUMBER, "bytes?": [int]}
_LOGPROBS = [{**_TOP, "top_logprobs?": [_TOP]}]
_CALLS = [{"id": _CALL, "function": {"index": int, "name": str, "arguments": dict}}]
_MESSAGE = {"role": re.compile("assistant"), "content": str, "thinking?": str, "tool_calls?": _CALLS}
_DETAILS = {
    "parent_model": str,
    "format": str,
    "family": str,
    "families": (list, type(None)),
    "parameter_size": str,
    "quantization_level": str,
}
_SIZES = {"context_length?": int, "embedding_length?": int}
_LISTED = {
    "name": _TAGGED,
    "model": _TAGGED,
    "modified_at": _LOCAL,
    "size": int,
    "digest": _MANIFEST,
    "details": {**_DETAILS, **_SIZES},
    "capabilities?": [str],
}
_RUNNING = {
    "name": _TAGGED,
    "model": _TAGGED,
    "size": int,
    "digest": _MANIFEST,
    "details": _DETAILS,
    "expires_at": _LOCAL,
    "size_vram": int,
    "context_length": int,
}
_SHOWN = {
    "license?": str,
    "modelfile?": str,
    "parameters?": str,
    "template?": str,
    "system?": str,
    "details": _DETAILS,
    "messages?": [{"role": str, "content": str}],
    "model_info": dict,
    "projector_info?": dict,
    "tensors?": [{"name": str, "type": str, "shape": [int]}],
    "capabilities?": [str],
    "modified_at": _LOCAL,
    "requires?": str,
}
_GENERATED = {
    "model": str,
    "created_at": _UTC,
    "response": str,
    "thinking?": str,
    "done": bool,
    "done_reason?": _REASON,
    "context?": [int],
    **_STATISTICS,
    "logprobs?": _LOGPROBS,
}
_CHATTED = {
    "model": str,
    "created_at": _UTC,
    "message": _MESSAGE,
    "done": bool,
    "done_reason?": _REASON,
    "logprobs?": _LOGPROBS,
    **_STATISTICS,
}
_PROGRESS = {"status": str, "digest?": _BLOB, "total?": int, "completed?": int}
_EMBEDDED = {
    "model": str,
    "embeddings": [[_NUMBER]],
    "total_duration?": int,
    "load_duration?": int,
    "prompt_eval_count?": int,
}

_FORMS: dict[str, Any] = {
    "/api/generate": _GENERATED,
    "/api/chat": _CHATTED,
    "/api/embed": _EMBEDDED,
    "/api/embeddings": {"embedding": [_NUMBER]},
    "/api/create": _PROGRESS,
    "/api/pull": _PROGRESS,
    "/api/push": _PROGRESS,
    "/api/show": _SHOWN,
    "/api/tags": {"models": [_LISTED]},
    "/api/ps": {"models": [_RUNNING]},
    "/api/version": {"version": re.compile(r"\d+\.\d+\.\d+")},
}
_PROGRESSES = ("/api/create", "/api/pull", "/api/push")


def hold_against_ollama(exchange: Exchange) -> None:
    """Fail unless the answer is written as Ollama writes it: type, framing, keys, their order, values."""
    kind = exchange.headers.get("content-type")
    assert exchange.complete
    if exchange.status >= 400:
        assert kind in (JSON, "application/json")
        _hold(json.loads(exchange.body), {"error": str}, exchange.path)
    elif exchange.path not in _FORMS:  # copy, delete and blobs answer with their status alone
        assert exchange.body == b""
    elif kind == LINES:
        assert exchange.headers["transfer-encoding"] == "chunked"
        objects = [_line(chunk) for chunk in exchange.chunks]
        for each in objects:
            _hold(each, _FORMS[exchange.path], exchange.path)
        _hold_stream(objects)
    else:
        assert kind == ("application/json" if exchange.path in _PROGRESSES else JSON)
        assert not exchange.body.endswith(b"\n")
        _hold(json.loads(exchange.body), _FORMS[exchange.path], exchange.path)


def _line(chunk: bytes) -> Any:
    """An object, sent as soon as it was there: a line of its own in a chunk of its own."""
    assert chunk.endswith(b"\n")
    assert chunk.count(b"\n") == 1
    return json.loads(chunk)


def _hold_stream(objects: list[Any]) -> None:
    """Only the last object ends the stream, and only it has statistics."""
    if "status" in objects[0]:
        assert [each["status"] == "success" for each in objects] == [False] * (len(objects) - 1) + [True]
        return
    assert [each["done"] for each in objects] == [False] * (len(objects) - 1) + [True]
    for each in objects[:-1]:
        assert not {"done_reason", "context", "eval_count", "total_duration"} & each.keys()
    assert {"done_reason", "eval_count", "total_duration"} <= objects[-1].keys()


def _hold(value: Any, form: Any, where: str) -> None:
    if isinstance(form, dict):
        assert isinstance(value, dict), where
        present = [name for key in form if (name := key.removesuffix("?")) in value]
        assert list(value) == present, where
        for key, inner in form.items():
            name = key.removesuffix("?")
            assert key != name or name in value, f"{where}.{name}"
            if name in value:
                assert key == name or value[name], f"{where}.{name} is empty"
                _hold(value[name], inner, f"{where}.{name}")
    elif isinstance(form, list):
        assert isinstance(value, list), where
        for item in value:
            _hold(item, form[0], f"{where}[]")
    elif isinstance(form, re.Pattern):
        assert isinstance(value, str), where
        assert form.fullmatch(value), f"{where}: {value!r}"
    else:
        assert isinstance(value, form), f"{where}: {value!r}"
