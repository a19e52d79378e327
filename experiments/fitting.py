"""Fits the coefficients of a HardwareConfig to measured ticks, by gradient descent through the CostModel itself.

What is fitted is the very formula that the scheduler predicts with, at the loads that it sees. A share is the sigmoid
of what is optimised, an overhead the softplus, so that neither can leave its legal range; the loss is the mean squared
difference of logarithms, so that a tick of 1 ms counts as much as one of 100 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig
from mnemosyne_jax.serve.cost import CostModel

SHARES = ("matmul_share", "weight_read_share", "attention_share", "kv_read_share", "activation_share", "link_share")
AMOUNTS = ("softmax_dims", "layer_overhead_s", "overhead_rows", "tick_overhead_s")
UNIT_OF = {name: getattr(HardwareConfig(), name) for name in AMOUNTS}  # an amount is optimised in these
STEPS, LEARNING_RATE = 5000, 0.2
MEMORY = 0.99  # of squared slopes: with the usual 0.999 coefficients that look alike are not told apart in these steps
DIGITS = 4  # of a fitted coefficient


@dataclass(frozen=True)
class Loads:
    """The loads of n ticks of one model on one mesh, for each of G groups, as a CostModel takes them.

    `chunks` [n, G, C, 3] are tokens, keys held before and keys of its own of up to C chunks; one that has no keys there
    costs nothing. `rows` and `merged_rows` [n] are those of the program, `decode_keys`
    [n, G] the keys of all decode rows.
    """

    model: ModelConfig
    mesh: MeshSpec
    dtype_bytes: int
    rows: np.ndarray
    merged_rows: np.ndarray
    chunks: np.ndarray
    decode_keys: np.ndarray

    def where(self, kept: np.ndarray) -> Loads:
        """Of the ticks that are `kept` (booleans [n])."""
        arrays = ("rows", "merged_rows", "chunks", "decode_keys")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in arrays})

    def seconds(self, hardware: Any) -> Any:
        """What each tick is predicted to take [n]: all stages hold such a load, so any one of them is the slowest.

        `hardware` is a HardwareConfig, or anything with its attributes.
        """
        cost = CostModel(self.model, hardware, self.mesh, self.dtype_bytes)
        some = self.chunks[..., 1:].any(-1)
        # The slope of a root is infinite at nothing: a chunk without keys is taken for one that has some, and left out.
        tokens, before, own = np.moveaxis(np.where(some[..., None], self.chunks, 1.0), -1, 0)
        attention_s = cost.decode_s(self.decode_keys) + (some * cost.chunk_s(tokens, before, own)).sum(-1)
        return cost.program_s(self.rows, self.merged_rows) + attention_s.max(-1)


def predict(parts: Sequence[Loads], hardware: HardwareConfig) -> np.ndarray:
    """Seconds of all ticks of all parts, one after the other."""
    return np.concatenate([part.seconds(hardware) for part in parts])


def fit(
    parts: Sequence[Loads], measured_s: np.ndarray, hardware: HardwareConfig, kept: np.ndarray | None = None
) -> HardwareConfig:
    """`hardware` with the coefficients that predict `measured_s` best, of all ticks of all parts one after the other.

    Only ticks that are `kept` (booleans; None: all) count. A coefficient that no tick depends on, such as `link_share`
    on one device, stays as it was. What all parts have in common leaves open what it tells apart: layers, the
    overheads of a layer and of a tick; rows of the smallest program, `overhead_rows`; the head dim, `softmax_dims`; the
    model's shape, the shares of products and of activations.
    """
    log_measured = jnp.log(jnp.asarray(measured_s))
    weights = jnp.ones(len(measured_s)) if kept is None else jnp.asarray(kept, jnp.float32)
    constants = dataclasses.asdict(hardware)

    def loss(free: dict[str, jax.Array]) -> jax.Array:
        # The arithmetic of a CostModel asks for attributes alone; a HardwareConfig would check values not known yet.
        traced = SimpleNamespace(**(constants | _coefficients(free)))
        seconds = jnp.concatenate([part.seconds(traced) for part in parts])
        return jnp.sum(weights * (jnp.log(seconds) - log_measured) ** 2) / jnp.sum(weights)

    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), b2=MEMORY)

    @jax.jit
    def descend(free: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            free, state = carry
            updates, state = optimizer.update(jax.grad(loss)(free), state)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, (free, optimizer.init(free)), length=STEPS)[0][0]

    found = _coefficients(descend(_free(hardware)))
    rounded = {name: float(f"{float(value):.{DIGITS}g}") for name, value in found.items()}
    return dataclasses.replace(hardware, **rounded, fitted=True)


def relative_errors(predicted_s: np.ndarray, measured_s: np.ndarray) -> np.ndarray:
    """How far each prediction is off, as a share of what was measured."""
    return np.abs(predicted_s / measured_s - 1)


def _coefficients(free: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Legal values of the coefficients, from any numbers."""
    shares = {name: jax.nn.sigmoid(free[name]) for name in SHARES}
    return shares | {name: UNIT_OF[name] * jax.nn.softplus(free[name]) for name in AMOUNTS}


def _free(hardware: HardwareConfig) -> dict[str, jax.Array]:
    """The numbers whose coefficients are those of `hardware`; at a limit of its range, close to it."""
    shares = {name: min(getattr(hardware, name), 0.99) for name in SHARES}
    amounts = {name: max(getattr(hardware, name) / UNIT_OF[name], 0.01) for name in AMOUNTS}
    free = {name: np.log(x / (1 - x)) for name, x in shares.items()}
    free |= {name: x + np.log(-np.expm1(-x)) for name, x in amounts.items()}
    return {name: jnp.asarray(value, jnp.float32) for name, value in free.items()}
