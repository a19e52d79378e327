"""How ticks compare with what was predicted of them, learned as they end.

Heat and power slow a device by a tenth within seconds, and no fit meets every size of a chunk: a budget that is to be
kept on average, and hardly ever exceeded, follows what ticks take here and now.
"""

from __future__ import annotations

MEMORY = 8  # ticks, about: a prompt's chunks change slowly, and so does what is off about their predictions
SLOWEST, FASTEST = 2.0, 0.5  # one sample says no more: a host that paused is no slower device
DECIDE_S, DECIDE_SHARE = 0.008, 0.25  # before a tick ends, the next is decided: so long, and such a part of it


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

    def spare_s(self, tick: int) -> float:
        """How long after the end of `tick` nothing need be decided, as those submitted behind it keep devices busy.

        None of it if nothing was expected of them.
        """
        busy_s = self.ratio * sum(seconds for later, seconds in self._expected_s.items() if later > tick)
        return max(0.0, busy_s - max(DECIDE_S, DECIDE_SHARE * busy_s))
