"""Whole traces with aborts through the real scheduler, over simulated devices: what leaked, starved or raised.

`python -m experiments.soak --traces "[FILE, FILE]" [--first_requests N] [--out FILE] [--check]` replays each trace
under each policy, `speed` times as fast as it arrived (lengths alone at `queries_per_s`), until nobody is left; a
`cancel_share` of the requests is taken back on the way. Every must is 0. Exits with 1 if one is missed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command_line, replay, results, traces
from experiments.replay import ReplayConfig
from experiments.traces import Arrival
from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.scheduler import Scheduler

# Requests beyond span_tokens are shared by the groups; the pool is small enough for requests to wait for pages.
SERVE = ServeConfig(
    chunk_tokens=8192,
    chunk_buckets=(64, 256, 1024, 4096, 8192),
    private_rows=48,
    private_chunks=8,
    shared_rows=8,
    shared_chunks=2,
    span_tokens=16_384,
    pool_pages=4_096,
    max_waiting=1_000_000,
)


@dataclass(frozen=True)
class SoakConfig:
    """Each of `traces`, or its first `first_requests`, under each of `policies`; those left after `drain_s` starved."""

    traces: tuple[str, ...] = ()
    first_requests: int | None = None
    policies: tuple[str, ...] = ("lars", "fcfs")
    cancel_share: float = 0.05
    speed: float = 3.0
    queries_per_s: float = 15.0
    mesh: MeshSpec = field(default_factory=lambda: MeshSpec(kvp=2, spp=2, tp=2))
    serve: ServeConfig = SERVE
    drain_s: float = 7200.0
    seed: int = 0
    out: str | None = None
    check: bool = False


def workload(config: SoakConfig, path: str) -> list[Arrival]:
    """The requests of a trace that are replayed, in order of arrival."""
    arrivals = traces.read(path)[: config.first_requests]
    if math.isnan(arrivals[0].arrival_s):
        gaps_s = np.random.default_rng([config.seed, *b"soak"]).exponential(1 / config.queries_per_s, len(arrivals))
        at_s = np.cumsum(gaps_s).tolist()
    else:
        at_s = [arrival.arrival_s / config.speed for arrival in arrivals]
    return [dataclasses.replace(arrival, arrival_s=s) for arrival, s in zip(arrivals, at_s, strict=True)]


def leaks(scheduler: Scheduler) -> dict[str, int]:
    """Pages, slots and requests that an idle scheduler has lost, or has twice. It is of no use afterwards."""
    places, serve, mesh = scheduler.places, scheduler.serve, scheduler.mesh
    pages = sum(pool.size - len(np.unique(pool.grant(pool.free))) for pool in places.pools)
    slots = serve.shared_slots(mesh) + mesh.kvp * serve.private_rows
    free = sum(len(set(slots)) for slots in places.free_slots.values())
    return {"leaked pages": pages, "leaked slots": slots - free, "leaked requests": len(scheduler.sequences)}


def soak(config: SoakConfig, policy: str, arrivals: Sequence[Arrival]) -> tuple[dict[str, int], dict[str, int]]:
    """(what must be 0, what became of the requests) of one run."""
    settings = ReplayConfig(
        mesh=config.mesh,
        serve=config.serve,
        cancel_share=config.cancel_share,
        drain_s=config.drain_s,
        seed=config.seed,
    )
    try:
        served, loop = replay.replay(settings, policy, arrivals)
        reasons = Counter(s.reason.partition(":")[0] for s in served)
        faults = {"exceptions": 0, "starved requests": reasons["unfinished"], **leaks(loop.scheduler)}
        wrong = sum(s.reason == "length" and s.token_s.size != s.new_tokens for s in served)
        faults["answers of a wrong length"] = wrong
        waited = sum(s.reason == "length" and s.ttft_s > 1.0 for s in served)
        return faults, {**reasons, "TTFT over 1 s": waited, "ticks": loop.scheduler.tick}
    except Exception:
        traceback.print_exc()
        return {"exceptions": 1}, {}


def main(args: list[str] | None = None) -> int:
    config = command_line.read(SoakConfig, args)
    rows: list[dict[str, Any]] = []
    for path in config.traces:
        try:
            arrivals = workload(config, path)
        except RequestError as error:
            print(error, file=sys.stderr)
            return 2
        for policy in config.policies:
            where = {"trace": Path(path).name, "policy": policy, "mesh": str(config.mesh), "requests": len(arrivals)}
            print(f"{where['trace']}, {policy}: {len(arrivals)} requests", file=sys.stderr, flush=True)
            begin_s = time.perf_counter()
            faults, became = soak(config, policy, arrivals)
            took_s = time.perf_counter() - begin_s
            rows += [results.row(name, count, "1", must="== 0", **where) for name, count in faults.items()]
            rows += [results.row(name, count, "1", **where) for name, count in became.items()]
            rows.append(results.row("soak", round(took_s, 1), "s", **where))
            counts = ", ".join(f"{count} {name}" for name, count in (faults | became).items())
            print(f"{where['trace']}, {policy}: {counts}; {took_s:.0f} s", flush=True)
            if config.out:  # what was found so far, should the rest be cut short
                results.write(config.out, results.document(config, rows))
    made = results.document(config, rows)
    kept = (
        results.check(made) if config.check else all(results.keeps(r["value"], r["must"]) for r in rows if "must" in r)
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
