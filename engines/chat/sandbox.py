"""The Jinja environment for chat templates: Hugging Face's dialect of it, with a meter on every render.

A template is untrusted code. Jinja's sandbox keeps it away from Python; what that does not bound, the cost, is bounded
here: every turn of a loop, every call and everything that can grow passes a meter that stops the render when it has run
too long or built too much. What cannot be metered, such as comparing two lists that hold themselves many times over, is
left to the limit around the whole prompt (`engines.llamacpp.engine`). The surprise: `tojson` keeps key order and
escapes nothing, unlike Jinja's own, because models were trained on that (`spec/chat-formats.md` section 1.2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from string import Formatter
from typing import Any

from jinja2 import Template, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from engines.chat.meter import MAX_OUTPUT_CHARS, Meter
from engines.errors import TemplateError

MAX_INTEGER_BITS = 64 * 1024
MAX_CLOCK_CHARS = 256


_meter: ContextVar[Meter] = ContextVar("meter")
_WIDE = re.compile(r"\d{5}")
_WIDEST = 9999
_TICK_EVERY = 4096


def _spend(size: int) -> None:
    """Take `size` from the running render. Without one, as when Jinja folds constants, it fails and Jinja does not."""
    _meter.get().spend(size)


def _limit_bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise TemplateError(f"the chat template computed an integer of more than {MAX_INTEGER_BITS} bits")


class _Environment(SandboxedEnvironment):
    """Jinja as Hugging Face configures it, with a meter in every loop and around everything that can grow."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    _GROWING_METHODS = frozenset({"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "extend"})
    _UNMETERED_METHODS = frozenset({"encode", "translate", "to_bytes", "sort"})  # lead to bytes, or call back directly

    def concat(self, parts: Iterable[str]) -> str:
        """How Jinja puts together what a macro, a block or `{% set %}` rendered."""
        parts = list(parts)
        _spend(sum(map(len, parts)))
        return "".join(parts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Keep methods out whose cost no bound can be told for; templates have no use for them."""
        return attr not in self._UNMETERED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse results that are too large before they are built."""
        if operator == "+" and _is_sized(left) and _is_sized(right):
            _spend(_cost(left) + _cost(right))
        elif operator == "*" and (_is_sized(left) or _is_sized(right)):
            sized, times = (left, right) if _is_sized(left) else (right, left)
            _spend(_cost(sized) * max(int(times), 0))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _limit_bits(bits)
        elif operator == "%" and isinstance(left, str):
            raise TemplateError("the chat template uses % formatting, which is not allowed")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Meter the call, and refuse methods whose result would be too large."""
        _meter.get().tick()
        owner, method = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, (str, list)) and method in self._GROWING_METHODS:
            args = tuple(_materialised(arg) for arg in args)
            _spend(_bound_of_method(method, owner, (*args, *kwargs.values())))
        result = super().call(context, obj, *args, **kwargs)
        _spend(_cost(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse `str.format` with a width that is large or computed, or with too much to write."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text: str = value.__self__

        def limited(*args: Any, **kwargs: Any) -> str:
            specs = [spec or "" for _, _, spec, _ in Formatter().parse(text)]
            if any("{" in spec or _WIDE.search(spec) for spec in specs):
                raise TemplateError("the chat template formats text with a width that is not allowed")
            widest = max(_WIDEST if any(specs) else 0, _weight([*args, *kwargs.values()]))
            _spend(len(text) + len(specs) * widest)
            return inner(*args, **kwargs)

        return limited

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [nodes.Call(_name("__join__"), concat.nodes, [], None, None)]
        loops: Iterable[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for loop in loops:
            loop.body.insert(0, nodes.Output([nodes.Call(_name("__tick__"), [], [], None, None)]))
            if isinstance(loop, nodes.For) and loop.test is not None:  # it runs for elements that never reach the body
                loop.test = nodes.And(nodes.Not(nodes.Call(_name("__tick__"), [], [], None, None)), loop.test)
        tree.set_environment(self)
        return tree


def _name(name: str) -> nodes.Name:
    return nodes.Name(name, "load")


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _cost(value: Any) -> int:
    """What a value takes by itself, in characters; an element of a list counts as the eight bytes it is."""
    if isinstance(value, str):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple, dict)) else 0


def _materialised(value: Any) -> Any:
    """An iterator as a list, metered on the way."""
    if not isinstance(value, Iterator):
        return value
    items = []
    for item in value:
        _spend(8 + _cost(item))
        items.append(item)
    return items


def _bound_of_method(method: str, owner: str | list[Any], args: tuple[Any, ...]) -> int:
    """An upper bound of the length of `owner.method(*args)`."""
    if method == "extend":
        return _cost(owner) + 8 * (len(args[0]) if args and hasattr(args[0], "__len__") else 0)
    if method == "replace" and isinstance(owner, str) and len(args) >= 2:
        return _bound_of_replace(owner, args[0], args[1])
    if method == "join" and args and hasattr(args[0], "__len__"):
        return len(owner) * len(args[0]) + _weight(args[0])
    widths = [arg for arg in args if isinstance(arg, int)]
    if method == "expandtabs":
        return len(owner) * max([8, *widths])
    return max([len(owner), *widths])


def _bound_of_replace(text: str, old: Any, new: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _weight(value: Any, indent: int = 0) -> int:
    """About what writing a value out takes, where a list may hold itself many times; `indent` is for each level."""
    if isinstance(value, str):
        return len(value)
    pending, weight, num_weighed = [(value, 1)], 0, 0
    while pending:
        item, depth = pending.pop()
        num_weighed += 1
        if not num_weighed % _TICK_EVERY:
            _meter.get().tick()
        if isinstance(item, str):
            weight += len(item)
        elif isinstance(item, (list, tuple, dict)):
            weight += len(item) * (1 + indent * depth)
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            pending.extend((part, depth + 1) for part in parts)
        if weight > MAX_OUTPUT_CHARS:
            break
    return weight


def _bounded(value: Any) -> Any:
    """`value`, unless writing it out would take too much."""
    if not isinstance(value, str):
        _spend(_weight(value))
    return value


def _join(*parts: Any) -> str:
    """The `~` operator, metered."""
    texts = [str(_bounded(part)) for part in parts]
    _spend(sum(len(text) for text in texts))
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
        value = _materialised(iter(value))
    weight = _weight(value, indent or 0)
    _spend(weight * (1 + sum(map(len, separators or ()))))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_REMOVED_FILTERS = ("batch", "format", "pprint", "random", "round", "slice", "sum", "urlize", "wordwrap", "xmlattr")
"""Filters of Jinja's own whose cost is hard to bound; no published chat template uses them."""

_STRUCTURAL_FILTERS = frozenset(
    {"abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last", "length"}
    | {"list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"}
)
"""Filters that do not write their argument out, so that nested values cost them nothing."""


def _metered(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that passes the meter, before and after."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        if name not in _STRUCTURAL_FILTERS:
            _spend(_bound_of_filter(name, [*args, *kwargs.values()]))
        result = inner(*args, **kwargs)
        _spend(_cost(result))
        return result

    if hasattr(inner, "jinja_pass_arg"):  # tells Jinja to pass the environment or the context first
        limited.jinja_pass_arg = inner.jinja_pass_arg  # type: ignore[attr-defined]  # how Jinja marks a function
    return limited


def _bound_of_filter(name: str, args: list[Any]) -> int:
    """An upper bound, within a factor, of what a filter writes: its arguments, as wide and as often as it is told."""
    texts = [arg for arg in args if isinstance(arg, str)]
    widths = [arg for arg in args if isinstance(arg, int)] if name in ("center", "indent", "truncate") else []
    size = max([_weight(args), *widths])
    if name == "replace" and len(texts) >= 3:
        return _bound_of_replace(*texts[:3])
    if name == "indent" and texts:
        return size + (texts[0].count("\n") + 2) * max([4, *widths, *map(len, texts[1:])])
    if name == "join" and len(args) >= 2 and hasattr(args[1], "__len__"):
        return size + len(args[1]) * sum(map(len, texts))
    return size


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def make_environment(now: Callable[[], datetime]) -> SandboxedEnvironment:
    """The environment to compile chat templates in; `now` is the clock behind `strftime_now`."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=_bounded,
        extensions=[loopcontrols, _Generation],
    )
    for name in _REMOVED_FILTERS:
        del environment.filters[name]
    for name, inner in environment.filters.items():
        environment.filters[name] = _metered(name, inner)
    environment.filters |= {"tojson": _tojson, "from_json": json.loads}
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda fmt: now().strftime(str(fmt)[:MAX_CLOCK_CHARS]),
        __tick__=lambda: _meter.get().tick(),
        __join__=_join,
    )
    return environment


def render(template: Template, values: Mapping[str, Any]) -> str:
    """Render a template of `make_environment` under a fresh meter. Raises whatever the template makes happen."""
    token = _meter.set(Meter())
    try:
        parts: list[str] = []
        size = 0
        for part in template.generate(values):
            size += len(part)
            _spend(len(part) if size <= MAX_OUTPUT_CHARS else size)
            parts.append(part)
        return "".join(parts)
    finally:
        _meter.reset(token)
