"""What the whole engine reaches with one request alone: TTFT, TBT, host time and memory, beside the device's ceilings.

`python -m experiments.bench_engine --config_path configs/bench_engine.yaml --out FILE.json --plot FILE.png --check`
prints a line for each measurement and saves the record after each. `--decode_only` fills the cache instead of
prefilling, so that a context of 10M tokens takes seconds; `--profile` adds where a tick's time goes on a GPU.
`--redraw "[FILE.json, ...]" --plot FILE.png` draws records of one device together and measures nothing. One process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# A cache for the longest context needs more of a GPU than the three quarters that JAX takes by itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import numpy as np

import mnemosyne_jax as mn
from experiments import bench_engine_figure as figure
from experiments import bench_engine_record as record
from experiments import ceilings, clocks, command_line, results
from experiments.bench_engine_profile import profiled, rows_of
from experiments.bench_engine_record import Bench
from experiments.bench_engine_runs import (
    Measured,
    TimedEngine,
    built,
    device_bytes,
    fill,
    needed_bytes,
    peak_bytes,
    pool_pages,
    random_prompt,
    run_prompt,
)
from experiments.devices import use_virtual_devices
from experiments.kernel_record import OURS, Found, words

GIB = 2**30


@dataclass(frozen=True)
class BenchEngineConfig:
    """`models` (YAML files) x `contexts`, from short to long, each in fixed chunks of `chunks` and, if `adaptive`, in
    chunks as the scheduler sizes them by `hardware` (a YAML file; None: that of the device).

    `serve` holds for all; its chunk buckets get those of `chunks` beside them, its pool what the longest context that
    fits needs, with `spare_gib` of a device left. A prefill is repeated `rounds` times if it took no longer than
    `repeat_s`. `new_tokens` are decoded after each prompt. Nothing is begun after `seconds`.
    """

    models: tuple[str, ...] = ("configs/model/llama-3.2-1b.yaml",)
    contexts: tuple[int, ...] = (8_192, 32_768, 131_072)
    chunks: tuple[int, ...] = (8184, 504)
    adaptive: bool = True
    hardware: str | None = None
    mesh: mn.MeshSpec = mn.MeshSpec()
    serve: mn.ServeConfig = mn.ServeConfig(private_rows=1, private_chunks=1, shared_rows=1, chunk_tokens=2048)
    decode_only: bool = False
    profile: bool = False
    profile_ticks: int = 4
    new_tokens: int = 65
    rounds: int = 3
    repeat_s: float = 4.0
    spare_gib: float = 3.0
    seconds: float = 420.0
    seed: int = 0
    matmul_size: int = 8192
    copy_bytes: int = 4 << 30
    sample_ms: float = 50.0
    virtual_devices: int = 0
    redraw: tuple[str, ...] = ()
    plot: str | None = None
    out: str | None = None
    check: bool = False

    def __post_init__(self):
        if self.redraw and not self.plot:
            raise ValueError("redraw needs --plot FILE.png")
        if not self.chunks or min(self.chunks) < 1:
            raise ValueError(f"chunks: got {self.chunks}, must be positive, one at least")
        if self.new_tokens < 8 or not self.contexts or min(self.contexts) < 1:
            raise ValueError("new_tokens must be 8 or more, contexts positive")

    @property
    def all_chunks(self) -> tuple[int | str, ...]:
        return (*self.chunks, "adaptive") if self.adaptive else self.chunks

    def serve_for(self, chunk: int | str, pool: int | None = None) -> mn.ServeConfig:
        """Settings under which engines share their programs, whatever the chunk."""
        buckets = tuple(sorted({*self.serve.buckets, *self.chunks}))
        serve = replace(self.serve, chunk_buckets=buckets, chunk_tokens=buckets[-1], pool_pages=pool)
        if isinstance(chunk, int):
            return replace(serve, chunking="fixed", chunk_tokens=chunk)
        return replace(serve, chunking="adaptive")

    def total_tokens(self, context: int) -> int:
        return context + self.new_tokens - 1


# One model.


def bench_model(config: BenchEngineConfig, bench: Bench, path: str) -> None:
    """All measurements of the model in a YAML file, its contexts from short to long."""
    shape, model, peak_before = Path(path).stem, mn.from_yaml(mn.ModelConfig, path), peak_bytes()
    model.refuse_mesh(config.mesh)
    contexts = contexts_that_fit(config, bench, model, shape)
    if not contexts or not bench.may_begin(shape=shape):
        return
    pages = max(pool_pages(config.serve, config.mesh, config.total_tokens(context)) for context in contexts)
    executor, spent_s = built(model, config.serve_for("adaptive", pages), config.mesh)
    for name, seconds in spent_s.items():
        bench.add(f"making {name}", seconds, "s", shape=shape)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent_s.items())
    print(f"{shape} on {config.mesh}, kernels {executor.impl}: {spent}", flush=True)
    hardware = None if config.hardware is None else mn.from_yaml(mn.HardwareConfig, config.hardware)
    kinds = config.chunks[:1] if config.decode_only else config.all_chunks
    engines = {chunk: TimedEngine(executor, config.serve_for(chunk, pages), hardware) for chunk in kinds}
    if config.decode_only:
        fill(executor)
    warm_up = random_prompt(min(contexts[0], 2 * max(config.chunks)), model.vocab, config.seed)
    for engine in engines.values():  # nothing measured is the first of its kind
        run_prompt(engine, warm_up, config.new_tokens, config.decode_only)
    for context in contexts:
        prompt, took_s = random_prompt(context, model.vocab, config.seed + 1), {}
        where = dict(shape=shape, context=context)
        for chunk, engine in engines.items():
            here = where | (dict(cache="filled") if config.decode_only else dict(chunk=chunk))
            if bench.may_begin(**here):
                with bench.found.guarded(OURS, **here):
                    took_s[chunk] = bench_request(config, bench, model, engine, prompt, here)
                bench.save()
        largest = max(config.chunks)
        for chunk in [chunk for chunk in took_s if chunk != largest and largest in took_s]:
            bench.add(record.RATIO, took_s[chunk] / took_s[largest], "1", **where, chunk=chunk, over=largest)
        if config.profile and bench.may_begin(**where, what="profile"):
            with bench.found.guarded(OURS, **where, what="profile"):
                chunk = config.chunks[0]
                accounts = profiled(engines[chunk], prompt, chunk, config.new_tokens, config.profile_ticks)
                rows_of(bench, accounts, **where)
        bench.save()
    record.memory_rows(bench, executor, peak_before, shape=shape, context=contexts[-1])
    bench.save()


def contexts_that_fit(config: BenchEngineConfig, bench: Bench, model: mn.ModelConfig, shape: str) -> list[int]:
    """Those of the run that a device has memory for, short to long; the others are absent from the record."""
    fitting, room = [], device_bytes() - int(config.spare_gib * GIB)
    for context in sorted(config.contexts):
        needed = needed_bytes(model, config.serve_for("adaptive"), config.mesh, config.total_tokens(context))
        if needed <= room:
            fitting.append(context)
        else:
            reason = f"needs {needed / GIB:.1f} GiB of a device for weights and cache, {room / GIB:.1f} are there"
            bench.leave_out(reason, shape=shape, context=context)
    return fitting


def bench_request(
    config: BenchEngineConfig,
    bench: Bench,
    model: mn.ModelConfig,
    engine: TimedEngine,
    prompt: np.ndarray,
    where: dict[str, Any],
) -> float:
    """The rows of one prompt, medians over some runs of it; returns its TTFT in s."""
    devices, filled = config.mesh.devices, config.decode_only
    runs: list[Measured] = []
    while len(runs) < config.rounds and (not runs or runs[-1].ttft_s <= config.repeat_s):
        runs.append(run_prompt(engine, prompt, config.new_tokens, filled))
    ttft_s, prefill = float(np.median([run.ttft_s for run in runs])), ""
    if not filled:
        rate = record.prefill_flops(model, len(prompt)) / ttft_s / devices / 1e12
        chunks = dict(runs=len(runs), chunks=len(runs[0].chunks), largest_chunk=max(runs[0].chunks))
        bench.add(record.TTFT, ttft_s, "s", **where, **chunks)
        bench.add("prefill rate of a device", rate, "TFLOP/s", **where)
        bench.add("MFU", rate / bench.ceilings["matmul_tflops"], "1", **where)
        prefill = f"TTFT {ttft_s:.4g} s ({rate:.4g} TFLOP/s in {chunks['chunks']} chunks), "
    tbt_s = np.concatenate([run.tbt_s for run in runs])
    p50_s, p99_s = np.percentile(tbt_s, (50, 99)).tolist()
    read_tb_per_s = record.decode_bytes(model, len(prompt), engine.executor.dtype.itemsize) / p50_s / devices / 1e12
    mbu = read_tb_per_s / bench.ceilings["copy_tb_per_s"]
    bench.add(record.TBT, 1e3 * p50_s, "ms", **where, tokens=len(tbt_s))
    bench.add("TBT p99", 1e3 * p99_s, "ms", **where)
    bench.add("decode read of a device", read_tb_per_s, "TB/s", **where)
    bench.add("MBU", mbu, "1", **where)
    busy_us = {tick: 1e6 * np.median([s for run in runs for s in run.host_s[tick]]) for tick in ("chunk", "decode")}
    for tick, us in busy_us.items():
        bench.add("host time p50", us, "us", tick=tick, **where)
    host = f"host {busy_us['chunk']:.0f} us a chunk, {busy_us['decode']:.0f} us a decode"
    print(
        f"{words(**where)}: {prefill}TBT {1e3 * p50_s:.4g} ms (p99 {1e3 * p99_s:.4g}, MBU {mbu:.2f}), {host}",
        flush=True,
    )
    return ttft_s


def main(args: list[str] | None = None) -> int:
    """The exit code: 1 if a must is missed that was to be checked, or if nothing could be drawn again."""
    config: BenchEngineConfig = command_line.read(BenchEngineConfig, args)
    if config.redraw:
        records = [json.loads(Path(name).read_text()) for name in config.redraw]
        return 0 if results.save_png(figure.figure, figure.together(records), config.plot or "") else 1
    use_virtual_devices(config.virtual_devices)
    end_s, found = time.monotonic() + config.seconds, Found(None)

    def measure_ceilings() -> dict[str, float]:
        reached = ceilings.measure(config.matmul_size, config.copy_bytes, config.sample_ms / 1e3)
        clocks._passed.cache_clear()  # half a GiB that would count as the engine's
        return reached

    reached = measure_ceilings()

    def save() -> dict[str, Any]:
        made = results.document(config, found.rows, reached)
        made |= {"convention": record.CONVENTION, "absent": found.absent}
        if config.out:
            results.write(config.out, made)
        return made

    bench = Bench(config.mesh, found, reached, save, end_s)
    for path in config.models:
        with found.guarded(OURS, shape=Path(path).stem):
            bench_model(config, bench, path)
        gc.collect()  # engines hold each other in circles, and the memory of a device
    reached |= {f"{name}_at_the_end": value for name, value in measure_ceilings().items()}
    made = save()
    if config.plot and not results.save_png(figure.figure, made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
