"""What the answer must look like, in every spelling that clients have for it (`spec/openai.md` section 4.4).

OpenAI's `response_format`, llama.cpp's `json_schema` and `grammar`, and vLLM's `guided_...` and `structured_outputs`
all end as one `OutputFormat`; two of them at once are refused, except that `response_format` wins over `json_schema`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from compat.openai.refusals import invalid, missing, unsupported_value
from compat.openai.schema import GenerateBody, GrammarTrigger, ResponseFormat
from engines.request import JSON, OutputFormat, Syntax, Tool

_SYNTAXES = {"gbnf": Syntax.GBNF, "lark": Syntax.LARK}
_WORD = ("word", 1)
"""llama.cpp's name and number for a trigger that is plain text."""

_MAX_TRIGGER = 256
_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")


def parse_format(body: GenerateBody, tools: Sequence[Tool] = ()) -> OutputFormat | None:
    """The constraint on the answer.

    Raises:
        BadRequest: there are several, or one that leaves no room for a call of the tools there are.
    """
    found = list(_formats(body))
    if not found:
        return None
    name, wanted = found[0]
    if len(found) > 1:
        raise invalid(found[1][0], f"cannot be combined with '{name}'")
    if tools and wanted.syntax is not Syntax.JSON_SCHEMA:
        raise invalid(name, "cannot be combined with 'tools'")
    return replace(wanted, triggers=_triggers(body)) if body.grammar_lazy else wanted


def _formats(body: GenerateBody) -> Iterator[tuple[str, OutputFormat]]:
    """Every constraint that the body states, with the field that states it."""
    if body.response_format is not None and body.response_format.type != "text":
        yield "response_format", _response_format(body.response_format)
    elif body.json_schema is not None:
        yield "json_schema", OutputFormat(body.json_schema or None)
    if body.grammar:
        yield "grammar", OutputFormat(syntax=Syntax.GBNF, grammar=body.grammar)
    outputs = body.structured_outputs
    for prefix, stated in (
        ("guided_", (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)),
        ("structured_outputs.", outputs and (outputs.json, outputs.regex, outputs.choice, outputs.grammar)),
    ):
        schema, regex, choice, grammar = stated or (None, None, None, None)
        if schema is not None:
            yield f"{prefix}json", OutputFormat(_schema(schema, f"{prefix}json") or None)
        if regex is not None:
            yield f"{prefix}regex", OutputFormat(syntax=Syntax.REGEX, grammar=regex)
        if choice is not None:
            yield f"{prefix}choice", OutputFormat(syntax=Syntax.REGEX, grammar=_one_of(choice))
        if grammar is not None:
            yield f"{prefix}grammar", OutputFormat(syntax=_guess_syntax(grammar), grammar=grammar)


def _response_format(wanted: ResponseFormat) -> OutputFormat:
    """OpenAI's constraint; an empty schema allows any object."""
    match wanted.type:
        case "regex":
            regex = wanted.regex or wanted.pattern
            if regex is None:
                raise missing("response_format.regex")
            return OutputFormat(syntax=Syntax.REGEX, grammar=regex)
        case "grammar":
            if wanted.grammar is None:
                raise missing("response_format.grammar")
            syntax = _SYNTAXES[wanted.syntax] if wanted.syntax else _guess_syntax(wanted.grammar)
            return OutputFormat(syntax=syntax, grammar=wanted.grammar)
        case _:
            schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
            return OutputFormat(schema or None)


def _schema(schema: dict[str, JSON] | str, path: str) -> dict[str, JSON]:
    """A schema as vLLM takes it: an object, or the JSON text of one."""
    if isinstance(schema, dict):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, JSON])
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        raise invalid(path, "expected a JSON Schema", "invalid_json_schema") from None


def _one_of(texts: Sequence[str]) -> str:
    """A regex that exactly these texts match."""
    return "(?:" + "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in texts) + ")"


def _guess_syntax(grammar: str) -> Syntax:
    """As vLLM tells them apart: GBNF defines its rules with `::=`, Lark with `:`."""
    return Syntax.GBNF if "::=" in grammar else Syntax.LARK


def _triggers(body: GenerateBody) -> tuple[str, ...]:
    """The texts that a lazy grammar waits for."""
    if not body.grammar_triggers:
        raise missing("grammar_triggers")
    return tuple(
        _trigger(trigger, f"grammar_triggers[{number}]") for number, trigger in enumerate(body.grammar_triggers)
    )


def _trigger(trigger: str | GrammarTrigger, path: str) -> str:
    if isinstance(trigger, GrammarTrigger):
        if trigger.type not in _WORD:
            raise unsupported_value(f"{path}.type", "only 'word' is offered here")
        trigger = trigger.value
    if not 0 < len(trigger) <= _MAX_TRIGGER:
        raise invalid(path, f"expected 1 to {_MAX_TRIGGER} characters")
    return trigger
