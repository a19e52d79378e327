"""What fits where, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from mnemosyne_jax.config import HardwareConfig, MeshSpec, ModelConfig

ACTIVATION_FRACTION = 0.15  # of a device's memory, kept for a tick's activations and the compiler's temporaries


@dataclass(frozen=True)
class Plan:
    """Bytes per device and the longest context of one request alone, for a model on a mesh of one kind of device.

    `ttft_s` and `tbt_s` are None until the hardware is calibrated.
    """

    weight_bytes_per_device: int
    kv_bytes_per_token: int  # of a request, over all devices
    kv_bytes_per_device: int  # of `context_tokens`
    longest_context_tokens: int
    context_tokens: int
    fits: bool
    ttft_s: float | None = None
    tbt_s: float | None = None


def plan(model: ModelConfig, hardware: HardwareConfig, mesh: MeshSpec, context_tokens: int) -> Plan:
    """The Plan of `model` on `mesh`, each device with the memory of `hardware`, for a context of `context_tokens`.

    Weights are split over spp * tp, keys and values over all three axes. Raises: RequestError if the
    model does not divide over the mesh.
    """
    model.refuse_mesh(mesh)
    dtype_bytes = jnp.dtype(model.dtype).itemsize
    weight_bytes = -(-model.weights * dtype_bytes // (mesh.spp * mesh.tp))
    token_bytes = model.kv_bytes_per_token(dtype_bytes, mesh.tp)
    room = int(hardware.memory_bytes * (1 - ACTIVATION_FRACTION)) - weight_bytes
    longest = max(0, room) * mesh.devices // token_bytes
    return Plan(
        weight_bytes_per_device=weight_bytes,
        kv_bytes_per_token=token_bytes,
        kv_bytes_per_device=-(-context_tokens * token_bytes // mesh.devices),
        longest_context_tokens=longest,
        context_tokens=context_tokens,
        fits=context_tokens <= longest,
    )
