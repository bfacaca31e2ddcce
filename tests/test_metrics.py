"""The metrics say what they claim: read back with Prometheus' own parser, and after requests through the server."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from moeyard.engine.messages import Stats
from moeyard.engine.predict.meter import Measured
from moeyard.launch.metrics import Metrics, expert_load

from .fake_frontend import FakeFrontEnd, serving, until


def read(text):
    """{(sample name, labels as a sorted tuple): value}, without the times at which series were made."""
    return {
        (sample.name.removeprefix("moeyard:"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def values(metrics):
    return read(metrics.render().decode())


def test_everything_has_our_prefix_and_is_there_from_the_start():
    families = list(text_string_to_metric_families(Metrics().render().decode()))
    assert all(family.name.startswith("moeyard:") and family.documentation for family in families)
    names = {name for name, _ in read(Metrics().render().decode())}
    assert names >= {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        *(
            f"{name}_count"
            for name in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_prompt_tokens",
                "request_generation_tokens",
            )
        ),
    }


def test_gauges_are_the_last_report():
    metrics = Metrics()
    metrics.on_stats(Stats(running=3, waiting=2, kv_blocks_used=5, kv_blocks_total=20))
    metrics.on_stats(Stats(running=1, waiting=0, kv_blocks_used=10, kv_blocks_total=20))
    now = values(metrics)
    assert now["num_requests_running", ()] == 1
    assert now["num_requests_waiting", ()] == 0
    assert now["kv_cache_usage_perc", ()] == 0.5


FIELDS = ("prompt_tokens", "generated_tokens", "prefix_queried_tokens", "prefix_hit_tokens", "preemptions")
COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
)


@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(0, 50)] * len(FIELDS)), max_size=5),
        max_size=2,
    )
)
def test_counters_add_up_over_reports_and_restarts(ranks):
    """Each inner list is one life of a rank: what it did between reports. A new life counts from 0."""
    metrics, done = Metrics(), [0] * len(FIELDS)
    for steps in ranks:
        totals = [0] * len(FIELDS)
        metrics.on_stats(Stats())
        for step in steps:
            totals = [a + b for a, b in zip(totals, step, strict=True)]
            done = [a + b for a, b in zip(done, step, strict=True)]
            report: dict[str, Any] = dict(zip(FIELDS, totals, strict=True))
            metrics.on_stats(Stats(**report))
    now = values(metrics)
    assert [now[name, ()] for name in COUNTERS] == done


def test_latencies():
    metrics = Metrics()
    metrics.on_submitted(7)
    metrics.on_first_token(0.5, 1.5, 2.5, 3)
    metrics.on_token(0.25, 1)
    metrics.on_token(0.5, 2)  # two tokens in one step: a quarter of a second each
    metrics.on_finished("length", 4.0, 7, 4)
    metrics.on_finished("abort", 1.0, 5, 1)
    now = values(metrics)
    for name, count, total in (
        ("request_queue_time_seconds", 1, 0.5),
        ("request_prefill_time_seconds", 1, 1.5),
        ("time_to_first_token_seconds", 1, 2.5),
        ("inter_token_latency_seconds", 3, 0.75),
        ("e2e_request_latency_seconds", 2, 5.0),
        ("request_prompt_tokens", 2, 12),
        ("request_generation_tokens", 2, 5),
    ):
        assert now[f"{name}_count", ()] == count
        assert now[f"{name}_sum", ()] == total
    assert now["inter_token_latency_seconds_bucket", (("le", "0.1"),)] == 0
    assert now["inter_token_latency_seconds_bucket", (("le", "0.25"),)] == 3
    success = {
        dict(labels)["finished_reason"]: v for (name, labels), v in now.items() if name == "request_success_total"
    }
    assert success == {"stop": 0, "length": 1, "abort": 1, "error": 0}


def test_expert_gauges_per_layer():
    metrics = Metrics()
    metrics.on_stats(Stats(expert_counts=[[4, 4], [8, 0], [0, 0]]))
    metrics.on_stats(Stats())  # "unchanged" must not wipe them
    now = values(metrics)
    assert now["moe_expert_balancedness", (("layer", "0"),)] == 1.0
    assert now["moe_expert_balancedness", (("layer", "1"),)] == 0.5
    assert now["moe_expert_top_share", (("layer", "0"),)] == 0.5
    assert now["moe_expert_top_share", (("layer", "1"),)] == 1.0
    assert ("moe_expert_top_share", (("layer", "2"),)) not in now, "nothing is claimed about an idle layer"
    assert metrics.expert_counts == [[4, 4], [8, 0], [0, 0]]


def test_predictors():
    metrics = Metrics()
    measured = Measured(used=8, right_k=4, right_2k=6, likely=4, likely_used=3, ns=5000, tokens=2, on=1, layers_ahead=3)
    metrics.on_stats(Stats(predictors={"look_ahead": measured.to_list(), "other": Measured().to_list()}))
    now = values(metrics)

    def of(name, *labels):
        return now.get((f"moe_predictor_{name}", (*labels, ("predictor", "look_ahead"))))

    assert (of("recall", ("at", "k")), of("recall", ("at", "2k")), of("precision")) == (0.5, 0.75, 0.75)
    assert (of("us_per_token"), of("on"), of("useful_share"), of("depth")) == (2.5, 1, None, 3)
    others = {name: value for (name, labels), value in now.items() if ("predictor", "other") in labels}
    assert others == {"moe_predictor_on": 0}, "nothing is claimed of one that was not asked"


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=8), max_size=4))
def test_expert_load_is_bounded_and_named_by_layer(counts):
    loads = expert_load(counts)
    assert [load.layer for load in loads] == [i for i, row in enumerate(counts) if any(row)]
    for load in loads:
        row = counts[load.layer]
        assert load.assignments == sum(row)
        assert row[load.top_expert] == max(row)
        assert 1 / len(row) <= load.balancedness + 1e-12 and load.balancedness <= 1
        assert load.top_share == pytest.approx(1 / (load.balancedness * len(row)))


def test_requests_through_the_server():
    frontend = FakeFrontEnd()
    with serving(frontend) as server, httpx.Client(base_url=server.url) as http:
        http.post("/v1/completions", json={"prompt": "x = 1", "max_tokens": 5}).raise_for_status()
        frontend.observer.on_stats(Stats(running=1, kv_blocks_used=1, kv_blocks_total=4, prompt_tokens=3))
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        now = read(answer.text)
        assert now["request_success_total", (("finished_reason", "length"),)] == 1
        assert now["request_generation_tokens_sum", ()] == 5
        assert now["inter_token_latency_seconds_count", ()] == 4
        assert now["prompt_tokens_total", ()] == 3
        assert now["kv_cache_usage_perc", ()] == 0.25


def test_two_servers_do_not_share_counters():
    with serving(FakeFrontEnd()) as one, serving(FakeFrontEnd()) as two:
        httpx.post(f"{one.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).raise_for_status()
        until(lambda: not one.frontend.running)
        counts = [read(httpx.get(f"{server.url}/metrics").text) for server in (one, two)]
    assert [now["e2e_request_latency_seconds_count", ()] for now in counts] == [1, 0]
