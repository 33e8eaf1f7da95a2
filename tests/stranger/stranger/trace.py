"""Traces: one JSON object a line, `t` in monotonic nanoseconds, `ev` the kind of event."""

import json
import time
from pathlib import Path


class Trace:
    """Appends events to one file. A line has left the process before the next statement runs, so an event
    that is written before an acknowledgement is on file when the acknowledgement leaves."""

    def __init__(self, path: Path):
        self.file = path.open("w", buffering=1, encoding="utf-8")

    def write(self, ev: str, **fields) -> None:
        fields = {"t": time.monotonic_ns(), "ev": ev, **fields}
        self.file.write(json.dumps(fields, separators=(",", ":")) + "\n")

    def close(self) -> None:
        self.file.close()


def read(directory: Path) -> list[dict]:
    """All events of a run, by time."""
    events = []
    for path in sorted(directory.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            events += [json.loads(line) for line in lines if line.strip()]
    events.sort(key=lambda event: event["t"])
    return events
