import random
from collections import Counter

import pytest

from benchmarks.soak import Soak, make_request


def soak(**changes: object) -> Soak:
    """A run whose books agree, but for the changes."""
    result = Soak(num_sent=10, memory=[100, 200, 300, 300, 300, 300, 301, 302])
    result.ledger = {"num_requests": 10, "completion_tokens": 50}
    result.engine = {"sampled_tokens_total": 50, "kv_cells": 64, "kv_cells_free": 64, "sequences_running": 0}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def test_books_that_agree_are_no_problem() -> None:
    """A run in which all is accounted for passes."""
    assert soak().problems == []


def test_a_request_that_was_cut_short_may_have_a_row() -> None:
    """Nobody can say whether the server had all of it; one row too many is one too many all the same."""
    assert soak(num_sent=9, num_cut_short=1).problems == []
    assert soak(num_sent=8, num_cut_short=1).problems == ["8 requests but 10 rows"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_sent": 11}, "11 requests but 10 rows"),
        ({"ledger": {"num_requests": 10, "completion_tokens": 49}}, "49 tokens"),
        ({"failures": Counter({"/v1/embeddings 500": 3})}, "3 times: /v1/embeddings 500"),
        ({"memory": [100, 200, 200, 200, 230, 260, 290, 320]}, "memory grew"),
    ],
)
def test_what_is_unaccounted_for_is_told(changes: dict[str, object], said: str) -> None:
    """A lost row, a lost token, a failure and a leak are each a problem."""
    assert any(said in problem for problem in soak(**changes).problems)


def test_cells_that_are_still_held_are_told() -> None:
    """A sequence that nobody owns any more keeps its cells, and that is found."""
    result = soak()
    result.engine["kv_cells_free"] = 60
    assert any("still held" in problem for problem in result.problems)


def test_requests_are_of_every_kind() -> None:
    """Both dialects, several choices, log-probabilities, schemas and embeddings all come up."""
    chance = random.Random(0)
    asked = [make_request(chance) for _ in range(200)]
    assert {path for path, _ in asked} == {"/api/chat", "/v1/chat/completions", "/v1/embeddings"}
    for name in ("n", "logprobs", "response_format", "options", "input"):
        assert any(name in body for _, body in asked)
