"""Requests that have no pages yet, in the order in which they are to be admitted."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from mnemosyne_jax.serve.policy import DEMOTED, Facts, demoted, key_at
from mnemosyne_jax.serve.request import Sequence

FEW = 64  # or less are looked at in nearly every tick, of all that wait


class WaitingQueue:
    """Sequences in the order of a policy, once estimated; of no policy, in the order in which they came."""

    def __init__(self, policy: str | None, demote_late: bool = False):
        self._policy, self._demote_late = policy, demote_late
        self.strict = policy is None or policy.startswith("fcfs")  # nobody ever passes another
        self._next_number = itertools.count()
        self._sequences: list[Sequence] = []  # as they came
        self._numbers: dict[Sequence, int] = {}  # that they got as they came
        self._facts = np.zeros((len(Facts._fields), 16))  # a column each; the table grows by doubling
        self.tokens = 0  # of all prompts

    def __len__(self) -> int:
        return len(self._sequences)

    def append(self, sequence: Sequence) -> None:
        count = len(self)
        if count == self._facts.shape[1]:
            self._facts = np.concatenate([self._facts, np.zeros_like(self._facts)], axis=1)
        self._facts[:, count] = [getattr(sequence, name) for name in Facts._fields]
        self._sequences.append(sequence)
        self._numbers[sequence] = next(self._next_number)
        self.tokens += len(sequence.request.prompt)

    def remove(self, sequence: Sequence) -> None:
        at, count = self._at(sequence), len(self)
        self._facts[:, at : count - 1] = self._facts[:, at + 1 : count]
        del self._sequences[at], self._numbers[sequence]
        self.tokens -= len(sequence.request.prompt)

    def _at(self, sequence: Sequence) -> int:
        number_of = self._numbers.__getitem__
        return bisect_left(self._sequences, number_of(sequence), key=number_of)

    def in_order(self, now_s: float) -> Iterator[Sequence]:
        """The first to be admitted first; whoever was is removed on the way."""
        count, few = len(self), self._first(FEW, now_s)
        yield from few
        if len(few) < count:
            seen = set(few)
            yield from (sequence for sequence in self._first(len(self), now_s) if sequence not in seen)

    def _first(self, few: int, now_s: float) -> list[Sequence]:
        """At least `few`, if there are, in order; ties as they came."""
        count = len(self)
        if self._policy is None or count < 2:
            return self._sequences.copy()
        facts = Facts(*self._facts[:, :count])
        keys = key_at(self._policy, now_s)(facts)
        if self._demote_late:
            keys = keys + DEMOTED * demoted(facts, now_s)
        last = min(few, count) - 1
        first = (keys <= np.partition(keys, last)[last]).nonzero()[0]  # all of equal keys, or none
        return [self._sequences[at] for at in first[keys[first].argsort(kind="stable")].tolist()]

    def lets_pass(self, sequence: Sequence, now_s: float) -> bool:
        """Whether those behind it may pass it if it finds no room.

        What has slack lets others pass; what is late, or came first under fcfs, does not: nobody waits for ever.
        """
        if self._demote_late and demoted(sequence, now_s):
            return True
        return not self.strict and sequence.due_s - now_s - sequence.left_s > 0
