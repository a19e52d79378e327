"""Requests that have no pages yet, in the order in which they are to be admitted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mnemosyne_jax.serve.policy import PrefillTimes, deadline_s, key
from mnemosyne_jax.serve.request import Sequence


class WaitingQueue:
    """Sequences in the order of a policy; without `times` in order of arrival in the queue.

    The order of all is one sort of an array, which is kept while nobody comes or goes.
    """

    def __init__(self, policy: str, times: PrefillTimes | None):
        self._policy, self._times = policy, times
        self._sequences: list[Sequence] = []
        self._facts: list[tuple[float, float, float]] = []  # arrival, deadline, work, in seconds
        self._columns: np.ndarray | None = None  # the facts as an array, once asked for

    def __len__(self) -> int:
        return len(self._sequences)

    def append(self, sequence: Sequence) -> None:
        facts = (sequence.timeline.arrival_s, 0.0, 0.0)
        if self._times:
            work_s = self._times.alone_s(len(sequence.request.prompt))
            facts = (facts[0], deadline_s(sequence, self._times), work_s)
        self._sequences.append(sequence)
        self._facts.append(facts)
        self._columns = None

    def remove(self, sequence: Sequence) -> None:
        at = self._sequences.index(sequence)
        del self._sequences[at], self._facts[at]
        self._columns = None

    def in_order(self, now_s: float) -> Iterator[tuple[Sequence, bool]]:
        """(sequence, whether those behind it may pass it if it finds no room), the first to be admitted first.

        What has slack lets others pass; what is late, or came first under fcfs, does not: nobody waits for ever.
        """
        if self._times is None or not self._sequences:
            yield from ((sequence, False) for sequence in list(self._sequences))
            return
        if self._columns is None:
            self._columns = np.array(self._facts).T
        arrival_s, due_s, work_s = self._columns
        keys = key(self._policy, now_s, arrival_s, due_s, work_s, work_s)  # nothing is done yet: all work is left
        patient = (due_s - now_s - work_s > 0) & (not self._policy.startswith("fcfs"))
        snapshot = list(self._sequences)
        for at in np.argsort(keys, kind="stable"):
            yield snapshot[at], bool(patient[at])
