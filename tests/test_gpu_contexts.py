"""The Hopper kernels over caches of more than 2^31 elements, contexts to 10M tokens, and in place, on one GPU."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import mosaic
from tests.gpu_cases import BLOCK, B, attend64, check, decode, prefill

pytestmark = pytest.mark.gpu

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
