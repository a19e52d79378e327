"""What `bench_kernels` measures: its configuration, and the rows, page tables and caches made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.clocks import Clock, Timing, time_calls, time_in_turns
from experiments.rivals import Shape, normal


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
    sustained_chunks: tuple[int, ...] = (512, 2048)
    sustained_s: float = 2.0
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

    def calls(self, shape: Shape) -> int:
        """How many calls of ours a launch holds: one of two numbers for a chunk, and so of programs."""
        return 1 if shape.calls == 1 else max(1, min(self.max_calls, 8192 // shape.chunk))

    def in_turns(self, contenders: Mapping[str, tuple[Clock, int]]) -> dict[str, Timing]:
        return time_in_turns(contenders, self.sample_ms / 1e3)

    def time(self, clock: Clock, calls: int) -> Timing:
        return time_calls(clock, calls, self.sample_ms / 1e3)


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
