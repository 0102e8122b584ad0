"""Tokens to trees, as Go's text/template/parse puts them together, with its words for what is wrong.

The surprise: a chain of `else if` is parsed in a loop and nested afterwards, so that a long one costs no depth; what
really is nested may be so only `MAX_DEPTH` times, which no template of anyone's needs.
"""

from __future__ import annotations

from collections.abc import Collection

from engines.chat.gotemplate.lexer import Token, tokenize
from engines.chat.gotemplate.nodes import (
    Action,
    Bool,
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
from engines.chat.gotemplate.numbers import parse_complex, parse_number
from engines.chat.gotemplate.quoting import quote, unquote, unquote_character
from engines.errors import GoTemplateError

MAX_DEPTH = 60
_OPERANDS = frozenset(
    {"bool", "character", "complex", "dot", "field", "word", "number", "nil", "raw", "string", "variable", "("}
)
_CONTROLS: dict[str, type[If | Range | With]] = {"if": If, "range": Range, "with": With}
_LITERALS = (Bool, Dot, Nil, Number, String)


class _Stop(Node):
    """`{{end}}` or `{{else}}`, which end a list; never part of a tree."""

    def __init__(self, position: int, word: str) -> None:
        super().__init__(position)
        self.word = word

    def __str__(self) -> str:
        return f"{{{{{self.word}}}}}"


def parse(source: str, functions: Collection[str]) -> dict[str, List]:
    """The trees of a template and of those that it defines, by name; its own name is empty.

    Args:
        source: the template's text.
        functions: the names that may be called.

    Raises:
        GoTemplateError: the source is no template, or too deeply nested.
    """
    try:
        return _Parser(source, functions).run()
    except RecursionError:
        raise GoTemplateError("template: : exceeded maximum depth") from None


class _Parser:
    def __init__(self, source: str, functions: Collection[str]) -> None:
        self._tokens = tokenize(source)
        self._functions = functions
        self._next = 0
        self._furthest = 0
        self._trees: dict[str, List] = {}
        self._variables = ["$"]
        self._num_ranges = 0
        self._depth = 0
        self._action_line = 0

    def run(self) -> dict[str, List]:
        root = List(0)
        while (token := self._peek()).kind != "EOF":
            if token.kind == "{{" and self._defines():
                self._definition()
                continue
            node = self._text_or_action()
            if isinstance(node, _Stop):
                raise self._failure(f"unexpected {node}")
            root.nodes.append(node)
        self._add("", root)
        return self._trees

    # tokens

    def _take(self) -> Token:
        token = self._tokens[self._next]
        self._furthest = max(self._furthest, self._next)
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return token

    def _peek(self) -> Token:
        self._furthest = max(self._furthest, self._next)
        return self._tokens[self._next]

    def _take_word(self) -> Token:
        """The next token that is no space."""
        while (token := self._take()).kind == "space":
            pass
        return token

    def _peek_word(self) -> Token:
        while self._peek().kind == "space":
            self._take()
        return self._peek()

    def _expect(self, kinds: tuple[str, ...], context: str) -> Token:
        token = self._take_word()
        if token.kind not in kinds:
            raise self._unexpected(token, context)
        return token

    def _failure(self, message: str) -> GoTemplateError:
        return GoTemplateError(f"template: :{self._tokens[self._furthest].line}: {message}")

    def _unexpected(self, token: Token, context: str) -> GoTemplateError:
        if token.kind == "error":
            where = ""
            if self._action_line not in (0, token.line):
                where = f" in action started at :{self._action_line}"
                where = where.removeprefix(" in action") if token.value.endswith(" action") else where
            return self._failure(f"{token}{where}")
        return self._failure(f"unexpected {token} in {context}")

    # templates

    def _add(self, name: str, tree: List) -> None:
        """Keep a tree, unless it is empty and there is one already."""
        earlier = self._trees.get(name)
        if earlier is None or _is_empty(earlier):
            self._trees[name] = tree
        elif not _is_empty(tree):
            raise self._failure(f"template: multiple definition of template {quote(name)}")

    def _defines(self) -> bool:
        after = self._next + 1
        while self._tokens[after].kind == "space":
            after += 1
        return self._tokens[after].kind == "define"

    def _definition(self) -> None:
        self._take()
        self._take_word()
        context = "define clause"
        name = self._unquoted(self._expect(("string", "raw"), context))
        self._expect(("}}",), context)
        self._add(name, self._separate(context))

    def _separate(self, context: str) -> List:
        """The list of a template of its own, up to its end: it sees no variables from around it."""
        variables, self._variables = self._variables, ["$"]
        num_ranges, self._num_ranges = self._num_ranges, 0
        tree, stop = self._list()
        if stop.word != "end":
            raise self._failure(f"unexpected {stop} in {context}")
        self._variables, self._num_ranges = variables, num_ranges
        return tree

    def _unquoted(self, token: Token) -> str:
        try:
            return unquote(token.value)
        except ValueError as error:
            raise self._failure(str(error)) from None

    def _list(self) -> tuple[List, _Stop]:
        """Nodes up to an `end` or `else`."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._failure("exceeded maximum depth")
        nodes = List(self._peek_word().position)
        while self._peek_word().kind != "EOF":
            node = self._text_or_action()
            if isinstance(node, _Stop):
                self._depth -= 1
                return nodes, node
            nodes.nodes.append(node)
        raise self._failure("unexpected EOF")

    def _text_or_action(self) -> Node:
        token = self._take_word()
        if token.kind == "text":
            return Text(token.position, token.value)
        if token.kind != "{{":
            raise self._unexpected(token, "input")
        self._action_line = token.line
        node = self._action()
        self._action_line = 0
        return node

    # actions

    def _action(self) -> Node:
        token = self._peek_word()
        match token.kind:
            case "if" | "range" | "with":
                self._take()
                return self._control(token.kind)
            case "end":
                self._take()
                return _Stop(self._expect(("}}",), "end").position, "end")
            case "else":
                self._take()
                following = self._peek_word()
                if following.kind in ("if", "with"):
                    return _Stop(following.position, "else")
                return _Stop(self._expect(("}}",), "else").position, "else")
            case "break" | "continue":
                self._take()
                return self._jump(token)
            case "template":
                self._take()
                return self._call()
            case "block":
                self._take()
                return self._block()
        return Action(token.position, self._pipeline("command", "}}"))

    def _jump(self, token: Token) -> Node:
        word = f"{{{{{token.kind}}}}}"
        closing = self._take_word()
        if closing.kind != "}}":
            raise self._unexpected(closing, word)
        if not self._num_ranges:
            raise self._failure(f"{word} outside {{{{range}}}}")
        return Break(token.position) if token.kind == "break" else Continue(token.position)

    def _control(self, word: str) -> Node:
        """`if`, `range` or `with` to its end, and with every `else if` on the way."""
        num_variables = len(self._variables)
        arms: list[tuple[Pipe, List]] = []
        starts: list[int] = []
        last: List | None = None
        while True:
            pipe = self._pipeline(word, "}}")
            self._num_ranges += word == "range"
            body, stop = self._list()
            self._num_ranges -= word == "range"
            arms.append((pipe, body))
            starts.append(stop.position)
            if stop.word == "end":
                break
            if word != "range" and self._peek().kind == word:
                self._take()
                continue
            last, stop = self._list()
            if stop.word != "end":
                raise self._failure(f"expected end; found {stop}")
            break
        del self._variables[num_variables:]
        return _nest(_CONTROLS[word], arms, starts, last)

    def _call(self) -> Node:
        token = self._take_word()
        name = self._template_name(token, "template clause")
        pipe = None
        if self._peek_word().kind == "}}":
            self._take()
        else:
            pipe = self._pipeline("template clause", "}}")
        return Call(token.position, name, quote(name), pipe)

    def _block(self) -> Node:
        token = self._take_word()
        name = self._template_name(token, "block clause")
        pipe = self._pipeline("block clause", "}}")
        self._add(name, self._separate("block clause"))
        return Call(token.position, name, quote(name), pipe)

    def _template_name(self, token: Token, context: str) -> str:
        if token.kind not in ("string", "raw"):
            raise self._unexpected(token, context)
        return self._unquoted(token)

    # pipelines

    def _pipeline(self, context: str, end: str) -> Pipe:
        pipe = Pipe(self._peek_word().position)
        self._declarations(pipe, context)
        while (token := self._peek_word()).kind != end:
            if token.kind not in _OPERANDS:
                self._take()
                raise self._unexpected(token, context)
            pipe.commands.append(self._command())
        self._take()
        if not pipe.commands:
            raise self._failure(f"missing value for {context}")
        for stage, command in enumerate(pipe.commands[1:], 2):
            if isinstance(command.args[0], _LITERALS):
                raise self._failure(f"non executable command in pipeline stage {stage}")
        return pipe

    def _declarations(self, pipe: Pipe, context: str) -> None:
        """`$x :=`, `$x =` or, for a range, `$i, $x :=`."""
        while (token := self._peek_word()).kind == "variable":
            start = self._next
            self._take()
            sign = self._peek_word()
            is_comma = sign.kind == "char" and sign.value == ","
            if sign.kind not in ("=", "declare") and not is_comma:
                self._next = start
                return
            self._take()
            pipe.variables.append(Variable(token.position, (token.value,)))
            self._variables.append(token.value)
            if not is_comma:
                pipe.assigns = sign.kind == "="
                return
            if context != "range" or len(pipe.variables) > 1:
                raise self._failure(f"too many declarations in {context}")
            if self._peek_word().kind not in ("variable", "}}", ")"):
                raise self._failure("range can only initialize variables")

    def _command(self) -> Command:
        command = Command(self._peek_word().position, [])
        while True:
            self._peek_word()
            operand = self._operand()
            if operand is not None:
                command.args.append(operand)
            token = self._peek()
            if token.kind == "space":
                self._take()
                continue
            if token.kind not in ("}}", ")"):
                self._take()
                if token.kind != "|":
                    raise self._unexpected(token, "operand")
            break
        if not command.args:
            raise self._failure("empty command")
        return command

    def _operand(self) -> Node | None:
        """A term and the fields behind it."""
        node = self._term()
        if node is None or self._peek().kind != "field":
            return node
        position = self._peek().position
        names: list[str] = []
        while self._peek().kind == "field":
            names.append(self._take().value[1:])
        match node:
            case Field():
                return Field(position, (*node.names, *names))
            case Variable():
                return Variable(position, (*node.names, *names))
            case Bool() | String() | Number() | Nil() | Dot():
                raise self._failure(f"unexpected . after term {quote(str(node))}")
        return Chain(position, node, tuple(names))

    def _term(self) -> Node | None:
        token = self._peek_word()
        position = token.position
        if token.kind not in _OPERANDS:
            return None
        self._take()
        match token.kind:
            case "word":
                if token.value not in self._functions:
                    raise self._failure(f"function {quote(token.value)} not defined")
                return Identifier(position, token.value)
            case "variable":
                if token.value not in self._variables:
                    raise self._failure(f"undefined variable {quote(token.value)}")
                return Variable(position, (token.value,))
            case "dot":
                return Dot(position)
            case "field":
                return Field(position, (token.value[1:],))
            case "(":
                return self._parenthesized()
        return self._literal(token)

    def _literal(self, token: Token) -> Node:
        match token.kind:
            case "nil":
                return Nil(token.position)
            case "bool":
                return Bool(token.position, token.value == "true")
            case "string" | "raw":
                return String(token.position, token.value, self._unquoted(token))
        return self._number(token)

    def _parenthesized(self) -> Pipe:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._failure("max expression depth exceeded")
        pipe = self._pipeline("parenthesized pipeline", ")")
        self._depth -= 1
        return pipe

    def _number(self, token: Token) -> Number:
        read = {"character": unquote_character, "complex": parse_complex, "number": parse_number}[token.kind]
        try:
            return Number(token.position, token.value, read(token.value))
        except ValueError as error:
            raise self._failure(str(error)) from None


def _nest(
    kind: type[If | Range | With], arms: list[tuple[Pipe, List]], starts: list[int], last: List | None
) -> If | Range | With:
    """A chain of `else if` as the nested nodes that it means."""
    pipe, body = arms[-1]
    node = kind(pipe.position, pipe, body, last)
    for (pipe, body), start in zip(reversed(arms[:-1]), reversed(starts[:-1]), strict=True):
        node = kind(pipe.position, pipe, body, List(start, [node]))
    return node


def _is_empty(node: Node) -> bool:
    """Whether there is nothing but white space."""
    if isinstance(node, List):
        return all(map(_is_empty, node.nodes))
    return isinstance(node, Text) and not node.text.strip()
