"""Events, models and errors to JSON: data in, data out."""

import datetime
import json
import math
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama_fakes import NOW, NOW_NS, card, finished, runner, says

from compat.ollama.errors import PROMPT_TOO_LONG, QUEUE_FULL, RUNNER_STOPPED, render_error
from compat.ollama.listing import render_local_time, render_processes, render_tags
from compat.ollama.render import ChatObjects, GenerateObjects, Reply, render_time
from compat.ollama.schema import ShowBody
from compat.ollama.show import render_modelfile, render_parameters, render_show
from compat.services import Answer
from engines.errors import (
    BodyTooLarge,
    Cancelled,
    GGUFParseError,
    InvalidModelName,
    ModelLoadFailed,
    ModelNotFound,
    PromptTooLong,
    ServerBusy,
    WorkerCrashed,
)
from engines.events import (
    Event,
    Finished,
    FinishReason,
    TextDelta,
    ThinkingDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from engines.model import ModelDescription, TensorInfo
from engines.request import FOREVER, Message, ToolCall

STATISTICS = (
    '"total_duration":512000000,"load_duration":9000000,"prompt_eval_count":9,"prompt_eval_duration":40000000,'
    '"eval_count":2,"eval_duration":60000000'
)
CALLS: list[Event] = [
    ThinkingDelta("hm"),
    ToolCallDelta(ToolCall("call_a1b2c3d4e5f6a7b8c9d0e1f2", "get_weather", {"city": "<Oslo>"})),
    ToolCallDelta(ToolCall("own", "now", "{broken")),
    *finished(FinishReason.TOOL_CALLS, prompt_tokens=9, completion_tokens=2),
]


def stream(reply: Reply, events: list[Event]) -> list[str]:
    """The objects of a stream."""
    return [line.decode() for event in events if (line := reply.render(event, NOW_NS)) is not None]


def whole(reply: Reply, events: list[Event]) -> str:
    """The only object of an answer."""
    answer = Answer()
    for event in events:
        answer.add(event)
    return reply.whole(answer, NOW_NS).decode()


def test_a_chat_streams_its_pieces_and_ends_with_statistics() -> None:
    """To the byte: keys in order, markup escaped, role and content in every object."""
    assert stream(ChatObjects("m<"), [ThinkingDelta("a&b"), *says("Hel", "lo")]) == [
        f'{{"model":"m\\u003c","created_at":"{NOW}","message":{{"role":"assistant","content":"","thinking":"a\\u0026b"}},"done":false}}',
        f'{{"model":"m\\u003c","created_at":"{NOW}","message":{{"role":"assistant","content":"Hel"}},"done":false}}',
        f'{{"model":"m\\u003c","created_at":"{NOW}","message":{{"role":"assistant","content":"lo"}},"done":false}}',
        f'{{"model":"m\\u003c","created_at":"{NOW}","message":{{"role":"assistant","content":""}},"done":true,"done_reason":"stop",{STATISTICS}}}',
    ]


def test_a_generation_streams_its_pieces_and_ends_with_context() -> None:
    """To the byte."""
    events = [
        ThinkingDelta("hm"),
        TextDelta("Hi"),
        *finished(FinishReason.LENGTH, (1, 2, 3), prompt_tokens=9, completion_tokens=2),
    ]
    assert stream(GenerateObjects("m"), events) == [
        f'{{"model":"m","created_at":"{NOW}","response":"","thinking":"hm","done":false}}',
        f'{{"model":"m","created_at":"{NOW}","response":"Hi","done":false}}',
        f'{{"model":"m","created_at":"{NOW}","response":"","done":true,"done_reason":"length","context":[1,2,3],{STATISTICS}}}',
    ]


def test_whole_answers_are_the_last_object_with_everything() -> None:
    """To the byte; the keys of what there is none of are absent."""
    events = [ThinkingDelta("hm"), *says("Hel", "lo")]
    assert whole(ChatObjects("m"), events) == (
        f'{{"model":"m","created_at":"{NOW}","message":{{"role":"assistant","content":"Hello","thinking":"hm"}},'
        f'"done":true,"done_reason":"stop",{STATISTICS}}}'
    )
    assert whole(GenerateObjects("m"), events) == (
        f'{{"model":"m","created_at":"{NOW}","response":"Hello","thinking":"hm","done":true,"done_reason":"stop",{STATISTICS}}}'
    )


def test_tool_calls_ride_on_the_last_object() -> None:
    """Short ids, indices from 0, arguments always an object; the reason stays `stop`."""
    thinking, last = map(json.loads, stream(ChatObjects("m"), CALLS))
    assert thinking["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
    assert last["message"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_a1b2c3d4", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "<Oslo>"}}},
            {"id": "own", "function": {"index": 1, "name": "now", "arguments": {}}},
        ],
    }
    assert (last["done"], last["done_reason"]) == (True, "stop")
    assert json.loads(whole(ChatObjects("m"), CALLS))["message"] == last["message"] | {"thinking": "hm"}


BLUE = TokenLogprob(7, b" blue", -0.12, (TokenLogprob(7, b" blue", -0.12), TokenLogprob(8, b"\xf0", -math.inf)))
SHOWN_BLUE = (
    '{"token":" blue","logprob":-0.12,"bytes":[32,98,108,117,101],"top_logprobs":['
    '{"token":" blue","logprob":-0.12,"bytes":[32,98,108,117,101]},{"token":"\ufffd","logprob":-9999.0,"bytes":[240]}]}'
)
END = TokenLogprob(2, b"", -0.5)
SHOWN_END = '{"token":"","logprob":-0.5}'
WITH_LOGPROBS: list[Event] = [
    ThinkingDelta("hm", 0, (END,)),
    ThinkingDelta("", 0, (END,)),
    TextDelta(" blue", 0, (BLUE,)),
    TextDelta("", 0, (END,)),
    *finished(prompt_tokens=9, completion_tokens=2),
]


def test_tokens_are_streamed_with_their_chunks() -> None:
    """To the byte; a chunk that is empty otherwise is sent for their sake."""
    head = f'{{"model":"m","created_at":"{NOW}",'
    tails = [
        *(f',"done":false,"logprobs":[{shown}]}}' for shown in (SHOWN_END, SHOWN_END, SHOWN_BLUE, SHOWN_END)),
        f',"done":true,"done_reason":"stop",{STATISTICS}}}',
    ]
    chat = ['"","thinking":"hm"', '""', '" blue"', '""', '""']
    assert stream(ChatObjects("m"), WITH_LOGPROBS) == [
        f'{head}"message":{{"role":"assistant","content":{content}}}{tail}'
        for content, tail in zip(chat, tails, strict=True)
    ]
    assert stream(GenerateObjects("m"), WITH_LOGPROBS) == [
        f'{head}"response":{content}{tail}' for content, tail in zip(chat, tails, strict=True)
    ]


def test_a_whole_answer_has_all_tokens() -> None:
    """To the byte: before a chat's statistics and after a generation's."""
    logprobs = f'"logprobs":[{SHOWN_END},{SHOWN_END},{SHOWN_BLUE},{SHOWN_END}]'
    assert whole(ChatObjects("m"), WITH_LOGPROBS) == (
        f'{{"model":"m","created_at":"{NOW}","message":{{"role":"assistant","content":" blue","thinking":"hm"}},'
        f'"done":true,"done_reason":"stop",{logprobs},{STATISTICS}}}'
    )
    assert whole(GenerateObjects("m"), WITH_LOGPROBS) == (
        f'{{"model":"m","created_at":"{NOW}","response":" blue","thinking":"hm","done":true,"done_reason":"stop",'
        f"{STATISTICS},{logprobs}}}"
    )


@pytest.mark.parametrize("reply", [ChatObjects("m"), GenerateObjects("m")])
@pytest.mark.parametrize(("lost", "sent"), [({"truncated_tokens": 5}, 14), ({"shifted_tokens": 2048}, 9)])
def test_what_was_cut_is_never_cut_in_silence(reply: Reply, lost: dict[str, int], sent: int) -> None:
    """The last object tells, streamed or not, and is the same without."""
    events = finished(FinishReason.STOP, (), prompt_tokens=9, completion_tokens=2, **lost)
    told = f',"prompt_tokens_sent":{sent},"truncated":true}}'
    for last, plain in (
        (stream(reply, events)[-1], stream(reply, finished(prompt_tokens=9, completion_tokens=2))[-1]),
        (whole(reply, events), whole(reply, finished(prompt_tokens=9, completion_tokens=2))),
    ):
        assert last == plain.removesuffix("}") + told


def test_a_prompt_is_shown_without_an_answer() -> None:
    """Images are counted where there are some."""
    assert ChatObjects("m").prompt("<p>", 0, NOW_NS).decode() == (
        f'{{"model":"m","created_at":"{NOW}","message":{{"role":"","content":""}},"done":false,'
        '"_debug_info":{"rendered_template":"\\u003cp\\u003e"}}'
    )
    assert GenerateObjects("m").prompt("p", 2, NOW_NS).decode() == (
        f'{{"model":"m","created_at":"{NOW}","response":"","done":false,'
        '"_debug_info":{"rendered_template":"p","image_count":2}}'
    )


def test_loading_and_unloading_have_no_statistics() -> None:
    """To the byte."""
    assert ChatObjects("m").empty(FinishReason.LOAD, NOW_NS).decode() == (
        f'{{"model":"m","created_at":"{NOW}","message":{{"role":"assistant","content":""}},"done":true,"done_reason":"load"}}'
    )
    assert GenerateObjects("m").empty(FinishReason.UNLOAD, NOW_NS).decode() == (
        f'{{"model":"m","created_at":"{NOW}","response":"","done":true,"done_reason":"unload"}}'
    )


def test_durations_are_never_zero_and_counts_may_be_absent() -> None:
    """A resident model and a cached prompt took some time all the same; no tokens are omitted, as in Go."""
    end = Finished(FinishReason.STOP, Usage(), Timings())
    reply = json.loads(stream(ChatObjects("m"), [end])[0])
    durations = [reply[f"{what}_duration"] for what in ("total", "load", "prompt_eval", "eval")]
    assert durations == [1, 1, 1, 1]
    assert not {"prompt_eval_count", "eval_count"} & set(reply)


@pytest.mark.parametrize(
    ("now_ns", "text"),
    [
        (NOW_NS + 3_456_789, "2026-01-02T03:04:05.123456789Z"),
        (NOW_NS - 120_000_000, "2026-01-02T03:04:05Z"),
        (NOW_NS + 80_000_001, "2026-01-02T03:04:05.200000001Z"),
    ],
)
def test_times_have_no_trailing_zeros(now_ns: int, text: str) -> None:
    """As Go writes them."""
    assert render_time(now_ns) == text


@given(st.integers(0, 2**62), st.text())
def test_every_piece_is_one_line_of_json(now_ns: int, text: str) -> None:
    """Whatever the text; Python reads the time."""
    for reply in (ChatObjects(text), GenerateObjects(text)):
        for event in (TextDelta(text + "x"), ThinkingDelta(text + "x"), *finished()):
            line = reply.render(event, now_ns)
            if line is not None:
                assert b"\n" not in line
                shown = json.loads(line)
                assert shown["model"] == text
                assert (datetime.datetime.fromisoformat(shown["created_at"]).timestamp() - now_ns / 1e9) < 1e-3


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InvalidModelName("-"), 400, "invalid model name"),
        (ModelNotFound("x"), 404, "model 'x' not found"),
        (PromptTooLong(9, 8), 400, PROMPT_TOO_LONG),
        (BodyTooLarge(5), 413, "request body is larger than 5 bytes"),
        (ServerBusy("the queue is full"), 503, QUEUE_FULL),
        (ServerBusy("the server is shutting down"), 503, "the server is shutting down"),
        (ModelLoadFailed("no memory"), 500, "no memory"),
        (WorkerCrashed("killed by signal 9"), 500, f"{RUNNER_STOPPED}: killed by signal 9"),
        (WorkerCrashed(""), 500, RUNNER_STOPPED),
        (GGUFParseError("bad magic", 0), 500, "failed to parse GGUF: bad magic (at byte 0)"),
        (Cancelled(), 499, "request canceled"),
        (ZeroDivisionError("secret"), 500, "internal server error"),
    ],
)
def test_errors_have_ollama_s_texts(error: Exception, status: int, text: str) -> None:
    """One string, and the status of the class."""
    reply = render_error(error)
    assert (reply.status, json.loads(reply.body)) == (status, {"error": text})


def test_a_busy_server_says_when_to_return() -> None:
    """In whole seconds, at least one."""
    assert render_error(ServerBusy("full", 7)).headers == {"Retry-After": "7"}
    assert render_error(ServerBusy("full", 0)).headers == {"Retry-After": "1"}
    assert QUEUE_FULL == "server busy, please try again.  maximum pending requests exceeded"


def test_tags_to_the_byte() -> None:
    """Keys in order; the time is local."""
    modified_at = render_local_time(NOW_NS / 1e9)
    assert render_tags([card("llama3.2:latest", "tools")]).decode() == (
        '{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest","modified_at":"' + modified_at + '",'
        '"size":2019393189,"digest":"a80c'
        + "0"
        * 60
        + '","details":{"parent_model":"","format":"gguf","family":"llama",'
        '"families":["llama"],"parameter_size":"3.2B","quantization_level":"Q4_K_M","context_length":131072,'
        '"embedding_length":3072},"capabilities":["completion","tools"]}]}'
    )
    assert render_tags([]) == b'{"models":[]}'


def test_unknown_facts_of_a_model_are_absent_or_null() -> None:
    """Families are null; lengths and capabilities vanish."""
    model = card(families=None, context_length=0, embedding_length=0, capabilities=())
    shown = json.loads(render_tags([model]))["models"][0]
    assert shown["details"]["families"] is None
    assert not {"context_length", "embedding_length"} & set(shown["details"])
    assert "capabilities" not in shown


def test_processes_to_the_byte() -> None:
    """Without the lengths and the parent of the model."""
    expires_at = render_local_time(NOW_NS / 1e9 + 300)
    assert render_processes([runner()], NOW_NS / 1e9).decode() == (
        '{"models":[{"name":"llama3.2:latest","model":"llama3.2:latest","size":3100000000,"digest":"a80c'
        + "0" * 60
        + '",'
        '"details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],"parameter_size":"3.2B",'
        '"quantization_level":"Q4_K_M"},"expires_at":"' + expires_at + '","size_vram":0,"context_length":4096}]}'
    )
    assert render_processes([], 0.0) == b'{"models":[]}'


def test_a_model_that_is_being_loaded_tells_how_far_it_is() -> None:
    """A field that Ollama does not have, and that is absent otherwise."""
    loading = runner(state="starting", load_progress=0.4234)
    assert json.loads(render_processes([loading], NOW_NS / 1e9))["models"][0]["load_progress"] == 0.42


def test_processes_are_sorted_and_for_ever_is_a_date() -> None:
    """Latest first; no keep-alive makes a date that cannot be written."""
    now_s = NOW_NS / 1e9
    listed = json.loads(render_processes([runner(now_s), runner(FOREVER), runner(now_s + 1e12)], now_s))["models"]
    years = [datetime.datetime.fromisoformat(model["expires_at"]).year for model in listed]
    assert years == [2318, 2318, 2026]


@pytest.mark.parametrize(
    ("seconds", "zone", "text"),
    [
        (NOW_NS / 1e9, "America/Los_Angeles", "2026-01-01T19:04:05.12-08:00"),
        (NOW_NS // 10**9, "Asia/Kolkata", "2026-01-02T08:34:05+05:30"),
        (NOW_NS / 1e9, "UTC", "2026-01-02T03:04:05.12Z"),
    ],
)
def test_local_times_have_an_offset(seconds: float, zone: str, text: str) -> None:
    """And can be read by Python."""
    assert render_local_time(seconds, ZoneInfo(zone)) == text
    assert datetime.datetime.fromisoformat(text).timestamp() == pytest.approx(seconds)


def test_parameters_are_lines_of_go_literals() -> None:
    """Names in 30 columns; a list repeats its name; numbers as Go prints floats."""
    parameters = {
        "stop": ["<|eot_id|>", 'a"\n'],
        "temperature": 0.7,
        "top_k": 1.0,
        "num_ctx": 131072,
        "seed": 1000000,
        "min_p": 0.00005,
        "x": 1234567.5,
        "use_mmap": False,
    }
    assert render_parameters(parameters).split("\n") == [
        'stop                           "<|eot_id|>"',
        'stop                           "a\\"\\n"',
        "temperature                    0.7",
        "top_k                          1",
        "num_ctx                        131072",
        "seed                           1e+06",
        "min_p                          5e-05",
        "x                              1.2345675e+06",
        "use_mmap                       false",
    ]


def test_a_modelfile_quotes_where_it_must() -> None:
    """Line breaks and spaces at the ends need quotes, and quotes inside those need three."""
    model = card(
        template="a\nb",
        licenses=("MIT",),
        adapters=(Path("/a"),),
        projectors=(Path("/p"),),
        parameters={"stop": [" x", "y"], "top_k": 40},
        messages=(Message("user", 'say "hi"\n'),),
    )
    assert render_modelfile(model, "be brief", {"top_k": 5, "seed": 1}) == (
        '# Modelfile generated by "ollama show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        "# FROM llama3.2:latest\n\n"
        "FROM /models/blobs/sha256-1\nADAPTER /a\nFROM /p\n"
        'TEMPLATE "a\nb"\nSYSTEM be brief\n'
        'PARAMETER stop " x"\nPARAMETER stop y\nPARAMETER top_k 5\nPARAMETER seed 1\n'
        "LICENSE MIT\n"
        'MESSAGE user """say "hi"\n"""\n'
    )


METADATA: dict[str, Any] = {
    "tokenizer.chat_template": "{{ jinja }}",
    "general.name": "secret",
    "general.basename": "Llama",
    "llama.rope.freq_base": 500000.0,
    "a.nan": math.nan,
    "b.array": [1.0, math.inf],
    "c.empty": [],
    "general.architecture": "llama",
}


def show(body: ShowBody | None = None, *, basename: str = "", projector: Any = None, **fields: Any) -> dict[str, Any]:
    """The reply to a show."""
    tensors = (TensorInfo("w", "Q8_0", (8, 4)),)
    description = ModelDescription(card(**fields), METADATA, tensors, 32, projector)
    shown: dict[str, Any] = json.loads(render_show(description, body or ShowBody(), basename=basename))
    return shown


def test_a_model_is_shown_in_order() -> None:
    """What it has not is absent; `model_info` is sorted and loses name and template."""
    shown = show(requires="0.14.0")
    assert list(shown) == [
        *("modelfile", "template", "details", "model_info", "tensors", "capabilities", "modified_at", "requires")
    ]
    assert shown["model_info"] == {
        "a.nan": None,
        "b.array": None,
        "c.empty": [],
        "general.architecture": "llama",
        "general.basename": "Llama",
        "general.parameter_count": 32,
        "llama.rope.freq_base": 500000,
    }
    assert list(shown["model_info"]) == sorted(shown["model_info"])
    assert shown["tensors"] == [{"name": "w", "type": "Q8_0", "shape": [8, 4]}]
    assert not {"context_length", "embedding_length"} & set(shown["details"])


def test_verbose_shows_arrays() -> None:
    """In full; JSON has no infinity."""
    assert show(ShowBody(verbose=True))["model_info"]["b.array"] == [1, None]


def test_a_whole_model_is_shown_whole() -> None:
    """Licences joined, messages as pairs, the system of the request over the model's, the projector beside."""
    shown = show(
        ShowBody(system="T", options={"seed": 1}),
        basename="asked",
        projector={"clip.x": [1], "general.name": "n"},
        licenses=("A", "B"),
        system="S",
        messages=(Message("user", "hi"),),
        parameters={"top_k": 1},
    )
    assert (shown["license"], shown["system"]) == ("A\nB", "T")
    assert shown["messages"] == [{"role": "user", "content": "hi"}]
    assert "SYSTEM T\nPARAMETER top_k 1\nPARAMETER seed 1\n" in shown["modelfile"]
    assert shown["parameters"] == "top_k                          1"
    assert shown["model_info"]["general.basename"] == "asked"
    assert shown["projector_info"] == {"clip.x": None}


@pytest.mark.parametrize(
    ("go", "jinja", "shown"),
    [
        ("", "", "{{ .Prompt }}"),
        ("{{ .Prompt }} {{ .Suffix }}", "", "{{ .Prompt }} {{ .Suffix }}"),
        ("", "{{ jinja }}", "{{ jinja }}"),
        ("{{ .Prompt }}", "{{ jinja }}", "{{ .Prompt }}"),
    ],
)
def test_the_template_is_the_one_in_use(go: str, jinja: str, shown: str) -> None:
    """Which of two that is has been decided already."""
    assert show(template="{{ .Other }}", go_template=go, chat_template=jinja)["template"] == shown
