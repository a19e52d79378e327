"""Keys planted in a haystack of millions of tokens, found by one exact prefill: which, how fast, in what memory.

`python -m experiments.needle --config_path configs/needle.yaml --tokens 20000000 --out FILE.json --plot FILE.png
--check` says every few seconds how far it is. `--serve.rope_precision hf_float32 --expect fail` shows what becomes of
keys past position 2^24 where angles are float32; `--first_position N` puts a short haystack there. `--redraw FILE.json
--plot FILE.png` draws a record and measures nothing. One process.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import mnemosyne_jax as mn
from experiments import command_line, results
from experiments import needle_record as record
from experiments.bench_engine_record import GIB, Bench, memory_rows
from experiments.bench_engine_runs import (
    TimedEngine,
    TimedExecutor,
    device_bytes,
    needed_bytes,
    peak_bytes,
    pool_pages,
)
from experiments.devices import use_virtual_devices
from experiments.kernel_record import Found
from mnemosyne_jax import needle

SAY_EVERY_S = 5.0
DTYPES = ("float32", "bfloat16")
Expect = Literal["find", "fail"]


@dataclass(frozen=True)
class NeedleConfig:
    """A haystack of `tokens` that holds a key with so many `values` at each of `depths`, and asks for all at its end.

    `first_position` is where the rotation begins to count. `expect` "find" means all keys, "fail" all up to position
    2^24 and none past it. The engine has pages for this request alone and, unless chunk buckets are given, one program
    for chunks of `chunk_tokens`. After `seconds` the request is given up: with Python's start, not quite nine minutes.
    """

    tokens: int = 10_000_000
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    values: int = 7
    first_position: int = 0
    dtype: str = "bfloat16"
    mesh: mn.MeshSpec = mn.MeshSpec()
    serve: mn.ServeConfig = mn.ServeConfig(private_rows=1, private_chunks=1, shared_rows=1, chunking="fixed")
    expect: Expect = "find"
    seconds: float = 525.0
    seed: int = 0
    virtual_devices: int = 0
    redraw: str | None = None
    plot: str | None = None
    out: str | None = None
    check: bool = False

    def __post_init__(self):
        for name, known in (("expect", get_args(Expect)), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise mn.RequestError(name, getattr(self, name), f"must be one of {', '.join(known)}")
        if self.redraw and not self.plot:
            raise mn.RequestError("redraw", self.redraw, "needs --plot FILE.png")

    @property
    def total_tokens(self) -> int:
        """Keys and values in the end: the last of `values` and a stop is never fed back."""
        return self.tokens + self.values

    @property
    def served(self) -> mn.ServeConfig:
        """`serve` with the pool and the chunk buckets of one request alone."""
        pages = pool_pages(self.serve, self.mesh, self.total_tokens)
        buckets = self.serve.chunk_buckets or (self.serve.chunk_tokens,)
        return replace(self.serve, pool_pages=pages, chunk_buckets=buckets)


def refuse_tokens(config: NeedleConfig) -> None:
    """Raises RequestError if the mesh does not divide the model, or its devices do not hold the request."""
    model = needle.config(config.dtype)
    model.refuse_mesh(config.mesh)
    needed, room = needed_bytes(model, config.served, config.mesh, config.total_tokens), device_bytes()
    if needed > room:
        need = f"needs {needed / GIB:.1f} GiB of a device for weights and cache, {room / GIB:.1f} are there"
        raise mn.RequestError("tokens", config.tokens, need)


def make_request(config: NeedleConfig) -> tuple[mn.Request, list[record.Key]]:
    """The request, and the keys that it asks for.

    Raises: RequestError if such a haystack cannot be, or if a key is to be missed and none can.
    """
    haystack: dict[str, Any] = dict(length=config.tokens, depths=config.depths, seed=config.seed, values=config.values)
    prompt, generated = mn.needle_prompt(**haystack)
    asked, answers = needle.tail_checks(**haystack)
    keys = record.keys_of(prompt, asked, answers, generated, config.depths, config.first_position)
    if config.expect == "fail" and not any(key.past_float32 for key in keys):
        last, limit = max(key.last for key in keys), record.FLOAT32_EXACT
        raise mn.RequestError("expect", "fail", f"needs a key past position {limit}: the last ends at {last}")
    more: dict[str, Any] = dict(read_positions=asked, first_position=config.first_position)
    return mn.Request("haystack", prompt, len(generated), **more), keys


def make_engine(config: NeedleConfig) -> TimedEngine:
    """An engine for the request, with every program."""
    made = mn.Engine.needle(config.mesh, config.served, config.dtype)
    executor = TimedExecutor(made.config, made.params, made.serve, made.mesh)
    executor.warmup()
    return TimedEngine(executor, made.serve, None)


def run(engine: TimedEngine, request: mn.Request, end_s: float) -> record.Course:
    """The Course of a request alone, told as it goes; given up when the monotonic clock is past `end_s`."""
    sequence = engine.scheduler.submit(request, engine.now(), engine.config.stop_ids)
    reached, host_s = [record.Point(0.0, 0)], []
    said = reached[0]
    while not sequence.finished:
        batch, busy_s = engine.timed_tick()
        if batch.chunks:
            host_s.append(busy_s)
        if sequence.prompt_done > reached[-1].tokens:
            now = record.Point(engine.now() - sequence.timeline.arrival_s, sequence.prompt_done)
            reached.append(now)
            if now.seconds - said.seconds >= SAY_EVERY_S:
                print(record.progress(engine.config, len(request.prompt), said, now), flush=True)
                said = now
        if time.monotonic() > end_s:
            engine.scheduler.cancel(request.id)
    return record.Course(sequence, reached, host_s)


def main(args: list[str] | None = None) -> int:
    """The exit code: 1 if a must is missed that was to be checked or nothing could be drawn again, 2 for a refusal."""
    config: NeedleConfig = command_line.read(NeedleConfig, args)
    if config.redraw:
        drawn = results.save_png(record.figure, json.loads(Path(config.redraw).read_text()), config.plot or "")
        return 0 if drawn else 1
    begin_s, found = time.monotonic(), Found(None)
    use_virtual_devices(config.virtual_devices)

    def save() -> dict[str, Any]:
        made = results.document(config, found.rows) | {"convention": record.CONVENTION, "absent": found.absent}
        if config.out:
            results.write(config.out, made)
        return made

    bench = Bench(config.mesh, found, {}, save, begin_s + config.seconds)
    where: dict[str, Any] = dict(shape="needle", context=config.tokens, chunk=config.serve.chunk_tokens)
    peak_before = peak_bytes()
    try:
        refuse_tokens(config)
        request, keys = make_request(config)
        engine = make_engine(config)
        bench.add("making programs", time.monotonic() - begin_s, "s", **where)
        print(f"{config.mesh}, kernels {engine.executor.impl}: ready in {time.monotonic() - begin_s:.1f} s", flush=True)
        course = run(engine, request, bench.end_s)
    except mn.RequestError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    bench.add("answered", course.answered, "bool", **where, reason=course.sequence.reason, must="== 1")
    if course.answered:
        record.key_rows(bench, course, keys, config.expect == "fail", **where)
        record.time_rows(bench, course, engine.config, **where)
    memory_rows(bench, engine.executor, peak_before, **where)
    record.course_rows(bench, course, engine.config, **where)
    bench.add("run", time.monotonic() - begin_s, "s", **where, must=f"<= {config.seconds:g}")
    made = bench.save()
    if config.plot and not results.save_png(record.figure, made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
