"""What ran when, as a trace for https://ui.perfetto.dev: kvp groups are its processes, stages its threads.

It is JSON of the trace-event format. A slice has the colour of its request: chrome://tracing obeys `cname`, but
ui.perfetto.dev hashes the name without its digits (google/perfetto#620), hence two letters of the request in each name.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

# Catapult's reserved colours (tracing/base/color_scheme.html) that one can tell from each other.
COLOURS = (
    "thread_state_iowait", "thread_state_running", "thread_state_runnable", "detailed_memory_dump", "terrible", "good",
    "bad", "rail_response", "rail_animation", "rail_load", "startup", "cq_build_passed",
)  # fmt: skip
IDLE, SEVERAL = "cq_build_abandoned", "generic_work"  # greys
DECODE = "decode"
ENGINE_PID = 1  # holds the counters; 0 is Perfetto's idle process
TIDS = 1000  # of a process: Perfetto names threads by tid alone, so it must differ between processes
JITTER_NS = 1000  # an overlap of rounding, not of work

Row = tuple[str, str, int, int]  # kind, request id, start, tokens


@dataclass(frozen=True)
class TickSpan:
    """What one stage of one group did in one tick; the times are on any clock that is never negative."""

    tick: int
    group: int
    stage: int
    begin_s: float
    end_s: float
    rows: tuple[Row, ...]
    predicted_s: float | None
    budget_s: float | None
    waiting: int = 0


def trace(ticks: Iterable[TickSpan], path: str | Path) -> Path:
    """The path, with the trace written there: whole, or not at all. It is compressed if the path ends in .gz.

    `ticks` holds the spans of each tick together, and those of each stage in order; it may be longer than memory.
    Raises: ValueError for spans of one stage that overlap, and for times that are negative or run backwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with gzip.open(part, "wt") if path.suffix == ".gz" else part.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for n, event in enumerate(events(ticks)):
            file.write((",\n" if n else "\n") + json.dumps(event))
        file.write("\n]}\n")
    return part.replace(path)


def events(ticks: Iterable[TickSpan]) -> Iterator[dict[str, Any]]:
    """The trace's events: for each tick its counters, then its slices; names come before their first use."""
    yield from _named("process", "engine", 0, pid=ENGINE_PID)
    ends_ns: dict[tuple[int, int], int] = {}
    for _, together in groupby(ticks, key=lambda span: span.tick):
        spans = list(together)
        yield from _counters(spans)
        for span in spans:
            pid = ENGINE_PID + 1 + span.group
            where = dict(pid=pid, tid=TIDS * pid + span.stage)
            if all(group != span.group for group, _ in ends_ns):
                yield from _named("process", f"group {span.group}", span.group + 1, pid=pid)
            if (span.group, span.stage) not in ends_ns:
                yield from _named("thread", f"stage {span.stage}", span.stage, **where)
            begin_ns, end_ns = round(1e9 * span.begin_s), round(1e9 * span.end_s)
            last_ns = ends_ns.get((span.group, span.stage), 0)
            if not 0 <= begin_ns <= end_ns or begin_ns < last_ns - JITTER_NS:
                raise ValueError(f"a span must begin at {last_ns / 1e9} s or later, and then end: got {span}")
            begin_ns = max(begin_ns, last_ns)
            end_ns = ends_ns[span.group, span.stage] = max(begin_ns, end_ns)
            yield {"ph": "X", "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3, **where} | _slice(span)


def _named(what: str, name: str, order: int, **where: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": f"{what}_name", **where, "args": {"name": name}}
    yield {"ph": "M", "name": f"{what}_sort_index", **where, "args": {"sort_index": order}}


def _counters(spans: Sequence[TickSpan]) -> Iterator[dict[str, Any]]:
    """How many requests wait, and how long the slowest stage takes beside what was predicted and allowed for it."""
    at = {"ph": "C", "ts": round(1e9 * min(span.begin_s for span in spans)) / 1e3, "pid": ENGINE_PID}
    slowest = max(spans, key=lambda span: span.end_s - span.begin_s)
    yield at | {"name": "requests", "args": {"waiting": max(span.waiting for span in spans)}}
    yield at | {"name": "tick", "args": {"took_ms": 1e3 * (slowest.end_s - slowest.begin_s)} | _limits_ms(slowest)}


def _limits_ms(span: TickSpan) -> dict[str, float]:
    limits_s = {"predicted_ms": span.predicted_s, "budget_ms": span.budget_s}
    return {name: 1e3 * limit for name, limit in limits_s.items() if limit is not None and math.isfinite(limit)}


def _slice(span: TickSpan) -> dict[str, Any]:
    ids, tokens = [row[1] for row in span.rows], sum(row[3] for row in span.rows)
    args = {"tick": span.tick, "tokens": tokens, "requests": ids} | _limits_ms(span)
    chunks = [row for row in span.rows if row[0] != DECODE]
    if not span.rows:
        return {"name": "idle", "cname": IDLE, "args": args}
    if not chunks and len(span.rows) > 1:
        return {"name": f"{len(span.rows)} decodes", "cname": SEVERAL, "args": args}
    leading = chunks or list(span.rows)
    shown = [f"{kind} {id} [{start}..{start + count})" for kind, id, start, count in leading]
    if chunks:  # also 0 decodes: the words of a name choose its colour in ui.perfetto.dev
        shown.append(f"{len(span.rows) - len(chunks)} decodes")
    hashed = zlib.crc32(leading[0][1].encode())
    letters = "".join(chr(ord("a") + hashed // 26**n % 26) for n in range(2))
    return {"name": f"{' + '.join(shown)} ({letters})", "cname": COLOURS[hashed % len(COLOURS)], "args": args}
