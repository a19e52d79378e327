"""The Hopper kernels against attention in float64, against exact integers, and against themselves, on one GPU.

MNEMOSYNE_TEST_PLATFORM=cuda python -m pytest -s tests/test_gpu_kernels.py tests/test_gpu_contexts.py. Lengths,
positions and page tables are data, so the many cases of a model share one program: compiling is what takes time here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from math import log2

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rivals import versions
from pallas_kernels import mosaic
from pallas_kernels.reference import MASKED
from pallas_kernels.tiling import SMS, Tiling
from pallas_kernels.work import work_list
from tests.gpu_cases import (
    COLUMNS,
    DECODED,
    LAYERS,
    LSE_TOLERANCE,
    MODELS,
    PAGES,
    ROWS,
    SLOTS,
    B,
    Case,
    Model,
    affine,
    build,
    check,
    chosen,
    many,
    merge64,
    merge_partials,
)

pytestmark = pytest.mark.gpu
# A decode has as many tokens as rows, which is how the two kernels' cases are told apart.
BOTH = pytest.mark.parametrize("model", MODELS + DECODED, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _which_compiler():
    print({name: version for name, version in versions().items() if name.startswith(("jax", "ptxas", "driver"))})


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


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_decodes_beside_chunks(model):
    """One list for both, with chunks in tiles of every kind."""
    rng = np.random.default_rng(5)
    lens = [1] * 40 + [200, 37, 0, 90, 12]
    stored = np.exp(rng.uniform(0, np.log(1500), len(lens))).astype(int)
    starts, strides = rng.integers(0, 4, len(lens)), rng.integers(1, 5, len(lens))
    firsts = (rng.uniform(0.2, 1.1, len(lens)) * (starts * B + strides * stored)).astype(int)
    case = build(rng, model, lens, stored, firsts, starts, strides)
    got = beside(case.q_TNH, case.kv, case.table_SJ, case.cu_R1, case.positions_T, case.rows)
    check(f"{model} decodes beside chunks", got, case.expected(), model.dtype)
    case.rows["kv_lens_R"][40:] = 0
    alone = beside(case.q_TNH, case.kv, case.table_SJ, case.cu_R1, case.positions_T, case.rows)
    check(f"{model} the decodes alone", [x[:40] for x in alone], [x[:40] for x in case.expected()], model.dtype)


@jax.jit
def beside(q_TNH, kv, table_SJ, cu_R1, positions_T, rows):
    """Rows of which the first 40 have one query each."""
    N, K = q_TNH.shape[1], kv.shape[3]
    heads = dict(heads_per_kv=N // K, kv_heads=K, head_dim=q_TNH.shape[2])
    work = mosaic.prefill_work(cu_R1, positions_T, decodes=40, **heads, **rows)
    return mosaic.attend_work(q_TNH, kv, 1, table_SJ, work)


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
