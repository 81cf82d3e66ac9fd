"""The names that dashboards rely on."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from convener.telemetry.metrics import Metrics

NAMES = {
    "convener_build_info": {"version", "protocol"},
    "convener_node_ready": set[str](),
    "convener_nodes": {"state"},
    "convener_conversations": {"status"},
    "convener_connections": {"transport"},
    "convener_messages": {"result"},
    "convener_turns": {"outcome"},
    "convener_turn_duration_seconds": set[str](),
    "convener_message_wait_seconds": set[str](),
    "convener_archive_failures": set[str](),
    "convener_archived_entries": set[str](),
    "convener_inbox_pending": set[str](),
    "convener_claims": {"reason"},
    "convener_takeover_duration_seconds": set[str](),
    "convener_limit_rejections": {"policy"},
    "convener_fenced_appends": set[str](),
    "convener_drain_remaining_conversations": set[str](),
    "convener_handoff_gap_seconds": set[str](),
    "convener_lease_margin_seconds": set[str](),
    "convener_event_loop_lag_seconds": set[str](),
    "convener_bus_probe_age_seconds": set[str](),
    "convener_resyncs": {"reason"},
    "convener_rpc_duration_seconds": {"outcome"},
    "convener_store_errors": {"kind"},
    "convener_store_memory_ratio": set[str](),
    "convener_store_evicts": set[str](),
    "convener_log_entries_lost": set[str](),
    "convener_log_entries_repaired": set[str](),
    "convener_invariant_violations": {"invariant"},
    "convener_background_restarts": {"task"},
    "convener_malformed": {"where"},
}


def families(metrics: Metrics) -> dict[str, str]:
    return {family.name: family.type for family in text_string_to_metric_families(metrics.render().decode())}


def test_names_are_pinned() -> None:
    assert set(families(Metrics())) == set(NAMES)


@pytest.mark.parametrize(("name", "labels"), NAMES.items())
def test_labels_are_pinned(name: str, labels: set[str]) -> None:
    metrics = Metrics()
    attribute = name.removeprefix("convener_").removesuffix("_seconds")
    metric = getattr(metrics, attribute)
    if labels and name != "convener_build_info":
        metric.labels(**dict.fromkeys(labels, "x"))
    (family,) = [f for f in text_string_to_metric_families(metrics.render().decode()) if f.name == name]
    assert family.documentation.endswith(".")
    for sample in family.samples:
        assert set(sample.labels) - {"le"} == labels


def test_counters_end_in_total_and_have_no_created_series() -> None:
    metrics = Metrics()
    metrics.turns.labels(outcome="done").inc()
    text = metrics.render().decode()
    assert 'convener_turns_total{outcome="done"} 1.0' in text
    assert "_created" not in text


def test_each_instance_counts_for_itself() -> None:
    one, other = Metrics(), Metrics()
    one.fenced_appends.inc()
    assert "convener_fenced_appends_total 1.0" in one.render().decode()
    assert "convener_fenced_appends_total 0.0" in other.render().decode()


def test_version_and_protocol_are_shown() -> None:
    text = Metrics(version="1.2.3", protocol=7).render().decode()
    assert 'convener_build_info{protocol="7",version="1.2.3"} 1.0' in text
