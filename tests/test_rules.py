"""Rules and dashboards read what is exported, and every alert fires on the series it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics.catalogue import METRICS
from tests.prometheus_tools import promtool
from tests.promql_tools import (
    DASHBOARDS,
    ROOT,
    RULES,
    alerts,
    grouped_labels,
    panel_expressions,
    selectors,
)

EXPRESSIONS = {name: rule["expr"] for name, rule in alerts().items()} | panel_expressions()
BY_SAMPLE = {name: metric for metric in METRICS for name in metric.sample_names}
# What Prometheus and its histograms add.
ADDED_LABELS = {"instance", "le"}

# For each alert: series that make it fire at its time, and series of a cluster that is well.
# A value is promtool's: `0+6x40` is 0, 6, 12 and so on, one a minute.
R, D = 'model_name="m",replica="r"', 'model_name="m",replica="r",drafter="d"'
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "DsparkNoRouter": ({}, {'dspark:build_info{model_name="m",version="1"}': "1x60"}),
    "DsparkNoReplica": (
        {'dspark:replicas{model_name="m",state="ready"}': "0x60"},
        {
            'dspark:replicas{model_name="m",state="ready",instance="a"}': "0x60",  # a new router
            'dspark:replicas{model_name="m",state="ready",instance="b"}': "1x60",
        },
    ),
    "DsparkReplicaMismatched": (
        {'dspark:replicas{model_name="m",state="mismatched"}': "1x60"},
        {'dspark:replicas{model_name="m",state="mismatched"}': "0x60"},
    ),
    "DsparkReplicasLost": (
        {'dspark:request_restarts_total{model_name="m"}': "0x20 3x40"},
        {'dspark:request_restarts_total{model_name="m"}': "7x60"},
    ),
    "DsparkInternalErrors": (
        {'dspark:requests_failed_total{model_name="m",reason="internal"}': "0+1x60"},
        {'dspark:requests_failed_total{model_name="m",reason="invalid"}': "0+9x60"},
    ),
    "DsparkQueueFull": (
        {
            'dspark:requests_failed_total{model_name="m",reason="queue_full"}': "0+2x60",
            'vllm:e2e_request_latency_seconds_count{model_name="m"}': "0+100x60",
        },
        {
            'dspark:requests_failed_total{model_name="m",reason="queue_full"}': "0+1x60",
            'vllm:e2e_request_latency_seconds_count{model_name="m"}': "0+200x60",
        },
    ),
    "DsparkSlowFirstToken": (
        {
            'vllm:time_to_first_token_seconds_bucket{model_name="m",le="5"}': "0+90x60",
            'vllm:time_to_first_token_seconds_bucket{model_name="m",le="10"}': "0+99x60",
            'vllm:time_to_first_token_seconds_bucket{model_name="m",le="+Inf"}': "0+100x60",
        },
        {
            'vllm:time_to_first_token_seconds_bucket{model_name="m",le="5"}': "0+96x60",
            'vllm:time_to_first_token_seconds_bucket{model_name="m",le="+Inf"}': "0+100x60",
        },
    ),
    "DsparkCachePressure": (
        {f"vllm:num_preemptions_total{{{R}}}": "0+12x60"},
        {f"vllm:num_preemptions_total{{{R}}}": "0+5x60"},
    ),
    "DsparkKeysRefused": (
        {
            'dspark:refusals_total{model_name="m",reason="no_key"}': "0+40x60",
            'dspark:refusals_total{model_name="m",reason="unknown_key"}': "0+40x60",
        },
        {
            'dspark:refusals_total{model_name="m",reason="no_key"}': "0+40x60",
            'dspark:refusals_total{model_name="m",reason="request_rate"}': "0+90x60",
        },
    ),
    "DsparkNoDrafterReady": (
        {
            f'dspark:drafters{{{R},state="lost"}}': "1x60",
            f'dspark:drafters{{{R},state="ready"}}': "0x60",
        },
        # None at all: the pool has gone to zero.
        {
            f'dspark:drafters{{{R},state="lost"}}': "0x60",
            f'dspark:drafters{{{R},state="ready"}}': "0x60",
        },
    ),
    "DsparkDrafterUnusable": (
        {f'dspark:drafter_state{{{D},state="quarantined"}}': "1x60"},
        {f'dspark:drafter_state{{{D},state="ready"}}': "1x60"},
    ),
    "DsparkLateRounds": (
        {
            f'dspark:drafter_rounds_total{{{D},outcome="answered"}}': "0+85x60",
            f'dspark:drafter_rounds_total{{{D},outcome="late"}}': "0+10x60",
            f'dspark:drafter_rounds_total{{{D},outcome="dropped"}}': "0+5x60",
        },
        {
            f'dspark:drafter_rounds_total{{{D},outcome="answered"}}': "0+95x60",
            f'dspark:drafter_rounds_total{{{D},outcome="late"}}': "0+5x60",
        },
    ),
    "DsparkMalformedProposals": (
        {f"dspark:malformed_proposals_total{{{R}}}": "0x20 1x40"},
        {f"dspark:malformed_proposals_total{{{R}}}": "1x60"},
    ),
    "DsparkSpeculationFlapping": (
        {f"dspark:speculation_flips_total{{{R}}}": "0+9x60"},
        {f"dspark:speculation_flips_total{{{R}}}": "0+4x60"},
    ),
    "DsparkAcceptanceLow": (
        {
            f"vllm:spec_decode_num_accepted_tokens_total{{{R}}}": "0+20x60",
            f"vllm:spec_decode_num_drafts_total{{{R}}}": "0+100x60",
        },
        # Nothing is drafted: that is not low.
        {
            f"vllm:spec_decode_num_accepted_tokens_total{{{R}}}": "20x60",
            f"vllm:spec_decode_num_drafts_total{{{R}}}": "100x60",
        },
    ),
    "DsparkConfidencesOff": (
        {f"dspark:calibration_error{{{R}}}": "0.2x60"},
        {f"dspark:calibration_error{{{R}}}": "0.1x60"},
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_reads_what_is_exported(name: str) -> None:
    """By names and labels both."""
    expression = EXPRESSIONS[name]
    read = selectors(expression)
    assert read
    known = set(ADDED_LABELS)
    for sample, labels in read:
        assert sample in BY_SAMPLE, sample
        assert set(labels) <= {*BY_SAMPLE[sample].labels, *ADDED_LABELS}, labels
        known.update(BY_SAMPLE[sample].labels)
    assert grouped_labels(expression) <= known


def test_the_checks_would_see_a_name_or_a_label_that_is_not_there() -> None:
    found = selectors('1 - sum by (a, le) (rate(x:y_total{b=~"c"}[5m])) / on () group_left () z')
    assert found == [("x:y_total", {"b": "c"}), ("z", {})]
    assert grouped_labels("max by (a) (x) + sum by (b) (y)") == {"a", "b"}
    with pytest.raises(ValueError, match="parenthesis"):
        selectors("sum by (a) rate(x")


def test_every_alert_has_a_case_and_a_runbook() -> None:
    assert set(CASES) == set(alerts())
    text = (ROOT / "docs" / "operate.md").read_text()
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["runbook"] == f"docs/operate.md#{name.lower()}"
        section = re.search(rf"^### {name}\n+(\S.+)", text, re.MULTILINE)
        assert section is not None, name
    assert set(re.findall(r"^### (Dspark\w+)", text, re.MULTILINE)) == set(alerts())


def test_dashboards_show_every_metric() -> None:
    assert len(DASHBOARDS) == 2
    shown = {
        BY_SAMPLE[name] for text in panel_expressions().values() for name, _ in selectors(text)
    }
    assert {metric.name for metric in METRICS} - {metric.name for metric in shown} == set()


@pytest.mark.prometheus
def test_prometheus_takes_the_rules() -> None:
    assert "16 rules found" in promtool("check", "rules", str(RULES))


@pytest.mark.prometheus
def test_prometheus_takes_what_dashboards_ask(tmp_path: Path) -> None:
    """As recording rules, which are all that promtool reads without a server."""
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(panel_expressions().values())
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))


@pytest.mark.prometheus
def test_every_alert_fires_on_what_it_is_for_and_on_nothing_else(tmp_path: Path) -> None:
    tests = []
    for name, (bad, good) in CASES.items():
        for series, is_bad in ((bad, True), (good, False)):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": s, "values": v} for s, v in series.items()],
                    "alert_rule_test": [_expected(name, is_bad)],
                }
            )
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(document))
    assert "SUCCESS" in promtool("test", "rules", str(path))


def _expected(name: str, is_firing: bool) -> dict[str, Any]:
    """What promtool expects of an alert half an hour and a bit after the series begin."""
    rule = alerts()[name]
    labels = {} if name == "DsparkNoRouter" else {"model_name": "m"}
    by = grouped_labels(rule["expr"]) - ADDED_LABELS - {"model_name"}
    values = {"replica": "r", "drafter": "d", "state": "quarantined"}
    labels |= {label: values[label] for label in by}
    annotations = {
        key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m: labels[m[1]], text)
        for key, text in rule["annotations"].items()
    }
    alert = {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": annotations}
    # A restart or a malformed answer is over after its window.
    at = "25m" if name in ("DsparkReplicasLost", "DsparkMalformedProposals") else "50m"
    return {"eval_time": at, "alertname": name, "exp_alerts": [alert] if is_firing else []}
