"""Who goes first: the order of prompts that wait for a chunk, and how much slack each has.

A policy is a key; the smallest goes first, and keys are taken anew at every tick, so that a prompt under way gives way
at its next chunk boundary and keeps its keys and values.

- fcfs: by arrival. `fcfs_exclusive`: by arrival, and nobody else while a prompt is under way: no preemption.
- edf: by deadline. srpt: by remaining work.
- lars: by relative slack, (time until the deadline - remaining work) / total work: a small request that is late by its
  own length is as urgent as a large one late by its. Slack falls without bound while a request waits, at a rate that
  the floor under total work bounds from above, and every request starts with slack: none waits for ever.

Source: arXiv 2409.17264v5 (LARS); there without the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnemosyne_jax.serve.request import Sequence

type Number = Any  # a float, or an array of them

DEADLINE_FACTOR, LEAST_DEADLINE_S = 1.5, 0.5  # of the prefill alone
LEAST_WORK_S = 0.05  # of a request, when its slack is put in relation to it


@dataclass(frozen=True, eq=False)
class PrefillTimes:
    """Seconds that a prompt takes alone, by its length: `seconds[i]` for `lengths[i]` tokens, increasing from 0."""

    lengths: np.ndarray
    seconds: np.ndarray

    def alone_s(self, tokens: int) -> float:
        """Of a whole prompt."""
        return float(np.interp(tokens, self.lengths, self.seconds))

    def remaining_s(self, tokens: int, done: int) -> float:
        """Of what is left of it."""
        return self.alone_s(tokens) - self.alone_s(done)


def prefill_times(chunk_of: Callable[[int], int], tick_s: Callable[[int, int], float], longest: int) -> PrefillTimes:
    """The PrefillTimes of prompts up to `longest`, chunk after chunk: `chunk_of(done)` tokens take tick_s(done, chunk).

    Chunks change slowly: where a prompt is long, each step of the table stands for many chunks of one size.
    """
    lengths, seconds = [0], [0.0]
    while lengths[-1] < longest:
        done = lengths[-1]
        chunk = chunk_of(done)
        chunks = max(1, done // (64 * chunk))
        lengths.append(done + chunk * chunks)
        seconds.append(seconds[-1] + chunks * tick_s(done + chunk * (chunks - 1) // 2, chunk))
    return PrefillTimes(np.array(lengths), np.array(seconds))


def deadline_s(sequence: Sequence, times: PrefillTimes) -> float:
    """When the first token is due, on the executor's clock: as asked, or in proportion to the prefill alone."""
    asked_s = sequence.request.deadline_s
    if asked_s is None:
        asked_s = max(DEADLINE_FACTOR * times.alone_s(len(sequence.request.prompt)), LEAST_DEADLINE_S)
    return sequence.timeline.arrival_s + asked_s


def relative_slack(sequence: Sequence, now_s: float, times: PrefillTimes) -> float:
    """Time to spare in units of the request's own work; negative once the deadline cannot be kept."""
    return priority("lars", sequence, now_s, times)


def priority(policy: str, sequence: Sequence, now_s: float, times: PrefillTimes) -> float:
    """The key of a policy: the smallest goes first, ties by arrival."""
    tokens = len(sequence.request.prompt)
    left_s = times.remaining_s(tokens, sequence.prompt_scheduled)
    facts = sequence.timeline.arrival_s, deadline_s(sequence, times), left_s, times.alone_s(tokens)
    return float(key(policy, now_s, *facts))


def key(policy: str, now_s: float, arrival_s: Number, due_s: Number, left_s: Number, work_s: Number) -> Number:
    """`priority` from a request's facts, or from arrays of them: arrival, deadline, work left and work in all."""
    match policy:
        case "fcfs" | "fcfs_exclusive":
            return arrival_s
        case "edf":
            return due_s
        case "srpt":
            return left_s
        case "lars":
            return (due_s - now_s - left_s) / np.maximum(work_s, LEAST_WORK_S)
    raise ValueError(f"no such policy: {policy}")
