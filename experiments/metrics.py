"""What users felt, in numbers: latencies, goodput, fluidity and fairness of a run's requests, and pictures of them.

Percentiles are nearest ranks, which infinite values do not harm: a first token that never came is a TTFT of inf, an
answer that was not finished an E2E of inf; no request is left out. Figures raise ImportError without matplotlib.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import results

LENGTHS = {"all": (-1, math.inf), "<=4K": (-1, 4_096), "4K-32K": (4_096, 32_768), "32K-128K": (32_768, 131_072)}
LENGTHS |= {"128K-1M": (131_072, 1_048_576), ">1M": (1_048_576, math.inf)}  # more than, at most
LATENCIES = {"TTFT": "s", "TBT": "s", "TPOT": "s", "E2E": "s", "TTFT / isolated": "1"}
STATISTICS = ("p50", "p90", "p99", "max", "mean")
REASONS = ("length", "stop", "refused", "cancelled", "unfinished")
TTFT_FACTOR, TTFT_FLOOR_S = 1.5, 0.5  # the deadline of a request that states none: the floor is for the shortest
SLOP_S = 1e-6  # no lateness, but the error of sums of floats


@dataclass(frozen=True, eq=False)
class Served:
    """One request and what came of it: `new_tokens` were asked for, `token_s` is when each that came did.

    `deadline_s`, of the first token, counts from arrival. `reason` is one of REASONS, or such a word, a colon and more.
    """

    id: str
    prompt_tokens: int
    new_tokens: int
    arrival_s: float
    deadline_s: float | None
    isolated_ttft_s: float  # on an idle system; positive, also of a refused request
    token_s: np.ndarray
    reason: str
    kind: str  # which part of the workload

    @property
    def finished(self) -> bool:
        return self.reason in ("length", "stop") and self.token_s.size > 0

    @property
    def ttft_s(self) -> float:
        return float(self.token_s[0]) - self.arrival_s if self.token_s.size else math.inf

    @property
    def ttft_deadline_s(self) -> float:
        return max(TTFT_FACTOR * self.isolated_ttft_s, TTFT_FLOOR_S) if self.deadline_s is None else self.deadline_s


def met(served: Served, tbt_slo_s: float) -> tuple[bool, bool, bool]:
    """Whether the first token came by its deadline; one came and the p99 TBT is in the SLO; both, and it finished."""
    prompt = served.ttft_s <= served.ttft_deadline_s + SLOP_S
    steady = bool(100 * (np.diff(served.token_s) > tbt_slo_s + SLOP_S).sum() <= served.token_s.size - 1)
    return prompt, steady, prompt and steady and served.finished


def deadlines(served: Served, tbt_slo_s: float) -> tuple[int, int, int]:
    """(tokens on time, tokens late or missing, deadlines that passed without their token).

    As in Etalon (arXiv 2407.07000), the first token is due by the TTFT deadline, each further one `tbt_slo_s` after the
    deadline of the one before, so that early tokens bank slack, or after that token itself if it was late. Fluidity
    index: tokens on time / tokens, their formula; stalls in full: on time / (on time + passed), their algorithm. Tokens
    that a refused or unfinished request lacks are late, and one of a cancelled request that got none.
    """
    after_s = served.token_s - served.arrival_s
    steps_s = tbt_slo_s * np.arange(after_s.size)
    # d[i + 1] = max(d[i], t[i]) + slo, unrolled: d[i] - i slo is the most of d[0] and every t[j] - j slo before i.
    starts_s = np.maximum.accumulate(np.append(served.ttft_deadline_s, after_s - steps_s)[:-1])
    late_s = np.maximum(after_s - starts_s - steps_s - SLOP_S, 0)
    asked = 0 if served.finished or served.reason == "cancelled" else served.new_tokens
    missing = max(1, after_s.size, asked) - after_s.size
    late, passed = int((late_s > 0).sum()), int(np.ceil(late_s / tbt_slo_s).sum())
    return after_s.size - late, late + missing, passed + missing


def summary(served: Sequence[Served], tbt_slo_s: float, span_s: float) -> dict[str, Any]:
    """Every number of a run of `span_s` seconds; `by length` for all requests and for each class of length that occurs.

    Goodput is finished requests per second whose TTFT and p99 TBT met their bounds. Jain's index (1: all equal, 1/n:
    one has everything) is over the classes' shares of their isolated speed, 1 / (TTFT / isolated) at p50 and at p99.
    """
    groups = {name: [s for s in served if low < s.prompt_tokens <= most] for name, (low, most) in LENGTHS.items()}
    by_length = {name: _of_group(group, tbt_slo_s) for name, group in groups.items() if group or name == "all"}
    slowdowns = [numbers["TTFT / isolated"] for name, numbers in by_length.items() if name != "all"]
    reasons = dict.fromkeys(REASONS, 0) | Counter(s.reason.partition(":")[0] for s in served)
    counts = {
        "offered": len(served),
        "requests": sum(s.finished for s in served),
        "goodput": sum(met(s, tbt_slo_s)[2] for s in served),
        "new tokens": sum(s.token_s.size for s in served),
        "prompt tokens": sum(s.prompt_tokens for s in served if s.token_s.size),  # of prompts that were read to the end
    }
    return {
        "requests": {"offered": len(served), **reasons, "no first token": sum(not s.token_s.size for s in served)},
        "per second": {name: count / span_s for name, count in counts.items()},
        "fairness": {f"Jain of {q}": jain([1 / stats[q] for stats in slowdowns]) for q in ("p50", "p99")},
        "by length": by_length,
    }


def _of_group(served: Sequence[Served], tbt_slo_s: float) -> dict[str, Any]:
    gaps_s, n = [np.diff(s.token_s) for s in served], len(served) or math.nan
    counts = [(0,) * 6, *((*met(s, tbt_slo_s), *deadlines(s, tbt_slo_s)) for s in served)]
    prompt, steady, both, on_time, late, passed = map(sum, zip(*counts, strict=True))
    return {
        "TTFT": statistics([s.ttft_s for s in served]),
        "TBT": statistics(np.concatenate([np.zeros(0), *gaps_s])),
        "TPOT": statistics([gaps.mean() for gaps in gaps_s if gaps.size]),
        "E2E": statistics([s.token_s[-1] - s.arrival_s if s.finished else math.inf for s in served]),
        "TTFT / isolated": statistics([max(s.ttft_s, SLOP_S) / s.isolated_ttft_s for s in served]),  # not 0
        "TTFT met": prompt / n,
        "TBT met": steady / n,
        "every SLO met": both / n,
        "fluidity index": on_time / (on_time + late or math.nan),
        "fluidity index, stalls in full": on_time / (on_time + passed or math.nan),
    }


def statistics(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Percentiles, most and mean, and of how many; NaN where there are none."""
    ranks = np.percentile(some := values if len(values) else [math.nan], (50, 90, 99, 100), method="inverted_cdf")
    return dict(zip(STATISTICS, (*ranks.tolist(), float(np.mean(some))), strict=True)) | {"count": len(values)}


def jain(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2); NaN if nobody has anything."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares) or math.nan)


def rows(made: Mapping[str, Any], **where: Any) -> list[dict[str, Any]]:
    """A summary as `results.row`s. JSON has no inf and no NaN: such a row has no value, and says what is `absent`."""
    found = [results.row(f"requests {name}", n, "requests", **where) for name, n in made["requests"].items()]
    found += [_row(f"{name} per second", rate, "1/s", **where) for name, rate in made["per second"].items()]
    found += [_row(name, value, "1", **where) for name, value in made["fairness"].items()]
    for length, numbers in made["by length"].items():
        for name, unit in LATENCIES.items():
            at = dict(length=length, samples=numbers[name]["count"], **where)
            found += [_row(f"{name} {q}", numbers[name][q], unit, **at) for q in STATISTICS]
        found += [_row(name, numbers[name], "1", length=length, **where) for name in numbers if name not in LATENCIES]
    return found


def _row(name: str, value: float, unit: str, **where: Any) -> dict[str, Any]:
    if not math.isfinite(value):
        return results.row(name, None, unit, absent="no sample" if math.isnan(value) else "inf: never came", **where)
    return results.row(name, float(f"{value:.6g}"), unit, **where)


def cdf_figure(runs: Mapping[str, Sequence[Served]], tbt_slo_s: float) -> Any:
    """TTFTs (a curve ends below 1 by the share that never came) and gaps of each run; dotted: deadlines, the SLO."""
    drawn, left, right = _panels()
    for name, served in runs.items():
        _draw_cdf(left, [s.ttft_s for s in served], label=name)
        _draw_cdf(right, np.concatenate([np.zeros(0), *(np.diff(s.token_s) for s in served)]))
    _draw_cdf(left, [s.ttft_deadline_s for run in runs.values() for s in run], label="deadlines", color="k", ls=":")
    right.axvline(tbt_slo_s, color="k", ls=":")
    left.set(xscale="log", xlabel="time to first token (s)", ylabel="share of requests")
    right.set(xscale="log", xlabel=f"time between tokens (s), SLO {tbt_slo_s:g}", ylabel="share of gaps")
    left.legend(fontsize="small")
    return drawn


def load_figure(sweeps: Mapping[str, Mapping[float, Mapping[str, Any]]]) -> Any:
    """Goodput and p99 TTFT (a cross: inf) against offered QPS, of the summaries of each policy by offered QPS."""
    drawn, left, right = _panels()
    for policy, by_qps in sweeps.items():
        qps = sorted(by_qps)
        ttft_s = np.array([by_qps[x]["by length"]["all"]["TTFT"]["p99"] for x in qps])
        left.plot(qps, [by_qps[x]["per second"]["goodput"] for x in qps], "o-", label=policy)
        (line,) = right.plot(qps, np.where(np.isinf(ttft_s), np.nan, ttft_s), "o-")
        crosses = np.where(np.isinf(ttft_s), 0.97, np.nan)  # of the height of the panel
        right.plot(qps, crosses, "x", color=line.get_color(), transform=right.get_xaxis_transform())
    left.set(xlabel="offered (requests/s)", ylabel="goodput (requests/s)", ylim=(0, None))
    right.set(xlabel="offered (requests/s)", ylabel="p99 time to first token (s)", yscale="log")
    left.legend(fontsize="small")
    return drawn


def _panels() -> Any:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    for axes in drawn.subplots(1, 2):
        axes.grid(alpha=0.25)
        axes.tick_params(axis="x", which="minor", labelbottom=False)  # of a log axis: they would overlap
    return drawn, *drawn.axes


def _draw_cdf(axes: Any, values: Sequence[float] | np.ndarray, **style: Any) -> None:
    came = int(np.isfinite(values).sum())
    shown = np.unique(np.linspace(0, came - 1, min(came, 2_000)).astype(int))  # as many points as one can tell apart
    axes.step(np.sort(values)[shown], (shown + 1) / max(1, len(values)), where="post", **style)
