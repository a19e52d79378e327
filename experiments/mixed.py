"""Short requests beside one long prompt, as they arrive in real time: how long each waits, variant after variant.

`python -m experiments.mixed --config_path configs/mixed.yaml --out FILE.json --plot FILE.png --check` serves the same
work under each variant of the scheduler, prints what came of it and saves the record after each. `--decodes 16
--short_every_s 0` has sixteen requests decode all the while instead: how well do chunks fill the time of a tick?
`--redraw "[FILE.json, ...]" --plot FILE.png` draws records of the same work together and measures nothing.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Weights and the cache of a long prompt need more of a GPU than the three quarters that JAX takes by itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import numpy as np

import mnemosyne_jax as mn
from experiments import ceilings, command_line, results
from experiments import mixed_figure as record
from experiments.bench_engine_record import prefill_flops
from experiments.bench_engine_runs import TimedEngine, TimedExecutor, built, pool_pages, random_prompt, run_prompt
from experiments.devices import use_virtual_devices
from experiments.kernel_record import OURS, Found
from experiments.mixed_figure import Run, Tick

SAY_EVERY_S = 5.0
# What a variant may change: nothing of the programs, which all share.
CHANGEABLE = (
    "policy", "late", "chunking", "chunk_tokens", "tbt_slo_s", "idle_tick_s", "least_yield", "long_yield",
    "least_chunk_every",
)  # fmt: skip


@dataclass(frozen=True)
class MixedConfig:
    """A prompt of `long_tokens` at t = 0, and beside it until its first token a request of `short_tokens` every
    `short_every_s` seconds, the first at t = 0 (0: none), and `decodes` requests of that length that have their first
    token before and decode all the while, at most `decode_new_tokens` each.

    `variants`: a name, and what it changes in `serve`; `only` runs some of them. `serve.private_rows` are for the long
    prompt and the short requests; those that decode have rows of their own. `hardware` is a YAML file (None: by the
    kind of the device). After `seconds` nothing is begun, and what runs is cancelled.
    """

    model: str = "configs/model/llama-3-8b.yaml"
    long_tokens: int = 262_144
    short_tokens: int = 1024
    short_new_tokens: int = 32
    short_every_s: float = 1.0
    decodes: int = 0
    decode_new_tokens: int = 8192
    hardware: str | None = None
    mesh: mn.MeshSpec = mn.MeshSpec()
    serve: mn.ServeConfig = mn.ServeConfig()
    variants: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {record.AIMED: {"policy": "lars", "chunking": "adaptive"}}
    )
    only: tuple[str, ...] = ()
    seconds: float = 480.0
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
        for name in ("long_tokens", "short_tokens", "short_new_tokens", "decode_new_tokens"):
            if getattr(self, name) < 1:
                raise mn.RequestError(name, getattr(self, name), "must be at least 1")
        for name in ("short_every_s", "decodes"):
            if not getattr(self, name) >= 0:  # a NaN is refused, too
                raise mn.RequestError(name, getattr(self, name), "must be 0 or more")
        if unknown := sorted(set(self.only) - self.variants.keys()):
            raise mn.RequestError("only", unknown, f"must be of {', '.join(self.variants)}")
        for variant, changes in self.variants.items():
            if unknown := sorted(changes.keys() - set(CHANGEABLE)):
                raise mn.RequestError(f"variants.{variant}", unknown, f"may change {', '.join(CHANGEABLE)}")
            self.serve_for(variant)

    def serve_for(self, variant: str) -> mn.ServeConfig:
        """Settings of a variant, with rows and pages for all that can run at once."""
        serve, before = self.serve, self.short_tokens - 1
        pages = pool_pages(serve, self.mesh, self.long_tokens)
        pages += serve.private_rows * pool_pages(serve, self.mesh, before + self.short_new_tokens)
        pages += self.decodes * pool_pages(serve, self.mesh, before + self.decode_new_tokens)
        rows = serve.private_rows + self.decodes
        serve = replace(serve, chunk_buckets=serve.buckets, private_rows=rows, pool_pages=pages)
        return replace(serve, **self.variants[variant])

    def arrived(self, after_s: float) -> int:
        """How many short requests have arrived so many seconds after the long one."""
        return 1 + int(after_s / self.short_every_s) if self.short_every_s else 0


# One variant.


def serve_mixed(config: MixedConfig, engine: TimedEngine, end_s: float, say: Callable[[str], None] = print) -> Run:
    """What came of the work, served until all of it has finished, or until time.monotonic() is `end_s`."""
    seeds = itertools.count(config.seed)

    def submit(id: str, tokens: int, new_tokens: int, arrival_s: float | None = None) -> mn.Handle:
        prompt = random_prompt(tokens, engine.config.vocab, next(seeds))
        return engine.submit(mn.Request(id, prompt, new_tokens, arrival_s, stop_ids=()))

    steady = [submit(f"decode {i}", config.short_tokens, config.decode_new_tokens) for i in range(config.decodes)]
    while not all(handle.timeline.token_s for handle in steady):
        engine.timed_tick()
    begin_s = engine.now()
    long = submit("long", config.long_tokens, 1, begin_s)
    shorts: list[mn.Handle] = []
    ticks: list[Tick] = []
    say_at_s, tick_slo_s = begin_s + SAY_EVERY_S, engine.serve.tbt_slo_s / config.mesh.spp
    while not ticks or not engine.loop.idle:
        engine.wait()
        if ticks and time.monotonic() > end_s:
            ended = [long, *shorts, *steady]
        else:
            ended = steady if long.finished else []
            until_s = min([engine.now(), *long.timeline.token_s]) - begin_s
            for i in range(len(shorts), config.arrived(until_s)):
                arrival_s = begin_s + i * config.short_every_s
                shorts.append(submit(f"short {i}", config.short_tokens, config.short_new_tokens, arrival_s))
        for handle in ended:
            handle.cancel()
        budget_s = tick_slo_s if engine.scheduler._decoding else engine.serve.idle_tick_s  # as the scheduler says
        batch, host_s = engine.timed_tick()
        own = sum(row.length for row in batch.chunks if row.request.id == "long")
        tokens = sum(row.length for row in batch.chunks)
        ticks.append(Tick(own, tokens - own, len(batch.decodes), budget_s, host_s, engine.now()))
        if engine.now() >= say_at_s:
            say_at_s += SAY_EVERY_S
            done, all_done = long.progress().processed, sum(handle.finished for handle in shorts)
            of_shorts = f", {all_done} of {len(shorts)} short requests finished" if shorts else ""
            say(f"{engine.now() - begin_s:.0f} s: {done:,} of {config.long_tokens:,} tokens{of_shorts}")
    return Run(
        long_ttft_s=_ttft_s(long),
        short_ttft_s=[_ttft_s(handle) for handle in shorts],
        short_tbt_s=_gaps_s(shorts, begin_s),
        short_finished=_finished(shorts),
        decode_tbt_s=_gaps_s(steady, begin_s),
        decodes_ended=_finished(steady),
        ticks=record.columns(ticks, engine.executor.depth, begin_s),
    )


def _ttft_s(handle: mn.Handle) -> float | None:
    return round(handle.timeline.ttft_s, 6) if handle.timeline.token_s else None


def _gaps_s(handles: Sequence[mn.Handle], since_s: float) -> list[float]:
    token_s = [np.array(handle.timeline.token_s) for handle in handles]
    return record.rounded(np.concatenate([np.zeros(0), *(np.diff(at[at >= since_s]) for at in token_s)]))


def _finished(handles: Sequence[mn.Handle]) -> int:
    return sum(handle.reason == "length" for handle in handles)


# All variants.


def serve_variants(
    config: MixedConfig, found: Found, runs: dict[str, Run], save: Callable[[], Any], end_s: float
) -> None:
    """Adds the run of each variant, and its rows, and saves after each."""
    shape, model = Path(config.model).stem, mn.from_yaml(mn.ModelConfig, config.model)
    model.refuse_mesh(config.mesh)
    hardware = None if config.hardware is None else mn.from_yaml(mn.HardwareConfig, config.hardware)
    variants = config.only or tuple(config.variants)
    executor, spent_s = built(model, config.serve_for(variants[0]), config.mesh)
    for name, seconds in spent_s.items():
        found.add(f"making {name}", seconds, "s", shape=shape)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent_s.items())
    print(f"{shape} on {config.mesh}, kernels {executor.impl}: {spent}", flush=True)
    warm_up(executor, config.serve_for(variants[0]), config.long_tokens)
    flops_per_device = prefill_flops(model, config.long_tokens) / config.mesh.devices
    for variant in variants:
        where = dict(shape=shape, context=config.long_tokens, variant=variant, beside=record.beside(vars(config)))
        if time.monotonic() > end_s:
            found.leave_out(OURS, "no time left", **where)
            continue
        with found.guarded(OURS, **where):
            engine = TimedEngine(executor, config.serve_for(variant), hardware)
            say = functools.partial(print, f"  {variant},", flush=True)
            runs[variant] = serve_mixed(config, engine, end_s, say)
            made = record.numbers(runs[variant], flops_per_device)
            record.add_rows(found, made, jax.devices()[0].device_kind, config.mesh, **where)
            print(f"{variant}: {record.line(made)}", flush=True)
        save()


def warm_up(executor: TimedExecutor, serve: mn.ServeConfig, longest: int) -> None:
    """Runs every program once: nothing measured is the first of its kind."""
    for bucket in serve.buckets:
        fixed = replace(serve, chunking="fixed", chunk_tokens=bucket)
        prompt = random_prompt(min(bucket, longest), executor.config.vocab, seed=0)
        run_prompt(TimedEngine(executor, fixed, None), prompt, new_tokens=2, planted=False)
    gc.collect()
    gc.freeze()  # to look through all that exists by now takes the collector two ticks


def main(args: list[str] | None = None) -> int:
    """The exit code: 1 if what was to be checked misses a must or is absent, or if nothing could be drawn again."""
    config: MixedConfig = command_line.read(MixedConfig, args)
    if config.redraw:
        records = [json.loads(Path(name).read_text()) for name in config.redraw]
        return 0 if results.save_png(record.figure, record.together(records), config.plot or "") else 1
    use_virtual_devices(config.virtual_devices)
    end_s, found, runs = time.monotonic() + config.seconds, Found(None), dict[str, Run]()
    measure = functools.partial(ceilings.measure, config.matmul_size, config.copy_bytes, config.sample_ms / 1e3)
    reached = measure()

    def save() -> dict[str, Any]:
        made = results.document(config, found.rows, reached)
        made |= {"convention": record.CONVENTION, "absent": found.absent}
        made["runs"] = {variant: asdict(run) for variant, run in runs.items()}
        if config.out:
            results.write(config.out, made)
        return made

    with found.guarded(OURS):
        serve_variants(config, found, runs, save, end_s)
    gc.unfreeze()
    gc.collect()  # engines hold each other in circles, and the memory of a device
    reached |= {f"{name}_at_the_end": value for name, value in measure().items()}
    made = save()
    if config.plot and not results.save_png(record.figure, made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
    return 0 if not config.check or (results.check(made) and not found.absent) else 1


if __name__ == "__main__":
    sys.exit(main())
