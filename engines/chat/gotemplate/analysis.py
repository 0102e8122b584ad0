"""What a parsed Go template gives away without being rendered (`spec/ollama.md` sections 8.2, 8.6 and 9). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from engines.chat.gotemplate.nodes import (
    Action,
    Branch,
    Chain,
    Command,
    Field,
    If,
    List,
    Node,
    Pipe,
    Range,
    Text,
    Variable,
    children,
    walk,
)

BARE_CALL = "{"
"""The tool tag of a template that writes nothing before a call's JSON."""


def identifiers(trees: Iterable[List]) -> frozenset[str]:
    """The names of all fields and variables, in lower case."""
    nodes = (node for tree in trees for node in walk(tree))
    return frozenset(
        name.lower() for node in nodes if isinstance(node, (Field, Variable, Chain)) for name in node.names
    )


def thinking_tags(root: List) -> tuple[str, str] | None:
    """What stands around `.Thinking` in the loop over the messages; None unless there is something on both sides."""
    opening = closing = ""
    pending: list[tuple[Node, Range | None, List]] = [(root, None, root)]
    while pending:
        node, loop, around = pending.pop()
        if isinstance(node, Field) and node.names[0] == "Thinking" and loop is not None and _is_over_messages(loop):
            first, last = around.nodes[0], around.nodes[-1]
            opening = first.text.strip() if isinstance(first, Text) else opening
            closing = last.text.strip() if isinstance(last, Text) else closing
        loop = node if isinstance(node, Range) else loop
        around = node if isinstance(node, List) else around
        pending.extend((child, loop, around) for child in reversed(list(children(node))))
    return (opening, closing) if opening and closing else None


def _is_over_messages(loop: Range) -> bool:
    return any(isinstance(node, Field) and node.names[0] == "Messages" for node in walk(loop.pipe))


def tool_tag(root: List) -> str:
    """What the template writes before the first call of a message with `.ToolCalls`, up to a brace."""
    node = next((node for node in walk(root) if isinstance(node, If) and _is_about_calls(node)), None)
    text = (_first_text(node.body.nodes) if node is not None else None) or ""
    return text.replace("\r\n", "\n").partition("{")[0].strip() or BARE_CALL


def _is_about_calls(node: If) -> bool:
    args = (arg for command in node.pipe.commands for arg in command.args)
    return any(isinstance(arg, Field) and "ToolCalls" in arg.names for arg in args)


def _first_text(nodes: Sequence[Node]) -> str | None:
    """The first text that is not blank, if it comes before anything that is printed."""
    for node in nodes:
        if isinstance(node, Text) and node.text.strip():
            return node.text
        if isinstance(node, Branch):
            return _first_text(node.body.nodes) or (_first_text(node.otherwise.nodes) if node.otherwise else None)
        if isinstance(node, Action):
            return None
    return None


def cut_after_response(root: List) -> List:
    """The tree without what comes after the first `.Response` that it prints (section 8.2, legacy rendering)."""
    return _Cut().list(root)


class _Cut:
    """What is left of each node, until the field has come; then nothing is."""

    def __init__(self) -> None:
        self._is_done = False

    def list(self, nodes: List) -> List:
        """The list up to the field."""
        return replace(nodes, nodes=[left for node in nodes.nodes if (left := self._node(node)) is not None])

    def _node(self, node: Node) -> Node | None:
        if self._is_done:
            return None
        match node:
            case Branch():  # what decides prints nothing
                body = self.list(node.body)
                return replace(node, body=body, otherwise=node.otherwise and self.list(node.otherwise))
            case Action():
                pipe = self._pipe(node.pipe)
                return pipe and replace(node, pipe=pipe)
            case Pipe():
                return self._pipe(node)
            case Field():
                self._is_done = "Response" in node.names
        return node

    def _pipe(self, pipe: Pipe) -> Pipe | None:
        commands: list[Command] = []
        for command in pipe.commands:
            args = [left for arg in command.args if (left := self._node(arg)) is not None]
            if not args:
                return None
            commands.append(replace(command, args=args))
        return replace(pipe, commands=commands)
