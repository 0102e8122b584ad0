"""Bodies as Go's decoder reads them."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat.ollama.decode import decode_chat, decode_generate, decode_show
from compat.ollama.gojson import decode_first, encode, quote
from engines.errors import BadRequest
from engines.request import FOREVER


def refusal(data: bytes | dict[str, Any]) -> str:
    """What a chat body is refused with."""
    with pytest.raises(BadRequest) as refused:
        decode_chat(data if isinstance(data, bytes) else json.dumps(data).encode())
    return refused.value.message


@pytest.mark.parametrize("data", [b"", b" \r\n\t "])
def test_nothing_is_no_body(data: bytes) -> None:
    """White space is nothing too."""
    assert refusal(data) == "missing request body"


@pytest.mark.parametrize("data", [b"{}", b"null", b' {"model":null,"options":null,"images":null} '])
def test_null_is_absent(data: bytes) -> None:
    """A body of nothing but nulls has every default."""
    body = decode_generate(data)
    assert (body.model, body.stream, body.truncate, body.options, body.context) == ("", True, True, {}, None)


@pytest.mark.parametrize("rest", [b"", b"garbage", b'{"model":"b"}', b"\n\x00"])
def test_only_the_first_value_counts(rest: bytes) -> None:
    """What follows is not even looked at."""
    assert decode_chat(b'{"model":"a"} ' + rest).model == "a"


def test_keys_match_exactly_or_in_another_case() -> None:
    """At every level that has a shape; a null does not undo what was said."""
    body = decode_chat(b'{"Model":"m","MODEL":null,"Messages":[{"Role":"user","CONTENT":"hi"}],"options":{"Top_K":1}}')
    assert (body.model, body.messages[0].role, body.messages[0].content) == ("m", "user", "hi")
    assert body.options == {"Top_K": 1}


def test_unknown_fields_are_ignored() -> None:
    """At every level."""
    body = decode_chat(b'{"x":1,"messages":[{"name":2,"tool_calls":[{"type":"function","function":{"name":"f"}}]}]}')
    assert (body.messages[0].tool_calls[0].function.name, body.messages[0].tool_calls[0].function.arguments) == (
        "f",
        {},
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{", "unexpected EOF"),
        (b'{"model":"x', "unexpected EOF"),
        (b"tru", "unexpected EOF"),
        (b"model=x", "invalid character 'm' looking for beginning of value"),
        (b"\xef\xbb\xbf{}", "invalid character '\u00ef' looking for beginning of value"),
        (b"'x'", "invalid character '\\'' looking for beginning of value"),
        (b"{model:1}", "invalid character 'm' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 "b"}', "invalid character '\"' after object key:value pair"),
        (b"[1 2]", "invalid character '2' after array element"),
        (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        (b'{"a":1e999}', "json: cannot unmarshal number into Go value of type float64"),
        (b"[" * 100_000, "exceeded max depth"),
    ],
)
def test_malformed_json_is_refused_in_go_s_words(data: bytes, text: str) -> None:
    """As far as we know what is wrong."""
    assert refusal(data) == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"content": ["a"]}]}, "array into Go struct field ChatRequest.messages.content of type string"),
        ({"messages": {}}, "object into Go struct field ChatRequest.messages of type []interface {}"),
        ({"model": 1}, "number into Go struct field ChatRequest.model of type string"),
        ({"stream": "x"}, "string into Go struct field ChatRequest.stream of type bool"),
        ({"options": []}, "array into Go struct field ChatRequest.options of type map[string]interface {}"),
        ({"top_logprobs": 1.0}, "number into Go struct field ChatRequest.top_logprobs of type int"),
        (
            {"messages": [{"tool_calls": [{"function": {"arguments": "{}"}}]}]},
            (
                "string into Go struct field ChatRequest.messages.tool_calls.function.arguments of type "
                "map[string]interface {}"
            ),
        ),
        ({"messages": [{"images": [1]}]}, "number into Go struct field ChatRequest.messages.images of type string"),
    ],
)
def test_a_wrong_type_names_the_field(body: dict[str, Any], text: str) -> None:
    """In Go's notation, which has no indices."""
    assert refusal(body) == f"json: cannot unmarshal {text}"


def test_a_body_that_is_no_object_is_refused() -> None:
    """There is no field to name."""
    assert refusal(b"[]") == "json: cannot unmarshal array into Go value of type api.ChatRequest"


@pytest.mark.parametrize("data", [b'{"context":[1.0]}', b'{"context":[-1]}', b'{"context":[4294967296]}'])
def test_a_context_holds_token_ids_only(data: bytes) -> None:
    """Nothing that an engine would have to guess at."""
    with pytest.raises(BadRequest, match="context"):
        decode_generate(data)


LEVELS = '"high", "medium", "low", "max", true, or false'


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"think": "x<"}, f'invalid think value: "x<" (must be {LEVELS})'),
        ({"think": ""}, f'invalid think value: "" (must be {LEVELS})'),
        ({"think": 1}, f"think must be a boolean or string ({LEVELS})"),
        ({"think": ["high"]}, f"think must be a boolean or string ({LEVELS})"),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
        ({"keep_alive": "300"}, 'time: missing unit in duration "300"'),
        ({"keep_alive": True}, "Unsupported type: 'bool'"),
        ({"messages": [{"images": ["data:image/png;base64,QQ=="]}]}, "illegal base64 data at input byte 4"),
        ({"messages": [{"images": ["QUI"]}]}, "illegal base64 data at input byte 3"),
        ({"messages": [{"images": ["Q=Q="]}]}, "illegal base64 data at input byte 1"),
    ],
)
def test_a_wrong_value_has_ollama_s_text(body: dict[str, Any], text: str) -> None:
    """These are checked while the body is read, before the model's name is looked at."""
    assert refusal(body) == text


def test_values_are_read() -> None:
    """Images with line breaks, keep-alives in every form, think levels."""
    image = base64.b64encode(b"x" * 100).decode()
    body = decode_generate(
        json.dumps({"images": [image[:60] + "\r\n" + image[60:], ""], "keep_alive": -1, "think": "max"}).encode()
    )
    assert (body.images, body.keep_alive, body.think) == ([b"x" * 100, b""], FOREVER, "max")
    assert decode_chat(b'{"keep_alive":"1m","think":false}').keep_alive == 60.0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'"a\xffb"', "a\ufffdb"),
        (b'"\\ud83d"', "\ufffd"),
        (b'"x\\uDE00y"', "x\ufffdy"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\ud83d\\ud83d\\ude00"', "\ufffd\U0001f600"),
        (b'"\\\\ud83d"', "\\ud83d"),
    ],
)
def test_what_is_no_unicode_becomes_a_replacement_character(data: bytes, text: str) -> None:
    """JavaScript cuts strings between surrogates; such a body must still be answered."""
    assert decode_first(data) == text


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text() | st.floats() | st.integers(), st.lists).map(repr).map(str.encode)
)
def test_any_bytes_are_a_value_or_a_bad_request(data: bytes) -> None:
    """And a value can be written again."""
    try:
        value = decode_first(data)
    except BadRequest:
        return
    encode(value)


@given(
    st.dictionaries(
        st.sampled_from(["model", "name", "verbose", "system", "options", "OPTIONS", "x"]),
        st.none() | st.text() | st.booleans() | st.dictionaries(st.text(), st.integers()),
    )
)
def test_any_object_is_a_show_body_or_a_bad_request(body: dict[str, Any]) -> None:
    """Never another exception."""
    try:
        decode_show(json.dumps(body).encode())
    except BadRequest as refused:
        assert refused.message.startswith("json: cannot unmarshal")  # noqa: PT017  either end is right


@given(st.text())
def test_encoding_is_json_without_markup(text: str) -> None:
    """What is escaped reads as what it was."""
    data = encode({"a": text})
    assert json.loads(data) == {"a": text}
    assert not set("<>&\u2028\u2029") & set(data.decode())


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('a"b\\', r'"a\"b\\"'),
        ("\n\t\x00\x7f", r'"\n\t\x00\x7f"'),
        ("\u00e9\u200b\U000e0001", '"\u00e9\\u200b\\U000e0001"'),
    ],
)
def test_quoting_is_go_s(text: str, quoted: str) -> None:
    """As `%q` writes it."""
    assert quote(text) == quoted
