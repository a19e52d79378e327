"""How ticks compare with what was predicted of them, learned as they end.

Heat and power slow a device by a tenth within seconds, and no fit meets every size of a chunk: a budget that is to be
kept on average, and hardly ever exceeded, follows what ticks take here and now.
"""

from __future__ import annotations

MEMORY = 8  # ticks, about: a prompt's chunks change slowly, and so does what is off about their predictions
SLOWEST, FASTEST = 2.0, 0.5  # one sample says no more: a host that paused is no slower device


class Pace:
    """`ratio` is what a tick takes in units of its prediction, of those ticks of which something was expected."""

    def __init__(self):
        self.ratio = 1.0
        self._mean = 1.0
        self._expected_s: dict[int, float] = {}
        self._ended_s: float | None = None

    def rest(self) -> None:
        """Nothing has run for a while: the time to the next end is not that of a tick."""
        self._ended_s = None

    def expect(self, tick: int, seconds: float) -> None:
        self._expected_s[tick] = seconds

    def end(self, tick: int, time_s: float) -> None:
        """Ticks end one after the other, all of them."""
        expected_s, before_s, self._ended_s = self._expected_s.pop(tick, None), self._ended_s, time_s
        if expected_s and before_s is not None:
            sample = min(max((time_s - before_s) / expected_s, FASTEST), SLOWEST)
            self._mean += (sample - self._mean) / MEMORY
            self.ratio = round(self._mean, 3)  # a model that is right to the last bit but one is right
