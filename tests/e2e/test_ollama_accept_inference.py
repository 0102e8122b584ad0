"""Rows 14 to 39 of the acceptance list: generate, chat, embed."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from acceptance_server import FRANCE, GREEDY, PARIS, TOOL, create, post, refused, rendered, streamed, upload, whole
from encoders import write_encoder
from serving import serving

pytestmark = pytest.mark.e2e
QUESTION = "What is the capital of France?"
STATISTICS = [
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
]
PLAIN = "{{ if .System }}S:{{ .System }} {{ end }}U:{{ .Prompt }} A:{{ .Response }}"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CHAT_AND_GENERATE = [("generate", {"prompt": QUESTION}), ("chat", {"messages": FRANCE})]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the demo and `plain`, which has a Go template that can do nothing but answer."""
    with (
        serving(tmp_path_factory.mktemp("inference"), OLLAMA_GO_TEMPLATE="1") as server,
        httpx.Client(base_url=server.url, timeout=60) as opened,
    ):
        create(opened, "plain", **{"from": "demo", "template": PLAIN})
        told = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        create(opened, "told", **{"from": "demo", "system": "MODEL", "messages": told})
        yield opened


def answer(reply: dict[str, Any]) -> str:
    """The text of a reply of either route."""
    return str(reply["message"]["content"] if "message" in reply else reply["response"])


def test_row_14_stream(client: httpx.Client) -> None:
    """The default: tokens as they come, statistics at the end."""
    *parts, last = streamed(client, "generate", prompt=QUESTION)
    assert len(parts) > 3
    assert all(list(part) == ["model", "created_at", "response", "done"] and not part["done"] for part in parts)
    assert "".join(part["response"] for part in parts) == PARIS
    assert list(last) == ["model", "created_at", "response", "done", "done_reason", "context", *STATISTICS]
    assert all(isinstance(last[name], int) and last[name] > 0 for name in STATISTICS)
    assert all(isinstance(token, int) for token in last["context"])


def test_row_15_whole(client: httpx.Client) -> None:
    """One object, without a newline."""
    got = post(client, "generate", prompt=QUESTION, stream=False, think=False, options=GREEDY)
    assert got.headers["content-type"] == "application/json; charset=utf-8"
    assert not got.text.endswith("\n")
    assert (got.json()["response"], got.json()["done_reason"]) == (PARIS, "stop")


@pytest.mark.parametrize("keep_alive", [0, "0", "0s"])
def test_row_16_load_and_unload(client: httpx.Client, keep_alive: Any) -> None:
    """Nothing to say loads; nothing to say and to keep unloads, also what is not loaded."""
    loaded = post(client, "generate", prompt="").json()
    assert list(loaded) == ["model", "created_at", "response", "done", "done_reason"]
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    for _ in range(2):
        unloaded = post(client, "generate", keep_alive=keep_alive).json()
        assert (unloaded["response"], unloaded["done_reason"]) == ("", "unload")
    for _ in range(100):
        if client.get("/api/ps").json() == {"models": []}:
            return
        time.sleep(0.05)
    pytest.fail("the model stayed")


@pytest.mark.parametrize(
    ("keep_alive", "text"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("abc", 'time: invalid duration "abc"'),
        (True, "Unsupported type: 'bool'"),
    ],
)
def test_row_16_keep_alive_that_means_nothing(client: httpx.Client, keep_alive: Any, text: str) -> None:
    """In the words of Go's own parser."""
    assert refused(post(client, "generate", prompt="x", keep_alive=keep_alive)) == (400, text)


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("", 404, "model '' not found"),
        ("a/b/c/d", 400, "invalid model name"),
        ("nope", 404, "model 'nope' not found"),
        ("Nope:X", 404, "model 'Nope:X' not found"),
        ("demo:cloud", 403, "ollama cloud is disabled: remote model is unavailable"),
        ("demo:local:cloud", 400, 'use either :local or :cloud, not both: "demo:local:cloud"'),
    ],
)
def test_row_17_names(client: httpx.Client, name: str, status: int, text: str) -> None:
    """Each refusal in Ollama's words."""
    assert refused(post(client, "generate", model=name, prompt="x")) == (status, text)


def test_row_18_raw(client: httpx.Client) -> None:
    """The prompt as it is, no context, and no company."""
    assert rendered(client, "generate", prompt="as <it> is", raw=True) == "as <it> is"
    assert "context" not in whole(client, "generate", prompt="as it is", raw=True)
    for extra in ({"system": "s"}, {"template": "t"}, {"context": [1]}):
        got = refused(post(client, "generate", prompt="x", raw=True, **extra))
        assert got == (400, "raw mode does not support template, system, or context")
    assert post(client, "generate", prompt="x", raw=True, context=[], stream=False, options=GREEDY).status_code == 200


def test_row_19_prompts(client: httpx.Client) -> None:
    """Who has the word about system, template, messages and context."""
    assert rendered(client, "generate", model="plain", prompt="p", system="s") == "S:s U:p A:"
    assert rendered(client, "generate", prompt="p", template="<{{ .Prompt }}>") == "<p>"
    told = rendered(client, "generate", model="told", prompt="p")
    assert [told.count(word) for word in ("MODEL", "Hi", "Ho")] == [1, 1, 1]
    asked = rendered(client, "generate", model="told", prompt="p", system="ASKED")
    assert "ASKED" in asked
    assert "MODEL" not in asked
    assert "Ho" not in rendered(client, "generate", model="told", prompt="p", context=[])
    first = whole(client, "generate", prompt=QUESTION)
    further = rendered(client, "generate", prompt="p", context=first["context"])
    assert PARIS in further
    assert further.endswith(rendered(client, "generate", prompt="p"))


def test_row_20_suffix(client: httpx.Client) -> None:
    """Filled in by models that can, as the demo always can."""
    got = rendered(client, "generate", prompt="a", suffix="b")
    assert got == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert rendered(client, "generate", model="plain", prompt="a", suffix="b") == got  # the vocabulary's own tokens


def test_row_21_images(client: httpx.Client) -> None:
    """Named in the prompt; what is no base64 is refused."""
    prefixed = ["data:image/png;base64,AAAA"]
    assert post(client, "generate", prompt="x", images=prefixed).status_code == 400
    bad = [{"role": "user", "content": "x", "images": ["*"]}]
    assert post(client, "chat", messages=bad).status_code == 400
    good = [{"role": "user", "content": "see [img] and", "images": ["aGVsbG8="]}]
    assert rendered(client, "chat", model="plain", messages=good) == "U:see [img-0] and A:"
    assert rendered(client, "generate", model="plain", prompt="x", images=["aGVsbG8="]) == "U:[img-0]x A:"


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_22_format(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """JSON, a schema, and neither."""
    got = json.loads(answer(whole(client, path, **body, format=SCHEMA)))
    assert isinstance(got["n"], int)
    options = {"temperature": 0, "num_predict": 300}
    reply = whole(client, path, **body, format="json", options=options)
    assert answer(reply).lstrip().startswith("{")
    assert reply["done_reason"] == "length" or isinstance(json.loads(answer(reply)), dict)
    status, text = refused(post(client, path, **body, format="xml"))
    assert (status, text) == (500, 'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object')
    assert answer(whole(client, path, **body, format="")) == PARIS


def test_row_22_format_and_thinking(client: httpx.Client) -> None:
    """A schema binds the answer, not the thought."""
    reply = whole(client, "chat", messages=FRANCE, think=True, format=SCHEMA)
    assert "capital" in reply["message"]["thinking"]
    json.loads(reply["message"]["content"])


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_23_think(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """The default on models that think, refused on others, and only known words."""
    for think in (None, True, "low", "high", "max"):
        reply = whole(client, path, **body, think=think)
        assert "capital" in reply.get("message", reply)["thinking"], think
        assert answer(reply) == PARIS
    assert "thinking" not in json.dumps(whole(client, path, **body, think=False))
    got = refused(post(client, path, model="plain", **body, think=True))
    assert got == (400, '"plain" does not support thinking')
    whole(client, path, model="plain", **body, think=False)
    words = '"high", "medium", "low", "max", true, or false'
    assert refused(post(client, path, **body, think="x")) == (400, f'invalid think value: "x" (must be {words})')
    assert refused(post(client, path, **body, think=1)) == (400, f"think must be a boolean or string ({words})")


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_24_logprobs(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """One entry for each token, with its bytes and as many alternatives as asked for."""
    entries = whole(client, path, **body, logprobs=True, top_logprobs=2)["logprobs"]
    assert "".join(entry["token"] for entry in entries).startswith(PARIS)
    for entry in entries:
        assert bytes(entry.get("bytes", [])).decode() == entry["token"]
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 2
        assert tops == sorted(tops, reverse=True)
        assert entry["logprob"] <= 0
    assert "top_logprobs" not in whole(client, path, **body, logprobs=True)["logprobs"][0]
    assert "logprobs" not in whole(client, path, **body, top_logprobs=2)
    for number in (-1, 21):
        got = refused(post(client, path, **body, top_logprobs=number))
        assert got == (400, "top_logprobs must be between 0 and 20")
    assert post(client, path, **body, top_logprobs=1.0).status_code == 400


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_25_debug(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """One object with the prompt."""
    got = post(client, path, **body, _debug_render_only=True)
    assert got.headers["content-type"].startswith("application/json")
    assert (got.json()["done"], answer(got.json())) == (False, "")
    assert QUESTION in got.json()["_debug_info"]["rendered_template"]


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_26_options(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """A request's before the model's; unknown ones ignored; wrong types told."""
    create(client, "short", **{"from": "demo", "parameters": {"num_predict": 2, "temperature": 0}})
    assert whole(client, path, model="short", **body, options=None)["eval_count"] == 2
    assert whole(client, path, model="short", **body, options={"num_predict": 3.9})["eval_count"] == 3
    whole(client, path, **body, options={"mirostat": "x", "nonsense": {}, "num_predict": 1, "seed": None})
    for name, value, type_ in [
        ("num_ctx", "1", "of type integer"),
        ("use_mmap", 1, "of type boolean"),
        ("temperature", "0", "of type float32"),
        ("stop", "x", "of type array"),
        ("stop", [1], "of an array of strings"),
    ]:
        got = refused(post(client, path, **body, options={name: value}))
        assert got == (500, f'option "{name}" must be {type_}')
    assert answer(whole(client, path, **body, options={**GREEDY, "stop": [" of"]})) == "The capital"


@pytest.mark.parametrize(("path", "body"), CHAT_AND_GENERATE)
def test_row_27_ends(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Cut off or done."""
    cut = whole(client, path, **body, options={"num_predict": 2})
    assert (cut["done_reason"], cut["eval_count"]) == ("length", 2)
    assert whole(client, path, **body)["done_reason"] == "stop"


def test_row_28_failures_before_the_stream(client: httpx.Client) -> None:
    """Their real status, and no stream."""
    got = post(client, "chat", messages=FRANCE, options={"stop": "x"})
    assert (got.status_code, list(got.json())) == (500, ["error"])
    got = post(client, "generate", prompt="x", template="{{ .Nope.x")
    assert got.status_code == 500
    assert "template" in refused(got)[1]


def test_row_29_disconnect(client: httpx.Client) -> None:
    """Who leaves makes room: what comes next does not wait for it."""
    options = {"num_predict": 3000, "temperature": 1.5}
    for _ in range(3):
        body = {"model": "demo", "prompt": "Tell me a story.", "raw": True, "options": options}
        with client.stream("POST", "/api/generate", json=body) as stream:
            next(stream.iter_lines())
    began = time.monotonic()
    assert answer(whole(client, "chat", messages=FRANCE)) == PARIS
    assert time.monotonic() - began < 5


def test_row_30_chat_without_messages(client: httpx.Client) -> None:
    """Loads and unloads; a model has to be named."""
    for keep_alive, reason in ((60, "load"), (0, "unload")):
        got = post(client, "chat", keep_alive=keep_alive).json()
        assert list(got) == ["model", "created_at", "message", "done", "done_reason"]
        assert (got["message"], got["done_reason"]) == ({"role": "assistant", "content": ""}, reason)
    assert refused(post(client, "chat", model="")) == (400, "model is required")
    assert refused(post(client, "chat", model="nope", messages=FRANCE)) == (404, "model 'nope' not found")


def test_row_31_messages(client: httpx.Client) -> None:
    """Roles in any case, contents as strings, the model's own messages first."""
    loud = [{"role": "USER", "content": "u"}]
    assert rendered(client, "chat", messages=loud) == rendered(
        client, "chat", messages=[{"role": "user", "content": "u"}]
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert post(client, "chat", messages=parts).status_code == 400
    told = rendered(client, "chat", model="told", messages=loud)
    assert told.index("MODEL") < told.index("Hi") < told.index("Ho") < told.rindex("user\nu")
    asked = rendered(client, "chat", model="told", messages=[{"role": "system", "content": "ASKED"}, *loud])
    assert "MODEL" not in asked
    assert "Ho" in asked


@pytest.mark.parametrize("stream", [True, False])
def test_row_32_tool_calls(client: httpx.Client, stream: bool) -> None:
    """Whole calls with an id, an index and arguments as an object."""
    body = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "tools": [TOOL]}
    parts = streamed(client, "chat", **body) if stream else [whole(client, "chat", **body)]
    calls = [call for part in parts for call in part["message"].get("tool_calls", [])]
    assert re.fullmatch("call_[a-z0-9]{8}", calls[0].pop("id"))
    assert calls == [{"function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}}]
    assert parts[-1]["done_reason"] == "stop"


def test_row_33_tool_results(client: httpx.Client) -> None:
    """By name or id; arguments are an object here too."""
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", **call}]},
        {"role": "tool", "content": "sunny", "tool_name": "get_weather", "tool_call_id": "call_1"},
    ]
    prompt = rendered(client, "chat", messages=talk, tools=[TOOL])
    assert '"arguments": {"city": "Paris"}' in prompt
    assert "<tool_response>\nsunny\n" in prompt
    talk[1]["tool_calls"] = [{"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]
    assert post(client, "chat", messages=talk).status_code == 400


def test_row_34_missing_capabilities(client: httpx.Client, tmp_path: Path) -> None:
    """Told with the model's full name."""
    got = refused(post(client, "chat", model="plain", messages=FRANCE, tools=[TOOL]))
    assert got == (400, "registry.ollama.ai/library/plain:latest does not support tools")
    assert whole(client, "chat", model="plain", messages=FRANCE, tools=[])["done"]
    digest = upload(client, write_encoder(tmp_path / "encoder.gguf").read_bytes())
    create(client, "encoder", files={"encoder.gguf": digest})
    assert refused(post(client, "chat", model="encoder", messages=FRANCE)) == (400, '"encoder" does not support chat')
    assert refused(post(client, "generate", model="encoder", prompt="x")) == (
        400,
        '"encoder" does not support generate',
    )
    assert len(post(client, "embed", model="encoder", input=["a", "b"]).json()["embeddings"]) == 2


@pytest.mark.parametrize("think", [True, False])
def test_row_35_every_object_has_a_message(client: httpx.Client, think: bool) -> None:
    """Role and content, also in the last one and those that think."""
    parts = streamed(client, "chat", messages=FRANCE, think=think)
    assert all(part["message"]["role"] == "assistant" for part in parts)
    assert all(isinstance(part["message"]["content"], str) for part in parts)
    assert all({"model", "created_at", "done"} <= set(part) for part in parts)


def test_row_36_truncation(client: httpx.Client) -> None:
    """System and the newest messages stay; without truncation it is an error."""
    old = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Yes."}]
    talk = [{"role": "system", "content": "SYSTEM"}, *old, *FRANCE]
    options = {**GREEDY, "num_ctx": 256}
    prompt = rendered(client, "chat", messages=talk, options=options)
    assert "SYSTEM" in prompt
    assert QUESTION in prompt
    assert "word word" not in prompt
    assert whole(client, "chat", messages=talk, options=options)["prompt_eval_count"] < 256
    assert refused(post(client, "chat", messages=talk, options=options, truncate=False))[0] == 400
    for path, body in (("chat", {"messages": old[:1]}), ("generate", {"prompt": "word " * 300})):
        status, text = refused(post(client, path, **body, options=options, shift=False))
        assert status == 400
        assert text.startswith("the prompt is longer than the context length currently available to the model; ")
    full = {"temperature": 1, "num_ctx": 64, "num_predict": 200}
    unshifted = whole(client, "generate", prompt="Once upon", raw=True, options=full, shift=False)
    assert unshifted["done_reason"] in {"length", "stop"}
    assert unshifted["eval_count"] <= 64


def test_row_37_thinking_is_kept_apart(client: httpx.Client) -> None:
    """No tag in any content."""
    parts = streamed(client, "chat", messages=FRANCE, think=True)
    content = "".join(part["message"]["content"] for part in parts)
    thinking = "".join(part["message"].get("thinking", "") for part in parts)
    assert content == PARIS
    assert "think>" not in thinking


def test_row_38_embed(client: httpx.Client) -> None:
    """A row of length one for each text, in order."""
    both = post(client, "embed", input=["a", "some other text"]).json()
    single = [post(client, "embed", input=text).json() for text in ("a", "some other text")]
    for row, alone in zip(both["embeddings"], single, strict=True):
        assert math.isclose(math.hypot(*row), 1, rel_tol=1e-4)
        assert row == pytest.approx(alone["embeddings"][0], abs=1e-3)
    assert both["prompt_eval_count"] == sum(alone["prompt_eval_count"] for alone in single)
    nothing: list[dict[str, Any]] = [{}, {"input": ""}, {"input": []}]
    for empty in nothing:
        assert post(client, "embed", **empty).json() == {"model": "demo", "embeddings": []}
    cut = post(client, "embed", input="a", dimensions=8).json()["embeddings"][0]
    assert (len(cut), round(math.hypot(*cut), 4)) == (8, 1)
    assert len(post(client, "embed", input="a", dimensions=9999).json()["embeddings"][0]) == 192
    long = {"input": "word " * 600, "options": {"num_ctx": 256}}
    assert post(client, "embed", **long).status_code == 200
    assert refused(post(client, "embed", **long, truncate=False)) == (
        400,
        "the input length exceeds the context length",
    )
    assert refused(post(client, "embed", model="", input="a")) == (404, "model '' not found")
    assert refused(post(client, "embed", input=1)) == (400, "invalid input type")
    assert refused(post(client, "embed", model="no", input="a")) == (
        404,
        'model "no" not found, try pulling it first',
    )


def test_row_39_embeddings(client: httpx.Client) -> None:
    """The old form: one vector."""
    assert len(post(client, "embeddings", prompt="a").json()["embedding"]) == 192
    assert post(client, "embeddings", prompt="").json() == {"embedding": []}
    long = {"prompt": "word " * 600, "options": {"num_ctx": 256}}
    assert refused(post(client, "embeddings", **long)) == (500, "the input length exceeds the context length")
    assert refused(post(client, "embeddings", model="", prompt="a")) == (400, "model is required")
    assert refused(post(client, "embeddings", model="no", prompt="a")) == (
        404,
        'model "no" not found, try pulling it first',
    )
