"""Walks a template's trees over its data, as Go's text/template does, under a meter.

Every turn of a loop, every call and everything that is written passes the meter. An error tells where it happened and
quotes the node, in Go's words, because template authors search for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, NoReturn

from engines.chat.gotemplate.functions import Function, FunctionError, Kind, make_functions
from engines.chat.gotemplate.nodes import (
    Action,
    Bool,
    Branch,
    Break,
    Call,
    Chain,
    Command,
    Continue,
    Dot,
    Field,
    Identifier,
    If,
    List,
    Nil,
    Node,
    Number,
    Pipe,
    Range,
    String,
    Text,
    Variable,
    With,
)
from engines.chat.gotemplate.printing import text_of
from engines.chat.gotemplate.quoting import as_bytes, quote
from engines.chat.gotemplate.values import INVALID, Map, Slice, Struct, Value, truth, type_name
from engines.chat.meter import MAX_OUTPUT_CHARS, Meter
from engines.errors import GoTemplateError, TemplateError

MAX_CALLS = 50
_MAX_QUOTED = 4096


class _Missing:
    """In place of a pipeline's value before its first command."""


_MISSING: Final = _Missing()


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def execute(
    trees: Mapping[str, List], data: Value, *, source: str, now: Callable[[], datetime], root: List | None = None
) -> str:
    """The text of a template.

    Args:
        trees: what `parser.parse` made of the source.
        data: what `.` and `$` are at the start.
        source: the text itself, for errors.
        now: the clock behind the dates.
        root: walked instead of the tree without a name.

    Raises:
        GoTemplateError: the template does not go with the data. TemplateError: it exceeded its limits.
    """
    execution = _Execution(trees, source, now)
    try:
        execution.run(data, trees[""] if root is None else root)
    except (RecursionError, MemoryError) as error:
        raise TemplateError("the chat template exceeded its limits") from error
    return as_bytes("".join(execution.pieces)).decode("utf-8", "replace")


class _Execution:
    """One render: what was written, the variables in sight, and the node that an error would be told of."""

    def __init__(self, trees: Mapping[str, List], source: str, now: Callable[[], datetime]) -> None:
        self.pieces: list[str] = []
        self._trees = trees
        self._source = source
        self._meter = Meter()
        self._functions = make_functions(now, self._meter.spend)
        self._num_written = 0
        self._variables: list[tuple[str, Value]] = []
        self._node: Node = List(0)
        self._name = ""
        self._num_calls = 0
        self._walkers: dict[type[Node], Callable[[Value, Node], None]] = {
            Text: self._walk_text,
            Action: self._walk_action,
            If: self._walk_if,
            With: self._walk_if,
            Range: self._walk_range,
            Call: self._walk_call,
            List: self._walk_list,
            Break: self._walk_break,
            Continue: self._walk_continue,
        }

    def run(self, data: Value, tree: List) -> None:
        self._variables = [("$", data)]
        self._walk_list(data, tree)

    def _failure(self, message: str) -> GoTemplateError:
        position = self._node.position
        before = self._source[:position]
        line = before.count("\n") + 1
        column = len(as_bytes(before[before.rfind("\n") + 1 :]))
        where = f":{line}:{column}: executing {quote(self._name)} at <{str(self._node)[:_MAX_QUOTED]}>"
        return GoTemplateError(f"template: {where}: {message}")

    def _write(self, text: str) -> None:
        self._num_written += len(text)
        self._meter.spend(len(text) if self._num_written <= MAX_OUTPUT_CHARS else self._num_written)
        self.pieces.append(text)

    # walking

    def _walk_list(self, dot: Value, node: Node) -> None:
        assert isinstance(node, List)
        for child in node.nodes:
            self._node = child
            self._walkers[type(child)](dot, child)

    def _walk_text(self, dot: Value, node: Node) -> None:
        assert isinstance(node, Text)
        self._write(node.text)

    def _walk_action(self, dot: Value, node: Node) -> None:
        assert isinstance(node, Action)
        value = self._pipe(dot, node.pipe)
        if not node.pipe.variables:
            self._node = node
            self._write(self._printed(value))

    def _printed(self, value: Value) -> str:
        if value is INVALID:
            return "<no value>"
        text = text_of(value)
        return text[1:] if isinstance(value, Struct) and text.startswith("&{") else text

    def _walk_break(self, dot: Value, node: Node) -> None:
        raise _Break

    def _walk_continue(self, dot: Value, node: Node) -> None:
        raise _Continue

    def _walk_if(self, dot: Value, node: Node) -> None:
        assert isinstance(node, Branch)
        num_variables = len(self._variables)
        value = self._pipe(dot, node.pipe)
        if truth(value):
            self._walk_list(value if isinstance(node, With) else dot, node.body)
        elif node.otherwise is not None:
            self._walk_list(dot, node.otherwise)
        del self._variables[num_variables:]

    def _walk_range(self, dot: Value, node: Node) -> None:
        assert isinstance(node, Range)
        num_variables = len(self._variables)
        value = self._pipe(dot, node.pipe)
        try:
            if not self._turns(node, value) and node.otherwise is not None:
                self._walk_list(dot, node.otherwise)
        except _Break:
            pass
        finally:
            del self._variables[num_variables:]

    def _turns(self, node: Range, value: Value) -> bool:
        """Walk the body for each element; whether there was one."""
        match value:
            case bool() | str() | float() | complex() | Struct():
                raise self._failure(f"range can't iterate over {text_of(value)}")
            case int():
                if len(node.pipe.variables) > 1:
                    raise self._failure(f"can't use {value} to iterate over more than one variable")
                for number in range(value):
                    self._turn(node, INVALID, number)
                return value > 0
            case dict():
                for key in sorted(value):
                    self._turn(node, key, value[key])
                return bool(value)
            case Slice() | bytes():
                for index, element in enumerate(value):
                    self._turn(node, index, element)
                return bool(value)
        return False  # nothing is an empty list

    def _turn(self, node: Range, index: Value, element: Value) -> None:
        self._meter.tick()
        variables = node.pipe.variables
        if variables:
            values = [element] if len(variables) == 1 else [index, element]
            for place, (variable, value) in enumerate(zip(variables, values, strict=True)):
                if node.pipe.assigns:
                    self._assign(variable, value)
                else:
                    self._variables[place - len(values)] = (variable.names[0], value)
        num_variables = len(self._variables)
        with contextlib.suppress(_Continue):
            self._walk_list(element, node.body)
        del self._variables[num_variables:]

    def _walk_call(self, dot: Value, node: Node) -> None:
        assert isinstance(node, Call)
        tree = self._trees.get(node.name)
        if tree is None:
            raise self._failure(f"template {node.quoted} not defined")
        if self._num_calls == MAX_CALLS:
            raise self._failure(f"exceeded maximum template depth ({MAX_CALLS})")
        self._meter.tick()
        dot = INVALID if node.pipe is None else self._pipe(dot, node.pipe)
        saved = self._variables, self._name
        self._variables, self._name = [("$", dot)], node.name
        self._num_calls += 1
        self._walk_list(dot, tree)
        self._num_calls -= 1
        self._variables, self._name = saved

    # evaluating

    def _pipe(self, dot: Value, pipe: Pipe) -> Value:
        """The value of a pipeline; variables that it declares stay until the end of the list around it."""
        self._node = pipe
        value: Value = _MISSING
        for command in pipe.commands:
            value = self._command(dot, command, value)
            if value is None:
                value = INVALID
        for variable in pipe.variables:
            if pipe.assigns:
                self._assign(variable, value)
            else:
                self._variables.append((variable.names[0], value))
        return value

    def _assign(self, variable: Variable, value: Value) -> None:
        name = variable.names[0]
        for place in range(len(self._variables) - 1, -1, -1):
            if self._variables[place][0] == name:
                self._variables[place] = (name, value)
                return
        raise self._failure(f"undefined variable: {name}")

    def _command(self, dot: Value, command: Command, final: Value) -> Value:
        first = command.args[0]
        has_args = len(command.args) > 1 or final is not _MISSING
        match first:
            case Field() | Chain() | Variable():
                return self._fields(dot, first, command.args[0], has_args=has_args)
            case Identifier():
                return self._function(dot, first, command, command.args[1:], final)
        if not isinstance(first, Pipe):
            self._node = first
        if has_args:
            raise self._failure(f"can't give argument to non-function {first}")
        match first:
            case Pipe():
                return self._pipe(dot, first)
            case Dot():
                return dot
            case Nil():
                raise self._failure("nil is not a command")
        return self._constant(first)

    def _constant(self, node: Node) -> Value:
        self._node = node
        match node:
            case Bool():
                return node.value
            case String():
                return node.text
            case Number():
                if node.value is None:
                    raise self._failure(f"{node.text} overflows int")
                return node.value
        raise self._failure(f"can't evaluate command {quote(str(node))}")

    def _fields(self, dot: Value, node: Field | Chain | Variable, first: Node, *, has_args: bool) -> Value:
        """A field of a field; only the last may seem to have arguments, and none can."""
        self._node = node
        match node:
            case Field():
                value, names = dot, node.names
            case Variable():
                value, names = self._variable(node.names[0]), node.names[1:]
                if not names and has_args:
                    raise self._failure(f"can't give argument to non-function {first}")
            case Chain():
                if isinstance(node.node, Nil):
                    raise self._failure(f"indirection through explicit nil in {node}")
                value, names = self._argument(dot, "value", node.node), node.names
        is_dynamic = False
        for place, name in enumerate(names, 1):
            owner = value
            value = self._field(owner, name, has_args=has_args and place == len(names), is_dynamic=is_dynamic)
            is_dynamic = isinstance(owner, dict) and not isinstance(value, Struct)
        return value

    def _variable(self, name: str) -> Value:
        for known, value in reversed(self._variables):
            if known == name:
                return value
        raise self._failure(f"undefined variable: {name}")

    def _field(self, owner: Value, name: str, *, has_args: bool, is_dynamic: bool) -> Value:
        """`owner.name`; the type of what comes out of a map is not known to Go, which shows in its errors."""
        match owner:
            case None:
                raise self._failure(f"nil pointer evaluating interface {{}}.{name}")
            case Struct() if name in owner.values:
                if has_args:
                    raise self._failure(f"{name} has arguments but cannot be invoked as function")
                return owner.values[name]
            case dict():
                if has_args:
                    raise self._failure(f"{name} is not a method but has arguments")
                return owner.get(name, owner.zero if isinstance(owner, Map) else None)
        if owner is INVALID:
            return INVALID
        kind = "interface {}" if is_dynamic else type_name(owner)
        raise self._failure(f"can't evaluate field {name} in type {kind}")

    def _function(
        self, dot: Value, identifier: Identifier, node: Node, args: Sequence[Node], final: Value = _MISSING
    ) -> Value:
        self._node = identifier
        self._meter.tick()
        name = identifier.name
        if name in ("and", "or"):
            return self._logic(dot, name, args, final)
        if name == "call":
            return self._call_value(dot, node, args, final)
        function = self._functions[name]
        values = self._arguments(dot, name, function, args, final)
        try:
            return function.run(*values)
        except FunctionError as error:
            self._node = node
            raise self._failure(f"error calling {name}: {error}") from None

    def _arguments(self, dot: Value, name: str, function: Function, args: Sequence[Node], final: Value) -> list[Value]:
        """The arguments and, behind them, what the pipeline passes on."""
        num_values = len(args) + (final is not _MISSING)
        num_fixed = len(function.parameters)
        self._count(name, num_fixed, function.rest is not None, len(args), num_values)
        kinds = [*function.parameters, *[function.rest or "value"] * (num_values - num_fixed)]
        values = [self._argument(dot, kind, arg) for kind, arg in zip(kinds, args, strict=False)]
        if final is not _MISSING:
            values.append(self._checked(final, kinds[-1]))
        return values

    def _count(self, name: str, num_fixed: int, takes_more: bool, num_args: int, num_values: int) -> None:
        if takes_more and num_values < num_fixed:
            raise self._failure(f"wrong number of args for {name}: want at least {num_fixed} got {num_args}")
        if not takes_more and num_values != num_fixed:
            raise self._failure(f"wrong number of args for {name}: want {num_fixed} got {num_values}")

    def _logic(self, dot: Value, name: str, args: Sequence[Node], final: Value) -> Value:
        """The operand that decides; those behind it are not evaluated."""
        self._count(name, 1, True, len(args), len(args) + (final is not _MISSING))
        value: Value = INVALID
        for arg in args:
            value = self._argument(dot, "value", arg)
            if truth(value) == (name == "or"):
                return value
        return value if final is _MISSING else final

    def _call_value(self, dot: Value, node: Node, args: Sequence[Node], final: Value) -> NoReturn:
        """No data has a function for a value."""
        self._count("call", 1, True, len(args), len(args) + (final is not _MISSING))
        values = [self._argument(dot, "value", arg) for arg in args]
        value = values[0] if values else final
        self._node = node
        if value is None or value is INVALID:
            raise self._failure("error calling call: call of nil")
        raise self._failure(
            f"error calling call: non-function {args[0] if args else text_of(final)} of type {type_name(value)}"
        )

    def _argument(self, dot: Value, kind: Kind, node: Node) -> Value:
        self._node = node
        match node:
            case Dot():
                return self._checked(dot, kind)
            case Nil():
                if kind == "string":
                    raise self._failure("cannot assign nil to string")
                return None if kind == "any" else INVALID
            case Field() | Variable() | Chain():
                return self._checked(self._fields(dot, node, node, has_args=False), kind)
            case Pipe():
                return self._checked(self._pipe(dot, node), kind)
            case Identifier():
                return self._checked(self._function(dot, node, node, ()), kind)
        if kind == "string" and not isinstance(node, String):
            raise self._failure(f"expected string; found {node}")
        return self._constant(node)

    def _checked(self, value: Value, kind: Kind) -> Value:
        """The value, if it can be what a parameter is."""
        if kind == "any" and value is INVALID:
            return None
        if kind == "string":
            if value is INVALID:
                raise self._failure("invalid value; expected string")
            if not isinstance(value, str):
                raise self._failure(f"wrong type for value; expected string; got {type_name(value)}")
        return value
