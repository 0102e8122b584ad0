"""Modelfiles: read into instructions, and written from them (`spec/ollama.md` section 11). Pure.

The reader has the habits of Ollama's (parser/parser.go), because Modelfiles are written for it: a value runs to the end
of its line, or to the quotes that end a line where it began with quotes; quotes know no escapes; characters that cannot
be printed are left out. Its surprise: a value stands on its instruction's line or is empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from engines.errors import BadRequest
from engines.request import JSON

COMMANDS = (
    *("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message"),
    "requires",
)
ROLES = ("system", "user", "assistant")
DEPRECATED = (
    *("penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock"),
    *("mirostat", "mirostat_tau", "mirostat_eta"),
)
"""Parameters that Ollama once had; they are left out, with a warning."""

_NO_COMMAND = (
    'command must be one of "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", '
    '"parameter", "message", or "requires"'
)
_NO_ROLE = 'message role must be one of "system", "user", or "assistant"'
_UNEXPECTED_END = "unexpected EOF"
_SEMVER = re.compile(
    r"v?(0|[1-9]\d*)(\.(0|[1-9]\d*)(\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?)?)?"  # golang.org/x/mod/semver
)


class ModelfileError(BadRequest):
    """The text is no Modelfile; the message is Ollama's."""

    code = "invalid_modelfile"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: a command in lower case, its argument, and for PARAMETER the name and MESSAGE the role."""

    command: str
    argument: str
    key: str = ""


def parse_modelfile(data: bytes) -> tuple[Instruction, ...]:
    """The instructions in order.

    Raises:
        ModelfileError: with the number of the line where it is known.
    """
    instructions = tuple(_Reader(decode(data)).instructions())
    if not any(instruction.command == "from" for instruction in instructions):
        raise ModelfileError("no FROM line")
    return instructions


def decode(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 when it has a byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def render_modelfile(instructions: Iterable[Instruction]) -> str:
    """The instructions, one a line."""
    return "".join(f"{_render(instruction)}\n" for instruction in instructions)


def quote(text: str) -> str:
    """A value as it has to be written. Three quotes at the end of a line within it cannot be written at all."""
    if "\n" in text or "\r" in text or text != text.strip(" \t") or text.startswith('"'):
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


def parse_parameters(parameters: Iterable[tuple[str, str]]) -> dict[str, JSON]:
    """Names and texts as an options object; `stop` gathers its values, of the others the last counts.

    Raises:
        ModelfileError: a name is unknown, or a text is no value for it.
    """
    options: dict[str, JSON] = {}
    for name, text in parameters:
        if name in DEPRECATED:
            continue
        reader = _PARAMETERS.get(name)
        if reader is None:
            raise ModelfileError(f"unknown parameter '{name}'")
        value = reader(text)
        options[name] = [*options.get(name, []), *value] if isinstance(value, list) else value
    return options


def parse_requires(text: str) -> str:
    """A version without its `v`. Raises ModelfileError for what is none."""
    if not _SEMVER.fullmatch(text):
        raise ModelfileError("requires must be a valid semver (e.g. 0.14.0)")
    return text.removeprefix("v")


def _render(instruction: Instruction) -> str:
    match instruction:
        case Instruction("from", argument):
            return f"FROM {argument}"
        case Instruction("message" | "parameter" as command, argument, key):
            return f"{command.upper()} {key} {quote(argument)}"
        case Instruction(command, argument):
            return f"{command.upper()} {quote(argument)}"


class _Reader:
    """Goes through a text once; `line` tells where it is, counted as Ollama does: CR and LF are a line each."""

    def __init__(self, text: str) -> None:
        self._text = "".join(character for character in text if character.isprintable() or character in "\t\r\n")
        self._at = 0

    def instructions(self) -> Iterator[Instruction]:
        """Raises ModelfileError."""
        while self._take(_BETWEEN) is not None and self._at < len(self._text):
            command = (self._word(_COMMAND) or "").lower()
            if command not in COMMANDS:
                raise self._fail(_NO_COMMAND)
            key = self._key(command)
            yield Instruction(command, self._value(), key)

    def _key(self, command: str) -> str:
        if command not in ("parameter", "message"):
            return ""
        self._take(_BLANKS)
        key = self._word(_NAME if command == "parameter" else _ROLE)
        if key is None:
            raise ModelfileError(_UNEXPECTED_END)
        if command == "message" and key not in ROLES:
            raise self._fail(_NO_ROLE)
        return key

    def _word(self, pattern: re.Pattern[str]) -> str | None:
        """A word that has a blank behind it; the blanks are left for whoever reads on."""
        word = self._take(pattern)
        if self._at == len(self._text):
            raise ModelfileError(_UNEXPECTED_END)
        return word if word and self._text[self._at] in " \t" else None

    def _value(self) -> str:
        self._take(_BLANKS)
        for opening, pattern in (('"""', _TRIPLE), ('"', _QUOTED)):
            if self._text.startswith(opening, self._at):
                text = self._take(pattern)
                if text is None:
                    raise ModelfileError(_UNEXPECTED_END)
                return text.strip(" \t")[len(opening) : -len(opening)]
        return (self._take(_BARE) or "").strip(" \t")

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _fail(self, what: str) -> ModelfileError:
        read = self._text[: self._at + 1]  # the character at which reading failed counts
        return ModelfileError(f"(line {1 + read.count(chr(10)) + read.count(chr(13))}): {what}")


_BETWEEN = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_COMMAND = re.compile(r"[^#][A-Za-z]*")
_NAME = re.compile(r"[A-Za-z0-9_]*")
_ROLE = re.compile(r"[A-Za-z]*")
_BLANKS = re.compile(r"[ \t]*")
_BARE = re.compile(r"[^\r\n]*")
_QUOTED = re.compile(r'".*?"[ \t]*(?=[\r\n]|\Z)', re.DOTALL)
_TRIPLE = re.compile(r'""".*?"""[ \t]*(?=[\r\n]|\Z)', re.DOTALL)


def _integers(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        raise ModelfileError(f"invalid int value [{text}]")
    return int(text)


def _reals(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,2})?", text):
        raise ModelfileError(f"invalid float value [{text}]")
    return float(text)


def _booleans(text: str) -> bool:
    if text not in ("1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"):
        raise ModelfileError(f"invalid bool value [{text}]")
    return text in ("1", "t", "T", "TRUE", "true", "True")


def _texts(text: str) -> list[str]:
    return [text]


_PARAMETERS: Mapping[str, Callable[[str], JSON]] = {
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), _integers),
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), _integers),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature", "repeat_penalty"), _reals),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _reals),
    "use_mmap": _booleans,
    "stop": _texts,
    # llama.cpp's further samplers, which Ollama does not know and leaves alone where it finds them.
    **dict.fromkeys(("top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base"), _reals),
    **dict.fromkeys(("dynatemp_range", "dynatemp_exponent"), _reals),
    **dict.fromkeys(("dry_allowed_length", "dry_penalty_last_n"), _integers),
    "dry_sequence_breakers": _texts,
    "ignore_eos": _booleans,
}
