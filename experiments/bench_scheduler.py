"""What one decision of the scheduler takes: microseconds of `next_batch` with many requests waiting, and of a replay.

`python -m experiments.bench_scheduler [--trace FILE] [--out FILE] [--check]` keeps a live system, under lars with
adaptive chunks, at `waiting` requests while others arrive, run and end, on each mesh of MESHES: once where slots are
what there are too few of, once where pages are, so that whoever waits is tried for room at every tick. The devices are
simulated and no part of the times; garbage collection is, but for what the imports left: one full collection of those
180,000 objects takes 80 ms, and a server spares itself by `gc.freeze()` before it loads an engine. With a trace, all of
it is replayed under the same settings. `cpu` times leave out what other processes took of the core; the musts are of
the `wall`.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments import command_line, replay, results
from experiments.replay import ReplayConfig
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.planning import pages_that_fit, tick_time, times_alone
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.request import Request
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor

MESHES = (MeshSpec(spp=2, tp=4), MeshSpec(kvp=4, spp=2))
BUCKETS_WITH_KVP = (64, 256, 1024, 2048, 8192)  # at most 5
DEADLINES_S = (None, 60.0, 600.0)  # some can wait, and let others pass
SCARCE_PAGES = 3_000  # in each group: room for fewer requests than there are slots


@dataclass(frozen=True)
class BenchSchedulerConfig:
    """`decisions` with `waiting` requests, after `warm_ticks` of the same; `replay` is the YAML of model and settings.

    Prompts are lognormal around `prompt_tokens`, one in fifty around fifty times that, up to `longest_tokens`.
    """

    replay: str = "configs/replay.yaml"
    trace: str = ""
    waiting: int = 1000
    decisions: int = 5000
    warm_ticks: int = 3000
    prompt_tokens: int = 2000
    longest_tokens: int = 200_000
    new_tokens: int = 300
    seed: int = 0
    must_p50_us: float = 100.0
    must_p99_us: float = 1000.0
    must_replay_s: float = 60.0
    out: str | None = None
    check: bool = False


def requests(config: BenchSchedulerConfig) -> Iterator[Request]:
    """Requests of mixed lengths without end, that have not arrived yet."""
    rng, zeros = np.random.default_rng(config.seed), np.zeros(config.longest_tokens, np.int32)
    number = 0
    while True:
        median = config.prompt_tokens * (50 if rng.random() < 0.02 else 1)
        prompt = int(min(max(1, rng.lognormal(np.log(median), 0.8)), config.longest_tokens))
        new_tokens = int(rng.integers(1, 2 * config.new_tokens))
        deadline_s = DEADLINES_S[rng.integers(len(DEADLINES_S))]
        yield Request(number, zeros[:prompt], new_tokens, deadline_s=deadline_s, stop_ids=())
        number += 1


def live(config: BenchSchedulerConfig, mesh: MeshSpec, scarce: str) -> Loop:
    """A loop over a simulated mesh, where `scarce` is 'slots' or 'pages'."""
    settings = command_line.read(ReplayConfig, ["--config_path", config.replay])
    buckets = settings.serve.chunk_buckets if mesh.kvp == 1 else BUCKETS_WITH_KVP
    serve: ServeConfig = dataclasses.replace(settings.serve, policy="lars", chunk_buckets=buckets)
    model, hardware = from_yaml(ModelConfig, settings.model), from_yaml(HardwareConfig, settings.hardware)
    ticks = tick_time(model, hardware, mesh, serve)
    pages = SCARCE_PAGES if scarce == "pages" else pages_that_fit(model, hardware, mesh, serve.page_tokens)
    scheduler = Scheduler(
        serve,
        mesh,
        pool_pages=pages,
        vocab=1,
        fits=lambda shared, private: ticks.program_rows(shared, private) is not None,
        tick_time=ticks,
        prefill_times=times_alone(ticks, serve, config.longest_tokens),
    )
    return Loop(scheduler, SimExecutor(serve, mesh, ticks))


def measure(config: BenchSchedulerConfig, loop: Loop) -> tuple[np.ndarray, dict[str, float]]:
    """(microseconds [decision, (wall, cpu)], means over the decisions of what there was to decide)."""
    scheduler, executor, arriving = loop.scheduler, loop.executor, requests(config)
    took_s, sizes = [], []
    for tick in range(config.warm_ticks + config.decisions):
        now_s = executor.now()
        while scheduler.waiting < config.waiting:
            scheduler.enqueue(scheduler.check(next(arriving), now_s))
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        batch = scheduler.next_batch(now_s)
        cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
        if tick >= config.warm_ticks:
            took_s.append((wall_s, cpu_s))
            running = len(scheduler.sequences) - scheduler.waiting
            sizes.append((running, len(batch.decodes), len(batch.chunks), scheduler.waiting))
        result = executor.step(batch)
        if result:
            scheduler.commit(result)
    names = ("running", "decode rows", "chunk rows", "waiting")
    return 1e6 * np.array(took_s), dict(zip(names, np.mean(sizes, 0).tolist(), strict=True))


def replay_rows(config: BenchSchedulerConfig) -> list[dict]:
    """The wall seconds that a replay of the trace takes, as it arrived and to its end."""
    settings = command_line.read(ReplayConfig, ["--config_path", config.replay, "--trace", config.trace])
    settings = dataclasses.replace(settings, queries_per_s=None, long_share=0.0)
    arrivals = replay.workload(settings)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    served, loop = replay.replay(settings, "lars", arrivals)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    where = {"requests": len(served), "mesh": str(settings.mesh)}
    ended = sum(s.reason == "length" for s in served)
    return [
        results.row("replay", round(wall_s, 1), "s", must=f"<= {config.must_replay_s:g}", clock="wall", **where),
        results.row("replay", round(cpu_s, 1), "s", clock="cpu", **where),
        results.row("ticks of the replay", loop.scheduler.tick, "1", **where),
        results.row("requests that ended", ended, "requests", must=f"== {len(served)}", **where),
    ]


def main(args: list[str] | None = None) -> int:
    config = command_line.read(BenchSchedulerConfig, args)
    rows = []
    for mesh in MESHES:
        for scarce in ("slots", "pages"):
            took_us, sizes = measure(config, live(config, mesh, scarce))
            where = {"mesh": str(mesh), "scarce": scarce}
            musts = {"p50": f"<= {config.must_p50_us:g}", "p99": f"<= {config.must_p99_us:g}", "max": None}
            for clock, values in zip(("wall", "cpu"), took_us.T, strict=True):
                for (name, must), q in zip(musts.items(), (50, 99, 100), strict=True):
                    must = must if clock == "wall" else None
                    value = round(float(np.percentile(values, q)), 1)
                    rows.append(results.row(f"next_batch {name}", value, "us", must=must, clock=clock, **where))
            words = [f"{r['clock']} {r['name']} {r['value']:g} us" for r in rows[-6:]]
            rows += [results.row(f"mean {name}", round(value, 1), "1", **where) for name, value in sizes.items()]
            there = ", ".join(f"{value:.1f} {name}" for name, value in sizes.items())
            print(f"{mesh}, {scarce} scarce ({there}): {', '.join(words)}", flush=True)
    if config.trace:
        rows += replay_rows(config)
        print(", ".join(f"{r['name']} {r['value']:g} {r['unit']}" for r in rows[-4:]), flush=True)
    made = results.document(config, rows)
    if config.out:
        results.write(config.out, made)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    gc.freeze()
    sys.exit(main())
