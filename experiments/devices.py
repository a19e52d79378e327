"""Virtual devices: a mesh of several devices on one CPU."""

from __future__ import annotations

import contextlib
import os

import jax

# Virtual devices take turns on few cores: a collective that waits for a busy neighbour is no deadlock.
PATIENCE = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
}


def use_virtual_devices(count: int) -> bool:
    """Whether this run is on `count` virtual CPU devices from now on; 0 asks for none.

    Call it before anything touches a device. If JAX_PLATFORMS names another platform than the CPU, that stands.
    """
    if not count or (os.environ.get("JAX_PLATFORMS") or "cpu") != "cpu":
        return False
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"{name}={value}" for name, value in PATIENCE.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # devices are in use already, as under pytest: make_mesh counts them
        jax.config.update("jax_num_cpu_devices", count)
    return True
