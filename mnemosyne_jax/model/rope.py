"""Rotary position tables that stay exact at any position a 32-bit integer can hold."""

from __future__ import annotations

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mnemosyne_jax.config import RopeConfig
from mnemosyne_jax.errors import RequestError

TWO_PI = 0x3243F6A8885A308D313198A2E03707344A4093822299F31D  # pi to 188 bits; read as 2 pi it has 187 fraction bits
TWO_PI_BITS = 187


def rotary_frequencies(rope: RopeConfig, head_dim: int, dtype: type = np.float64) -> tuple[np.ndarray, float]:
    """Radians per position of each rotary pair, and the attention factor that multiplies cosine and sine.

    Shapes: [head_dim / 2], of `dtype`. The operations are Hugging Face's, in their order, so float32 gives
    the rounding that released checkpoints saw; only the power is rounded once, from float64.

    Raises: RequestError if yarn or llama3 lack the length that they were pretrained at.
    Source: transformers.modeling_rope_utils; yarn: Peng et al. 2023; llama3: the Llama 3.1 release.
    """
    if rope.type in ("yarn", "llama3") and rope.original_positions < 1:
        raise RequestError("rope.original_positions", rope.original_positions, f"{rope.type} needs it: at least 1")
    exponents = (np.arange(0, head_dim, 2).astype(dtype) / head_dim).astype(np.float64)
    periods = np.power(rope.theta, exponents).astype(dtype)
    plain = 1.0 / periods
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.type == "yarn":
        keep = 1 - _yarn_stretch(rope, head_dim, dtype)
        return (1.0 / (rope.factor * periods)) * (1 - keep) + plain * keep, _yarn_attention_factor(rope)
    return plain, 1.0


@jax.named_scope("rotary_tables")
def rotary_tables(positions_T: Array, rope: RopeConfig, head_dim: int, precision: str) -> tuple[Array, Array]:
    """Cosine and sine of position times frequency, times the attention factor.

    `precision` 'exact' is within 1e-6 of float64 at every position below 2**31. 'hf_float32' rounds the angle
    to float32 as Hugging Face does: off by about position * 2**-24 radians.

    Shapes: int32 [T] -> two float32 [T, head_dim / 2].
    Raises: RequestError for any other `precision`.
    """
    if precision == "exact":
        turn_T2 = _fraction_of_turn(positions_T, *_fixed_point_turns(rope, head_dim))
        angle_T2 = turn_T2.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
        factor = rotary_frequencies(rope, head_dim)[1]
    elif precision == "hf_float32":
        frequency_2, factor = rotary_frequencies(rope, head_dim, np.float32)
        angle_T2 = positions_T.astype(jnp.float32)[:, None] * frequency_2
    else:
        raise RequestError("rope_precision", precision, "must be 'exact' or 'hf_float32'")
    return jnp.cos(angle_T2) * np.float32(factor), jnp.sin(angle_T2) * np.float32(factor)


@jax.named_scope("rotate")
def rotate(x_TNH: Array, cos_T2: Array, sin_T2: Array) -> Array:
    """`x_TNH` with each pair (i, i + H/2) turned by its angle, computed in float32, in the dtype of `x_TNH`."""
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_T2[:, None, :], sin_T2[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_TNH.dtype)


@lru_cache(maxsize=64)
def _fixed_point_turns(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Turns per position as 64 fraction bits, in two uint32 [head_dim / 2]: upper, lower.

    A float64 quotient by 2 pi has too few bits: its error times 2**31 would reach 1e-7 turns. Python integers do not.
    """
    ratios = [frequency.as_integer_ratio() for frequency in rotary_frequencies(rope, head_dim)[0].tolist()]
    turns = [(top << (64 + TWO_PI_BITS)) // (bottom * TWO_PI) & (2**64 - 1) for top, bottom in ratios]
    return np.array([t >> 32 for t in turns], np.uint32), np.array([t & (2**32 - 1) for t in turns], np.uint32)


def _fraction_of_turn(positions_T: Array, upper_2: np.ndarray, lower_2: np.ndarray) -> Array:
    """position * turns modulo 1, as int32 [T, H/2] in units of 2**-32 turn, so in [-1/2, 1/2).

    Whole turns overflow away, which is the point. The upper 32 bits of position * lower come from 16-bit halves,
    because uint32 is the widest integer at hand (64-bit types are off in JAX unless a global flag is set).
    """
    position = positions_T.astype(jnp.uint32)[:, None]
    high, low = position >> 16, position & 0xFFFF
    lower_high, lower_low = lower_2 >> 16, lower_2 & 0xFFFF
    middle = low * lower_high + ((low * lower_low) >> 16)
    carry = (high * lower_low + (middle & 0xFFFF)) >> 16
    return jax.lax.bitcast_convert_type(position * upper_2 + high * lower_high + (middle >> 16) + carry, jnp.int32)


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths slowed by `factor`, short ones kept, those between the two limits interpolated."""
    wavelength, low, high = 2 * math.pi / plain, rope.low_freq_factor, rope.high_freq_factor
    is_long = wavelength > rope.original_positions / low
    is_short = wavelength < rope.original_positions / high
    smooth = (rope.original_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    return np.where(is_long, plain / rope.factor, np.where(is_short, plain, between))


def _yarn_stretch(rope: RopeConfig, head_dim: int, dtype: type) -> np.ndarray:
    """Shape [head_dim / 2]: 0 where a pair keeps its frequency, 1 where it is divided by `factor`, a ramp between."""

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes `turns` turns within the pretraining length."""
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    return np.clip((np.arange(head_dim // 2, dtype=dtype) - low) / (high - low), 0, 1)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
