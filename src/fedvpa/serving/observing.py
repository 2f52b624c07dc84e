"""What a server tells of itself: structured logs and metrics. No key, no text, and no user's id is
in either."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

logger = logging.getLogger("fedvpa.serving")

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and times, as Prometheus reads them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fedvpa_requests", "Requests", ["route", "method", "status"], registry=registry
        )
        self.seconds = Histogram(
            "fedvpa_request_seconds", "Seconds to the end of a response", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "fedvpa_first_token_seconds", "Seconds to an answer's first piece", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter("fedvpa_tokens", "Tokens read and drawn", ["kind"], registry=registry)
        self.updates = Counter(
            "fedvpa_posterior_updates", "Comparisons that were added", registry=registry
        )
        self.running = Gauge("fedvpa_running", "Answers under way", registry=registry)
        self.waiting = Gauge("fedvpa_waiting", "Requests that wait", registry=registry)

    def text(self, load: dict[str, int]) -> bytes:
        """All of it, with the engine's load of this moment."""
        self.running.set(load["running"])
        self.waiting.set(load["waiting"])
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, and the fields of `extra={"fields": ...}`."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(),
                "message": record.getMessage(), **fields}  # fmt: skip
        return json.dumps(line, ensure_ascii=False)


def log_json(level: int = logging.INFO) -> None:
    """All of fedvpa's log to standard error, a JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    top = logging.getLogger("fedvpa")
    top.handlers, top.propagate = [handler], False
    top.setLevel(level)
