"""Ring attention over any number of devices is plain attention, its work balanced, and nothing sent in vain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.ring import ring_attention, stripe, unstripe
from pallas_kernels.reference import MASKED, chunked_prefill

B, S, K, N, H = 4, 64, 2, 6, 8  # page, longest sequence, kv heads, query heads, head dim


def sharded(attend, n, axis="kvp"):
    """`attend` of local q, k, v and `tokens`, compiled for `n` devices, with arguments and results striped."""
    spec = PartitionSpec(axis)
    mesh = make_mesh(MeshSpec(**{axis: n}))
    ins = (spec, spec, spec, PartitionSpec())
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=ins, out_specs=spec, check_vma=False))


@functools.cache
def ring(n, axis="kvp"):
    def attend(q, k, v, tokens):
        return ring_attention(q, k, v, tokens=tokens, page_tokens=B, axis=axis)

    return sharded(attend, n, axis)


@jax.jit
def plain(q_SNH, k_SKH, v_SKH, tokens):
    """Attention on one device, all keys in one run of pages."""
    kv = jnp.stack([k_SKH, v_SKH]).reshape(2, S // B, B, K, H).transpose(1, 0, 3, 2, 4)[None]
    return chunked_prefill(
        q_SNH,
        kv,
        0,
        jnp.arange(S // B, dtype=jnp.int32)[None],
        slots_R=jnp.zeros(1, jnp.int32),
        cu_q_lens_R1=jnp.stack([jnp.int32(0), tokens]),
        q_positions_T=jnp.arange(S, dtype=jnp.int32),
        kv_lens_R=tokens[None],
        key_start_R=jnp.zeros(1, jnp.int32),
        key_stride_R=jnp.ones(1, jnp.int32),
    )


def prompt(tokens, dtype=np.float32):
    """q, k, v of `tokens` tokens and NaN up to S: what lies behind the prompt may hold anything."""
    rng = np.random.default_rng(tokens)
    q, k, v = (rng.normal(size=(S, heads, H)).astype(dtype) for heads in (N, K, K))
    for x in (q, k, v):
        x[tokens:] = np.nan
    return q, k, v


def check(n, tokens, dtype=np.float32, axis="kvp"):
    q, k, v = prompt(tokens, dtype)
    got = ring(n, axis)(*(stripe(x, n, B) for x in (q, k, v)), np.int32(tokens))
    assert got.out_TNH.dtype == got.lse_TN.dtype == jnp.float32
    want_out, want_lse = plain(q, k, v, np.int32(tokens))
    np.testing.assert_allclose(unstripe(got.out_TNH, n, B), want_out, atol=2e-6)
    np.testing.assert_allclose(unstripe(got.lse_TN, n, B), want_lse, atol=2e-6, rtol=1e-6)
    assert np.all(np.asarray(want_lse)[:tokens] > MASKED) and np.all(np.asarray(want_lse)[tokens:] == MASKED)


@pytest.mark.parametrize("tokens", [0, 1, B, B + 1, 2 * B + 3, 37, S - B, S - 1, S])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ring_attention_is_plain_attention(n, tokens):
    check(n, tokens)


def test_bfloat16_is_accumulated_in_float32():
    check(2, 37, jnp.bfloat16)


def test_any_axis():
    check(2, 37, axis="spp")


@pytest.mark.parametrize("n", [1, 2, 4])
def test_stripe(n):
    """Local page j of device d is global page d + n * j, and back."""
    x = np.arange(S)
    for d, local in enumerate(np.split(stripe(x, n, B), n)):
        for j, page in enumerate(np.split(local, S // n // B)):
            np.testing.assert_array_equal(page, (d + n * j) * B + np.arange(B))
    np.testing.assert_array_equal(unstripe(stripe(x, n, B), n, B), x)


def test_causal_work_is_balanced():
    """Of equal scores the log-sum-exp counts the keys: at every step devices differ by at most a page a query."""
    n, T = 4, S // 4

    def keys_seen(q, k, v, tokens):
        """Keys that each local query sees at each step, [1, steps, T]."""
        steps = []

        def counting(*args, **kwargs):
            out, lse = chunked_prefill(*args, **kwargs)
            steps.append(jnp.where(lse[:, 0] > MASKED, jnp.exp2(lse[:, 0]), 0))
            return out, lse

        ring_attention(q, k, v, tokens=tokens, page_tokens=B, chunked_prefill=counting)
        return jnp.stack(steps)[None]

    q, k, v = (np.zeros((S, heads, H), np.float32) for heads in (N, K, K))
    seen = np.rint(sharded(keys_seen, n)(q, k, v, np.int32(S)))  # device, step, query
    np.testing.assert_array_equal(unstripe(seen.sum(1).reshape(S), n, B), np.arange(S) + 1)
    work = seen.sum(-1)
    assert np.ptp(work, axis=0).max() <= B * T
    assert np.ptp(work.sum(1)) < n * B * T  # the whole: one row of pages a query
    assert work.sum() == S * (S + 1) // 2


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_nothing_is_sent_after_the_last_step(n):
    q, k, v = prompt(S)
    text = ring(n).lower(q, k, v, np.int32(S)).as_text()
    sends = [line for line in text.splitlines() if "stablehlo.collective_permute" in line]
    assert len(sends) == n - 1
    assert all(f"tensor<1x{S // n // B}x2x{K}x{B}x{H}xf32>" in line for line in sends)  # keys and values in one
    assert not any(name in text for name in ("stablehlo.all_gather", "stablehlo.all_reduce", "stablehlo.all_to_all"))


def test_half_a_page_is_refused():
    with pytest.raises(AssertionError):
        ring(2).lower(*(x[: 7 * B] for x in prompt(S)), np.int32(S))
