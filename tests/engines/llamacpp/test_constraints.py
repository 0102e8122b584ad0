from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from engines.errors import BadRequest
from engines.llamacpp.constraints import ConstrainedChooser, Grammars
from engines.llamacpp.context import Context, Logits
from engines.llamacpp.model import Model
from engines.request import OutputFormat, Syntax

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The demo model's vocabulary."""
    model = Model(DEMO, num_gpu=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def grammars(model: Model) -> Iterator[Grammars]:
    """Its grammars."""
    grammars = Grammars(model)
    yield grammars
    grammars.close()


class Babbler:
    """A context and a chooser in one: every row is flat, and what comes next is a script's, else anything allowed."""

    def __init__(self, model: Model, seed: int = 0, script: str = "") -> None:
        self._random = np.random.default_rng(seed)
        self._num_tokens = model.num_tokens
        self._script = model.tokenize(script, add_special=False, parse_special=True)
        self.row: Logits = np.zeros(model.num_tokens, np.float32)

    def logits(self, index: int) -> Logits:
        """The row that is masked."""
        return self.row

    def sample(self, index: int) -> int:
        """The script's next token, then any that is not ruled out."""
        allowed = np.flatnonzero(self.row > -np.inf)
        self.row = np.zeros(self._num_tokens, np.float32)
        if self._script:
            return self._script.pop(0)
        return int(self._random.choice(allowed))

    def close(self) -> None:
        """It holds nothing."""


def speak(
    model: Model,
    grammars: Grammars,
    output: OutputFormat,
    *,
    seed: int = 0,
    script: str = "",
    in_thinking: bool = False,
    may_think: bool = False,
    max_tokens: int = 300,
) -> tuple[str, bool]:
    """What a babbling model says under a constraint, and whether it came to an end."""
    babbler = Babbler(model, seed, script)
    chooser = ConstrainedChooser(
        model,
        cast(Context, babbler),
        babbler,
        grammars,
        grammars.compile(output),
        triggers=output.triggers,
        in_thinking=in_thinking,
        may_think=may_think,
    )
    said = b""
    for _ in range(max_tokens):
        token = chooser.sample(0)
        if model.is_end(token):
            return said.decode(), True
        said += model.piece(token, special=True)
    return said.decode("utf-8", "replace"), False


@pytest.mark.parametrize("seed", range(20))
def test_a_schema_is_followed_by_a_model_that_babbles(model: Model, grammars: Grammars, seed: int) -> None:
    """Whatever is chosen among the allowed tokens makes valid JSON in the end."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["Ann", "Ben"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
    }
    text, has_ended = speak(model, grammars, OutputFormat(schema), seed=seed)
    assert has_ended
    value = json.loads(text)
    assert value.keys() == {"name", "age", "tags"}
    assert value["name"] in ("Ann", "Ben")
    assert 0 <= value["age"] <= 99
    assert all(isinstance(tag, bool) for tag in value["tags"])


@pytest.mark.parametrize(
    ("syntax", "grammar", "pattern"),
    [
        (Syntax.REGEX, r"[0-9]{3}-[a-f]+x", r"[0-9]{3}-[a-f]+x"),
        (Syntax.GBNF, 'root ::= ("yes" | "no") " " [0-9] [0-9]?', r"(yes|no) [0-9]{1,2}"),
        (Syntax.GBNF, 'root ::= item item?\nitem ::= "- " [ab] "\\n"', r"(- [ab]\n){1,2}"),
        (Syntax.LARK, 'start: "A" "b"+ | /[0-9]+;/', r"Ab+|[0-9]+;"),
    ],
)
def test_every_syntax_constrains(model: Model, grammars: Grammars, syntax: Syntax, grammar: str, pattern: str) -> None:
    """The whole answer matches, whenever it comes to an end."""
    ended = 0
    for seed in range(10):
        text, has_ended = speak(model, grammars, OutputFormat(syntax=syntax, grammar=grammar), seed=seed)
        if has_ended:
            ended += 1
            assert re.fullmatch(pattern, text), text
    assert ended > 3


def test_a_left_recursive_grammar_is_no_trap(model: Model, grammars: Grammars) -> None:
    """llama.cpp's own parser would never return; this one reads it as what it means."""
    output = OutputFormat(syntax=Syntax.GBNF, grammar='root ::= list\nlist ::= list "," [0-9] | [0-9]')
    text, _ = speak(model, grammars, output, max_tokens=50)
    assert re.fullmatch(r"([0-9](,[0-9])*,?)", text)


@pytest.mark.parametrize(
    "output",
    [
        OutputFormat({"type": "nonsense"}),
        OutputFormat({"$ref": "#/$defs/missing"}),
        OutputFormat({"type": "string", "pattern": "("}),
        OutputFormat({"type": "integer", "minimum": 5, "maximum": 1}),
        OutputFormat(syntax=Syntax.REGEX, grammar="(unclosed"),
        OutputFormat(syntax=Syntax.GBNF, grammar="root ::= missing"),
        OutputFormat(syntax=Syntax.GBNF, grammar="root"),
        OutputFormat(syntax=Syntax.GBNF, grammar=""),
        OutputFormat(syntax=Syntax.GBNF, grammar="root ::= " + "(" * 5000),
        OutputFormat(syntax=Syntax.LARK, grammar="start: %%"),
        OutputFormat(syntax=Syntax.LARK, grammar="x" * 300_000),
        OutputFormat(syntax=Syntax.REGEX, grammar="a", triggers=("x",) * 100),
    ],
    ids=[
        "type", "ref", "pattern", "empty range", "regex", "gbnf name", "gbnf text", "gbnf nothing", "gbnf depth",
        "lark", "lark length", "triggers",
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_what_cannot_be_compiled_is_refused(grammars: Grammars, output: OutputFormat) -> None:
    """Before anything runs, with a reason, and soon."""
    with pytest.raises(BadRequest, match=r"invalid|may have"):
        grammars.compile(output)


@pytest.mark.parametrize(
    "output",
    [
        OutputFormat({"type": "string", "pattern": "(a{1,1000}){1,1000}"}),
        OutputFormat({"type": "string", "pattern": "(a|b)*c(a|b){400}"}),
        OutputFormat({"type": "array", "minItems": 10**9, "maxItems": 10**12}),
        OutputFormat({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
        OutputFormat({"enum": [f"value {i}" for i in range(20_000)]}),
        OutputFormat({"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(1000)]}),
        OutputFormat(syntax=Syntax.REGEX, grammar="(a|aa)+(b?){900}c"),
        OutputFormat(syntax=Syntax.GBNF, grammar='root ::= root root | "a" | "b"'),
    ],
    ids=["pattern", "states", "array", "properties", "enum", "branches", "regex", "ambiguous"],
)
@pytest.mark.timeout(30)
def test_what_explodes_is_refused_or_served_soon(model: Model, grammars: Grammars, output: OutputFormat) -> None:
    """Neither compiling nor any single token keeps the others waiting."""
    with contextlib.suppress(BadRequest):
        speak(model, grammars, output, max_tokens=30)


def test_a_constraint_waits_for_the_end_of_the_reasoning(model: Model, grammars: Grammars) -> None:
    """What is thought is free, whether the prompt or the model opened the block."""
    output = OutputFormat(syntax=Syntax.REGEX, grammar="[0-9]{3}")
    text, has_ended = speak(model, grammars, output, script="so be it</think>", in_thinking=True)
    assert has_ended
    assert re.fullmatch(r"so be it</think>[0-9]{3}", text)
    text, has_ended = speak(model, grammars, output, script="<think>hm</think>", may_think=True)
    assert has_ended
    assert re.fullmatch(r"<think>hm</think>[0-9]{3}", text)


def test_a_constraint_begins_after_its_trigger_and_again_after_the_next(model: Model, grammars: Grammars) -> None:
    """Between them the answer is free, which is how tool calls are held to their schemas."""
    output = OutputFormat(syntax=Syntax.REGEX, grammar="[0-9]{2};", triggers=("CALL ", "ASK "))
    text, _ = speak(model, grammars, output, script="I say CALL 12; and ASK ", max_tokens=40)
    assert re.match(r"I say CALL 12; and ASK [0-9]{2};", text)


def test_a_trigger_in_the_reasoning_is_none(model: Model, grammars: Grammars) -> None:
    """Only the answer counts."""
    output = OutputFormat(syntax=Syntax.REGEX, grammar="[0-9]{2};", triggers=("CALL ",))
    text, _ = speak(model, grammars, output, script="CALL x</think>then CALL ", in_thinking=True, max_tokens=40)
    assert re.match(r"CALL x</think>then CALL [0-9]{2};", text)


def test_an_answer_ends_where_no_token_is_allowed(model: Model, grammars: Grammars) -> None:
    """A script that leaves the grammar brings the matcher into an error, and the answer to its end."""
    output = OutputFormat(syntax=Syntax.REGEX, grammar="[0-9]{3}")
    assert speak(model, grammars, output, script="12x") == ("12x", True)
