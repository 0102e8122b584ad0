"""The numbers for Prometheus: ours, and those of every worker, in one text.

The only importer of prometheus_client. Whoever scrapes the workers hands their texts to `render`; a scrape loads and
wakes nothing. Label values are bounded: past the caps new callers and models are counted as `other`, and a model that
does not exist has the empty label. The ledger keeps the exact names. The surprise: gauges are not kept but asked for
at each scrape, so they cannot drift from what they describe.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from engines.events import FinishReason
from engines.model import RunnerStatus
from engines.request import Origin
from gateway.usage.record import FAILURES, REFUSED, UsageRecord, bounded_text

logger = logging.getLogger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Otherwise every counter has a second series with the time of its first increment.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves this function untyped

_OUTCOMES = {*(reason.value for reason in FinishReason), REFUSED}
_ORIGIN = ("surface", "caller", "client")
_RUNNER = ("backend", "model", "mode")
_MAX_LABEL_BYTES = 128
_MAX_CODES = 64
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_WAIT_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts requests that have ended, and renders `/metrics`.

    Counters and gauges carry the origin's labels, histograms the model and never the caller. Surfaces
    and clients come from closed lists, so only callers, models and error codes are capped.
    """

    def __init__(self, max_callers: int = 200, max_models: int = 200) -> None:
        self._caller = _Capped(max_callers)
        self._code = _Capped(_MAX_CODES)
        self._model = _Capped(max_models)
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, help_text, labels, namespace="headwater", registry=registry)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_text, ("model",), namespace="headwater", registry=registry, buckets=buckets)

        by_model = (*_ORIGIN, "model")
        self._requests = counter("requests", "Requests by how they ended.", (*by_model, "outcome"))
        self._errors = counter("request_errors", "Failed and refused requests by error code.", (*_ORIGIN, "code"))
        self._prompt = counter("prompt_tokens", "Prompt tokens, cached ones included.", by_model)
        self._cached = counter("cached_tokens", "Prompt tokens that were already in the KV cache.", by_model)
        self._completion = counter("completion_tokens", "Generated tokens.", by_model)
        self._thinking = counter("thinking_tokens", "Generated tokens that were reasoning.", by_model)
        self._truncated = counter("truncated_tokens", "Prompt tokens left out to fit the window.", by_model)
        self._wasted = counter("wasted_tokens", "Generated tokens that nobody received.", by_model)
        self._draft = counter("draft_tokens", "Tokens proposed by speculation.", by_model)
        self._accepted = counter("accepted_tokens", "Proposed tokens that were kept.", by_model)
        self._unrecorded = counter("usage_unrecorded", "Requests missing from the usage ledger.")
        self._dropped = counter("origin_asserted_dropped", "X-Request-Origin headers that were not believed.")

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S)
        self._duration = histogram("request_duration_seconds", "From arrival to the end.", _WHOLE_S)
        self._queue = histogram("queue_seconds", "Waiting for a turn.", _WAIT_S)
        self._load = histogram("load_seconds", "Waiting for the model, where it had to be loaded.", _WAIT_S)
        self._token = histogram("time_per_output_token_seconds", "Between two tokens of one answer.", _TOKEN_S)

    def observe(self, record: UsageRecord) -> None:
        """Count one request that has ended."""
        model = self._model(record.model) if record.model_digest else ""
        origin = self._origin_labels(record.origin)
        outcome = record.finish_reason if record.finish_reason in _OUTCOMES else "other"
        self._requests.labels(*origin, model, outcome).inc()
        if record.finish_reason in FAILURES:
            self._errors.labels(*origin, self._code(record.error_code)).inc()
        for counter, tokens in (
            (self._prompt, record.usage.prompt_tokens),
            (self._cached, record.usage.cached_tokens),
            (self._completion, record.usage.completion_tokens),
            (self._thinking, record.usage.thinking_tokens),
            (self._truncated, record.usage.truncated_tokens),
            (self._wasted, record.wasted_tokens),
            (self._draft, record.draft_tokens),
            (self._accepted, record.accepted_tokens),
        ):
            if tokens > 0:
                counter.labels(*origin, model).inc(tokens)
        if record.finish_reason != REFUSED:
            self._observe_timings(record, model)

    def _observe_timings(self, record: UsageRecord, model: str) -> None:
        timings, num_gaps = record.timings, record.usage.completion_tokens - 1
        self._duration.labels(model).observe(timings.total_s)
        self._queue.labels(model).observe(timings.queue_s)
        if timings.load_s > 0:
            self._load.labels(model).observe(timings.load_s)
        if timings.ttft_s > 0:
            self._ttft.labels(model).observe(timings.ttft_s)
        if num_gaps > 0 and timings.decode_s > 0:
            self._token.labels(model).observe(timings.decode_s / num_gaps)

    def inc_unrecorded(self, num_requests: int) -> None:
        """Count requests that the ledger had to give up."""
        self._unrecorded.inc(num_requests)

    def inc_dropped_origin(self) -> None:
        """Count an `X-Request-Origin` header that was not believed."""
        self._dropped.inc()

    def watch(
        self,
        *,
        in_flight: Callable[[], Iterable[Origin]],
        waiting: Callable[[], Iterable[Origin]],
        runners: Callable[[], Iterable[RunnerStatus]],
    ) -> None:
        """Where to look at each scrape: origins of the requests being served and of those queued, and the runners.

        Call it once, when the house is wired. The functions must not block.
        """

        def gauges() -> Iterable[Metric]:
            yield self._origin_gauge("requests_in_flight", "Requests being served now.", in_flight())
            yield self._origin_gauge("requests_waiting", "Requests waiting for a turn now.", waiting())
            yield from self._runner_gauges(runners())

        self._registry.register(_Families(gauges))

    def render(self, workers: Iterable[tuple[Mapping[str, str], str]] = ()) -> bytes:
        """Everything in Prometheus' text format, to be sent as `CONTENT_TYPE`.

        Args:
            workers: of each worker, the labels that tell it from all others (`backend`, `model`, `mode`) and its own
                metrics as text. A text that is malformed is left out, and logged.
        """
        families = {family.name: family for family in self._registry.collect()}
        for labels, text in workers:
            try:
                theirs = _parse(labels, text)
            except Exception as error:  # noqa: BLE001  (the parser raises whatever its string slicing runs into)
                logger.warning("metrics of worker %s are malformed: %r", dict(labels), error)
                continue
            _merge(families, theirs)
        return generate_latest(_Families(families.values))

    def _origin_labels(self, origin: Origin) -> tuple[str, str, str]:
        return origin.surface, self._caller(origin.caller), origin.client

    def _origin_gauge(self, name: str, help_text: str, origins: Iterable[Origin]) -> Metric:
        gauge = GaugeMetricFamily(f"headwater_{name}", help_text, labels=_ORIGIN)
        for labels, num_requests in Tally(map(self._origin_labels, origins)).items():
            gauge.add_metric(labels, num_requests)
        return gauge

    def _runner_gauges(self, runners: Iterable[RunnerStatus]) -> Iterable[Metric]:
        loaded: Tally[tuple[str, str, str]] = Tally()
        memory: Tally[tuple[str, str, str]] = Tally()
        for runner in runners:
            labels = (runner.backend, self._model(runner.model.name), runner.mode.value)
            loaded[labels] += 1
            memory[labels] += runner.size_bytes
        for name, help_text, values in (
            ("models_loaded", "Models with a runner now.", loaded),
            ("models_loaded_bytes", "Memory that they take.", memory),
        ):
            gauge = GaugeMetricFamily(f"headwater_{name}", help_text, labels=_RUNNER)
            for labels, value in values.items():
                gauge.add_metric(labels, value)
            yield gauge


class _Capped:
    """A label's values: the first `limit` as they are, and to stay so; the rest as `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        value = bounded_text(value, _MAX_LABEL_BYTES)
        if value not in self._seen:
            if len(self._seen) >= self._limit:
                return "other"
            self._seen.add(value)
        return value


class _Families(Collector):
    """A collector of whatever families the function returns."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


def _parse(labels: Mapping[str, str], text: str) -> list[Metric]:
    """A worker's families with its labels added. All or nothing: raises when any line is malformed."""
    text.encode()
    families = list(text_string_to_metric_families(text))
    for family in families:
        family.samples = [
            # Timestamps are dropped: a scrape of us is a scrape of now.
            Sample(sample.name, _labelled(sample.labels, labels), float(sample.value))
            for sample in family.samples
        ]
    return families


def _labelled(own: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """Prometheus' own rule for a label that both have: the scraped one becomes `exported_<name>`."""
    return {f"exported_{name}" if name in labels else name: value for name, value in own.items()} | dict(labels)


def _merge(families: dict[str, Metric], theirs: Iterable[Metric]) -> None:
    for family in theirs:
        merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        if merged.type != family.type:
            logger.warning("metric %s is a %s in one worker and a %s in another", family.name, merged.type, family.type)
        else:
            merged.samples.extend(family.samples)
