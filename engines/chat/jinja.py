"""Chat templates in Jinja, as GGUF files carry them (`spec/chat-formats.md` section 1).

A template is untrusted code. The sandbox keeps it away from Python; what the sandbox does not bound, the cost, is
bounded here: every turn of a loop, macro call and concatenation passes a meter that stops the render when it has run
too long or grown too large. Its one surprise: `tojson` keeps key order and escapes nothing, unlike Jinja's own, because
models were trained on that.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from engines.errors import TemplateError
from engines.request import JSON, Message, Tool

MAX_SOURCE_CHARS = 256 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_SECONDS = 2.0

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For models that bring no template of their own."""


class _Meter:
    """What one render may still spend."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> str:
        """Called at every turn of a loop and every macro call; renders as nothing."""
        if time.monotonic() > self._deadline:
            raise TemplateError(f"the chat template ran longer than {MAX_SECONDS:g} s")
        return ""


_meter: ContextVar[_Meter] = ContextVar("meter")
_WIDE_FORMAT = re.compile(r":[^}]*(\d{5}|\{)")


def _limit_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise TemplateError(f"the chat template built a text of more than {MAX_OUTPUT_CHARS} characters")


class _Environment(SandboxedEnvironment):
    """Jinja as Hugging Face configures it, with a meter in every loop and around everything that can grow."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    _GROWING_METHODS = frozenset({"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "extend"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse results that are too large before they are built."""
        if operator in "+*" and _is_sized(left) and _is_sized(right):
            _limit_size(len(left) + len(right))
        elif operator == "*" and (_is_sized(left) or _is_sized(right)):
            sized, times = (left, right) if _is_sized(left) else (right, left)
            _limit_size(len(sized) * int(times))
        elif operator == "**" or (operator == "*" and max(abs(left), abs(right)) > 2**63):
            _limit_size(int(abs(right)) * 1000 if abs(left) > 1 else 0)
        elif operator == "%" and isinstance(left, str):
            raise TemplateError("the chat template uses % formatting, which is not allowed")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse methods whose result would be too large."""
        _meter.get().tick()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, list)) and getattr(obj, "__name__", "") in self._GROWING_METHODS:
            _limit_size(_bound_of_method(obj.__name__, owner, args))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse `str.format` with a width that is large or computed."""
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and _WIDE_FORMAT.search(text):
            raise TemplateError("the chat template formats text with a width that is not allowed")
        return super().wrap_str_format(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [nodes.Call(_name("__join__"), concat.nodes, [], None, None)]
        loops: Iterable[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for loop in loops:
            loop.body.insert(0, nodes.Output([nodes.Call(_name("__tick__"), [], [], None, None)]))
        tree.set_environment(self)
        return tree


def _name(name: str) -> nodes.Name:
    return nodes.Name(name, "load")


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _bound_of_method(method: str, owner: str | list[Any], args: tuple[Any, ...]) -> int:
    """An upper bound of the length of `owner.method(*args)`."""
    if method == "extend":
        return len(owner) + (len(args[0]) if args and _is_sized(args[0]) else 0)
    if method == "replace" and len(args) >= 2 and isinstance(args[1], str):
        return (len(owner) + 1) * (len(args[1]) + 1)
    if method == "join" and args and _is_sized(args[0]):
        return (len(owner) + 1) * len(args[0]) + sum(len(str(item)) for item in args[0])
    widths = [arg for arg in args if isinstance(arg, int)]
    if method == "expandtabs":
        return len(owner) * max([8, *widths])
    return max([len(owner), *widths])


def _bounded(value: Any) -> Any:
    """`value`, unless writing it out would visit too many elements: a list can hold itself twice, sixty times over."""
    pending, seen = [value], 0
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple, dict)):
            seen += len(item)
            _limit_size(seen)
            pending.extend(item.values() if isinstance(item, dict) else item)
    return value


def _join(*parts: Any) -> str:
    """The `~` operator, metered."""
    texts = [str(_bounded(part)) for part in parts]
    _limit_size(sum(len(text) for text in texts))
    return "".join(texts)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Render the body unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if not isinstance(value, (str, Mapping)) and isinstance(value, Iterable):
        value = list(value)
    text = json.dumps(
        _bounded(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _limit_size(len(text))
    return text


def _sized_filter(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numeric arguments may not ask for an enormous text."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            _bounded(arg)
            if isinstance(arg, int) and not isinstance(arg, bool):
                _limit_size(arg)
        texts = [arg for arg in args if isinstance(arg, str)]
        if name == "replace" and len(texts) >= 3:
            _limit_size(_bound_of_method("replace", texts[0], (texts[1], texts[2])))
        return inner(*args, **kwargs)

    if hasattr(inner, "jinja_pass_arg"):  # tells Jinja to pass the environment or the context first
        limited.jinja_pass_arg = inner.jinja_pass_arg  # type: ignore[attr-defined]  # how Jinja marks a function
    return limited


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _environment(now: Callable[[], datetime]) -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=_bounded,
        extensions=[loopcontrols, _Generation],
    )
    for name in ("replace", "center", "indent", "wordwrap", "truncate", "string", "join"):
        environment.filters[name] = _sized_filter(name, environment.filters[name])
    environment.filters["tojson"] = _tojson
    environment.filters["from_json"] = json.loads
    del environment.filters["format"]  # %-formatting, with widths that the meter cannot see
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda fmt: now().strftime(fmt),
        __tick__=lambda: _meter.get().tick(),
        __join__=_join,
    )
    return environment


class ChatTemplate:
    """One model's chat template, compiled once.

    Args:
        source: the template's text. bos, eos: the texts of the model's special tokens, empty when it has none.
        now: the clock behind `strftime_now`.

    Raises:
        TemplateError: the template is too large or does not compile.
    """

    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
        self.source = source
        self._bos = bos
        self._eos = eos
        self._now = now
        try:
            self._template = _environment(now).from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Iterable[Message],
        *,
        tools: Iterable[Tool] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, JSON] | None = None,
    ) -> str:
        """The prompt text of a chat.

        Raises:
            TemplateError: the template refused the messages, failed, or exceeded its limits.
        """
        now = self._now()
        values: dict[str, Any] = {
            "bos_token": self._bos,
            "eos_token": self._eos,
            "datetime": now.strftime("%b %d %Y"),
            "date_string": now.strftime("%d %b %Y"),
            **(variables or {}),
            "messages": [_plain_message(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        plain_tools = [_plain_tool(tool) for tool in tools]
        if plain_tools:  # undefined without tools: None and [] both break published templates
            values |= {"tools": plain_tools, "functions": json.dumps(plain_tools, ensure_ascii=False)}
        token = _meter.set(_Meter())
        try:
            return self._collect(values)
        except TemplateError:
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise TemplateError(f"the chat template failed: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise TemplateError("the chat template exceeded its limits") from error
        finally:
            _meter.reset(token)

    def _collect(self, values: dict[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        for part in self._template.generate(values):
            _meter.get().tick()
            size += len(part)
            _limit_size(size)
            parts.append(part)
        return "".join(parts)


def _plain_message(message: Message) -> dict[str, JSON]:
    """A message as templates know it: nothing missing, nothing None (`spec/chat-formats.md` section 1.3)."""
    plain: dict[str, JSON] = {"role": message.role, "content": message.content}
    if message.thinking:
        plain |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _plain_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_name:
        plain |= {"name": message.tool_name, "tool_name": message.tool_name}
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_arguments(arguments: dict[str, JSON] | str) -> dict[str, JSON]:
    return arguments if isinstance(arguments, dict) else {"input": arguments}


def _plain_tool(tool: Tool) -> dict[str, JSON]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
