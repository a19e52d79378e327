"""What the attention kernels reach on one GPU, beside its own ceilings and other libraries, all in one run.

`python -m experiments.bench_kernels --out FILE.json --plot FILE.png --check` prints a line for each measurement;
`--quick` keeps the longest context and the first head dim, `--impl reference` runs anywhere at small sizes.
`--redraw FILE.json --plot FILE.png` draws an old record again and measures nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory too

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ceilings, command_line, kernel_record, results, rivals
from experiments.clocks import REST_S, Clock, jax_clock
from experiments.kernel_inputs import (
    BenchKernelsConfig,
    batches,
    decode_rows,
    make_kv,
    page_tables,
    prefill_rows,
)
from experiments.kernel_record import CONVENTION, MAX_ERROR, OURS, Found, words
from experiments.rivals import Shape, normal
from pallas_kernels import mosaic, reference

MERGE_BYTES, WORK_LIST = 2 << 30, "work list"


# Ours.


def kernels_of(config: BenchKernelsConfig) -> Any:
    return {"mosaic": mosaic, "reference": reference}[config.impl]


def programs(config: BenchKernelsConfig, head_dim: int, decode: bool) -> tuple[Any, Any]:
    """(rows -> their work list, (results, qs, kv, tables, rows, work) -> results of one call for each q), jitted.

    Queries of every call differ, so that none is dropped for another's result. Lengths are data: one program for all.
    The reference takes no work list. Results are donated to the next launch: as in an engine, whose state stays where
    it is, no address changes, which would cost the host a new CUDA graph.
    """
    heads = dict(heads_per_kv=config.query_heads // config.kv_heads, kv_heads=config.kv_heads)
    kernels = kernels_of(config)

    def make(rows):
        if config.impl == "reference":
            return None
        if decode:
            return kernels.decode_work(**rows, **heads)
        return kernels.prefill_work(**rows, **heads, head_dim=head_dim)

    def calls(results, qs, kv, tables, rows, work):
        @jax.jit  # lowered once for all calls
        def call(q, kv, table, rows, work):
            if work is not None:
                return kernels.attend_work(q, kv, np.int32(0), table, work)
            return (kernels.paged_decode if decode else kernels.chunked_prefill)(q, kv, np.int32(0), table, **rows)

        return [call(q, kv, table, rows, work) for q, table in zip(qs, tables, strict=True)]

    return jax.jit(make), jax.jit(calls, donate_argnums=0, keep_unused=True)


def relative_error(out_TNH, q_TNH, kv, table, rows) -> float:
    """||out - exact|| / ||exact|| of a call's first and last query, each attended to alone; NaN if any output is."""
    out, *alone, finite = _first_and_last(out_TNH, q_TNH, table, rows)
    exact = _attend_alone(kv, *alone)
    return float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)) if finite else float("nan")


@jax.jit
def _first_and_last(out_TNH, q_TNH, table, rows):
    positions = rows.get("q_positions_T", rows.get("q_positions_R"))
    queries, owners = jnp.array([0, -1]), jnp.array([0, len(rows["slots_R"]) - 1])
    tables, kv_lens = table[rows["slots_R"][owners]], rows["kv_lens_R"][owners]
    return out_TNH[queries], q_TNH[queries], tables, positions[queries], kv_lens, jnp.isfinite(out_TNH).all()


@jax.jit
def _attend_alone(kv, q_RNH, table, positions_R, kv_lens_R):
    ends = dict(slots_R=jnp.arange(2), key_start_R=jnp.zeros(2, jnp.int32), key_stride_R=jnp.ones(2, jnp.int32))
    return reference.paged_decode(q_RNH, kv, 0, table, q_positions_R=positions_R, kv_lens_R=kv_lens_R, **ends)[0]


def bench_grid(config: BenchKernelsConfig, found: Found, save: Callable[[], Any]) -> None:
    """Every shape of the grid by ours and by each rival in turns, so that all meet the same device.

    The longest contexts come first: no rival is begun after `seconds`.
    """
    end_s = time.monotonic() + config.seconds
    absent = {name: reason for name in rivals.RIVALS if (reason := rivals.why_absent(name))}
    for name, reason in absent.items():
        found.leave_out(name, reason)
    kvs = {head_dim: make_kv(config, head_dim) for head_dim in config.head_dims}
    program = functools.cache(functools.partial(programs, config))
    for context, head_dim, chunk in itertools.product(
        sorted(config.contexts, reverse=True), config.head_dims, config.chunks
    ):
        if chunk > context:
            continue
        shape, decode = config.shape(chunk, context, head_dim), chunk == 1
        tables = page_tables(config, [max(config.contexts)], config.calls(shape))
        rows = decode_rows([context]) if decode else prefill_rows(chunk, context)
        others = prepare_rivals(config, found, shape, [name for name in rivals.RIVALS if name not in absent], end_s)
        measure(config, found, program(head_dim, decode), (kvs[head_dim], tables, rows), shape, shape.where, others)
        del others
        rivals.free()
        save()  # a run that is cut short keeps what it has found
    for head_dim, (name, contexts) in itertools.product(config.head_dims, batches(config).items()):
        tables = page_tables(config, contexts, 1) * min(4, config.max_calls)  # too much to be cached from call to call
        shape = config.shape(1, sum(contexts), head_dim)
        where = dict(shape=name, head_dim=head_dim, keys=shape.context)
        inputs = kvs[head_dim], tables, decode_rows(contexts)
        measure(config, found, program(head_dim, True), inputs, shape, where, {})


def measure(
    config: BenchKernelsConfig,
    found: Found,
    run: tuple[Any, Any],
    inputs: tuple[Any, ...],
    shape: Shape,
    where: dict[str, Any],
    others: dict[str, tuple[Clock, int]],
) -> None:
    """The rows of one shape: ours, its error and the making of its work list; the others, given their clocks."""
    (make, calls), (kv, tables, rows) = run, inputs
    batch, timings, error = len(rows["kv_lens_R"]), {}, None
    with found.guarded(OURS, **where):
        work = make(rows)
        qs = [normal(i, (shape.chunk * batch, shape.query_heads, shape.head_dim)) for i in range(len(tables))]
        launch = launcher(calls, qs, kv, tables, rows, work)
        error = relative_error(launch()[-1][0], qs[-1], kv, tables[-1], rows)
        contenders = {OURS: (jax_clock(launch), len(tables))}
        if work is not None and shape.context >= max(config.contexts):  # its cost does not depend on the context
            contenders[WORK_LIST] = jax_clock(lambda: make(rows)), 1
        timings = config.in_turns(contenders | others)
    found.measured(OURS, timings.pop(OURS, None), shape, shape.flops, batch, **where)
    found.add("relative error", error, "1", must=MAX_ERROR, by=OURS, **where)
    if made := timings.pop(WORK_LIST, None):
        found.add(WORK_LIST, 1e6 * made.median_s, "us", by=OURS, **where, spread_us=made.spread_s * 1e6)
    for name, timing in timings.items():
        found.measured(name, timing, shape, shape.full_flops, **where)


def prepare_rivals(
    config: BenchKernelsConfig, found: Found, shape: Shape, names: Sequence[str], end_s: float
) -> dict[str, tuple[Clock, int]]:
    """Name -> (clock, calls in a launch) of those that run at this shape, unless the time is up."""
    ready, calls = {}, min(config.calls(shape), shape.calls)
    for name in names:
        if time.monotonic() > end_s:
            found.leave_out(name, "no time left", **shape.where)
            continue
        with found.guarded(name, **shape.where):
            clock = rivals.RIVALS[name](shape, calls)
            clock(1)  # what cannot run fails here
            ready[name] = clock, calls
    return ready


def launcher(calls, qs: list[jax.Array], *given: Any) -> Callable[[], Any]:
    """Launches whose results take the place of those before."""
    results = [(jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:2], jnp.float32)) for q in qs]

    def launch():
        nonlocal results
        results = calls(results, qs, *given)
        return results

    return launch


def bench_sustained(config: BenchKernelsConfig, found: Found) -> None:
    """Rates over seconds without a rest, where the device's power limit has its say: ours, the fastest rival's, and
    the matrix product's."""
    head_dim, context = config.head_dims[0], max(config.contexts)
    kv, (make, calls) = make_kv(config, head_dim), programs(config, head_dim, decode=False)
    for chunk in (chunk for chunk in config.sustained_chunks if chunk <= context):
        shape, rows, clocks = config.shape(chunk, context, head_dim), prefill_rows(chunk, context), {}
        where = shape.where | dict(seconds=config.sustained_s)
        with found.guarded(OURS, **where):
            q = normal(0, (chunk, shape.query_heads, head_dim))
            launch = launcher(calls, [q], kv, page_tables(config, [context], 1), rows, make(rows))
            clocks[OURS] = jax_clock(launch), shape.flops
        if rival := found.fastest_rival(shape):
            clocks[rival] = rivals.RIVALS[rival](shape, 1), shape.full_flops
        clocks["matmul"] = ceilings.matmul_clock(config.matmul_size), 2 * config.matmul_size**3
        for name, (clock, flops) in clocks.items():
            clock(1)
            launches = max(1, round(config.sustained_s / max(clock(1), 1e-6)))
            time.sleep(REST_S * 10)
            rate = flops * launches / clock(launches) / 1e12
            found.add("sustained rate", rate, "TFLOP/s", by=name, **where)
            print(f"{words(by=name, **where)}: {rate:.4g} TFLOP/s", flush=True)
        del clocks
        rivals.free()


# The merge, the others.


def bench_merge(config: BenchKernelsConfig, found: Found, copy_tb_per_s: float) -> None:
    """The merge of partials, ours and as XLA compiles the reference, in bytes read and written, beside the copy.

    A must stands where launches do not matter.
    """
    makers = {OURS: kernels_of(config).merge_partials, "XLA": reference.merge_partials}
    N, H = config.query_heads, max(config.head_dims)
    for T, X, by in itertools.product(config.merge_tokens, config.merge_partials, makers):
        where, share = dict(by=by, shape=f"{X} partials of {T} tokens"), None
        merge_all = jax.jit(lambda partials, merge=makers[by]: [merge(*partial) for partial in partials])
        moved_bytes = 4 * (X + 1) * T * N * (H + 1)
        calls = max(1, min(config.max_calls, MERGE_BYTES // moved_bytes))
        with found.guarded(**where):
            shapes = (X, T, N, H), (X, T, N)
            partials = [[normal(2 * i + j, shape, jnp.float32) for j, shape in enumerate(shapes)] for i in range(calls)]
            timing = config.time(jax_clock(functools.partial(merge_all, partials)), calls)
            rate, took_us = moved_bytes / timing.median_s / 1e12, 1e6 * timing.median_s
            share = rate / copy_tb_per_s
            found.add("merge time", took_us, "us", **where, spread_us=1e6 * timing.spread_s)
            found.add("merge", rate, "TB/s", **where)
            print(f"{words(**where)}: {took_us:.4g} us, {rate:.3g} TB/s, {share:.0%} of copy", flush=True)
        limit = dict(must=">= 0.7") if T >= 4096 and found.bounded_on and by == OURS else {}
        found.add("merge / copy", share, "1", **where, **limit)


def main(args: list[str] | None = None) -> int:
    config = command_line.read(BenchKernelsConfig, args)
    if config.redraw:
        made = json.loads(Path(config.redraw).read_text())
        return 0 if results.save_png(kernel_record.figure, made, config.plot or "") else 1
    if config.quick:
        config = dataclasses.replace(config, contexts=(max(config.contexts),), head_dims=config.head_dims[:1])
    bounded = config.impl == "mosaic" and (config.query_heads, config.kv_heads) == (32, 8)
    found = Found(jax.devices()[0].device_kind if bounded else None)
    measure_ceilings = functools.partial(
        ceilings.measure, config.matmul_size, config.copy_bytes, config.sample_ms / 1e3
    )
    reached = measure_ceilings()

    def save() -> dict[str, Any]:
        made = results.document(config, found.rows, reached) | {"convention": CONVENTION, "absent": found.absent}
        made["versions"] |= rivals.versions()
        if config.out:
            results.write(config.out, made)
        return made

    bench_grid(config, found, save)
    bench_sustained(config, found)
    save()
    if not config.quick:
        bench_merge(config, found, reached["copy_tb_per_s"])
    reached |= {f"{name}_at_the_end": value for name, value in measure_ceilings().items()}
    made = save()
    if config.plot and not results.save_png(kernel_record.figure, made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
