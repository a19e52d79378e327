"""What requests felt under each load, as rows; which load was sustained; and the picture of it.

A row's `part` is "all", or a kind of request: "trace" or "long". A number that is infinite has no value, but `absent`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import metrics, results
from experiments.metrics import Served

KEPT, HOPELESS = 0.9, 0.5  # shares of requests whose first token is in time
QUANTILES = ("p50", "p90", "p99")
STYLES = ("o-", "s--", "^-.", "v:", "D-", "x--", "P-.", "<:")

type Table = dict[
    str, dict[float, dict[str, float]]
]  # variant -> queries/s -> what (" of a part", but for all) -> value


def rows(served: Sequence[Served], tbt_slo_s: float, span_s: float, **where: Any) -> list[dict[str, Any]]:
    """TTFT, also over that alone, and shares in time by part; TBT, goodput and counts of one run of `span_s`."""
    made = []
    for part in ("all", *sorted({s.kind for s in served})):
        some = [s for s in served if part in ("all", s.kind)]
        in_time = sum(metrics.met(s, tbt_slo_s)[0] for s in some) / len(some)
        ttft, slowdown = [s.ttft_s for s in some], [s.ttft_s / s.isolated_ttft_s for s in some]
        made += _quantiles("TTFT", ttft, "s", part=part, **where)
        made += _quantiles("TTFT / isolated", slowdown, "1", part=part, **where)
        made.append(_row("TTFT in time", in_time, "1", part=part, **where))
        made.append(_row("requests", len(some), "requests", part=part, **where))
        made.append(_row("unfinished", sum(not s.finished for s in some), "requests", part=part, **where))
    made += _quantiles("TBT", np.concatenate([np.zeros(0), *(np.diff(s.token_s) for s in served)]), "s", **where)
    goodput = sum(metrics.met(s, tbt_slo_s)[2] for s in served) / span_s
    return [*made, _row("goodput", goodput, "1/s", **where), _row("span", span_s, "s", **where)]


def _quantiles(name: str, values: Sequence[float] | np.ndarray, unit: str, **where: Any) -> list[dict[str, Any]]:
    found = metrics.statistics(values)
    return [_row(f"{name} {q}", found[q], unit, **where) for q in QUANTILES]


def _row(name: str, value: float, unit: str, **where: Any) -> dict[str, Any]:
    if math.isfinite(value):
        return results.row(name, float(f"{value:.6g}"), unit, **where)
    return results.row(name, None, unit, absent="no sample" if math.isnan(value) else "inf: never came", **where)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of runs by variant, load and name; infinite where a row has no value."""
    made: Table = {}
    for row in rows:
        if "queries_per_s" in row and "versus" not in row:
            name = row["name"] if row.get("part", "all") == "all" else f"{row['name']} of {row['part']}"
            made.setdefault(row["variant"], {}).setdefault(row["queries_per_s"], {})[name] = row.get("value", math.inf)
    return made


def is_sustained(found: Mapping[str, float], tbt_slo_s: float) -> bool:
    """90% of the requests in time, and the p99 time between tokens within the SLO."""
    return found["TTFT in time"] >= KEPT and found["TBT p99"] <= tbt_slo_s + metrics.SLOP_S


def comparisons(made: Table, baseline: str, tbt_slo_s: float) -> list[dict[str, Any]]:
    """Rows: the highest load that each variant sustained, and how many times better than the baseline each is."""
    best = {
        label: max((load for load in loads if is_sustained(loads[load], tbt_slo_s)), default=0.0)
        for label, loads in made.items()
    }
    found = [_row("sustained load", load, "1/s", variant=label) for label, load in best.items()]
    for label in made if baseline in made else ():
        if label == baseline:
            continue
        where = dict(variant=label, versus=baseline)
        if best[baseline]:
            found.append(_row("sustained load ratio", best[label] / best[baseline], "1", **where))
        for load in sorted(made[label].keys() & made[baseline].keys()):
            own, theirs = made[label][load], made[baseline][load]
            for name in (name for name in own if name.startswith("TTFT p") and name in theirs):
                found.append(_row(f"{name} ratio", theirs[name] / own[name], "1", queries_per_s=load, **where))
    return found


def figure(made: Table, tbt_slo_s: float) -> Any:
    """Median and p99 TTFT (no point: infinite) and the share in time against load; a ring: p99 TBT over the SLO."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14, 4.8), layout="constrained")
    panels = drawn.subplots(1, 3)
    for style, (label, by_load) in zip(STYLES * len(made), made.items(), strict=False):
        loads = sorted(by_load)
        for axes, name in zip(panels, ("TTFT p50", "TTFT p99", "TTFT in time"), strict=True):
            values = np.array([by_load[load][name] for load in loads])
            axes.plot(loads, np.where(np.isfinite(values), values, np.nan), style, label=label, markersize=4)
        late = [load for load in loads if by_load[load]["TBT p99"] > tbt_slo_s + metrics.SLOP_S]
        panels[2].plot(late, [by_load[load]["TTFT in time"] for load in late], "ko", fillstyle="none", markersize=9)
    for axes, title in zip(panels, ("median TTFT (s)", "p99 TTFT (s)", "share of requests in time"), strict=True):
        axes.set(xlabel="offered (requests/s)", ylabel=title)
        axes.grid(alpha=0.25)
    panels[0].set_yscale("log")
    panels[1].set_yscale("log")
    panels[2].axhline(KEPT, color="k", ls=":")
    panels[2].set_ylim(0, 1.02)
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(made), fontsize="small")
    return drawn
