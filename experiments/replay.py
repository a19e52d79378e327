"""Replays a trace of requests on a simulated mesh, under one policy after another, with the scheduler that serves.

    python -m experiments.replay --config_path configs/replay.yaml --trace FILE [--out FILE] [--plot FILE.png]
        [--perfetto FILE.json.gz]

A trace without arrivals, or `queries_per_s`, gives a Poisson process with the trace's lengths; `long_share` of the
requests become long ones. The simulator's watch is a cost model of its own, each of its rates off by up to `error`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from experiments import command_line, metrics, perfetto, results, stages, traces
from experiments.metrics import Served
from experiments.perfetto import TickSpan
from experiments.traces import Arrival, LongLengths
from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig, ServeConfig, from_yaml
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.planning import pages_that_fit, tick_time, times_alone
from mnemosyne_jax.serve.budget import BatchLoad, TickTime
from mnemosyne_jax.serve.engine import Loop
from mnemosyne_jax.serve.policy import PrefillTimes
from mnemosyne_jax.serve.request import Request, Sequence
from mnemosyne_jax.serve.scheduler import Scheduler
from mnemosyne_jax.serve.simulation import SimExecutor, StageRun

SAY_EVERY_S = 5.0  # of wall time
SHARES = ("matmul_share", "weight_read_share", "attention_share", "kv_read_share", "link_share")


@dataclass(frozen=True)
class ReplayConfig:
    """`trace` on `mesh` of `hardware`, once for each of `policies`; `serve` holds every other setting.

    With `queries_per_s` requests are drawn from the trace for `duration_s`, else they arrive as they did. Requests that
    are not done `drain_s` after the last arrival count as unfinished; `cancel_share` of them are taken back on the way.
    `stages` is how the pipeline runs: as the engine's, or each stage at its own pace (`serve/simulation.py`).
    `perfetto` is where the first policy's schedule goes, from and to `perfetto_s` seconds of the simulation.
    """

    trace: str = ""
    model: str = "configs/model/llama-3-8b.yaml"
    hardware: str = "configs/hardware/h100.yaml"
    mesh: MeshSpec = field(default_factory=MeshSpec)
    serve: ServeConfig = field(default_factory=ServeConfig)
    policies: tuple[str, ...] = ("lars", "fcfs_exclusive")
    stages: Literal["lock_step", "asynchronous"] = "lock_step"
    queries_per_s: float | None = None
    duration_s: float = 3600.0
    drain_s: float = 600.0
    long_share: float = 0.0
    long_lengths: LongLengths = field(default_factory=LongLengths)
    cancel_share: float = 0.0
    seed: int = 0
    error: float = 0.05
    perfetto: str | None = None
    perfetto_s: tuple[float, float] = (0.0, 60.0)
    out: str | None = None
    plot: str | None = None
    check: bool = False


def workload(config: ReplayConfig) -> list[Arrival]:
    """The requests of a run, in order of arrival."""
    if not config.trace:
        raise RequestError("trace", config.trace, "must name a file of requests")
    arrivals = traces.read(config.trace)
    if config.queries_per_s is not None:
        arrivals = traces.with_poisson_arrivals(arrivals, config.queries_per_s, config.seed, config.duration_s)
    elif math.isnan(arrivals[0].arrival_s):
        raise RequestError("queries_per_s", None, f"must be given: {config.trace} holds no arrivals")
    return traces.mix(arrivals, config.long_share, config.seed, config.long_lengths) if config.long_share else arrivals


def cancels(
    config: ReplayConfig, arrivals: Seq[Arrival], expected: TickTime, times: PrefillTimes
) -> list[tuple[float, str]]:
    """(when, which request) for those that are taken back, in order of time.

    The time is within what the request would take alone on an idle system, so that it is under way or waiting.
    """
    generator = np.random.default_rng([config.seed, *b"cancel"])
    chosen = generator.permutation(len(arrivals))[: round(config.cancel_share * len(arrivals))].tolist()
    idle_tick_s = expected.seconds((BatchLoad.empty(config.mesh.kvp),)) or 0.0
    lives_s = [
        times.alone_s(arrivals[i].prompt_tokens) + (arrivals[i].new_tokens - 1) * config.mesh.spp * idle_tick_s
        for i in chosen
    ]
    after_s = generator.uniform(0, 1, len(chosen)) * np.array(lives_s)
    return sorted((arrivals[i].arrival_s + float(s), arrivals[i].id) for i, s in zip(chosen, after_s, strict=True))


def perturbed(hardware: HardwareConfig, error: float, seed: int) -> HardwareConfig:
    """Hardware whose every rate differs by up to `error`, either way."""
    off = np.random.default_rng([seed, *b"error"]).uniform(1 - error, 1 + error, len(SHARES))
    shares = {name: min(1.0, float(getattr(hardware, name) * x)) for name, x in zip(SHARES, off, strict=True)}
    return dataclasses.replace(hardware, **shares)


def replay(
    config: ReplayConfig, policy: str, arrivals: Seq[Arrival], spans: list[TickSpan] | None = None
) -> tuple[list[Served], Loop]:
    """(what came of every request, the loop that served them) under one policy.

    `spans` takes in those of `perfetto_s`.
    """
    model, hardware = from_yaml(ModelConfig, config.model), from_yaml(HardwareConfig, config.hardware)
    serve, mesh = dataclasses.replace(config.serve, policy=policy), config.mesh
    expected = tick_time(model, hardware, mesh, serve)
    longest = max(arrival.prompt_tokens for arrival in arrivals)
    times = times_alone(expected, serve, longest)
    scheduler = Scheduler(
        serve,
        mesh,
        pool_pages=serve.pool_pages or pages_that_fit(model, hardware, mesh, serve.page_tokens),
        vocab=1,
        fits=lambda shared, private: expected.program_rows(shared, private) is not None,
        tick_time=expected,
        prefill_times=times,
    )

    def draw(runs: tuple[StageRun, ...]) -> None:
        if spans is not None and config.perfetto_s[0] <= runs[0].begin_s < config.perfetto_s[1]:
            spans.extend(stages.tick_spans(runs, runs[0].batch.tick, expected, serve, mesh, scheduler.waiting))

    watch = tick_time(model, perturbed(hardware, config.error, config.seed), mesh, serve)
    executor = SimExecutor(serve, mesh, watch, config.stages, None if spans is None else draw)
    loop = Loop(scheduler, executor)
    prompt = np.zeros(longest, np.int32)
    waiting, leaving, found = deque(arrivals), deque(cancels(config, arrivals, expected, times)), {}
    end_s, say_at_s = arrivals[-1].arrival_s + config.drain_s, time.perf_counter() + SAY_EVERY_S
    while (waiting or not loop.idle) and executor.now() < end_s:
        if loop.idle:
            executor.wait_until(waiting[0].arrival_s)
        requests, ended, now_s = [], [], executor.now()
        while waiting and waiting[0].arrival_s <= now_s:
            arrival = waiting.popleft()
            request = Request(
                arrival.id, prompt[: arrival.prompt_tokens], arrival.new_tokens, arrival.arrival_s, arrival.deadline_s,
                stop_ids=(),
            )  # fmt: skip
            try:
                requests.append(scheduler.check(request, arrival.arrival_s))
                found[arrival.id] = None
            except RequestError as error:
                found[arrival.id] = f"refused: {error}"
        while leaving and leaving[0][0] <= now_s:
            ended.append(leaving.popleft()[1])
        arrived, _ = loop.tick(requests, ended)
        found |= {sequence.request.id: sequence for sequence in arrived}
        if time.perf_counter() >= say_at_s:
            tokens = sum(s.prompt_scheduled + len(s.tokens) for s in found.values() if isinstance(s, Sequence))
            print(f"  {policy}: {now_s:.0f} s simulated of at most {end_s:.0f}, {tokens:,} tokens, "
                  f"{scheduler.waiting} requests waiting", file=sys.stderr, flush=True)  # fmt: skip
            say_at_s = time.perf_counter() + SAY_EVERY_S
    return [served(arrival, found.get(arrival.id), times) for arrival in arrivals], loop


def served(arrival: Arrival, found, times: PrefillTimes) -> Served:
    """What came of one request: `found` is its Sequence, or why there is none."""
    refused = isinstance(found, str)
    token_s = np.array([] if refused or found is None else found.timeline.token_s)
    reason = found if refused else ((found and found.reason) or "unfinished")
    return Served(
        id=arrival.id,
        prompt_tokens=arrival.prompt_tokens,
        new_tokens=arrival.new_tokens,
        arrival_s=arrival.arrival_s,
        deadline_s=arrival.deadline_s,
        isolated_ttft_s=max(times.alone_s(arrival.prompt_tokens), 1e-6),
        token_s=token_s,
        reason=reason,
        kind=arrival.kind,
    )


def main(args: list[str] | None = None) -> int:
    config = command_line.read(ReplayConfig, args)
    try:
        arrivals = workload(config)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    print(traces.describe(arrivals), flush=True)
    rows, runs = [], {}
    for policy in config.policies:
        begin_s, spans = time.perf_counter(), [] if config.perfetto and not runs else None
        runs[policy], loop = replay(config, policy, arrivals, spans)
        took_s, ticks = time.perf_counter() - begin_s, loop.scheduler.tick
        span_s = loop.executor.now() - arrivals[0].arrival_s
        rows += metrics.rows(metrics.summary(runs[policy], config.serve.tbt_slo_s, span_s), policy=policy)
        assert isinstance(loop.executor, SimExecutor)
        rows += stages.utilisation(loop.executor, span_s, policy=policy)
        rows.append(results.row("replay", round(took_s, 2), "s", policy=policy, ticks=ticks))
        if filling := loop.scheduler.filling:
            rows.append(results.row("chunks over budget", filling.forced_chunks, "1", policy=policy))
        ttft, tbt = ([f"{x:.3g}" for x in _percentiles(values)] for values in _latencies(runs[policy]))
        print(f"{policy}: TTFT p50/p90/p99 {'/'.join(ttft)} s, TBT {'/'.join(tbt)} s; "
              f"{ticks} ticks, {span_s:.0f} s simulated in {took_s:.1f} s", flush=True)  # fmt: skip
        if config.perfetto and spans:
            perfetto.trace(spans, config.perfetto)
    made = results.document(config, rows)
    if config.out:
        results.write(config.out, made)
    if config.plot:
        metrics.cdf_figure(runs, config.serve.tbt_slo_s).savefig(config.plot, dpi=120)
    return 0 if not config.check or results.check(made) else 1


def _latencies(run: Seq[Served]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s.ttft_s for s in run]), np.concatenate([np.diff(s.token_s) for s in run])


def _percentiles(values: np.ndarray) -> np.ndarray:
    return np.percentile(values, (50, 90, 99), method="inverted_cdf") if values.size else np.full(3, np.nan)


if __name__ == "__main__":
    sys.exit(main())
