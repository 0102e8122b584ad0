"""Bodies to requests: data in, data out."""

import dataclasses
import json
from typing import Any

import pytest
from ollama_fakes import ORIGIN, card

from compat.ollama.decode import decode_chat, decode_generate
from compat.ollama.names import refuse_cloud, short_name
from compat.ollama.options import parse_options
from compat.ollama.parse import parse_chat, parse_generate, parse_unload
from engines.errors import AccessDenied, BadRequest, HeadwaterError
from engines.model import ModelCard
from engines.request import FOREVER, GenerateRequest, LoadOptions, Message, OutputFormat, Priority, Sampling, ToolCall

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}


def chat(model: ModelCard | None = None, **fields: Any) -> GenerateRequest:
    """The request of a chat body."""
    body = decode_chat(json.dumps({"model": "m", "messages": HI} | fields).encode())
    return parse_chat(body, model or card(), request_id="req_1", origin=ORIGIN)


def generate(model: ModelCard | None = None, **fields: Any) -> GenerateRequest:
    """The request of a generate body."""
    body = decode_generate(json.dumps({"model": "m", "prompt": "hi"} | fields).encode())
    return parse_generate(body, model or card(), request_id="req_1", origin=ORIGIN)


def test_a_chat_is_its_messages() -> None:
    """Nothing is made up: the engine's defaults are Ollama's."""
    expected = GenerateRequest(
        id="req_1",
        model="m",
        origin=ORIGIN,
        messages=(Message("user", "hi"),),
        truncate=True,
        shift=True,
        stream=True,
        priority=Priority.INTERACTIVE,
    )
    assert chat() == expected
    assert chat(stream=False, truncate=False).stream is False
    assert chat(truncate=False).truncate is False


def test_every_part_of_a_message_arrives() -> None:
    """Roles in lower case, arguments in their order."""
    call = {"id": "c", "type": "function", "function": {"index": 3, "name": "f", "arguments": {"b": 1, "a": 2}}}
    messages = [
        {"role": "User", "content": "x", "images": ["QUI="]},
        {"role": "assistant", "thinking": "t", "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_name": "f", "tool_call_id": "c"},
    ]
    parsed = chat(messages=messages).messages
    assert parsed == (
        Message("user", "x", images=(b"AB",)),
        Message("assistant", thinking="t", tool_calls=(ToolCall("c", "f", {"b": 1, "a": 2}),)),
        Message("tool", "y", tool_name="f", tool_call_id="c"),
    )
    assert isinstance(parsed[1].tool_calls[0].arguments, dict)
    assert list(parsed[1].tool_calls[0].arguments) == ["b", "a"]


OWN = card(system="S", messages=(Message("user", "a"), Message("assistant", "b")))


def test_the_model_s_own_messages_come_first() -> None:
    """SYSTEM only when the request does not begin with one."""
    assert chat(OWN).messages == (Message("system", "S"), *OWN.messages, Message("user", "hi"))
    with_system = [{"role": "SYSTEM", "content": "T"}, *HI]
    assert chat(OWN, messages=with_system).messages == (*OWN.messages, Message("system", "T"), Message("user", "hi"))


def test_a_prompt_is_a_chat() -> None:
    """System of the request over the model's; the model's messages; the prompt with its images; ids come back."""
    request = generate(OWN, images=["QUI="])
    assert request.messages == (Message("system", "S"), *OWN.messages, Message("user", "hi", images=(b"AB",)))
    assert request.return_tokens
    assert generate(OWN, system="T").messages == (Message("system", "T"), *OWN.messages, Message("user", "hi"))
    assert generate().messages == (Message("user", "hi"),)


@pytest.mark.parametrize("context", [[], [1, 2]])
def test_a_context_leaves_out_the_model_s_messages(context: list[int]) -> None:
    """Also an empty one."""
    request = generate(OWN, context=context)
    assert request.messages == (Message("system", "S"), Message("user", "hi"))
    assert request.context_tokens == tuple(context)


def test_a_raw_prompt_is_text() -> None:
    """No template and no ids back."""
    request = generate(OWN, raw=True, context=[])
    assert (request.messages, request.prompt, request.return_tokens) == (None, "hi", False)


@pytest.mark.parametrize("fields", [{"system": "s"}, {"template": "t"}, {"context": [1]}])
def test_raw_excludes_what_a_template_would_place(fields: dict[str, Any]) -> None:
    """Before anything else is looked at."""
    with pytest.raises(BadRequest, match=r"^raw mode does not support template, system, or context$"):
        generate(card(capabilities=()), raw=True, think=True, **fields)


@pytest.mark.parametrize(
    ("think", "able", "expected"),
    [
        (None, True, True),
        (True, True, True),
        (False, True, False),
        ("low", True, "low"),
        ("max", True, "max"),
        (None, False, None),
        (False, False, False),
    ],
)
def test_models_that_can_think_do_by_default(think: Any, able: bool, expected: Any) -> None:
    """`false` is always accepted."""
    model = card("m:latest", *(["thinking"] if able else []))
    assert chat(model, think=think).think == generate(model, think=think).think == expected


EMBEDDING = card("nomic:latest", capabilities=("embedding",))


@pytest.mark.parametrize(
    ("parse", "model", "fields", "text"),
    [
        (chat, None, {"think": "high"}, '"m" does not support thinking'),
        (chat, EMBEDDING, {"think": True}, '"m" does not support thinking'),
        (chat, EMBEDDING, {"tools": [TOOL], "options": {"seed": "x"}}, '"m" does not support chat'),
        (generate, EMBEDDING, {"suffix": "x"}, '"m" does not support generate'),
        (chat, None, {"tools": [TOOL]}, "registry.ollama.ai/library/llama3.2:latest does not support tools"),
        (generate, None, {"suffix": "x"}, "registry.ollama.ai/library/llama3.2:latest does not support insert"),
    ],
)
def test_what_the_model_cannot_do_is_refused(parse: Any, model: Any, fields: dict[str, Any], text: str) -> None:
    """In Ollama's order: thinking, completion, then the rest; all before the options."""
    with pytest.raises(BadRequest) as refused:
        parse(model, **fields)
    assert refused.value.message == text


def test_images_in_raw_mode_are_refused() -> None:
    """Rather than ignored."""
    with pytest.raises(BadRequest, match="images in raw mode are not supported yet"):
        generate(raw=True, images=["QUI="])


def test_a_template_in_the_request_renders_the_same_messages() -> None:
    """And nothing is said where the model's own is to be used, which is not the dialect's choice."""
    model = card("m:latest", template="{{ .Prompt }}", go_template="{{ .Prompt }}")
    request = generate(model, template="{{ .System }}", system="S")
    assert (request.template, request.messages) == ("{{ .System }}", (Message("system", "S"), Message("user", "hi")))
    assert generate(model).template is None


def test_a_model_without_any_template_takes_the_prompt_alone() -> None:
    """In a generation; a chat with it is ChatML's business."""
    assert generate(card("m:latest")).template == "{{ .Prompt }}"
    assert generate(card("m:latest", chat_template="{{ messages }}")).template is None
    assert chat(card("m:latest")).template is None


def test_a_suffix_leaves_nothing_but_prompt_and_suffix() -> None:
    """Where the model can fill in; system text and the model's own messages have no place there."""
    request = generate(dataclasses.replace(OWN, capabilities=("completion", "insert")), suffix="end", system="S")
    assert (request.messages, request.prompt, request.suffix) == (None, "hi", "end")
    assert request.return_tokens


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (card("m:latest", family="qwen3"), "so"),
        (card("deepseek-r1:8b", family="llama"), "so"),
        (card("me/deepseek-r1:8b", family="qwen2"), "so"),
        (card("m:latest", family="llama"), " <think>why</think>\nso"),
    ],
)
def test_old_reasoning_inside_answers_is_taken_out_for_models_that_put_it_there(model: Any, expected: str) -> None:
    """Only at the head of an answer, and only before the last question."""
    thought = " <think>why</think>\nso"
    said = [("user", "a"), ("assistant", thought), ("user", thought), ("assistant", thought)]
    request = chat(model, messages=[{"role": role, "content": content} for role, content in said])
    assert [message.content for message in request.messages or ()] == ["a", expected, thought, thought]


@pytest.mark.parametrize("parse", [chat, generate])
def test_logprobs_alone_matter(parse: Any) -> None:
    """`top_logprobs` does nothing without them."""
    assert parse(top_logprobs=20) == parse()
    assert parse(logprobs=True).logprobs == 0
    assert parse(logprobs=True, top_logprobs=20).logprobs == 20


@pytest.mark.parametrize("parse", [chat, generate])
@pytest.mark.parametrize(
    ("family", "said", "shift"),
    [("llama", None, True), ("deepseek2", None, False), ("deepseek2", True, True), ("llama", False, False)],
)
def test_windows_move_on_unless_told_otherwise(parse: Any, family: str, said: Any, shift: bool) -> None:
    """All families' but one, as in Ollama."""
    assert parse(card(family=family), shift=said).shift is shift


def test_what_is_kept_of_a_prompt_is_said_by_the_request_or_the_model() -> None:
    """In that order; 4 tokens where nobody says anything."""
    model = card(parameters={"num_keep": 24})
    assert (chat().num_keep, chat(model).num_keep) == (4, 24)
    assert chat(model, options={"num_keep": -1.5}).num_keep == -1


@pytest.mark.parametrize(("stream", "priority"), [(True, Priority.INTERACTIVE), (False, Priority.NORMAL)])
def test_who_streams_reads_along(stream: bool, priority: Priority) -> None:
    """And goes first."""
    assert chat(stream=stream).priority is generate(stream=stream).priority is priority


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("json", OutputFormat()),
        ({"type": "object"}, OutputFormat({"type": "object"})),
        ({}, OutputFormat({})),
    ],
)
def test_formats(value: Any, expected: OutputFormat | None) -> None:
    """`json`, a schema, or nothing."""
    assert chat(format=value).format == generate(format=value).format == expected


@pytest.mark.parametrize(
    ("value", "quoted"), [("xml", r'"\"xml\""'), (["json"], r'"[\"json\"]"'), (5, '"5"'), (True, '"true"')]
)
def test_another_format_is_a_server_error(value: Any, quoted: str) -> None:
    """With status 500, since Ollama finds out while it generates."""
    with pytest.raises(HeadwaterError) as refused:
        chat(format=value)
    assert refused.value.message == f'invalid format: {quoted}; expected "json" or a valid JSON Schema object'
    assert refused.value.status == 500


def test_tools_keep_what_ollama_keeps() -> None:
    """Other keywords are dropped, the order is Ollama's, properties stay in the client's."""
    parameters = {
        "$defs": {"x": {"const": 1}},
        "additionalProperties": False,
        "required": ["b"],
        "properties": {
            "b": {"minimum": 1, "description": "d", "enum": [1, None], "type": ["integer", "null"], "default": 3},
            "a": {"anyOf": [{"type": "string", "title": "T"}], "items": {"title": "kept"}, "description": None},
            "c": {"type": "object", "required": ["z"], "properties": {"z": {"type": "string", "format": "date"}}},
        },
        "type": "object",
    }
    tool = {"type": "function", "function": {"name": "f", "description": "what", "parameters": parameters}}
    (parsed,) = chat(card("m:latest", "tools"), tools=[tool]).tools
    assert (parsed.name, parsed.description) == ("f", "what")
    assert json.dumps(parsed.parameters) == json.dumps(
        {
            "type": "object",
            "$defs": {"x": {"const": 1}},
            "required": ["b"],
            "properties": {
                "b": {"type": ["integer", "null"], "description": "d", "enum": [1, None]},
                "a": {"anyOf": [{"type": "string"}], "items": {"title": "kept"}},
                "c": {"type": "object", "properties": {"z": {"type": "string"}}, "required": ["z"]},
            },
        }
    )


def test_a_tool_without_parameters_has_none() -> None:
    """The shape is there all the same."""
    (parsed,) = chat(card("m:latest", "tools"), tools=[{"function": {"name": "f"}}]).tools
    assert parsed.parameters == {"type": "object", "properties": {}}


def test_options_reach_sampling_and_load() -> None:
    """Truncated towards zero; unknown names and nulls are skipped."""
    sampling, load = parse_options(
        {"top_k": 7.9, "temperature": 1, "stop": ["a"], "num_ctx": 8192, "mirostat": "x", "seed": None}
    )
    assert sampling == Sampling(top_k=7, temperature=1.0, stop=("a",))
    assert load == LoadOptions(num_ctx=8192)


def test_numbers_beyond_a_machine_word_are_bounded() -> None:
    """Whatever JSON can write, an engine can hold."""
    huge: dict[str, Any] = dict.fromkeys(
        ("num_ctx", "num_predict", "seed", "temperature", "num_thread", "num_batch"), 10**400
    )
    sampling, load = parse_options(huge)
    assert (sampling.max_tokens, sampling.seed, sampling.temperature) == (2**31 - 1, 2**63 - 1, 2**31 - 1)
    assert (load.num_ctx, load.num_thread, load.num_batch) == (2**31 - 1, 1024, 2**16)
    sampling, load = parse_options(dict.fromkeys(huge, -1e308))
    assert (sampling.max_tokens, sampling.seed, load.num_ctx, load.num_thread) == (-(2**31), -(2**63), 4, 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_ctx": "8"}, 'option "num_ctx" must be of type integer'),
        ({"num_predict": True}, 'option "num_predict" must be of type integer'),
        ({"use_mmap": 1}, 'option "use_mmap" must be of type boolean'),
        ({"temperature": "hot"}, 'option "temperature" must be of type float32'),
        ({"stop": "x"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
        ({"num_keep": "4"}, 'option "num_keep" must be of type integer'),
    ],
)
def test_wrong_options_are_a_server_error(options: dict[str, Any], text: str) -> None:
    """Status 500, as in Ollama, also for a request that only loads."""
    with pytest.raises(HeadwaterError) as refused:
        generate(prompt="", options=options)
    assert (refused.value.message, refused.value.status) == (text, 500)


@pytest.mark.parametrize("request_", [chat(messages=[], format="xml", logprobs=True), generate(prompt="", format=1)])
def test_nothing_to_say_is_a_request_for_the_model(request_: GenerateRequest) -> None:
    """What concerns the answer is not looked at."""
    assert request_.messages == ()
    assert request_.format is None


def test_a_load_carries_options_and_keep_alive() -> None:
    """They decide which runner there will be and for how long."""
    request = generate(prompt="", options={"num_ctx": 99}, keep_alive=-1)
    assert (request.load.num_ctx, request.keep_alive_s) == (99, FOREVER)


def test_an_unload_is_a_keep_alive_of_nothing() -> None:
    """Options and all else do not matter."""
    body = decode_generate(b'{"model":"m","keep_alive":"0s","options":{"num_ctx":"x"}}')
    request = parse_unload(body, request_id="req_1", origin=ORIGIN)
    assert (request.messages, request.keep_alive_s) == ((), 0.0)


@pytest.mark.parametrize("name", ["x:cloud", "x:8b-cloud", "me/x:CLOUD", " x:Cloud "])
def test_cloud_names_are_refused(name: str) -> None:
    """As by an Ollama whose cloud is disabled."""
    with pytest.raises(AccessDenied, match=r"^ollama cloud is disabled: remote model is unavailable$"):
        refuse_cloud(name)


@pytest.mark.parametrize("name", ["my-cloud-model", "x-cloud", "x:local", "x:8b", "host:5000/a/b-cloud", ""])
def test_other_names_are_not(name: str) -> None:
    """The word alone is no suffix."""
    refuse_cloud(name)


@pytest.mark.parametrize("name", ["x:local:cloud", "x:cloud:local", "x:8b-cloud:local"])
def test_two_sources_are_refused(name: str) -> None:
    """One must be meant."""
    with pytest.raises(BadRequest) as refused:
        refuse_cloud(name)
    assert refused.value.message == f'use either :local or :cloud, not both: "{name}"'


def test_short_names_keep_their_tag() -> None:
    """And lose what is implied."""
    assert short_name("registry.ollama.ai/library/x") == "x:latest"
    assert short_name("x:local") == "x:latest"
