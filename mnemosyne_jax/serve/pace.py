"""How ticks compare with what was predicted of them, learned as they end.

Heat and power slow a device by a tenth within seconds, and no fit meets every size of a chunk: a budget that is to be
kept on average, and hardly ever exceeded, follows what ticks take here and now.
"""

from __future__ import annotations

MEMORY = 8  # ticks, about: a prompt's chunks change slowly, and so does what is off about their predictions
SLOWEST, FASTEST = 2.0, 0.5  # one sample says no more: a host that paused is no slower device
# How long before a tick ends the next is decided: such a part of it, and so long, by how often a host was late.
DECIDE_SHARE, LEAST_DECIDE_S, MOST_DECIDE_S = 0.25, 0.008, 0.064
FORGET = 1 / 256  # of what a late tick had added, with every tick: one in 180 is late where hosts pause at random


class Pace:
    """`ratio` is what a tick takes in units of its prediction, of those ticks of which something was expected."""

    def __init__(self):
        self.ratio = 1.0
        self._mean = 1.0
        self._decide_s = LEAST_DECIDE_S
        self._expected_s: dict[int, float] = {}
        self._ended_s: float | None = None

    def rest(self) -> None:
        """Nothing has run for a while: the time to the next end is not that of a tick."""
        self._ended_s = None

    def expect(self, tick: int, seconds: float) -> None:
        self._expected_s[tick] = seconds

    def end(self, tick: int, time_s: float, late: bool = False) -> None:
        """Ticks end one after the other, all of them, at the time or, if the host was `late`, some time before it.

        Being late says nothing of the tick, but that the next are to be decided sooner.
        """
        expected_s, before_s, self._ended_s = self._expected_s.pop(tick, None), self._ended_s, time_s
        if not expected_s or before_s is None:
            return
        if late:
            self._decide_s = min(2 * self._decide_s, MOST_DECIDE_S)
            return
        self._decide_s = max((1 - FORGET) * self._decide_s, LEAST_DECIDE_S)
        sample = min(max((time_s - before_s) / expected_s, FASTEST), SLOWEST)
        self._mean += (sample - self._mean) / MEMORY
        self.ratio = round(self._mean, 3)  # a model that is right to the last bit but one is right

    def spare_s(self, tick: int) -> float:
        """How long after the end of `tick` nothing need be decided, as those submitted behind it keep devices busy.

        None of it if nothing was expected of them.
        """
        busy_s = self.ratio * sum(seconds for later, seconds in self._expected_s.items() if later > tick)
        return max(0.0, busy_s - max(self._decide_s, DECIDE_SHARE * busy_s))
