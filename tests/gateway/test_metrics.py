from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engines.events import Timings, Usage
from engines.model import ModelCard, RunnerStatus
from engines.request import Mode, Origin
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.usage.record import UsageRecord

RUNNER = {"backend": "llama.cpp", "model": "m:latest", "mode": "completion"}


def make_record(caller: str = "alice", **fields: Any) -> UsageRecord:
    """A record of an ordinary request; further fields override."""
    ordinary: dict[str, Any] = {
        "id": "req_1",
        "started_at": 1_800_000_000.5,
        "origin": Origin("ollama/completion", caller, "curl"),
        "route": "/api/chat",
        "model": "m:latest",
        "model_digest": "a" * 64,
        "status": 200,
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=6),
        "timings": Timings(prefill_s=0.25, decode_s=0.5, ttft_s=0.25, total_s=1.0),
    }
    return UsageRecord(**ordinary | fields)


def samples(text: bytes) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample by name; fails on text that Prometheus could not read, or families that appear twice."""
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_a_request_is_counted_under_its_origin() -> None:
    """Counters carry surface, caller, client and model, and add up."""
    metrics = Metrics()
    for _ in range(2):
        metrics.observe(make_record())
    found = samples(metrics.render())
    origin = {"surface": "ollama/completion", "caller": "alice", "client": "curl", "model": "m:latest"}
    assert found["headwater_requests_total"] == [({**origin, "outcome": "stop"}, 2)]
    assert found["headwater_prompt_tokens_total"] == [(origin, 20)]
    assert found["headwater_cached_tokens_total"] == [(origin, 8)]
    assert found["headwater_completion_tokens_total"] == [(origin, 12)]
    assert "headwater_wasted_tokens_total" not in found


def test_histograms_know_the_model_and_never_the_caller() -> None:
    """Otherwise every caller would multiply every bucket."""
    metrics = Metrics()
    metrics.observe(make_record())
    found = samples(metrics.render())
    assert found["headwater_time_to_first_token_seconds_sum"] == [({"model": "m:latest"}, 0.25)]
    assert found["headwater_request_duration_seconds_sum"] == [({"model": "m:latest"}, 1.0)]
    assert found["headwater_time_per_output_token_seconds_sum"] == [({"model": "m:latest"}, 0.1)]
    assert found["headwater_queue_seconds_count"] == [({"model": "m:latest"}, 1)]
    assert "headwater_load_seconds_count" not in found
    for name, series in found.items():
        if name.endswith("_bucket"):
            assert all(labels.keys() == {"model", "le"} for labels, _ in series)


def test_unknown_models_are_no_label_values() -> None:
    """A name that somebody made up is counted under the empty model."""
    metrics = Metrics()
    metrics.observe(
        make_record(model="made-up", model_digest="", finish_reason="refused", error_code="model_not_found")
    )
    text = metrics.render()
    assert b"made-up" not in text
    found = samples(text)
    ((labels, _),) = found["headwater_requests_total"]
    assert (labels["model"], labels["outcome"]) == ("", "refused")
    ((labels, _),) = found["headwater_request_errors_total"]
    assert labels["code"] == "model_not_found"
    assert "headwater_request_duration_seconds_count" not in found


def test_callers_beyond_the_cap_are_other_and_early_ones_keep_their_name() -> None:
    """The number of series is bounded, whoever asks."""
    metrics = Metrics(max_callers=2)
    for caller in ("a", "b", "c", "d", "a"):
        metrics.observe(make_record(caller))
    counts = {labels["caller"]: value for labels, value in samples(metrics.render())["headwater_requests_total"]}
    assert counts == {"a": 2, "b": 1, "other": 2}


def test_models_beyond_the_cap_are_other() -> None:
    """Copies of a model under ever new names do not fill the memory."""
    metrics = Metrics(max_models=1)
    for model in ("a", "b", "c"):
        metrics.observe(make_record(model=model))
    counts = {labels["model"]: value for labels, value in samples(metrics.render())["headwater_requests_total"]}
    assert counts == {"a": 1, "other": 2}


@given(st.text(st.characters(), max_size=300))
def test_any_caller_name_can_be_rendered(caller: str) -> None:
    """Quotes, line ends, NUL and lone surrogates in a name do not break the page."""
    metrics = Metrics()
    metrics.observe(make_record(caller))
    assert len(samples(metrics.render())["headwater_requests_total"]) == 1


def test_completeness_counters_are_there_from_the_start() -> None:
    """An alert on them needs the zero."""
    metrics = Metrics()
    assert samples(metrics.render())["headwater_usage_unrecorded_total"] == [({}, 0)]
    metrics.inc_unrecorded(3)
    metrics.inc_dropped_origin()
    found = samples(metrics.render())
    assert found["headwater_usage_unrecorded_total"] == [({}, 3)]
    assert found["headwater_origin_asserted_dropped_total"] == [({}, 1)]


def test_gauges_are_read_at_each_scrape() -> None:
    """They show what is, and lose a caller who has left."""
    in_flight = [Origin("openai/chat", "alice"), Origin("openai/chat", "alice"), Origin("openai/chat", "bob")]
    card = ModelCard("m:latest", "full", "d", Path("w"), "sha256:w", 1, 0.0)
    runner = RunnerStatus(card, "llama.cpp", Mode.COMPLETION, "ready", 3, 1000, 0, 4096, float("inf"))
    metrics = Metrics()
    metrics.watch(in_flight=lambda: in_flight, waiting=lambda: in_flight[2:], runners=lambda: [runner, runner])
    found = samples(metrics.render())
    assert [(labels["caller"], n) for labels, n in found["headwater_requests_in_flight"]] == [("alice", 2), ("bob", 1)]
    assert [(labels["caller"], n) for labels, n in found["headwater_requests_waiting"]] == [("bob", 1)]
    assert found["headwater_models_loaded"] == [(RUNNER, 2)]
    assert found["headwater_models_loaded_bytes"] == [(RUNNER, 2000)]
    in_flight.clear()
    assert "headwater_requests_in_flight" not in samples(metrics.render())


WORKER = """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 12
# HELP llamacpp:kv_cache_usage_ratio KV-cache usage.
# TYPE llamacpp:kv_cache_usage_ratio gauge
llamacpp:kv_cache_usage_ratio{model="inner"} 0.5 1395066363000
"""


def test_workers_metrics_are_labelled_and_merged() -> None:
    """Families of several workers appear once, with each worker's labels on its samples."""
    other = RUNNER | {"model": "n:latest"}
    text = Metrics().render([(RUNNER, WORKER), (other, WORKER)])
    assert text.count(b"# TYPE llamacpp:prompt_tokens_total counter") == 1
    assert text.count(b"# HELP llamacpp:prompt_tokens_total") == 1
    found = samples(text)
    assert found["llamacpp:prompt_tokens_total"] == [(RUNNER, 12), (other, 12)]
    assert found["llamacpp:kv_cache_usage_ratio"][0] == (RUNNER | {"exported_model": "inner"}, 0.5)


def test_a_malformed_worker_is_left_out_whole() -> None:
    """Half a page would look like a worker that stopped counting; the others are still there."""
    found = samples(Metrics().render([(RUNNER, WORKER + "broken{ 1\n"), (RUNNER | {"model": "n"}, WORKER)]))
    assert [labels["model"] for labels, _ in found["llamacpp:prompt_tokens_total"]] == ["n"]


def test_a_family_of_another_type_is_left_out() -> None:
    """The first one's type holds, and ours comes first."""
    text = "# TYPE headwater_models_loaded counter\nheadwater_usage_unrecorded_total 99\n# TYPE a gauge\na 1\n"
    found = samples(Metrics().render([(RUNNER, text), (RUNNER, "# TYPE a histogram\na_count 1\na_sum 1\n")]))
    assert found["headwater_usage_unrecorded_total"][0] == ({}, 0)
    assert found["a"] == [(RUNNER, 1)]
    assert "a_count" not in found


@given(
    st.text(st.characters())
    | st.lists(st.sampled_from([*WORKER.split(), "{", "}", '"', "\n", " ", "#", "1e999", "9" * 400])).map("".join)
)
def test_no_worker_can_break_the_page(text: str) -> None:
    """Whatever a worker answers, the page is rendered and our own numbers are on it."""
    page = Metrics().render([(RUNNER, text)])
    assert b"headwater_usage_unrecorded_total 0.0\n" in page
    list(text_string_to_metric_families(page.decode()))


def test_the_content_type_is_prometheus_text() -> None:
    """Prometheus chooses its parser by it."""
    assert CONTENT_TYPE.startswith("text/plain; version=")
