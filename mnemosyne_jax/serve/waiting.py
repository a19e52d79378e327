"""Requests that have no pages yet, in the order in which they are to be admitted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mnemosyne_jax.serve.policy import DEMOTED, LEAST_WORK_S, demoted, key_of
from mnemosyne_jax.serve.request import Sequence

FEW = 32  # are looked at in most ticks, of all that wait


class WaitingQueue:
    """Sequences in the order of a policy, once estimated; of no policy, in the order in which they came."""

    def __init__(self, policy: str | None, demote_late: bool = False):
        self._policy, self._demote_late = policy, demote_late
        self._sequences: list[Sequence] = []
        # In seconds, of each: arrival, deadline, work, and work but at least LEAST_WORK_S. The table grows by doubling,
        # and keeps the order of the list.
        self._facts = np.zeros((4, 16))
        self.tokens = 0  # of all prompts

    def __len__(self) -> int:
        return len(self._sequences)

    def append(self, sequence: Sequence) -> None:
        count = len(self._sequences)
        if count == self._facts.shape[1]:
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        work_s = sequence.work_s
        self._facts[:, count] = sequence.timeline.arrival_s, sequence.due_s, work_s, max(work_s, LEAST_WORK_S)
        self._sequences.append(sequence)
        self.tokens += len(sequence.request.prompt)

    def remove(self, sequence: Sequence) -> None:
        at, count = self._sequences.index(sequence), len(self._sequences)
        self._facts[:, at : count - 1] = self._facts[:, at + 1 : count]
        del self._sequences[at]
        self.tokens -= len(sequence.request.prompt)

    def in_order(self, now_s: float) -> Iterator[tuple[Sequence, bool]]:
        """(sequence, whether those behind it may pass it if it finds no room), the first to be admitted first.

        What has slack lets others pass; what is late, or came first under fcfs, does not: nobody waits for ever.
        """
        if self._policy is None or not self._sequences:
            yield from ((sequence, False) for sequence in list(self._sequences))
            return
        # Nothing is done: all work is left. Whoever is admitted on the way is removed: the order is that of before.
        arrival_s, due_s, left_s, unit_s = self._facts[:, : len(self._sequences)].copy()
        keys = key_of(self._policy)(now_s, arrival_s, due_s, left_s, unit_s)
        patient = due_s - now_s - left_s > 0
        if self._policy.startswith("fcfs"):
            patient[:] = False
        if self._demote_late:
            behind = demoted(now_s, arrival_s, due_s, left_s)
            keys, patient = keys + DEMOTED * behind, patient | behind
        snapshot = list(self._sequences)
        for at in _ascending(keys):
            yield snapshot[at], bool(patient[at])


def _ascending(keys: np.ndarray) -> Iterator[int]:
    """The positions of keys in ascending order, ties as they stand; the first few without sorting them all."""
    if len(keys) <= FEW:
        yield from keys.argsort(kind="stable").tolist()
        return
    yield int(keys.argmin())  # often the only one asked for
    few = keys <= np.partition(keys, FEW)[FEW]
    for some, begin in ((few, 1), (~few, 0)):
        (at,) = some.nonzero()
        yield from at[keys[at].argsort(kind="stable")][begin:].tolist()
