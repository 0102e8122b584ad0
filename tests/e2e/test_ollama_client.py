"""Every method of Ollama's Python package, both clients unmodified, and the wire below them as Ollama writes it."""

from __future__ import annotations

import asyncio
import base64
import inspect
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from ollama_wire import JSON, LINES, hold_against_ollama
from recording import Exchange, Recorder, recording
from registries import docker_registry, needs_registry
from serving import Server, serving

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
SURE = {"temperature": 0}
COUNTRY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
}
METHODS = {
    *("chat", "close", "copy", "create", "create_blob", "delete", "embed", "embeddings", "generate", "list"),
    *("ps", "pull", "push", "show", "systemone", "web_fetch", "web_search"),
}


def get_weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return f"sunny in {city}"


class Talk:
    """Either client, asked in one way: streams come back as lists."""

    def __init__(self, url: str, kind: str, **settings: Any) -> None:
        self._runner = asyncio.Runner() if kind == "async" else None
        self._client: Any = (ollama.AsyncClient if self._runner else ollama.Client)(url, **settings)

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call that method and wait for all it says."""
        asked = getattr(self._client, method)
        if self._runner:
            return self._runner.run(_all_of(asked(*args, **kwargs)))
        said = asked(*args, **kwargs)
        return list(said) if inspect.isgenerator(said) else said

    def close(self) -> None:
        """Close the client by its own method, and what it ran in."""
        self("close")
        if self._runner:
            self._runner.close()


async def _all_of(asked: Any) -> Any:
    said = await asked
    return [part async for part in said] if inspect.isasyncgen(said) else said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server; each test leaves it with the demo model alone."""
    with serving(tmp_path_factory.mktemp("house")) as running:
        yield running


@pytest.fixture
def wire(server: Server) -> Iterator[Recorder]:
    """The recorded way to it; everything that went over it must have been as from Ollama."""
    with recording(server.url) as recorder:
        yield recorder
        for exchange in recorder.exchanges():
            if exchange.path != "/v1/systemone":
                hold_against_ollama(exchange)


@pytest.fixture(params=["sync", "async"])
def talk(request: pytest.FixtureRequest, wire: Recorder) -> Iterator[Talk]:
    """The synchronous client, then the asynchronous one."""
    with closing(Talk(wire.url, request.param)) as opened:
        yield opened


def last(wire: Recorder) -> Exchange:
    """The newest exchange; the clients keep one connection."""
    return wire.exchanges()[-1]


@pytest.mark.parametrize("client", [ollama.Client, ollama.AsyncClient])
def test_no_method_is_forgotten(client: type) -> None:
    """What the package offers is what is called here."""
    assert {name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_")} == METHODS


def test_generate(talk: Talk, wire: Recorder) -> None:
    """Whole and streamed, with a context to go on from, raw, and within a schema."""
    whole = talk("generate", "demo", FRANCE[0]["content"], think=False, options=SURE)
    assert (whole.response, whole.done_reason, last(wire).headers["content-type"]) == (PARIS, "stop", JSON)
    parts = talk("generate", "demo", FRANCE[0]["content"], think=True, options=SURE, stream=True)
    assert "".join(part.response for part in parts) == PARIS
    assert "".join(part.thinking or "" for part in parts)
    assert last(wire).headers["content-type"] == LINES
    assert len(parts) == len(last(wire).chunks) > 8
    again = talk("generate", "demo", "And of Italy?", context=whole.context, think=False, options=SURE)
    assert again.prompt_eval_count > len(whole.context)
    raw = talk("generate", "demo", "Once upon a time", raw=True, options={**SURE, "num_predict": 5})
    assert (raw.context, raw.done_reason, raw.eval_count) == (None, "length", 5)
    shaped = talk("generate", "demo", FRANCE[0]["content"], format=COUNTRY, think=False, options=SURE)
    assert shaped.response.startswith("{")
    short = {**SURE, "num_predict": 5}
    sampled = talk("generate", "demo", "x", logprobs=True, top_logprobs=2, raw=True, options=short, stream=True)
    assert sum(len(part.logprobs or ()) for part in sampled) == sampled[-1].eval_count


def test_generate_loads_and_unloads(talk: Talk) -> None:
    """An empty prompt is one object, streamed or not; what a client sends as a duration is understood."""
    for keep_alive, reason in ((None, "load"), ("1h", "load"), (-1, "load"), (0, "unload"), ("0s", "unload")):
        assert talk("generate", "demo", keep_alive=keep_alive).done_reason == reason


def test_chat(talk: Talk, wire: Recorder) -> None:
    """Whole and streamed, thinking apart."""
    whole = talk("chat", "demo", FRANCE, think=True, options=SURE)
    assert (whole.message.content, last(wire).headers["content-type"]) == (PARIS, JSON)
    parts = talk("chat", "demo", FRANCE, think=True, options=SURE, stream=True)
    assert "".join(part.message.content for part in parts) == PARIS
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
    assert len(parts) == len(last(wire).chunks) > 8
    assert (parts[-1].eval_count, parts[-1].prompt_eval_count) == (whole.eval_count, whole.prompt_eval_count)
    assert talk("chat", "demo").done_reason == "load"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_with_tools(talk: Talk, stream: bool) -> None:
    """A Python function is called and its result goes back in."""
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    said = talk("chat", "demo", asked, tools=[get_weather], think=False, options=SURE, stream=stream)
    (call,) = [call for part in (said if stream else [said]) for call in part.message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    if not stream:
        result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)}
        assert talk("chat", "demo", [*asked, said.message, result], think=False, options=SURE).done


def test_chat_in_a_format(talk: Talk) -> None:
    """JSON of any kind and of one schema, with the probability of each token."""
    said = talk("chat", "demo", FRANCE, format="json", think=False, options={**SURE, "num_predict": 40})
    assert said.message.content.startswith("{")
    said = talk("chat", "demo", FRANCE, format=COUNTRY, think=False, logprobs=True, top_logprobs=3, options=SURE)
    assert said.message.content == "".join(token.token for token in said.logprobs)
    assert len(said.logprobs[0].top_logprobs) == 3


def test_embed_and_embeddings(talk: Talk) -> None:
    """One row a text, cut on demand; the old method gives one."""
    rows = talk("embed", "demo", ["one", "two"], truncate=True).embeddings
    assert len(rows) == 2
    assert talk("embed", "demo", "one").embeddings == [pytest.approx(rows[0])]
    assert [len(row) for row in talk("embed", "demo", ["one"], dimensions=8).embeddings] == [8]
    assert talk("embed", "demo").embeddings == []
    assert len(talk("embeddings", "demo", "one", options=SURE, keep_alive="1m").embedding) == len(rows[0])
    assert talk("embeddings", "demo").embedding == []


def test_list_show_and_ps(talk: Talk) -> None:
    """They agree on the name and the digest."""
    talk("generate", "demo", keep_alive="1h")
    (listed,), running = talk("list").models, talk("ps").models[0]
    assert listed.model == running.model == running.name == "demo:latest"
    assert listed.digest == running.digest
    assert listed.modified_at < running.expires_at
    shown = talk("show", "demo")
    assert shown.modelinfo["general.architecture"] == "llama"
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)


@pytest.mark.parametrize("stream", [False, True])
def test_create_copy_and_delete(talk: Talk, stream: bool) -> None:
    """A model of another with all that a client may set, a second name for it, and neither in the end."""
    made = talk(
        "create",
        "made",
        from_="demo",
        system="Be brief.",
        license=["one", "two"],
        parameters={"temperature": 0, "stop": ["END"]},
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        template="{{ .System }}{{ .Prompt }}",
        stream=stream,
    )
    assert (made[-1] if stream else made).status == "success"
    shown = talk("show", "made")
    assert shown.license == "one\ntwo"
    assert "SYSTEM Be brief." in shown.modelfile
    assert {line.split()[0] for line in shown.parameters.splitlines()} == {"temperature", "stop"}
    assert talk("copy", "made", "people/copied:v1").status == "success"
    assert {model.model for model in talk("list").models} == {"demo:latest", "made:latest", "people/copied:v1"}
    for name in ("made", "people/copied:v1"):
        assert talk("delete", name).status == "success"
    assert [model.model for model in talk("list").models] == ["demo:latest"]


def test_create_blob(talk: Talk, wire: Recorder) -> None:
    """A file is stored by its digest, once, and a model is made of it."""
    digest = talk("create_blob", DEMO)
    assert last(wire).status == 200  # the demo model is there, so its weights are
    assert talk("create", "again", files={"demo.gguf": digest}).status == "success"
    assert talk("generate", "again", "Hi", options={"num_predict": 2}).eval_count == 2
    talk("delete", "again")


def test_create_blob_of_a_new_file(talk: Talk, wire: Recorder, tmp_path: Path) -> None:
    """It is kept, and the second time it is there."""
    file = tmp_path / "text"
    file.write_bytes(base64.b64encode(str(tmp_path).encode()))
    digests = {talk("create_blob", file) for _ in range(2)}
    assert len(digests) == 1
    assert [exchange.status for exchange in wire.exchanges()] == [201, 200]


@needs_registry
@pytest.mark.parametrize("stream", [False, True])
def test_push_and_pull(talk: Talk, stream: bool, tmp_path: Path) -> None:
    """To a registry and back."""
    with docker_registry(tmp_path) as registry:
        name = f"{registry}/people/demo:v1"
        talk("copy", "demo", name)
        pushed = talk("push", name, insecure=True, stream=stream)
        talk("delete", name)
        pulled = talk("pull", name, insecure=True, stream=stream)
        assert [(said[-1] if stream else said).status for said in (pushed, pulled)] == ["success", "success"]
        assert talk("chat", name, FRANCE, think=False, options=SURE).message.content == PARIS
        talk("delete", name)


UNKNOWN: dict[str, tuple[Callable[[Talk], Any], int, str]] = {
    "chat": (lambda talk: talk("chat", "nope", FRANCE), 404, "model 'nope' not found"),
    "chat stream": (lambda talk: talk("chat", "nope", FRANCE, stream=True), 404, "model 'nope' not found"),
    "generate": (lambda talk: talk("generate", "nope", "x"), 404, "model 'nope' not found"),
    "embed": (lambda talk: talk("embed", "nope", "x"), 404, 'model "nope" not found, try pulling it first'),
    "embeddings": (lambda talk: talk("embeddings", "nope", "x"), 404, 'model "nope" not found, try pulling it first'),
    "show": (lambda talk: talk("show", "nope"), 404, "model 'nope:latest' not found"),
    "copy": (lambda talk: talk("copy", "nope", "there"), 404, 'model "nope" not found'),
    "delete": (lambda talk: talk("delete", "nope"), 404, "model 'nope' not found"),
    "create": (lambda talk: talk("create", "made"), 400, "neither 'from' or 'files' was specified"),
    "pull": (lambda talk: talk("pull", "a/b/c/d/e"), 400, "invalid model name"),
    "top_logprobs": (
        lambda talk: talk("chat", "demo", FRANCE, top_logprobs=21),
        400,
        "top_logprobs must be between 0 and 20",
    ),
}


@pytest.mark.parametrize("which", UNKNOWN)
def test_refusals_arrive_as_the_clients_own_error(talk: Talk, which: str) -> None:
    """With Ollama's status and text, which the clients pass on."""
    ask, status, text = UNKNOWN[which]
    with pytest.raises(ollama.ResponseError) as refused:
        ask(talk)
    assert (refused.value.status_code, refused.value.error) == (status, text)


def test_systemone_is_not_served(talk: Talk) -> None:
    """As by the Ollama whose API this is."""
    with pytest.raises(ollama.ResponseError) as refused:
        talk("systemone", "demo", "state", {"q": {"type": "noul", "instructions": "Is it?"}})
    assert refused.value.status_code == 404


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(("method", "argument"), [("web_search", "headwater"), ("web_fetch", "https://example.com")])
def test_the_webs_methods_go_to_ollamas_own_host(wire: Recorder, kind: str, method: str, argument: str) -> None:
    """Whatever host the client has: they ask ollama.com, never this server."""
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(403, json={"error": "not today"})

    keyed = Talk(wire.url, kind, headers={"Authorization": "Bearer k"}, transport=httpx.MockTransport(refuse))
    with closing(keyed), pytest.raises(ollama.ResponseError, match="not today"):
        keyed(method, argument)
    assert asked == [f"https://ollama.com/api/{method}"]
    assert wire.exchanges() == []
