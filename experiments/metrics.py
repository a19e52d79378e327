"""What users felt, in numbers: latencies, goodput, fluidity and fairness of a run's requests, and pictures of them.

Percentiles are nearest ranks (the least value that at least q % of the values do not exceed): each is a value that
occurred, and infinite ones do no harm. A first token that never came counts as a TTFT of inf, an answer that was not
finished as an E2E of inf: no request is left out, also not one that was refused or cancelled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import results

LENGTHS = {"<=4K": 4_096, "4K-32K": 32_768, "32K-128K": 131_072, "128K-1M": 1_048_576, ">1M": math.inf}
LATENCIES = {"TTFT": "s", "TBT": "s", "TPOT": "s", "E2E": "s", "TTFT / isolated": "1"}
ENDED = ("length", "stop")
REASONS = (*ENDED, "refused", "cancelled", "unfinished")
TTFT_FACTOR, TTFT_FLOOR_S = 1.5, 0.5  # the deadline of a request that states none: the floor is for the shortest
SLOP_S = 1e-6  # no lateness, but the error of sums of floats
MOST_POINTS = 2_000  # of a drawn curve


@dataclass(frozen=True, eq=False)
class Served:
    """One request and what came of it. Times are on one clock; `deadline_s`, of the first token, counts from arrival.

    `new_tokens` is how many were asked for, `token_s` when each came (none: an empty array), `isolated_ttft_s` the TTFT
    on an idle system. `reason` is "length", "stop", "cancelled", "unfinished", or begins with "refused:" or another
    word and a colon. `kind` says which part of the workload it is.
    """

    id: str
    prompt_tokens: int
    new_tokens: int
    arrival_s: float
    deadline_s: float | None
    isolated_ttft_s: float
    token_s: np.ndarray
    reason: str
    kind: str

    @property
    def finished(self) -> bool:
        return self.reason in ENDED and self.token_s.size > 0

    @property
    def ttft_s(self) -> float:
        return float(self.token_s[0]) - self.arrival_s if self.token_s.size else math.inf

    @property
    def e2e_s(self) -> float:
        return float(self.token_s[-1]) - self.arrival_s if self.finished else math.inf

    @property
    def ttft_deadline_s(self) -> float:
        """Counted from arrival: its own, or one that grows with what the prompt costs."""
        return max(TTFT_FACTOR * self.isolated_ttft_s, TTFT_FLOOR_S) if self.deadline_s is None else self.deadline_s

    @property
    def length(self) -> str:
        return next(name for name, most_tokens in LENGTHS.items() if self.prompt_tokens <= most_tokens)


def met(served: Served, tbt_slo_s: float) -> tuple[bool, bool]:
    """Whether the first token came by its deadline, and whether one came and 99 % of the gaps after it are short."""
    if not served.token_s.size:
        return False, False
    gaps_s = np.diff(served.token_s)
    steady = not gaps_s.size or percentile(gaps_s, 99) <= tbt_slo_s + SLOP_S
    return served.ttft_s <= served.ttft_deadline_s + SLOP_S, bool(steady)


def deadlines(served: Served, tbt_slo_s: float) -> tuple[int, int, int]:
    """(tokens on time, tokens late or missing, deadlines that passed without their token).

    The fluidity index of Etalon (arXiv 2407.07000): the first token is due by the TTFT deadline, each further one
    `tbt_slo_s` after the deadline of the one before it, so that early tokens bank slack, or after the token itself if
    that was late. The index is tokens on time / tokens. The authors' code, other than their formula, counts every
    deadline that passes in a stall, so that a long one weighs more: on time / (on time + passed). Tokens that a refused
    or unfinished request lacks are late, and one token of a cancelled request that got none.
    """
    after_s = served.token_s - served.arrival_s
    steps_s = tbt_slo_s * np.arange(after_s.size)
    # d[i + 1] = max(d[i], t[i]) + slo, unrolled: d[i] - i slo is the most of d[0] and every t[j] - j slo before i.
    starts_s = np.maximum.accumulate(np.append(served.ttft_deadline_s, after_s - steps_s)[:-1])
    late_s = after_s - starts_s - steps_s - SLOP_S
    late = late_s > 0
    if served.finished or (served.reason == "cancelled" and after_s.size):
        missing = 0
    else:
        missing = 1 if served.reason == "cancelled" else max(1, served.new_tokens - after_s.size)
    passed = int(np.ceil(late_s[late] / tbt_slo_s).sum())
    return int((~late).sum()), int(late.sum()) + missing, passed + missing


def summary(served: Sequence[Served], tbt_slo_s: float, span_s: float) -> dict[str, Any]:
    """Every number of a run of `span_s` seconds; those of `by length` for all requests and for each class that occurs.

    Goodput is finished requests per second whose TTFT and p99 TBT met their bounds. A class's share of its isolated
    speed is 1 / (TTFT / isolated), 0 if its first tokens never came: Jain's index (1: equal, 1/n: one has all) is over
    these shares of all classes, at the median and at the p99 of each.
    """
    ends = Counter(dict.fromkeys(REASONS, 0)) + Counter()  # a new reason is counted too
    ends = dict.fromkeys(REASONS, 0) | Counter(s.reason.partition(":")[0] for s in served)
    classes = {name: [s for s in served if s.length == name] for name in LENGTHS}
    groups = {"all": served} | {name: group for name, group in classes.items() if group}
    by_length = {name: _of_group(group, tbt_slo_s) for name, group in groups.items()}
    slowdowns = [numbers["TTFT / isolated"] for name, numbers in by_length.items() if name != "all"]
    counts = {
        "requests": sum(s.finished for s in served),
        "goodput": sum(s.finished and all(met(s, tbt_slo_s)) for s in served),
        "new tokens": sum(s.token_s.size for s in served),
        "prompt tokens": sum(s.prompt_tokens for s in served if s.token_s.size),
    }
    return {
        "tbt_slo_s": tbt_slo_s,
        "span_s": span_s,
        "requests": {"offered": len(served), **ends, "no first token": sum(not s.token_s.size for s in served)},
        "per second": {"offered": len(served) / span_s} | {name: n / span_s for name, n in counts.items()},
        "fairness": {f"Jain of {q}": jain([1 / np.float64(stats[q]) for stats in slowdowns]) for q in ("p50", "p99")},
        "by length": by_length,
    }


def _of_group(served: Sequence[Served], tbt_slo_s: float) -> dict[str, Any]:
    gaps_s = [np.diff(s.token_s) for s in served]
    verdicts = np.array([(*met(s, tbt_slo_s), s.finished) for s in served], bool).reshape(-1, 3)
    on_time, late, passed = np.array([deadlines(s, tbt_slo_s) for s in served], int).reshape(-1, 3).sum(0).tolist()
    return {
        "requests": len(served),
        "TTFT": statistics([s.ttft_s for s in served]),
        "TBT": statistics(np.concatenate([np.zeros(0), *gaps_s])),
        "TPOT": statistics([gaps.mean() for gaps in gaps_s if gaps.size]),
        "E2E": statistics([s.e2e_s for s in served]),
        "TTFT / isolated": statistics([s.ttft_s / s.isolated_ttft_s for s in served]),
        "TTFT met": _ratio(verdicts[:, 0].sum(), len(served)),
        "TBT met": _ratio(verdicts[:, 1].sum(), len(served)),
        "finished, both met": _ratio(verdicts.all(1).sum(), len(served)),
        "fluidity index": _ratio(on_time, on_time + late),
        "fluidity index, stalls in full": _ratio(on_time, on_time + passed),
    }


def percentile(values: Sequence[float] | np.ndarray, q: float) -> float:
    return float(np.percentile(values, q, method="inverted_cdf"))


def statistics(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Percentiles, most and mean, and of how many; NaN where there are none."""
    if not len(values):
        return {"p50": math.nan, "p90": math.nan, "p99": math.nan, "max": math.nan, "mean": math.nan, "count": 0}
    ranks = {f"p{q}": percentile(values, q) for q in (50, 90, 99)}
    return ranks | {"max": float(np.max(values)), "mean": float(np.mean(values)), "count": len(values)}


def jain(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2); NaN if nobody has anything."""
    x = np.array(shares, float)
    return _ratio(x.sum() ** 2, x.size * (x**2).sum())


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def rows(made: Mapping[str, Any], **where: Any) -> list[dict[str, Any]]:
    """A summary as `results.row`s. JSON has no inf and no NaN: such a row has no value, and says what is `absent`."""
    found = [_row(f"requests {name}", n, "requests", **where) for name, n in made["requests"].items()]
    for name, rate in made["per second"].items():
        found.append(_row(f"{name} per second", rate, "tokens/s" if "tokens" in name else "requests/s", **where))
    found += [_row(name, value, "1", **where) for name, value in made["fairness"].items()]
    for length, numbers in made["by length"].items():
        for name, value in numbers.items():
            if name in LATENCIES:
                for q, number in value.items():
                    found.append(_row(f"{name} {q}", number, LATENCIES[name], length=length, **where))
            elif name != "requests":
                found.append(_row(name, value, "1", length=length, requests=numbers["requests"], **where))
    return found
