"""What a template is parsed into, node for node as in Go's text/template/parse.

`str` of a node is its source in Go's own spelling, which error messages quote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Node:
    """Anything in a template; `position` counts characters from the start of the source."""

    position: int


@dataclass(slots=True)
class Text(Node):
    """What is written as it stands."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Dot(Node):
    """The value that the template is at."""

    def __str__(self) -> str:
        return "."


@dataclass(slots=True)
class Nil(Node):
    """The literal `nil`."""

    def __str__(self) -> str:
        return "nil"


@dataclass(slots=True)
class Bool(Node):
    """`true` or `false`."""

    value: bool

    def __str__(self) -> str:
        return "true" if self.value else "false"


@dataclass(slots=True)
class Number(Node):
    """A number as the template spells it, and its value where no type is asked for; None does not fit an int."""

    text: str
    value: int | float | complex | None

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class String(Node):
    """A literal with its quotes, and its text."""

    quoted: str
    text: str

    def __str__(self) -> str:
        return self.quoted


@dataclass(slots=True)
class Identifier(Node):
    """A function's name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Field(Node):
    """`.A.B`, without the first dot `names` is `("A", "B")`."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return "".join(f".{name}" for name in self.names)


@dataclass(slots=True)
class Variable(Node):
    """`$x.A.B`: the variable with its dollar sign, then the fields."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(self.names)


@dataclass(slots=True)
class Chain(Node):
    """Fields of what stands in parentheses or is called: `(index . 0).A`."""

    node: Node
    names: tuple[str, ...]

    def __str__(self) -> str:
        inner = f"({self.node})" if isinstance(self.node, Pipe) else str(self.node)
        return inner + "".join(f".{name}" for name in self.names)


@dataclass(slots=True)
class Command(Node):
    """Something and its arguments."""

    args: list[Node]

    def __str__(self) -> str:
        return " ".join(f"({arg})" if isinstance(arg, Pipe) else str(arg) for arg in self.args)


@dataclass(slots=True)
class Pipe(Node):
    """Commands, each of which gets the value of the one before, and the variables that get the last one's."""

    commands: list[Command] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    assigns: bool = False

    def __str__(self) -> str:
        names = ", ".join(map(str, self.variables))
        sign = f"{names} {'=' if self.assigns else ':='} " if names else ""
        return sign + " | ".join(map(str, self.commands))


@dataclass(slots=True)
class Action(Node):
    """A pipeline whose value is printed, unless it declares variables."""

    pipe: Pipe

    def __str__(self) -> str:
        return f"{{{{{self.pipe}}}}}"


@dataclass(slots=True)
class Break(Node):
    """Ends the innermost range."""

    def __str__(self) -> str:
        return "{{break}}"


@dataclass(slots=True)
class Continue(Node):
    """Ends one turn of the innermost range."""

    def __str__(self) -> str:
        return "{{continue}}"


@dataclass(slots=True)
class List(Node):
    """Nodes in order."""

    nodes: list[Node] = field(default_factory=list)

    def __str__(self) -> str:
        return "".join(map(str, self.nodes))


@dataclass(slots=True)
class Branch(Node):
    """A pipeline that decides which of two lists is walked."""

    pipe: Pipe
    body: List
    otherwise: List | None

    def __str__(self) -> str:
        otherwise = f"{{{{else}}}}{self.otherwise}" if self.otherwise is not None else ""
        return f"{{{{{type(self).__name__.lower()} {self.pipe}}}}}{self.body}{otherwise}{{{{end}}}}"


@dataclass(slots=True)
class If(Branch):
    """`{{if}}`."""

    __str__ = Branch.__str__


@dataclass(slots=True)
class With(Branch):
    """`{{with}}`, where the body is at the pipeline's value."""

    __str__ = Branch.__str__


@dataclass(slots=True)
class Range(Branch):
    """`{{range}}`, whose body is walked once for each element."""

    __str__ = Branch.__str__


@dataclass(slots=True)
class Call(Node):
    """`{{template}}`: the template of that name, at the pipeline's value."""

    name: str
    quoted: str
    pipe: Pipe | None

    def __str__(self) -> str:
        return f"{{{{template {self.quoted}{f' {self.pipe}' if self.pipe is not None else ''}}}}}"


def children(node: Node) -> Iterator[Node]:
    """What is directly inside a node, in order."""
    match node:
        case List(nodes=nodes) | Command(args=nodes):
            yield from nodes
        case Pipe():
            yield from node.commands
        case Branch():
            yield from (node.pipe, node.body, *([node.otherwise] if node.otherwise is not None else []))
        case Action():
            yield node.pipe
        case Call(pipe=Pipe() as pipe):
            yield pipe
        case Chain():
            yield node.node


def walk(node: Node) -> Iterator[Node]:
    """A node and everything inside it, in order."""
    pending: list[Any] = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(reversed(list(children(current))))
