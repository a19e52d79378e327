"""Calls of the Hopper kernels of every model and row that matter, and attention in float64 to hold them against.

Shapes beside those of `reference`: G query heads of one kv head, D distinct pages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic
from pallas_kernels.reference import MASKED

B = mosaic.PAGE_TOKENS
ROWS = SLOTS = 64
LAYERS, PAGES, COLUMNS = 2, 544, 512  # columns: contexts of 64K keys
BLOCK = 512  # pages that the float64 attention takes at once

# Of the error relative to the result, root mean square: weights are rounded to the dtype before they meet the values.
TOLERANCE = {jnp.bfloat16: 3e-3, jnp.float16: 5e-4}
LSE_TOLERANCE = 2e-5

prefill = jax.jit(mosaic.chunked_prefill)
decode = jax.jit(mosaic.paged_decode)
merge_partials = jax.jit(mosaic.merge_partials)


@dataclasses.dataclass(frozen=True)
class Model:
    heads_per_kv: int
    kv_heads: int
    head_dim: int
    dtype: type
    tokens: int = 512  # of a chunk, most of them padding in the longer ones

    def __str__(self) -> str:
        return f"G{self.heads_per_kv}-H{self.head_dim}-{self.dtype.__name__}-T{self.tokens}"


# Every pair of G, H and dtype, and every branch of `prefill_tiling` but the smallest, whose tiling is a decode's.
MODELS = [
    Model(1, 2, 64, jnp.bfloat16, tokens=380),  # 128 rows in a tile, the next one 192
    Model(4, 2, 64, jnp.float16),
    Model(7, 2, 64, jnp.bfloat16, tokens=3712),  # one kv head in turn, 192 rows
    Model(16, 1, 64, jnp.float16),
    Model(1, 2, 128, jnp.float16),
    Model(4, 2, 128, jnp.bfloat16, tokens=4608),  # one kv head in turn, 256 rows by two CTAs
    Model(7, 2, 128, jnp.float16),
    Model(16, 1, 128, jnp.bfloat16),
    Model(4, 1, 128, jnp.bfloat16, tokens=448),  # 128 rows by one CTA: with one kv head there is none for another
]
DECODED = [dataclasses.replace(MODELS[i], tokens=ROWS) for i in (2, 3, 4, 5)]


def times_seen(positions_T, columns_J, pages_J, kv_len, start, stride):
    """(the distinct pages, how often each query sees each of their keys): a table may name a page many times."""
    pages_D, which_J = np.unique(pages_J, return_inverse=True)
    first_J = (start + stride * columns_J.astype(np.int64)) * B
    exist_J = np.clip(kv_len - columns_J.astype(np.int64) * B, 0, B)
    seen_TJ = np.clip(positions_T[:, None].astype(np.int64) - first_J + 1, 0, exist_J)
    T, D = len(positions_T), len(pages_D)
    index_TJ = (np.arange(T)[:, None] * D + which_J) * (B + 1) + seen_TJ
    count_TDB1 = np.bincount(index_TJ.ravel(), minlength=T * D * (B + 1)).reshape(T, D, B + 1)
    return pages_D, count_TDB1[..., :0:-1].cumsum(-1)[..., ::-1]  # key b of a page is seen where more than b are


def plain(q_TGH, k_SH, v_SH, times_TS):
    """Attention in float64 over keys that each count so many times: (out_TGH, lse_TG base 2)."""
    T, G, H = q_TGH.shape
    with np.errstate(divide="ignore"):
        bias_TS = np.log(times_TS)
    scores_TGS = (q_TGH.reshape(T * G, H) @ k_SH.T).reshape(T, G, len(k_SH)) / np.sqrt(H) + bias_TS[:, None]
    max_TG1 = scores_TGS.max(-1, keepdims=True, initial=-1e300)  # finite, also where no key is seen
    weights_TGS = np.exp(scores_TGS - max_TG1)
    total_TG1 = weights_TGS.sum(-1, keepdims=True)
    seen_TG1 = total_TG1 > 0
    total_TG1 = np.where(seen_TG1, total_TG1, 1)
    lse_TG1 = np.where(seen_TG1, np.log2(total_TG1) + max_TG1 / np.log(2), MASKED)
    return (weights_TGS.reshape(T * G, len(v_SH)) @ v_SH).reshape(T, G, H) / total_TG1, lse_TG1[..., 0]


def merge64(out_XTNH, lse_XTN):
    max_TN = lse_XTN.max(0)
    weight_XTN = np.exp2(lse_XTN - max_TN)
    total_TN = weight_XTN.sum(0)
    out_TNH = (weight_XTN[..., None] * out_XTNH).sum(0) / total_TN[..., None]
    return out_TNH, np.where(max_TN > MASKED, max_TN + np.log2(total_TN), MASKED)


def attend64(q_TGH, positions_T, pages_J, kv_len, start, stride, read: Callable):
    """The queries of one kv head over a table row; `read(pages_D)` gives the head's keys and values, [D, 2, B, H]."""
    T, G, H = q_TGH.shape
    used_J = np.arange(-(-kv_len // B))
    distinct_D, which_J = np.unique(pages_J[used_J], return_inverse=True)
    parts = [(np.zeros((T, G, H)), np.full((T, G), MASKED))]
    for first in range(0, len(distinct_D), BLOCK):
        columns_J = used_J[(which_J >= first) & (which_J < first + BLOCK)]
        pages_D, times_TDB = times_seen(positions_T, columns_J, pages_J[columns_J], kv_len, start, stride)
        times_TS = times_TDB.reshape(T, len(pages_D) * B)
        seen_S = times_TS.any(0)  # the rest may be NaN
        k_SH, v_SH = np.moveaxis(read(pages_D), 1, 0).reshape(2, -1, H)[:, seen_S].astype(np.float64)
        parts.append(plain(q_TGH.astype(np.float64), k_SH, v_SH, times_TS[:, seen_S]))
    return merge64(*(np.stack(x) for x in zip(*parts, strict=True)))


def check(label: str, got, want, dtype) -> None:
    """Prints and bounds the error of each query head relative to its result: root mean square, maximum, of the LSE.

    Not the norm of all over the norm of all: the results of short contexts, which are larger, would hide the rest.
    """
    (out, lse), (want_out, want_lse) = ([np.asarray(x, np.float64) for x in pair] for pair in (got, want))
    seen = want_lse > -1e29
    assert (lse[~seen] == np.float32(MASKED)).all() and not out[~seen].any()  # NaN is any, too
    error, size = (np.linalg.norm(x[seen], axis=-1) for x in (out - want_out, want_out))
    typical, worst = np.sqrt(np.mean((error / size) ** 2)), (error / size).max()
    worst_lse = np.abs(lse - want_lse)[seen].max()
    print(f"{label}: relative error {typical:.1e}, at most {worst:.1e}, of the LSE {worst_lse:.1e}")
    assert typical <= TOLERANCE[dtype] and worst <= 2 * TOLERANCE[dtype] and worst_lse <= LSE_TOLERANCE


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one call. As many tokens as rows: a decode."""

    q_TNH: np.ndarray
    kv: np.ndarray | jax.Array  # on the host for `expected`
    table_SJ: np.ndarray
    cu_R1: np.ndarray
    positions_T: np.ndarray
    rows: dict[str, np.ndarray]

    @property
    def is_decode(self) -> bool:
        return len(self.positions_T) == ROWS

    def run(self):
        """What the kernel gives, as numpy arrays."""
        args = (self.q_TNH, self.kv, np.int32(1), self.table_SJ)
        if self.is_decode:
            got = decode(*args, q_positions_R=self.positions_T, **self.rows)
        else:
            got = prefill(*args, cu_q_lens_R1=self.cu_R1, q_positions_T=self.positions_T, **self.rows)
        return jax.device_get(got)

    def expected(self):
        (T, N, H), K = self.q_TNH.shape, self.kv.shape[3]
        out, lse = np.zeros((T, N, H)), np.full((T, N), MASKED)
        names = ("slots_R", "kv_lens_R", "key_start_R", "key_stride_R")
        for r, (slot, *row) in enumerate(zip(*(self.rows[name] for name in names), strict=True)):
            for head in range(K):
                at = (slice(self.cu_R1[r], self.cu_R1[r + 1]), slice(head * N // K, (head + 1) * N // K))
                read = lambda pages_D, head=head: self.kv[1, pages_D, :, head]  # noqa: E731
                out[at], lse[at] = attend64(self.q_TNH[at], self.positions_T[at[0]], self.table_SJ[slot], *row, read)
        return out, lse


def build(rng, model: Model, lens, stored, firsts, starts, strides) -> Case:
    """Random keys on random pages in a cache of NaN, a table that points nowhere else, and NaN behind the queries.

    Row r has lens[r] queries at positions from firsts[r] on and stored[r] keys; rows that are not named are empty.
    """
    given = np.array([lens, stored, firsts, starts, strides])
    lens, stored, firsts, starts, strides = np.pad(given, ((0, 0), (0, ROWS - given.shape[1]))).astype(np.int32)
    strides[given.shape[1] :] = 1
    K, H = model.kv_heads, model.head_dim
    kv = np.full((LAYERS, PAGES, 2, K, B, H), np.nan, model.dtype)
    table_SJ = rng.choice(np.array([-7, PAGES, 2**30], np.int32), (SLOTS, COLUMNS))
    slots, free = rng.permutation(SLOTS).astype(np.int32), rng.permutation(PAGES).astype(np.int32)
    cu = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
    assert cu[-1] <= model.tokens
    q = np.full((model.tokens, model.heads_per_kv * K, H), np.nan, model.dtype)
    q[: cu[-1]] = rng.standard_normal((cu[-1], *q.shape[1:]), np.float32)
    positions = np.full(model.tokens, 2**30, np.int32)
    positions[: cu[-1]] = np.repeat(firsts - cu[:-1], lens) + np.arange(cu[-1])
    for slot, keys in zip(slots, stored, strict=True):
        pages, free = np.split(free, [-(-keys // B)])
        assert len(pages) == -(-keys // B)
        table_SJ[slot, : len(pages)] = pages
        kv[1, pages] = rng.standard_normal((len(pages), *kv.shape[2:]), np.float32)
        kv[1, pages[-1:], ..., keys - B * (len(pages) - 1) :, :] = np.nan
    rows = dict(slots_R=slots, kv_lens_R=stored, key_start_R=starts, key_stride_R=strides)
    return Case(q, kv, table_SJ, cu, positions, rows)


def chosen(model: Model) -> Case:
    """The edges by hand: nothing stored, nothing visible, one key, the last key, a chunk across pages, a long row."""
    stored, firsts = [129, 700, 1, 500, 0, 12_000], [128, 500, 0, 3, 7, 11_985]
    lens = [1] * ROWS if model.tokens == ROWS else [1, 200, 37, 0, 90, 12]
    pad = [0] * (len(lens) - len(stored))
    some = (lens, stored + pad, firsts + pad, [0] * len(lens), [1] * len(lens))
    return build(np.random.default_rng(0), model, *some)


def affine(model: Model) -> Case:
    """Pages dealt to groups: queries between pages, before the first key and behind the last."""
    rows = ([640, 300, 3000, 1000], [2000, 480, 12_000, 5060], [3, 1, 0, 40], [4, 2, 7, 1])
    return build(np.random.default_rng(1), model, [100, 64, 3, 120], *rows)


@functools.cache
def many(model: Model) -> Case:
    """64 ragged rows, every one with keys of its own."""
    rng = np.random.default_rng(2)
    lens = [1] * ROWS if model.tokens == ROWS else rng.integers(0, 11, ROWS)
    stored = np.exp(rng.uniform(0, np.log(3000), ROWS)).astype(int)
    starts, strides = rng.integers(0, 4, ROWS), rng.integers(1, 5, ROWS)
    firsts = (rng.uniform(0.2, 1.1, ROWS) * (starts * B + strides * stored)).astype(int)
    return build(rng, model, lens, stored, firsts, starts, strides)
