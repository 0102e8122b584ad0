import json

import pytest

pytest.importorskip("jsonschema", reason="the extra `bench` is not installed")

import jsonschema

from benchmarks.constrained import Constrained, judge
from benchmarks.schemas import SchemaWriter

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}


def test_schemas_are_valid_and_hardly_two_alike() -> None:
    """Five hundred seeds give nearly as many different schemas, all of which the validator accepts."""
    schemas = [SchemaWriter(seed).schema() for seed in range(500)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    assert len({json.dumps(schema) for schema in schemas}) >= 495
    assert SchemaWriter(7).schema() == schemas[7]


def test_schemas_are_of_every_kind() -> None:
    """Nested objects, lists, tuples, alternatives, references, recursion, enums, patterns and ranges all come up."""
    text = json.dumps([SchemaWriter(seed).schema() for seed in range(300)])
    for word in ("maxItems", "prefixItems", "anyOf", "$ref", "node", "enum", "const", "pattern", "exclusiveMaximum"):
        assert f'{word}"' in text


def test_every_reference_has_its_definition() -> None:
    """No schema points outside itself."""
    for seed in range(300):
        schema = SchemaWriter(seed).schema()
        for part in json.dumps(schema).split('"$ref": "#/$defs/')[1:]:
            assert part.split('"')[0] in schema["$defs"]


def test_a_matching_answer_has_nothing_wrong() -> None:
    """What the schema allows passes."""
    assert judge('{"x": 9}', POINT) == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"x": 10}', "maximum"),
        ("{}", "required"),
        ('{"x": 1, "y": 2}', "Additional"),
        ('{"x": 1', "not JSON"),
        ('{"x": NaN}', "no JSON number"),
        ('{"x": 1, "x": 2}', "twice"),
    ],
)
def test_a_wrong_answer_is_found(answer: str, said: str) -> None:
    """What the schema forbids, and what only Python takes for JSON, is told in words."""
    assert said in judge(answer, POINT)


def test_problems_do_not_grow_without_bound() -> None:
    """Ten thousand wrong answers are counted, and the first few are told."""
    result = Constrained()
    for seed in range(10_000):
        result.note(f"schema {seed}")
    assert len(result.problems) == 20
