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

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from mnemosyne_jax.serve.request import Sequence

type Number = Any  # a float, or an array of them

DEADLINE_FACTOR, LEAST_DEADLINE_S = 1.5, 0.5  # of the prefill alone
LEAST_WORK_S = 0.05  # of a request, when its slack is put in relation to it
DEMOTED, DEMOTED_DEADLINES = 1e12, 10  # more than any key; for how many times its deadline a long one is, if late


class Facts(NamedTuple):
    """What the order of many sequences depends on: arrays of what a Sequence has under the same names."""

    arrival_s: Number
    due_s: Number
    left_s: Number
    unit_s: Number
    forgiven_s: Number


type Ranked = Sequence | Facts
type Key = Callable[[Ranked], Number]


@dataclass(frozen=True, eq=False)
class PrefillTimes:
    """Seconds that a prompt takes alone, by its length: `seconds[i]` for `lengths[i]` tokens, increasing from 0."""

    lengths: Seq[int]
    seconds: Seq[float]

    def alone_s(self, tokens: int) -> float:
        """Of a whole prompt; between the lengths of the table, by a straight line."""
        i = bisect_left(self.lengths, tokens, 1, len(self.lengths) - 1)
        before, before_s = self.lengths[i - 1], self.seconds[i - 1]
        share = (tokens - before) / (self.lengths[i] - before)
        return before_s + (share if share < 1.0 else 1.0) * (self.seconds[i] - before_s)


def prefill_times(chunk_of: Callable[[int], int], tick_s: Callable[[int, int], float], longest: int) -> PrefillTimes:
    """The PrefillTimes of prompts up to `longest`, chunk after chunk: `chunk_of(done)` tokens take tick_s(done, chunk).

    Chunks change slowly: where a prompt is long, each step of the table stands for many chunks of one size.
    """
    lengths, seconds = [0], [0.0]
    while lengths[-1] < max(longest, 1):  # a line needs two points
        done = lengths[-1]
        chunk = chunk_of(done)
        chunks = max(1, done // (64 * chunk))
        lengths.append(done + chunk * chunks)
        seconds.append(seconds[-1] + chunks * tick_s(done + chunk * (chunks - 1) // 2, chunk))
    return PrefillTimes(lengths, seconds)


def estimate(sequence: Sequence, times: PrefillTimes) -> None:
    """Fills in what its place in an order depends on: when it is due, how much work it is and how much is left.

    The first token is due as asked, or in proportion to the prefill alone.
    """
    sequence.work_s = sequence.left_s = times.alone_s(len(sequence.request.prompt))
    sequence.unit_s = max(sequence.work_s, LEAST_WORK_S)
    if sequence.prompt_scheduled:
        sequence.left_s -= times.alone_s(sequence.prompt_scheduled)
    asked_s = sequence.request.deadline_s
    due_after_s = max(DEADLINE_FACTOR * sequence.work_s, LEAST_DEADLINE_S) if asked_s is None else asked_s
    sequence.due_s = sequence.timeline.arrival_s + due_after_s
    # What is short takes little from others if it goes before them, and gains much.
    deadlines = 0 if is_short(sequence) else DEMOTED_DEADLINES
    sequence.forgiven_s = sequence.timeline.arrival_s + deadlines * due_after_s


def is_short(sequence: Sequence) -> bool:
    """Whether the whole prefill takes no longer than the least that anybody has to wait."""
    return sequence.work_s <= LEAST_DEADLINE_S


def relative_slack(sequence: Sequence, now_s: float) -> float:
    """Time to spare in units of the request's own work; negative once the deadline cannot be kept."""
    return slack_at(now_s)(sequence)


def slack_at(now_s: float) -> Key:
    """`relative_slack` at one time, for the many that are asked for it at every tick."""
    return lambda ranked: (ranked.due_s - now_s - ranked.left_s) / ranked.unit_s


def priority(policy: str, sequence: Sequence, now_s: float, demote_late: bool = False) -> float:
    """The key of a policy: the smallest goes first, ties by arrival."""
    return priority_at(policy, now_s, demote_late)(sequence)


def priority_at(policy: str, now_s: float, demote_late: bool = False) -> Callable[[Sequence], float]:
    """`priority` at one time, for the many that are sorted by it at every tick."""
    key = key_at(policy, now_s)

    def at_now(s: Sequence) -> float:
        stands_back = now_s + s.left_s > s.due_s and now_s < s.forgiven_s  # `demoted`: a call of it takes as long again
        return key(s) + DEMOTED if stands_back else key(s)

    return at_now if demote_late else key


def demoted(ranked: Ranked, now_s: float) -> Number:
    """Whether a request is late, but neither short nor so late that it must have its turn after all."""
    return (now_s + ranked.left_s > ranked.due_s) & (now_s < ranked.forgiven_s)


KEYS: dict[str, Callable[[float], Key]] = {
    "fcfs": lambda now_s: attrgetter("arrival_s"),
    "fcfs_exclusive": lambda now_s: attrgetter("arrival_s"),
    "edf": lambda now_s: attrgetter("due_s"),
    "srpt": lambda now_s: attrgetter("left_s"),
    "lars": slack_at,
}


def key_at(policy: str, now_s: float) -> Key:
    """The key of a policy at one time."""
    if policy not in KEYS:
        raise ValueError(f"no such policy: {policy}")
    return KEYS[policy](now_s)
