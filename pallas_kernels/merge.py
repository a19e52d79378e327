"""Merging partial attentions by their log-sum-exp, in Mosaic GPU: those of a work list, or X of equal shape.

A warpgroup takes one token and one or several of its heads. Partials are read a few at a time, all at once, and
summed in their order, so the result does not depend on timing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tensor_core as tc
from pallas_kernels.reference import MASKED
from pallas_kernels.tiling import SMS
from pallas_kernels.work import Merge

MANY_CTAS = 2 * SMS


def merge_items(
    out_IKMH: jax.Array, lse_IKM: jax.Array, merges_TW: jax.Array, *, heads_per_kv: int, dtype: Any, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """(out_TNH of `dtype`, lse_TN) of the partials of a work list's items; (0, MASKED) where there are none."""
    K, H, T, G = out_IKMH.shape[1], out_IKMH.shape[3], merges_TW.shape[0], heads_per_kv
    # A few tokens leave SMs to spare, and may have many partials each: a head for each warpgroup, its loads in flight.
    heads, at_once = (1, 32) if T * K * G <= MANY_CTAS else (G, max(1, 8 // G))

    def body(merges_ref, out_ref, lse_ref, merged_ref, merged_lse_ref):
        token, group = lax.axis_index("token"), lax.axis_index("head")
        merge = Merge(*(merges_ref[token, w] for w in range(len(Merge._fields))))

        def read(i, g):
            exists, head = i < merge.partials, group * heads + g
            at = (
                merge.first_partial + jnp.minimum(i, merge.partials - 1),
                lax.div(head, jnp.int32(G)),
                merge.place * G + lax.rem(head, jnp.int32(G)),
            )
            return tc.load(out_ref.at[at], _layout(H), interpret), jnp.where(exists, lse_ref[at], MASKED)

        results = _merge_in_order(read, merge.partials, heads, H, at_once, interpret)
        for g, (out, lse) in enumerate(results):
            merged_ref[token, group * heads + g] = out.astype(merged_ref.dtype)
            merged_lse_ref[token, group * heads + g] = lse

    stored = dtype if H % 128 == 0 else jnp.float32  # Pallas stores 64 numbers only in words of four bytes
    out_TNH, lse_TN = _kernel(body, T, K * G // heads, K * G, H, stored, interpret)(merges_TW, out_IKMH, lse_IKM)
    return out_TNH.astype(dtype), lse_TN


def merge_partials(out_XTNH: jax.Array, lse_XTN: jax.Array, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """`reference.merge_partials` in one pass over the partials: (out_TNH, lse_TN), summed in the order of X."""
    X, T, N, H = out_XTNH.shape
    heads = next(n for n in (8, 4, 2, 1) if N % n == 0)

    def body(out_ref, lse_ref, merged_ref, merged_lse_ref):
        token, group = lax.axis_index("token"), lax.axis_index("head")

        def read(x, g):
            at = (x, token, group * heads + g)
            return tc.load(out_ref.at[at], _layout(H), interpret), lse_ref[at]

        for g, (out, lse) in enumerate(_merge_in_order(read, X, heads, H, X, interpret)):
            merged_ref[token, group * heads + g] = out
            merged_lse_ref[token, group * heads + g] = lse

    return _kernel(body, T, N // heads, N, H, jnp.float32, interpret)(out_XTNH, lse_XTN)


def _merge_in_order(
    read: Callable, count: Any, heads: int, H: int, at_once: int, interpret: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """[(out_H, lse) of each head] of partials 0 .. count-1, where read(i, head) gives (out_H, lse) of one."""

    def block(b, carry):
        blocks = [[read(b * at_once + i, g) for i in range(at_once)] for g in range(heads)]
        merged = []
        for (out, m, total), parts in zip(carry, blocks, strict=True):
            new_m = functools.reduce(jnp.maximum, (lse for _, lse in parts), m)
            shrink = jnp.exp2(m - new_m)
            out, total = out * shrink, total * shrink
            for part, lse in parts:
                weight = jnp.exp2(lse - new_m)
                out, total = out + part * weight, total + weight
            merged.append((out, new_m, total))
        return merged

    none = (tc.full((H,), 0.0, _layout(H), interpret), jnp.float32(MASKED), jnp.float32(0))
    carry = [none] * heads
    if isinstance(count, int) and count == at_once:
        carry = block(0, carry)
    else:
        carry = lax.fori_loop(0, (count + at_once - 1) // at_once, block, carry)
    results = []
    for out, m, total in carry:
        total = jnp.where(total == 0, 1.0, total)
        results.append((out * (1 / total), m + jnp.log2(total)))
    return results


def _layout(H: int) -> Any:
    return plgpu.Layout.WG_STRIDED((H,), vec_size=1) if H % 128 == 0 else tc.ROWS


def _kernel(body: Callable, T: int, groups: int, N: int, H: int, dtype: Any, interpret: Any) -> Callable:
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((T, N, H), dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)),
        grid=(groups, T),
        grid_names=("head", "token"),
        kernel_name="merge_partials",
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
