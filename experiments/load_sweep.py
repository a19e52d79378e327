"""Latency against load: variants of the scheduler under more and more queries per second, on a simulated mesh.

    python -m experiments.load_sweep --config_path configs/load_sweep.yaml --replay.trace FILE --out FILE.json \
        --plot FILE.png

Every run is a replay of its own, with the same seed. The record is written after each; a sweep that is started again
keeps what its record has and runs the rest. `--redraw` draws a record.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import command_line, load_measures, results
from experiments.load_measures import HOPELESS, table
from experiments.replay import ReplayConfig, replay, workload
from mnemosyne_jax.errors import RequestError

GIVE_UP_AFTER = 2  # hopeless loads in a row
PER_START = ("queries_per_s", "only", "max_workers", "out", "plot", "redraw", "check")  # may differ within a record

type Row = dict[str, Any]


@dataclass(frozen=True)
class LoadSweepConfig:
    """`replay` at each of `queries_per_s` for each of `variants`: a name, and what it changes in `replay.serve`.

    Chunks aim at `replay.serve.tbt_slo_s`; tokens are judged by `tbt_slo_s`, with room for predictions that are off.
    `only` runs some of the variants. A variant ends after two loads in a row at which fewer than half of its requests
    had their first token in time: worse is to come. All are compared with `baseline`; `aims` are of the first variant,
    by the name of the comparison, those of latencies at `aims_at` queries per second.
    """

    replay: ReplayConfig = field(default_factory=ReplayConfig)
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"lars": {"policy": "lars"}})
    queries_per_s: tuple[float, ...] = (0.75,)
    tbt_slo_s: float = 0.030
    only: tuple[str, ...] = ()
    baseline: str = "fcfs_exclusive"
    aims: dict[str, str] = field(default_factory=dict)
    aims_at: float = 0.75
    max_workers: int = 1
    out: str = "out/load_sweep.json"
    plot: str | None = None
    redraw: bool = False
    check: bool = False


def run(config: ReplayConfig, label: str, overrides: Mapping[str, Any], tbt_slo_s: float) -> list[Row]:
    """The rows of one variant at one load."""
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, **overrides))
    begin_s, arrivals = time.perf_counter(), workload(config)
    served, loop = replay(config, config.serve.policy, arrivals)
    where: dict[str, Any] = dict(variant=label, queries_per_s=config.queries_per_s)
    span_s = loop.executor.now() - arrivals[0].arrival_s
    rows = load_measures.rows(served, tbt_slo_s, span_s, **where)
    rows.append(results.row("ticks", loop.scheduler.tick, "1", **where))
    return [*rows, results.row("replay", round(time.perf_counter() - begin_s, 1), "s", **where)]


def next_load(config: LoadSweepConfig, label: str, rows: list[Row]) -> float | None:
    """The lowest load that a variant has not run at; None if it is done."""
    done = table(rows).get(label, {})
    return next((load for load in sorted(config.queries_per_s) if load not in done), None)


def is_hopeless(label: str, load: float, rows: list[Row]) -> bool:
    """Whether the loads just below this one say that there is nothing to be seen at it."""
    done = table(rows).get(label, {})
    below = [done[at]["TTFT in time"] for at in sorted(done) if at < load][-GIVE_UP_AFTER:]
    return len(below) == GIVE_UP_AFTER and max(below) < HOPELESS


def conclusions(config: LoadSweepConfig, rows: list[Row]) -> list[Row]:
    """What follows from the rows of all runs: sustained loads, comparisons, and where a variant was given up."""
    aimed = next(iter(config.variants))
    made = load_measures.comparisons(table(rows), config.baseline, config.tbt_slo_s)
    for row in made:
        if row["variant"] == aimed and row.get("queries_per_s", config.aims_at) == config.aims_at:
            row |= {"aim": config.aims[row["name"]]} if row["name"] in config.aims else {}
    for label in config.variants:
        load = next_load(config, label, rows)
        if load is not None and is_hopeless(label, load, rows):
            made.append(results.row("given up as hopeless, from", load, "1/s", variant=label))
    return made


def sweep(config: LoadSweepConfig, rows: list[Row], keep: Callable[[], None]) -> None:
    """Adds the rows of each run that `rows` lacks, and calls `keep` after each run.

    Each run has a process of its own, which ends with it even if this one was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has threads, as jax's has, may hang
    with ProcessPoolExecutor(config.max_workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        running: dict[Future[list[Row]], str] = {}

        def start(label: str) -> None:
            load = next_load(config, label, rows)
            if load is not None and not is_hopeless(label, load, rows):
                at_load = dataclasses.replace(config.replay, queries_per_s=load)
                running[pool.submit(run, at_load, label, config.variants[label], config.tbt_slo_s)] = label

        for label in config.only or config.variants:
            start(label)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rows += future.result()
                keep()
                start(running.pop(future))


def kept(config: LoadSweepConfig) -> tuple[list[Row], list[str]]:
    """(rows of the runs, commands) of the record that is there.

    Raises: RequestError if it is one of another sweep.
    """
    if not Path(config.out).exists():
        return [], []
    made = json.loads(Path(config.out).read_text())
    asked, found = json.loads(json.dumps(dataclasses.asdict(config))), made["config"]
    asked["variants"] = {label: asked["variants"].get(label) for label in found["variants"]}  # there may be more
    differing = [name for name in asked if name not in PER_START and asked[name] != found.get(name)]
    if differing:
        raise RequestError("out", config.out, f"holds a sweep with another {', '.join(differing)}")
    return [row for row in made["rows"] if "queries_per_s" in row and "versus" not in row], made["commands"]


def main(args: list[str] | None = None) -> int:
    config = command_line.read(LoadSweepConfig, args)
    try:
        rows, commands = kept(config)
        unknown = set(config.only) - config.variants.keys()
        if unknown:
            raise RequestError("only", sorted(unknown), f"must be of {', '.join(config.variants)}")
        workload(dataclasses.replace(config.replay, queries_per_s=1.0))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2

    def keep() -> None:
        label, load = rows[-1]["variant"], rows[-1]["queries_per_s"]
        last = table(rows)[label][load]
        ttft = "/".join(f"{last[f'TTFT {q}']:.3g}" for q in load_measures.QUANTILES)
        print(f"{label} at {load:g}/s: TTFT p50/p90/p99 {ttft} s, {last['TTFT in time']:.1%} in time, "
              f"p99 TBT {1e3 * last['TBT p99']:.3g} ms, after {last['replay']:g} s", flush=True)  # fmt: skip
        results.write(config.out, record())

    def record() -> dict[str, Any]:
        made = results.document(config, [*rows, *conclusions(config, rows)])
        return made | {"commands": [*commands, made["command"]]}

    if not config.redraw:
        sweep(config, rows, keep)
    if config.plot:
        load_measures.figure(table(rows), config.tbt_slo_s).savefig(config.plot, dpi=110)
    for row in (made := conclusions(config, rows)):
        if " of " not in row["name"]:  # those are in the record
            at = f" at {row['queries_per_s']:g}/s" if "queries_per_s" in row else ""
            print(f"{row['variant']}{at}: {row['name']} {row.get('value', 'inf')}")
    return 0 if not config.check or results.check({"rows": made}) else 1


if __name__ == "__main__":
    sys.exit(main())
