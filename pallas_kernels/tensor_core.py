"""The few operations that the CPU interpreter of Mosaic GPU lacks, each beside a plain form for it.

Everything else of a kernel (barriers, copies, page look-ups, softmax) is the same code on both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

MATRIX = plgpu.Layout.WGMMA  # an accumulator in registers
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number for each of its rows


def full(shape: tuple[int, ...], value: float, layout: Any, interpret: Any) -> jax.Array:
    x = jnp.full(shape, value, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, layout)


def iota(shape: tuple[int, int], axis: int, interpret: Any) -> jax.Array:
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def load(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)


def scores(q_ref: Any, k_ref: Any, interpret: Any) -> jax.Array:
    """q @ k.T in float32."""
    if interpret:
        return _dot(_read(q_ref), _read(k_ref).T)

    def issue(s_ref):
        plgpu.wgmma(s_ref, q_ref, k_ref.transpose((1, 0)))
        return s_ref[...]

    return pl.run_scoped(issue, _accumulator(q_ref.shape[0], k_ref.shape[0]))


def accumulate(out: jax.Array, p: jax.Array, v_ref: Any, interpret: Any) -> jax.Array:
    """out + p @ v."""
    if interpret:
        return out + _dot(p, _read(v_ref))

    def issue(out_ref):
        out_ref[...] = out
        plgpu.wgmma(out_ref, p, v_ref)
        return out_ref[...]

    return pl.run_scoped(issue, _accumulator(*out.shape))


def accumulate_and_score(
    out: jax.Array, p: jax.Array, v_ref: Any, q_ref: Any, k_ref: Any, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """(out + p @ v, q @ k.T), one order for both.

    p comes first: it lies in registers, which must be ready before the first order of a batch, or ptxas would put a
    wait between the two.
    """
    if interpret:
        return out + _dot(p, _read(v_ref)), _dot(_read(q_ref), _read(k_ref).T)

    def issue(out_ref, s_ref):
        out_ref[...] = out
        s_ref[...] = _known_zeros(s_ref.shape)
        plgpu.wgmma(out_ref, p, v_ref)
        plgpu.wgmma(s_ref, q_ref, k_ref.transpose((1, 0)))
        return out_ref[...], s_ref[...]

    return pl.run_scoped(issue, _accumulator(*out.shape), _accumulator(q_ref.shape[0], k_ref.shape[0]))


def _known_zeros(shape: tuple[int, ...]) -> jax.Array:
    """Zeros each written for itself, which ptxas makes the first product start from for nothing.

    Pallas's own are copies of one register, and that is part of an accumulator too: ptxas no longer sees that all are
    zero, and every step of a loop would move 64 registers, an eighth of its instructions.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=MATRIX))
    def zeros(_: Any) -> Any:
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        splat = mgpu.FragmentedArray.splat(arith.constant(f32, 0.0), shape, layout=mgpu.WGMMA_LAYOUT)
        registers = splat.registers.copy()
        for index in np.ndindex(registers.shape):
            zero = [llvm.inline_asm(f32, [], "mov.b32 $0, 0f00000000;", "=f", has_side_effects=True) for _ in range(2)]
            registers[index] = vector.from_elements(pair, zero)
        return mgpu.FragmentedArray(_registers=registers, _layout=splat.layout, _is_signed=None)

    return zeros()  # pyright: ignore[reportCallIssue]: the decorator gives the argument


def _accumulator(rows: int, columns: int) -> Any:
    return plgpu.WGMMAAccumulatorRef((rows, columns))


def _read(ref: Any) -> jax.Array:
    x = ref[...]
    plgpu.commit_smem()  # the tensor core would read as TMA writes, in the async proxy: no fence needed there
    return x


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
