import json
from typing import Any

import pytest

from compat.openai.decode import decode_chat, decode_completion
from engines.errors import BadRequest

USER = {"role": "user", "content": "hi"}


def refusal(body: Any) -> BadRequest:
    """What decoding this chat body raises."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(BadRequest) as caught:
        decode_chat(data)
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nope",
        b"[]",
        b"null",
        b'"x"',
        b"7",
        b"1e999",
        b"9" * 9999,
        b'{"model": "\xff"}',
        b'{"a": NaN}',
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json_object_has_neither_param_nor_code(data: bytes) -> None:
    """Empty, malformed, wrongly encoded, too deep, or JSON of another kind: 400 with null param and code."""
    error = refusal(data)
    assert (error.status, error.param, error.reason) == (400, None, None)


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 1}, "model", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [None]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [USER, {"role": "user", "content": 3}]}, "messages[1].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
            "messages[0].content[0].type",
            "missing_required_parameter",
        ),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 9}, "n", "integer_above_max_value"),
        ({"n": "2"}, "n", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
        ({"presence_penalty": -3}, "presence_penalty", "decimal_below_min_value"),
        ({"top_k": 2**31}, "top_k", "integer_above_max_value"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"response_format": {"type": "sound"}}, "response_format.type", "invalid_value"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
            "tools[0].function.name",
            "invalid_value",
        ),
    ],
)
def test_a_fault_is_named_by_path_and_code(change: dict[str, Any], param: str, reason: str) -> None:
    """Each row of the error table that decoding can tell."""
    error = refusal({"model": "m", "messages": [USER]} | change)
    assert (error.param, error.reason) == (param, reason)
    assert param in error.message


def test_a_number_that_no_float_can_hold_is_refused() -> None:
    """1e999 is JSON but no number that anything here could use."""
    assert (
        refusal(b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}').param == "temperature"
    )


def test_unknown_fields_nulls_and_a_byte_order_mark_are_accepted() -> None:
    """Vendor extras are ignored at every level, and null means absent."""
    message: dict[str, Any] = {"role": "user", "content": "hi", "name": None, "extra": {}}
    body: dict[str, Any] = {
        "model": "m",
        "messages": [message],
        "stop": None,
        "tools": None,
        "stream_options": None,
        "provider": {},
    }
    decoded = decode_chat(b"\xef\xbb\xbf" + json.dumps(body).encode())
    assert (decoded.model, decoded.messages[0].content, decoded.stop) == ("m", "hi", None)


@pytest.mark.parametrize("prompt", [None, "", "a", ["a", "b"], [1, 2], [[1], [2]], ["a", [1]]])
def test_every_form_of_a_prompt_is_decoded(prompt: Any) -> None:
    """Text, token ids, and lists of either."""
    assert decode_completion(json.dumps({"model": "m", "prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize("prompt", [{}, 1, [None], [1.5], [-1], [2**31], [["a"]]])
def test_every_other_prompt_is_refused(prompt: Any) -> None:
    """The path leads to the fault."""
    with pytest.raises(BadRequest) as caught:
        decode_completion(json.dumps({"model": "m", "prompt": prompt}).encode())
    assert (caught.value.param or "").startswith("prompt")
