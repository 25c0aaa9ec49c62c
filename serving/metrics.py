"""The ``guard_*`` metrics. One registry per gateway; every name and label is in ``docs/metrics.md`` (a test compares).

Labels never hold prompt text, keys or request ids; ``adapter`` is a revision name, bounded by the revisions loaded.
"""

from __future__ import annotations

import math
import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from guard.verdict import Verdict
from serving.policy import Decision, Policy

# Field-anchors §E.3: the check itself takes tens of microseconds on a GPU and milliseconds on a CPU.
_CHECK_BUCKETS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25)
_HOLD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SCORE_BUCKETS = (0.25, 0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 2.3, 2.6, 3.0, 3.5, 4.0)
_REASON = re.compile(r"[a-z][a-z_]{0,39}")
_MAX_REASONS = 32


def result_of(verdict: Verdict, decision: Decision) -> str:
    """The ``result`` label: what the check said and what came of it. Unscored stays unscored whatever was done."""
    if verdict.status != "flagged":
        return verdict.status
    if decision.would_action:
        return "would_reroute" if decision.would_action == "reroute" else "would_block"
    return {"block": "blocked", "reroute": "rerouted"}.get(decision.action, "flagged")


class Metrics:
    """Everything the gateway counts."""

    def __init__(self, engine: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        self.engine = engine
        self._reasons: set[str] = set()
        self.checks = Counter(
            "guard_checks", "Requests by what the check said and what came of it.",
            ["model_name", "engine", "adapter", "phase", "mode", "result"], registry=self.registry,
        )  # fmt: skip
        self.check_seconds = Histogram(
            "guard_check_duration_seconds", "Time the engine spent on the check, where it says so.",
            ["phase"], buckets=_CHECK_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.hold_seconds = Histogram(
            "guard_hold_back_duration_seconds", "Time from the request to the first byte released to the client.",
            ["mode"], buckets=_HOLD_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.score = Histogram(
            "guard_score", "-log10 of the p-value of scored requests.",
            ["model_name", "adapter"], buckets=_SCORE_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.bypasses = Counter(
            "guard_bypasses", "Answers delivered without a verdict.", ["reason"], registry=self.registry
        )
        self.engine_errors = Counter(
            "guard_engine_errors", "Engine failures by the phase they hit.", ["phase"], registry=self.registry
        )
        self.hook = Gauge(
            "guard_hook_info", "1 while the engine reports an attached probe, else 0.",
            ["engine", "engine_version", "dtype", "heads"], registry=self.registry,
        )  # fmt: skip
        self.calibration = Gauge(
            "guard_calibration_info",
            "The profile in force of each live model.",
            ["model_name", "digest"],
            registry=self.registry,
        )
        self.calibrated_at = Gauge(
            "guard_calibration_timestamp_seconds", "When the profile of a live model was accepted.",
            ["model_name"], registry=self.registry,
        )  # fmt: skip
        self.profile_stale = Gauge(
            "guard_profile_stale", "1 once clean traffic was found odder than the profile of a live model, else 0.",
            ["model_name", "adapter"], registry=self.registry,
        )  # fmt: skip
        self.profile_drift = Gauge(
            "guard_profile_drift_log10_capital", "log10 of the capital bet against the profile of a live model.",
            ["model_name", "adapter"], registry=self.registry,
        )  # fmt: skip
        self.quarantine = Gauge(
            "guard_quarantine_records", "Flagged requests in cases.", ["state"], registry=self.registry
        )
        self.quarantine_writes = Counter(
            "guard_quarantine_writes",
            "Flagged requests by what became of their evidence.",
            ["result"],
            registry=self.registry,
        )
        self.quarantine_bytes = Gauge("guard_quarantine_bytes", "Bytes of evidence stored.", registry=self.registry)
        self.quarantine_age = Gauge(
            "guard_quarantine_oldest_age_seconds", "Age of the oldest stored evidence.", registry=self.registry
        )
        self.repairs = Gauge("guard_purify_jobs", "Repairs by state.", ["state"], registry=self.registry)
        self.repair_seconds = Gauge(
            "guard_purify_job_duration_seconds",
            "Duration of the last finished repair.",
            ["model_name"],
            registry=self.registry,
        )
        self.repair_asr = Gauge(
            "guard_purify_attack_success_ratio", "Attack success the last repair measured.",
            ["model_name", "stage"], registry=self.registry,
        )  # fmt: skip
        self.repair_utility = Gauge(
            "guard_purify_utility_delta_ratio", "Clean accuracy after minus before, of the last repair.",
            ["model_name"], registry=self.registry,
        )  # fmt: skip
        self.adapters = Gauge(
            "guard_adapter_info",
            "Revisions in use.",
            ["adapter", "version", "digest", "role"],
            registry=self.registry,
        )
        self.swaps = Counter("guard_adapter_swaps", "Swaps by how they ended.", ["result"], registry=self.registry)
        self.approvals_pending = Gauge(
            "guard_approvals_pending", "Repaired candidates that wait for a person.", registry=self.registry
        )

    def reason(self, reason: str | None) -> str:
        """``reason`` as a label: the code in front of any detail, and never more different ones than a label bears."""
        match = _REASON.match(reason or "")
        code = match[0] if match else "other"
        if code not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            return "other"
        self._reasons.add(code)
        return code

    def count(self, alias: str, revision: str, policy: Policy, verdict: Verdict, decision: Decision) -> None:
        """Count one request that was answered (or stopped)."""
        phase = "prefill" if verdict.step == 0 else "decode"
        result = result_of(verdict, decision)
        self.checks.labels(alias, self.engine, revision, phase, policy.mode, result).inc()
        if verdict.p_value is not None:
            self.score.labels(alias, revision).observe(-math.log10(max(verdict.p_value, 1e-12)))
        if verdict.status == "unscored" and decision.delivers:
            self.bypasses.labels(self.reason(verdict.reason)).inc()

    def time_check(self, step: int, seconds: float) -> None:
        """Record how long the engine's check at ``step`` took."""
        self.check_seconds.labels("prefill" if step == 0 else "decode").observe(seconds)

    def count_error(self, alias: str, revision: str, policy: Policy, phase: str) -> None:
        """Count one request that the engine failed to answer."""
        self.checks.labels(alias, self.engine, revision, "decode", policy.mode, "error").inc()
        self.engine_errors.labels(phase).inc()

    def count_aborted(self, alias: str, revision: str, policy: Policy) -> None:
        """Count one request whose client left before its verdict was final."""
        self.checks.labels(alias, self.engine, revision, "decode", policy.mode, "aborted").inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
