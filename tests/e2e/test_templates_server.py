"""Go templates, suffixes and prompts that are only shown: the real server on the demo model, asked over HTTP.

The demo's own template is written again in Go, so that both must come to the same prompts and answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from serving import Server, serving

from engines.store.blobs import write_blob
from engines.store.manifests import LAYER_TYPE, Layer, read_manifest, write_manifest
from engines.store.names import parse_name

pytestmark = pytest.mark.e2e

GO = """{{ if .Suffix }}<|fim_prefix|>{{ .Prompt }}<|fim_suffix|>{{ .Suffix }}<|fim_middle|>{{ else }}
{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}{{ if .System }}

{{ end }}You may call these tools with <tool_call>:
{{- range .Tools }}
{"name": "{{ .Function.Name }}", "description": "{{ .Function.Description }}", "parameters": {
{{- range $name, $property := .Function.Parameters.Properties }}"{{ $name }}": "{{ $property.Type }}"{{ end }}}}
{{- end }}{{ end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "assistant" }}<|im_start|>assistant
{{ if true }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}
{{- if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>{{ end }}<|im_end|>
{{ else if eq .Role "tool" }}<|im_start|>tool
<tool_response>
{{ .Content }}
</tool_response><|im_end|>
{{ else if ne .Role "system" }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
{{ if not (and .IsThinkSet .Think) }}<think>

</think>

{{ end }}{{ end }}"""
GREEDY = {"temperature": 0, "num_predict": 60}
FRANCE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose demo has a twin with a Go template."""
    root = tmp_path_factory.mktemp("templates")
    with serving(root, OLLAMA_CONTEXT_LENGTH="1024") as running:
        models = root / "models"
        add_template(models, "demo", "twin", GO)
        yield running


def add_template(models: Path, source: str, target: str, template: str) -> None:
    """The same weights under another name, with a TEMPLATE layer."""
    manifest, _ = read_manifest(models, parse_name(source))
    data = template.encode()
    layer = Layer(f"{LAYER_TYPE}template", write_blob(models, data), len(data))
    write_manifest(models, parse_name(target), msgspec.structs.replace(manifest, layers=(*manifest.layers, layer)))


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    """One answer, whole."""
    body = {"stream": False, "options": GREEDY} | body
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def rendered(server: Server, path: str, **body: Any) -> str:
    """The prompt that a request would come to."""
    reply = ask(server, path, _debug_render_only=True, **body)
    assert reply["done"] is False
    return str(reply["_debug_info"]["rendered_template"])


CHATS: list[dict[str, Any]] = [
    {"messages": FRANCE, "think": False},
    {"messages": FRANCE[1:], "think": False},
    {"messages": [*FRANCE, {"role": "assistant", "content": "Paris."}, FRANCE[1]], "think": False},
    {"messages": [*FRANCE, {"role": "assistant", "content": "P", "thinking": "hm"}, FRANCE[1]], "think": False},
    {"messages": FRANCE, "tools": [TOOL], "think": False},
]


@pytest.mark.parametrize("chat", CHATS)
def test_both_languages_come_to_the_same_prompt(server: Server, chat: dict[str, Any]) -> None:
    """Through the whole house, without generating."""
    go = rendered(server, "/api/chat", model="twin", **chat)
    assert go == rendered(server, "/api/chat", model="demo", **chat)
    assert go.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_both_languages_come_to_the_same_answer(server: Server) -> None:
    """One runner serves both, since the weights are the same."""
    answers = [ask(server, "/api/chat", model=model, messages=FRANCE, think=False) for model in ("demo", "twin")]
    assert answers[0]["message"] == answers[1]["message"]
    assert answers[0]["prompt_eval_count"] == answers[1]["prompt_eval_count"]
    assert len(httpx.get(f"{server.url}/api/ps").json()["models"]) == 1


def test_calls_are_found_by_the_tag_that_the_template_writes(server: Server) -> None:
    """And by the tool's name."""
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(server, "/api/chat", model="twin", messages=question, tools=[TOOL], think=False)
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}
    assert answer["message"]["content"] == ""


def test_reasoning_is_told_apart_by_the_markers_of_the_template(server: Server) -> None:
    """In a template of the request, whose markers are found as those of a model's are."""
    answer = ask(server, "/api/generate", model="demo", prompt=FRANCE[1]["content"], template=GO, think=True)
    assert answer["thinking"]
    assert "think>" not in answer["response"] + answer["thinking"]


def test_a_template_of_the_request_is_used_as_it_is(server: Server) -> None:
    """Also an old one, of which the end is cut; and an answer to it is what a raw prompt's is."""
    template = "{{ if .System }}{{ .System }}: {{ end }}{{ .Prompt }} {{ .Response }}<|im_end|>"
    asked = {"model": "demo", "prompt": "Once upon a", "system": "S", "template": template, "think": False}
    assert rendered(server, "/api/generate", **asked) == "S: Once upon a "
    raw = ask(server, "/api/generate", model="demo", prompt="S: Once upon a ", raw=True, think=False)
    assert ask(server, "/api/generate", **asked)["response"] == raw["response"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ nope }}", 'template: :1: function "nope" not defined'),
        (
            "{{ range .Messages }}{{ .Nope }}{{ end }}",
            'template: :1:24: executing "" at <.Nope>: can\'t evaluate field Nope in type *template.templateMessage',
        ),
    ],
)
def test_a_wrong_template_is_told_in_go_s_words(server: Server, template: str, text: str) -> None:
    """With Ollama's status."""
    body = {"model": "demo", "prompt": "x", "template": template}
    reply = httpx.post(f"{server.url}/api/generate", json=body, timeout=60)
    assert (reply.status_code, reply.json()) == (500, {"error": text})


def test_a_hostile_template_is_stopped(server: Server) -> None:
    """Within seconds, and the model answers others afterwards."""
    body = {"model": "demo", "prompt": "x", "template": "{{ range 1000000000 }}{{ end }}"}
    reply = httpx.post(f"{server.url}/api/generate", json=body, timeout=60)
    assert (reply.status_code, reply.json()) == (400, {"error": "the chat template ran longer than 2 s"})
    assert ask(server, "/api/chat", model="demo", messages=FRANCE, think=False)["done"]


@pytest.mark.parametrize("model", ["demo", "twin"])
def test_a_gap_is_filled_in_by_template_or_vocabulary(server: Server, model: str) -> None:
    """Both know the same three tokens; both dialects come to the same text."""
    asked = {"model": model, "prompt": "The capital of France", "suffix": "Paris."}
    expected = "<|fim_prefix|>The capital of France<|fim_suffix|>Paris.<|fim_middle|>"
    assert rendered(server, "/api/generate", **asked) == expected
    filled = ask(server, "/api/generate", think=False, **asked)["response"]
    reply = ask(server, "/v1/completions", **asked, temperature=0, max_tokens=60)
    assert reply["choices"][0]["text"] == filled


def test_a_raw_prompt_is_shown_as_it_is(server: Server) -> None:
    """With what the context before it says, if there is one."""
    assert rendered(server, "/api/generate", model="demo", prompt="<x>", raw=True) == "<x>"
    before = ask(server, "/api/generate", model="demo", prompt="Hi", think=False)["context"]
    shown = rendered(server, "/api/generate", model="demo", prompt="More", context=before, think=False)
    assert shown.startswith("<|im_start|>user\nHi<|im_end|>")
    assert shown.endswith("<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
