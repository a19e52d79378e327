"""Requests that have no pages yet, in the order in which they are to be admitted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from mnemosyne_jax.serve.policy import DEMOTED, LEAST_WORK_S, demoted, key_of
from mnemosyne_jax.serve.request import Sequence

FEW = 32  # are looked at in most ticks, of all that wait


class WaitingQueue:
    """Sequences in the order of a policy, once estimated; of no policy, in the order in which they came."""

    def __init__(self, policy: str | None, demote_late: bool = False):
        self._policy, self._demote_late = policy, demote_late
        self._next_number = itertools.count()
        self._sequences: dict[int, Sequence] = {}  # by numbers that they get as they come
        self._numbers: dict[Sequence, int] = {}
        # Of each its number, and in seconds: arrival, deadline, work, work but at least LEAST_WORK_S, and `forgiven_s`.
        # The table grows by doubling, and is in the order of the numbers.
        self._facts = np.zeros((6, 16))
        self.tokens = 0  # of all prompts

    @property
    def strict(self) -> bool:
        """Whether nobody ever passes another."""
        return self._policy is None or self._policy.startswith("fcfs")

    def __len__(self) -> int:
        return len(self._sequences)

    def append(self, sequence: Sequence) -> None:
        count = len(self._sequences)
        if count == self._facts.shape[1]:
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        number, work_s = next(self._next_number), sequence.work_s
        self._sequences[number], self._numbers[sequence] = sequence, number
        unit_s, arrival_s = max(work_s, LEAST_WORK_S), sequence.timeline.arrival_s
        self._facts[:, count] = number, arrival_s, sequence.due_s, work_s, unit_s, sequence.forgiven_s
        self.tokens += len(sequence.request.prompt)

    def remove(self, sequence: Sequence) -> None:
        number, count = self._numbers.pop(sequence), len(self._sequences)
        at = self._facts[0, :count].searchsorted(number)
        self._facts[:, at : count - 1] = self._facts[:, at + 1 : count]
        del self._sequences[number]
        self.tokens -= len(sequence.request.prompt)

    def in_order(self, now_s: float) -> Iterator[tuple[Sequence, bool]]:
        """(sequence, whether those behind it may pass it if it finds no room), the first to be admitted first.

        What has slack lets others pass; what is late, or came first under fcfs, does not: nobody waits for ever.
        """
        if self._policy is None or not self._sequences:
            yield from ((sequence, False) for sequence in list(self._sequences.values()))
            return
        # Nothing is done: all work is left. Whoever is admitted on the way is removed: the order is that of before.
        numbers, arrival_s, due_s, left_s, unit_s, forgiven_s = self._facts[:, : len(self._sequences)].copy()
        keys = key_of(self._policy)(now_s, arrival_s, due_s, left_s, unit_s)
        patient = due_s - now_s - left_s > 0
        if self.strict:
            patient[:] = False
        if self._demote_late:
            behind = demoted(now_s, due_s, left_s, forgiven_s)
            keys, patient = keys + DEMOTED * behind, patient | behind
        for at in _ascending(keys):
            yield self._sequences[numbers[at]], bool(patient[at])


def _ascending(keys: np.ndarray) -> Iterator[int]:
    """The positions of keys in ascending order, ties as they stand; the first few without sorting them all."""
    taken: set[int] = set()
    while len(taken) < FEW:
        at = int(keys.argmin())
        if keys[at] == math.inf:
            break
        yield at
        keys[at] = math.inf
        taken.add(at)
    yield from (at for at in keys.argsort(kind="stable").tolist() if at not in taken)
