"""The Hopper kernels against attention in float64, against exact integers, and against themselves, on one GPU.

MNEMOSYNE_TEST_PLATFORM=cuda python -m pytest -s tests/test_gpu_kernels.py. Lengths, positions and page tables are
data, so the many cases of a model share one program: compiling is what takes time here.

Shapes beside those of `reference`: G query heads of one kv head, D distinct pages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from math import log2

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.rivals import versions
from pallas_kernels import mosaic
from pallas_kernels.reference import MASKED
from pallas_kernels.work import SMS, Tiling, work_list

pytestmark = pytest.mark.gpu

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
    Model(1, 2, 64, jnp.bfloat16, tokens=448),  # 128 rows in a tile, the next one 192
    Model(4, 2, 64, jnp.float16),
    Model(7, 2, 64, jnp.bfloat16, tokens=3712),  # one kv head in turn, 192 rows
    Model(16, 1, 64, jnp.float16),
    Model(1, 2, 128, jnp.float16),
    Model(4, 2, 128, jnp.bfloat16, tokens=4608),  # one kv head in turn, 128 rows
    Model(7, 2, 128, jnp.float16),
    Model(16, 1, 128, jnp.bfloat16),
]
DECODED = [dataclasses.replace(MODELS[i], tokens=ROWS) for i in (2, 3, 4, 5)]
# A decode has as many tokens as rows, which is how the two kernels' cases are told apart.
BOTH = pytest.mark.parametrize("model", MODELS + DECODED, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _which_compiler():
    print({name: version for name, version in versions().items() if name.startswith(("jax", "ptxas", "driver"))})


# --- attention in float64 ---------------------------------------------------------------------------------------------


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


# --- against float64 --------------------------------------------------------------------------------------------------


@BOTH
def test_ragged_rows(model):
    for make in (chosen, many) if model.tokens == ROWS else (chosen, affine, many):
        case = make(model)
        check(f"{model} {make.__name__}", case.run(), case.expected(), model.dtype)


# --- exact ------------------------------------------------------------------------------------------------------------


def of_integers(rng, model: Model, positions_T) -> tuple[Case, np.ndarray]:
    """Keys that spell their own position in +-8, integer values, q still zero: (case, the values [S, K, H]).

    All rows read one context of as many keys as the table holds.
    """
    K, H, T = model.kv_heads, model.head_dim, model.tokens
    used = len(positions_T)
    S = COLUMNS * B
    values_SKH = rng.integers(-128, 129, (S, K, H)).astype(np.float32)
    kv = np.full((LAYERS, PAGES, 2, K, B, H), np.nan, model.dtype)
    pages = rng.permutation(PAGES)[:COLUMNS].astype(np.int32)
    keys_SKH = 8 * spelled(np.repeat(np.arange(S)[:, None], K, 1), K, H)
    for side, x_SKH in enumerate((keys_SKH, values_SKH)):
        kv[1, pages, side] = x_SKH.reshape(COLUMNS, B, K, H).swapaxes(1, 2)
    table_SJ = np.full((SLOTS, COLUMNS), PAGES, np.int32)
    table_SJ[3] = pages
    lens = rng.multinomial(used, np.full(ROWS, 1 / ROWS)) if T > ROWS else np.ones(ROWS)
    cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    same = functools.partial(np.full, ROWS, dtype=np.int32)
    rows = dict(slots_R=same(3), kv_lens_R=same(S), key_start_R=same(0), key_stride_R=same(1))
    q = np.zeros((T, model.heads_per_kv * K, H), model.dtype)
    return Case(q, kv, table_SJ, cu, np.pad(positions_T, (0, T - used)).astype(np.int32), rows), values_SKH


def spelled(numbers_XK, K: int, H: int) -> np.ndarray:
    """The 16 bits of each number as +-1, over and over: no two have more than H - H/8 as product. [X, K, H]"""
    # Every kv head spells in its own way.
    numbers_XK = (numbers_XK ^ 0x5A5A * np.arange(K)).astype(np.uint16)
    return np.where(numbers_XK[..., None] >> np.arange(H, dtype=np.uint16) % 16 & 1, np.float32(1), np.float32(-1))


def one_hot(model: Model) -> tuple[Case, np.ndarray]:
    """Queries that each ask for one of 64K keys, and the integers they must get.

    The winning score, 128 H before it is scaled, is a power of two: exact whatever is fused. All others lie so far
    below, 184 or more in base 2, that their weights are zero in float32.
    """
    rng, K, G, H = np.random.default_rng(3), model.kv_heads, model.heads_per_kv, model.head_dim
    positions_T = rng.integers(0, COLUMNS * B, min(model.tokens, 448))
    asked_TKG = rng.integers(0, positions_T[:, None, None] + 1, (len(positions_T), K, G))
    asked_TKG[:, :, 0] = positions_T[:, None]  # the last that is visible
    case, values_SKH = of_integers(rng, model, positions_T)
    q_TKGH = 16 * spelled(asked_TKG.swapaxes(1, 2), K, H).swapaxes(1, 2)
    case.q_TNH[: len(positions_T)] = q_TKGH.reshape(-1, K * G, H)
    return case, values_SKH[asked_TKG, np.arange(K)[:, None]].reshape(-1, K * G, H)


def check_one_hot(got, want, head_dim: int) -> None:
    out, lse = got
    np.testing.assert_array_equal(out[: len(want)], want)
    np.testing.assert_allclose(lse[: len(want)], 128 * head_dim**0.5 * log2(np.e), rtol=1e-6)


@BOTH
def test_one_key_that_outweighs_all_others_is_returned_exactly(model):
    case, want = one_hot(model)
    check_one_hot(case.run(), want, model.head_dim)


@BOTH
def test_mean_of_integers_is_exact(model):
    """q = 0 over the first 2^k keys. Splits are even, so no weight is rounded when their partials are merged."""
    rng, G, K = np.random.default_rng(4), model.heads_per_kv, model.kv_heads
    is_decode = model.tokens == ROWS
    counts = 2 ** np.arange(int(log2(COLUMNS * B)) - (1 if is_decode else 0))
    case, values_SKH = of_integers(rng, model, counts - 1)
    if is_decode:
        pages, tiling = sum(-(-counts // B)), mosaic.DECODE
        case.rows["kv_lens_R"][len(counts) :] = 0
    else:
        tiling = mosaic.prefill_tiling(model.tokens, G, K, model.head_dim)
        case.cu_R1[1:] = len(counts)
        pages = -(-len(counts) // (tiling.rows // G)) * counts[-1] // B
    longest = tiling.least_pages  # of an item, as there are few pages: what the next line makes sure of
    assert pages <= longest * (tiling.waves * SMS // (K * tiling.ctas)) and longest & (longest - 1) == 0
    out, lse = (x[: len(counts)] for x in case.run())
    want_TKH = np.stack([values_SKH[:n].mean(0, dtype=np.float64) for n in counts])
    np.testing.assert_array_equal(out, np.repeat(want_TKH, G, axis=1))
    assert np.abs(lse - np.log2(counts)[:, None]).max() <= LSE_TOLERANCE


# --- against themselves -----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="tiling")
def tiled(q_TNH, kv, table_SJ, cu_R1, positions_T, rows, tiling: Tiling):
    N, K = q_TNH.shape[1], kv.shape[3]
    heads = dict(heads_per_kv=N // K, kv_heads=K)
    work = work_list(cu_R1, positions_T, **rows, page_tokens=B, tiling=tiling, **heads)
    return mosaic.attend_work(q_TNH, kv, 1, table_SJ, work)


def run_tiled(case: Case, tiling: Tiling):
    return jax.device_get(tiled(case.q_TNH, case.kv, case.table_SJ, case.cu_R1, case.positions_T, case.rows, tiling))


def test_no_cut_changes_the_result():
    """Tiles of 64, 128 and 192 rows, few long items and many short ones, heads together and in turn, 2 to 4 stages."""
    model = MODELS[1]
    case, (hot, exact) = many(model), one_hot(model)
    want, results = case.expected(), []
    for tiling in (
        Tiling(rows=64, stages=2, waves=1, least_pages=1),
        Tiling(rows=128, stages=4, waves=4, least_pages=2, even=True),
        Tiling(rows=192, stages=3, waves=16, least_pages=1),
        Tiling(rows=128, stages=2, waves=16, least_pages=1, heads_together=1),
        Tiling(rows=256, stages=2, waves=16, least_pages=1, heads_together=1, ctas=2),
    ):
        results.append(run_tiled(case, tiling))
        check(f"{tiling}", results[-1], want, model.dtype)
        check_one_hot(run_tiled(hot, tiling), exact, model.head_dim)
    for one, other in itertools.pairwise(results):
        check("one cut against the next", one, other, model.dtype)


@BOTH
def test_same_call_same_bits(model):
    case = dataclasses.replace(many(model), kv=jnp.asarray(many(model).kv))
    first = case.run()
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, case.run(), first)


def alone(case: Case, r: int) -> Case:
    """Row r of a case and nothing beside it."""
    mine = slice(case.cu_R1[r], case.cu_R1[r + 1])
    count = mine.stop - mine.start
    place = slice(r, r + 1) if case.is_decode else slice(0, count)  # a decode's token stays with its row
    q, positions = np.full_like(case.q_TNH, np.nan), np.zeros_like(case.positions_T)
    q[place], positions[place] = case.q_TNH[mine], case.positions_T[mine]
    cu = case.cu_R1 if case.is_decode else np.where(np.arange(ROWS + 1) > r, count, 0).astype(np.int32)
    lens = np.where(np.arange(ROWS) == r, case.rows["kv_lens_R"], 0).astype(np.int32)
    return dataclasses.replace(case, q_TNH=q, positions_T=positions, cu_R1=cu, rows=case.rows | dict(kv_lens_R=lens))


NEIGHBOURS = pytest.mark.parametrize("model", [MODELS[1], MODELS[5], DECODED[1], DECODED[3]], ids=str)


@NEIGHBOURS
def test_a_row_alone_is_the_row_among_64(model):
    case = dataclasses.replace(many(model), kv=jnp.asarray(many(model).kv))
    together = case.run()
    seen_R = [(together[1][case.cu_R1[r] : case.cu_R1[r + 1]] > MASKED).sum() for r in range(ROWS)]
    for r in np.argsort(seen_R * case.rows["kv_lens_R"])[-32::5]:
        one = alone(case, r)
        count = case.cu_R1[r + 1] - case.cu_R1[r]
        at = slice(r, r + 1) if case.is_decode else slice(0, count)
        got, want = ([x[s] for x in pair] for pair, s in ((one.run(), at), (together, slice(*case.cu_R1[r : r + 2]))))
        check(f"{model} row {r}, {count} queries, alone and in a batch", got, want, model.dtype)


@NEIGHBOURS
def test_nan_stays_in_its_row(model):
    """Wherever it is, it reaches every query of its row that sees a key and no other row: not one bit of theirs."""
    case = many(model)
    clean = case.run()
    r = np.argmax(np.diff(case.cu_R1) * np.minimum(case.rows["kv_lens_R"], 1000))
    mine_T = np.isin(np.arange(model.tokens), np.arange(*case.cu_R1[r : r + 2]))
    sees_TN = clean[1] > MASKED
    assert sees_TN[mine_T].any()
    slot, keys = case.rows["slots_R"][r], case.rows["kv_lens_R"][r]
    for place in ("q", "keys", "values"):
        q, kv = case.q_TNH.copy(), case.kv.copy()
        if place == "q":
            q[mine_T] = np.nan
        else:
            kv[1, case.table_SJ[slot, : -(-keys // B)], ["keys", "values"].index(place)] = np.nan
        poisoned = dataclasses.replace(case, q_TNH=q, kv=kv).run()
        for got, before in zip(poisoned, clean, strict=True):
            np.testing.assert_array_equal(got[~mine_T], before[~mine_T])
        assert np.isnan(poisoned[0][mine_T & sees_TN.any(1)]).all(), place


# --- large caches, long contexts --------------------------------------------------------------------------------------

BIG = (2, 8448, 2, 4, B, 128)  # 2.2e9 elements
BIG_COLUMNS, BIG_ROWS, HEADS = 78_208, 4, 16
QUIET = BIG[1] - 4  # pages from here on have values so large that one key more or less shows in 1M, or in 10M
LOUD = [2.0**10, 2.0**10, 2.0**14, 2.0**14]


@pytest.fixture(scope="module")
def big():
    """A cache of more than 2^31 elements, of which those of layer 1 begin behind 1.1e9."""
    loudness = np.ones((*BIG[:2], 2), np.float32)
    loudness[:, QUIET:, 1] = LOUD

    def some_pages(key_and_loudness):
        key, loudness_P2 = key_and_loudness
        return (jax.random.normal(key, (64, *BIG[2:])) * loudness_P2[..., None, None, None]).astype(jnp.bfloat16)

    @jax.jit
    def fill(loudness):
        loudness = loudness.reshape(-1, 64, 2)
        keys = jax.random.split(jax.random.key(0), len(loudness))
        return lax.map(some_pages, (keys, loudness)).reshape(BIG)

    return jax.block_until_ready(fill(loudness))


@jax.jit
def fetch(kv, layer, pages_D, head):
    return kv[layer, pages_D, :, head].astype(jnp.float32)


def expected_big(kv, layer, head, q_TNH, positions_T, pages_J, kv_len, start=0, stride=1):
    """What these queries must get from one kv head, its pages read back from the device."""
    G = q_TNH.shape[1] // kv.shape[3]

    def read(pages_D):
        return np.asarray(fetch(kv, layer, np.resize(pages_D, BLOCK), head))[: len(pages_D)]

    q_TGH = q_TNH[:, head * G : (head + 1) * G]
    return attend64(q_TGH, positions_T, pages_J, kv_len, start, stride, read)


def of_head(got, head: int, tokens):
    out, lse = (np.asarray(x) for x in got)
    heads = slice(head * HEADS // BIG[3], (head + 1) * HEADS // BIG[3])
    return out[tokens, heads], lse[tokens, heads]


def big_calls(kv, layer, q_TNH, table_SJ, lens, positions_T, decoded, rows):
    """A chunk of ragged rows, padded to 64 tokens, and some of its queries (`decoded`) as decodes: both results.

    rows: slots, kv_lens, key_start, key_stride of the chunk's rows.
    """
    lens = np.pad(lens, (0, BIG_ROWS - len(lens)))
    row_T = np.repeat(np.arange(BIG_ROWS), lens)
    rows = np.pad(rows, ((0, 0), (0, BIG_ROWS - rows.shape[1])), mode="edge").astype(np.int32)
    names = ("slots_R", "kv_lens_R", "key_start_R", "key_stride_R")
    kv_args = (kv, np.int32(layer), table_SJ)
    cu = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
    padded = np.pad(positions_T, (0, 64 - len(positions_T))).astype(np.int32)
    chunk = prefill(q_TNH, *kv_args, cu_q_lens_R1=cu, q_positions_T=padded, **dict(zip(names, rows, strict=True)))
    of_decoded = dict(zip(names, rows[:, row_T[decoded]], strict=True))
    return chunk, decode(q_TNH[decoded], *kv_args, q_positions_R=padded[decoded], **of_decoded)


def big_queries(rng) -> np.ndarray:
    return rng.standard_normal((64, HEADS, BIG[5]), np.float32).astype(jnp.bfloat16)


@pytest.mark.parametrize("layer", [0, 1])
def test_offsets_beyond_two_to_the_31(big, layer):
    """Two ragged rows of 64 tokens on the last pages, of layer 1 behind element 2^31; layer 0 tells them apart."""
    rng = np.random.default_rng(5)
    lens, kv_lens = np.array([40, 24]), np.array([9_001, 30_000])
    positions_T = np.concatenate([kv_len - n + np.arange(n) for n, kv_len in zip(lens, kv_lens, strict=True)])
    pages = QUIET - 1 - rng.permutation(400).astype(np.int32)
    assert (BIG[1] + pages.min()) * np.prod(BIG[2:], dtype=np.int64) > 2**31
    table_SJ = np.full((BIG_ROWS, BIG_COLUMNS), BIG[1], np.int32)
    table_SJ[2, :71], table_SJ[0, :235] = pages[:71], pages[71:306]
    rows = np.stack([[2, 0], kv_lens, [0, 0], [1, 1]])
    q = big_queries(rng)
    decoded = np.array([0, 39, 40, 63])
    chunk, decodes = big_calls(big, layer, q, table_SJ, lens, positions_T, decoded, rows)
    for r, (slot, kv_len) in enumerate(rows[:2].T):
        tokens = slice(40 * r, 40 + 24 * r)
        for head in range(BIG[3]):
            want = expected_big(big, layer, head, q[tokens], positions_T[tokens], table_SJ[slot], kv_len)
            check(f"layer {layer} row {r} head {head}", of_head(chunk, head, tokens), want, jnp.bfloat16)
            ends = [x[[0, -1]] for x in want]
            check("as decodes", of_head(decodes, head, slice(2 * r, 2 * r + 2)), ends, jnp.bfloat16)


@pytest.mark.parametrize(
    ("pages", "start", "stride", "heads"),
    [(8192, 0, 1, [2]), (78_125, 0, 1, range(4)), (78_125, 12_000_000, 5, range(4))],
    ids=["1M", "10M", "10M from 1.5e9 on"],
)
def test_long_contexts(big, pages, start, stride, heads):
    """32 queries across the last page boundary, and four of them as decodes. 1M real keys; 10M share 64 pages' memory.

    The last two pages are loud: a query that saw one key too many or too few would be off by some hundredths.
    """
    rng = np.random.default_rng(6)
    million = pages < QUIET
    kv_len = pages * B - 112
    table_SJ = np.zeros((BIG_ROWS, BIG_COLUMNS), np.int32)
    quiet = rng.permutation(QUIET).astype(np.int32)
    table_SJ[1, : pages - 2] = quiet[: pages - 2] if million else rng.choice(quiet[:64], pages - 2)
    table_SJ[1, pages - 2 : pages] = np.arange(2) + (QUIET if million else QUIET + 2)
    ends_at = (start + stride * (pages - 1)) * B + 16
    positions_T = np.arange(ends_at - 32, ends_at)
    q, decoded = big_queries(rng), np.array([0, 15, 16, 31])
    rows = np.array([[1], [kv_len], [start], [stride]])
    chunk, decodes = big_calls(big, 1, q, table_SJ, [32], positions_T, decoded, rows)
    for head in heads:
        row = (table_SJ[1], kv_len, start, stride)
        want = expected_big(big, 1, head, q[decoded], positions_T[decoded], *row)
        check(f"{pages} pages from {start}, head {head}", of_head(chunk, head, decoded), want, jnp.bfloat16)
        check("as decodes", of_head(decodes, head, slice(None)), want, jnp.bfloat16)


def test_donated_cache_is_not_copied():
    """Two layers write their keys into the stacked cache and attend to it: in place, with little beside it.

    The second's keys come from the first's result, as in a model: they cannot be written before the cache was read.
    """
    R, K, H = 4, 4, 128
    shape = (2, 512, 2, K, B, H)

    def tick(kv, q_RNH, pages_R, places_R, table_SJ, q_positions_R, rows):
        for layer in range(2):
            new_R2KH = q_RNH[:, : 2 * K].reshape(R, 2, K, H)
            kv = kv.at[layer, pages_R, :, :, places_R].set(new_R2KH, mode="drop")
            out, _ = mosaic.paged_decode(q_RNH, kv, layer, table_SJ, q_positions_R=q_positions_R, **rows)
            q_RNH = out.astype(kv.dtype)
        return kv, q_RNH

    like = jax.ShapeDtypeStruct
    numbers = like((R,), jnp.int32)
    rows = dict.fromkeys(("slots_R", "kv_lens_R", "key_start_R", "key_stride_R"), numbers)
    kv, q = (like(s, jnp.bfloat16) for s in (shape, (R, HEADS, H)))
    args = (kv, q, numbers, numbers, like((R, 64), jnp.int32), numbers, rows)
    compiled = jax.jit(tick, donate_argnums=0).lower(*args).compile()
    cache_bytes, memory = np.prod(shape) * 2, compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes // 8
    assert not re.search(rf"= bf16\[{','.join(map(str, shape))}\]\S* copy", compiled.as_text())


@pytest.mark.parametrize(("X", "T", "N", "H"), [(2, 5, 14, 64), (8, 3, 32, 128)])
def test_merge_partials(X, T, N, H):
    rng = np.random.default_rng(X)
    out, lse = rng.standard_normal((X, T, N, H), np.float32), 8 * rng.standard_normal((X, T, N), np.float32)
    empty = np.zeros((X, T), bool)
    empty[1:, 0] = empty[:, 1] = True  # the first token has one partial, the second none
    out[empty], lse[empty] = 0, MASKED
    got = jax.device_get(merge_partials(out, lse))
    jax.tree.map(np.testing.assert_array_equal, [x[:2] for x in got], [x[0, :2] for x in (out, lse)])
    want = merge64(out[:, 2:].astype(np.float64), lse[:, 2:].astype(np.float64))
    error, lse_error = (np.abs(x[2:] - y).max() for x, y in zip(got, want, strict=True))
    print(f"merge of {X}: error {error:.1e}, of the LSE {lse_error:.1e}")
    assert error <= 4e-6 and lse_error <= 5e-6
