"""What the attention kernels reach on one GPU, beside its own ceilings and other libraries, all in one run.

`python -m experiments.bench_kernels --out FILE.json --plot FILE.png --check` prints a line for each measurement;
`--quick` keeps the longest context and the first head dim, `--impl reference` runs anywhere at small sizes.
`--redraw FILE.json --plot FILE.png` draws an old record again and measures nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory too

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command_line, kernel_record, results, rivals
from experiments.kernel_record import CONVENTION, MAX_ERROR, OURS, Found, words
from experiments.rivals import Shape, Timing, jax_clock, normal, time_calls
from pallas_kernels import reference

MERGE_BYTES = 2 << 30


@dataclass(frozen=True)
class BenchKernelsConfig:
    """`chunks` x `contexts` x `head_dims`, where the chunk fits; a chunk of 1 is a decode row.

    `batch_rows` are two sizes of a batch of decode rows with contexts of 1 to 64 and 1 to 8 times `batch_unit`, drawn
    log-uniformly; a third batch is the second with one row of the longest context. No rival is begun after `seconds`.
    """

    impl: str = "mosaic"
    chunks: tuple[int, ...] = (1, 32, 128, 512, 2048, 8192)
    contexts: tuple[int, ...] = (4_096, 65_536, 131_072, 1_048_576)
    head_dims: tuple[int, ...] = (128, 64)
    query_heads: int = 32
    kv_heads: int = 8
    page_tokens: int = 128
    batch_rows: tuple[int, int] = (32, 256)
    batch_unit: int = 1024
    merge_tokens: tuple[int, ...] = (32, 512, 4096)
    merge_partials: tuple[int, ...] = (2, 4, 8)
    matmul_size: int = 8192
    copy_bytes: int = 4 << 30
    max_calls: int = 16
    sample_ms: float = 10.0
    seconds: float = 420.0
    quick: bool = False
    redraw: str | None = None
    plot: str | None = None
    out: str | None = None
    check: bool = False

    def __post_init__(self):
        if self.impl not in ("mosaic", "reference"):
            raise ValueError(f"impl: got {self.impl}, must be mosaic or reference")
        if self.redraw and not self.plot:
            raise ValueError("redraw needs --plot FILE.png")

    def shape(self, chunk: int, context: int, head_dim: int) -> Shape:
        return Shape(chunk, context, head_dim, self.query_heads, self.kv_heads)

    def calls(self, chunk: int) -> int:
        """How many calls of ours a launch holds: the same for all contexts, which share a program."""
        return max(1, min(self.max_calls, 8192 // chunk))

    def time(self, clock: rivals.Clock, calls: int) -> Timing:
        return time_calls(clock, calls, self.sample_ms / 1e3)


# Ours.


def kernels_of(config: BenchKernelsConfig) -> Any:
    """The module of kernels, imported where it is used: only a GPU run needs what the mosaic one needs."""
    return importlib.import_module(f"pallas_kernels.{config.impl}")


def programs(config: BenchKernelsConfig, head_dim: int, decode: bool) -> tuple[Any, Any]:
    """(rows -> their work list, (qs, kv, tables, rows, work) -> results of one call for each q), jitted.

    Queries of every call differ, so that none is dropped for another's result. Lengths are data: one program for all.
    The reference takes no work list.
    """
    heads = dict(heads_per_kv=config.query_heads // config.kv_heads, kv_heads=config.kv_heads)
    kernels = kernels_of(config)

    def make(rows):
        if config.impl == "reference":
            return None
        if decode:
            return kernels.decode_work(**rows, **heads)
        return kernels.prefill_work(**rows, **heads, head_dim=head_dim)

    def calls(qs, kv, tables, rows, work):
        @jax.jit  # lowered once for all calls
        def call(q, kv, table, rows, work):
            if work is not None:
                return kernels.attend_work(q, kv, np.int32(0), table, work)
            return (kernels.paged_decode if decode else kernels.chunked_prefill)(q, kv, np.int32(0), table, **rows)

        return [call(q, kv, table, rows, work) for q, table in zip(qs, tables, strict=True)]

    return jax.jit(make), jax.jit(calls)


def prefill_rows(chunk: int, context: int) -> dict[str, jax.Array]:
    """One row whose queries are the last of its context."""
    positions = np.arange(context - chunk, context)
    rows = dict(slots_R=[0], cu_q_lens_R1=[0, chunk], q_positions_T=positions, kv_lens_R=[context])
    return _on_device(**rows, key_start_R=[0], key_stride_R=[1])


def decode_rows(contexts: Sequence[int]) -> dict[str, jax.Array]:
    """A row for each context, whose query is the last of it."""
    kv_lens, ones = np.array(contexts), np.ones(len(contexts))
    rows = dict(slots_R=np.arange(len(contexts)), q_positions_R=kv_lens - 1, kv_lens_R=kv_lens)
    return _on_device(**rows, key_start_R=0 * ones, key_stride_R=ones)


def _on_device(**rows: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(values, jnp.int32) for name, values in rows.items()}


def batches(config: BenchKernelsConfig) -> dict[str, list[int]]:
    """Contexts of ragged batches of decode rows, by name."""
    rng, (few, many) = np.random.default_rng(0), config.batch_rows

    def draw(rows: int, most: int) -> list[int]:
        return (config.batch_unit * np.exp(rng.uniform(0, np.log(most), rows))).astype(int).tolist()

    spread, short, longest = draw(few, 64), draw(many, 8), max(config.contexts)
    return {
        f"{few} rows of 1 to 64 x {config.batch_unit}": spread,
        f"{many} rows of 1 to 8 x {config.batch_unit}": short,
        f"{many - 1} rows of 1 to 8 x {config.batch_unit} and one of {longest}": [*short[1:], longest],
    }


def pool_pages(config: BenchKernelsConfig) -> int:
    """Pages that hold any one row or batch of this run."""
    together = [[max(config.contexts)], *batches(config).values()]
    return max(sum(-(-context // config.page_tokens) for context in contexts) for contexts in together)


def page_tables(config: BenchKernelsConfig, contexts: Sequence[int], count: int) -> list[jax.Array]:
    """As many tables of rows with these contexts, each table on other pages of the pool as far as there are others:
    a short context is then read from memory in every call, not from the cache. All are as wide as the longest one."""
    row_pages = [-(-context // config.page_tokens) for context in (*contexts, *config.contexts)]
    pool, ends, width, tables = pool_pages(config), np.cumsum(row_pages[: len(contexts)]), max(row_pages), []
    order = np.random.default_rng(1).permutation(pool)
    for i in range(count):
        turned, table = np.roll(order, -(i * pool // count)), np.zeros((len(contexts), width), np.int32)
        for row, end in enumerate(ends):
            table[row, : row_pages[row]] = turned[end - row_pages[row] : end]
        tables.append(jnp.asarray(table))
    return tables


def make_kv(config: BenchKernelsConfig, head_dim: int) -> jax.Array:
    """The stacked cache of one layer, random; made page by page, for its numbers are too many to be drawn at once."""
    pages, page = pool_pages(config), (2, config.kv_heads, config.page_tokens, head_dim)
    seeds = jnp.arange(config.max_calls, config.max_calls + pages)  # the first are those of the queries
    draw = lambda seeds: jax.lax.map(lambda seed: normal(seed, page), seeds, batch_size=min(64, pages))  # noqa: E731
    return jax.jit(lambda seeds: draw(seeds)[None])(seeds)


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


def bench_ours(config: BenchKernelsConfig, found: Found, head_dim: int) -> None:
    """The grid and the ragged batches of one head dim."""
    kv = make_kv(config, head_dim)
    for chunk in config.chunks:
        decode = chunk == 1
        run = programs(config, head_dim, decode)
        tables = page_tables(config, [max(config.contexts)], config.calls(chunk))
        for context in (context for context in config.contexts if context >= chunk):
            shape = config.shape(chunk, context, head_dim)
            rows = decode_rows([context]) if decode else prefill_rows(chunk, context)
            measure_ours(config, found, run, (kv, tables, rows), shape, shape.where)
    run = programs(config, head_dim, decode=True)
    for name, contexts in batches(config).items():
        tables = page_tables(config, contexts, 1) * min(4, config.max_calls)  # too much to be cached from call to call
        shape = config.shape(1, sum(contexts), head_dim)
        where = dict(shape=name, head_dim=head_dim, keys=shape.context)
        measure_ours(config, found, run, (kv, tables, decode_rows(contexts)), shape, where)


def measure_ours(config: BenchKernelsConfig, found: Found, run, inputs, shape: Shape, where: dict[str, Any]) -> None:
    """The rows of one shape: the kernel, given its work list; its error; the making of the list."""
    (make, calls), (kv, tables, rows) = run, inputs
    batch, timing, work_timing, error = len(rows["kv_lens_R"]), None, None, None
    with found.guarded(OURS, **where):
        work = make(rows)
        qs = [normal(i, (shape.chunk * batch, shape.query_heads, shape.head_dim)) for i in range(len(tables))]
        error = relative_error(calls(qs, kv, tables, rows, work)[-1][0], qs[-1], kv, tables[-1], rows)
        timing = config.time(jax_clock(lambda: calls(qs, kv, tables, rows, work)), len(tables))
        if work is not None:
            work_timing = config.time(jax_clock(lambda: make(rows)), 1)
    found.measured(OURS, timing, shape, shape.flops, batch, **where)
    found.add("relative error", error, "1", must=MAX_ERROR, by=OURS, **where)
    if work_timing is not None:
        found.add("work list", 1e6 * work_timing.median_s, "us", by=OURS, **where, spread_us=work_timing.spread_s * 1e6)


# The device, the merge, the others.


def measure_ceilings(config: BenchKernelsConfig) -> dict[str, float]:
    """What the device reaches on a large matrix product and a large copy."""
    n = config.matmul_size
    a, b = normal(0, (n, n)), normal(1, (n, n))
    product = jax.jit(jnp.matmul)
    matmul = config.time(jax_clock(lambda: product(a, b)), 1)
    source = jax.jit(lambda: jax.random.bits(jax.random.key(0), (config.copy_bytes // 4,), jnp.uint32))()
    copy = jax.jit(jnp.copy)
    copied = config.time(jax_clock(lambda: copy(source)), 1)
    ceilings = dict(matmul_tflops=2e-12 * n**3 / matmul.median_s, copy_tb_per_s=2e-12 * source.nbytes / copied.median_s)
    print(words(**{name: f"{value:.4g}" for name, value in ceilings.items()}), flush=True)
    return ceilings


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


def bench_rivals(config: BenchKernelsConfig, found: Found, end_s: float) -> None:
    """The grid by every rival that there is, the longest contexts first, until the time is up."""
    absent = {name: reason for name in rivals.RIVALS if (reason := rivals.why_absent(name))}
    for name, reason in absent.items():
        found.leave_out(name, reason)
    present = [name for name in rivals.RIVALS if name not in absent]
    longest_first = sorted(config.contexts, reverse=True)
    for head_dim, context, chunk in itertools.product(config.head_dims, longest_first, config.chunks):
        shape = config.shape(chunk, context, head_dim)
        calls = min(config.calls(chunk), shape.calls)
        for name in present if chunk <= context else ():
            if time.monotonic() > end_s:
                found.leave_out(name, "no time left", **shape.where)
                continue
            with found.guarded(name, **shape.where):
                timing = config.time(rivals.RIVALS[name](shape, calls), calls)
                found.measured(name, timing, shape, shape.full_flops, **shape.where)
            rivals.free()


def main(args: list[str] | None = None) -> int:
    config = command_line.read(BenchKernelsConfig, args)
    if config.redraw:
        return 0 if kernel_record.save_png(json.loads(Path(config.redraw).read_text()), config.plot) else 1
    end_s = time.monotonic() + config.seconds
    if config.quick:
        config = dataclasses.replace(config, contexts=(max(config.contexts),), head_dims=config.head_dims[:1])
    bounded = config.impl == "mosaic" and (config.query_heads, config.kv_heads) == (32, 8)
    found, ceilings = Found(jax.devices()[0].device_kind if bounded else None), measure_ceilings(config)

    def save() -> dict[str, Any]:
        made = results.document(config, found.rows, ceilings) | {"convention": CONVENTION, "absent": found.absent}
        made["versions"] |= rivals.versions()
        if config.out:
            results.write(config.out, made)
        return made

    for head_dim in config.head_dims:
        bench_ours(config, found, head_dim)
        rivals.free()
        save()  # a run that is cut short keeps what it has found
    if not config.quick:
        bench_merge(config, found, ceilings["copy_tb_per_s"])
        save()
    bench_rivals(config, found, end_s)
    made = save()
    if config.plot and not kernel_record.save_png(made, config.plot):
        print(f"{config.plot} was not written: there is no matplotlib here", file=sys.stderr)
    return 0 if not config.check or results.check(made) else 1


if __name__ == "__main__":
    sys.exit(main())
