"""The clock and the power of a GPU while something runs on it, by NVML where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

EVERY_S = 0.01
POWER_NOW = 186  # NVML_FI_DEV_POWER_INSTANT: the usual reading is a mean over a second


class Sampled:
    """Samples the first device while its block runs. `means` are then `sm_mhz` and `watts`; none without NVML."""

    def __init__(self):
        self._read, self._found, self._ended = reader(), list[tuple[float, float]](), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampled:
        if self._read:
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._read:
            self._thread.join()

    def _sample(self) -> None:
        while self._read and not self._ended.wait(EVERY_S):
            self._found.append(self._read())

    @property
    def means(self) -> dict[str, float]:
        if not self._found:
            return {}
        sm_mhz, watts = np.mean(self._found, axis=0).tolist()
        return dict(sm_mhz=round(sm_mhz), watts=round(watts))


def reader() -> Callable[[], tuple[float, float]] | None:
    """What reads (MHz of the SMs, watts) now; None if nothing does."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(jax.devices()[0].local_hardware_id)
        (power,) = pynvml.nvmlDeviceGetFieldValues(handle, [POWER_NOW])
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # no package, no driver, no GPU: each has an error of its own
        return None
    if power.nvmlReturn != pynvml.NVML_SUCCESS:  # a card that does not tell would be said to take no power
        return None

    def read() -> tuple[float, float]:
        (power,) = pynvml.nvmlDeviceGetFieldValues(handle, [POWER_NOW])
        return float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)), power.value.uiVal / 1e3

    return read
