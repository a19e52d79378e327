"""The picture of a record of `scaling`: TTFT and TBT against devices, a line for each axis and context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments import results
from experiments.bench_engine_record import TBT, TTFT
from experiments.scaling_record import least_times
from mnemosyne_jax.config import MeshSpec

AXES = {"spp": ("C0", "o"), "kvp": ("C1", "s"), "tp": ("C2", "^")}
UNITS = {TTFT: "s", TBT: "ms"}
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # by context, and so are markers filled
FILLS = ("full", "none", "left", "bottom")


def figure(record: Mapping[str, Any]) -> Any:
    """A row for each shape, of a panel for each time that was measured, as a matplotlib Figure: layouts of one axis as
    lines, mixed ones as crosses.

    Dotted is the ideal: the time on the fewest devices that were measured, divided by what devices are more.
    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    found = {name: least_times(record["rows"], name) for name in UNITS}
    shapes = list(dict.fromkeys(shape for works in found.values() for shape, _ in works))
    drawn = Figure(figsize=(13, 0.6 + 4.2 * max(1, len(shapes))), layout="constrained")
    grid = drawn.add_gridspec(max(1, len(shapes)), 2)
    for row, shape in enumerate(shapes):
        works = {name: {c: times for (of, c), times in sorted(found[name].items()) if of == shape} for name in found}
        names = [name for name in works if works[name]]
        counts = sorted({mesh.devices for name in names for times in works[name].values() for mesh in times})
        for column, name in enumerate(names):
            axes = drawn.add_subplot(grid[row, column] if len(names) > 1 else grid[row, :])
            for number, (context, times) in enumerate(works[name].items()):
                style = dict(linestyle=LINES[number % len(LINES)], fillstyle=FILLS[number % len(FILLS)])
                _draw(axes, context, times, style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            results.plain_log(axes.yaxis)
            axes.set_xticks(counts, [str(count) for count in counts], minor=False)
            axes.set_xlim(counts[0] / 1.1, counts[-1] * 1.1)
            axes.set(title=f"{shape}: {name}", xlabel="devices", ylabel=f"{name} ({UNITS[name]})")
            axes.grid(alpha=0.25, which="both")
            axes.legend(fontsize="small")
    versions, device = record["versions"], record["device"]
    drawn.suptitle(f"{device['kind']}, one request alone, dotted: ideal; jax {versions['jax']}")
    return drawn


def _draw(axes: Any, context: int, times: Mapping[MeshSpec, float], style: Mapping[str, Any]) -> None:
    label, mixed = f"{context:,}", dict(times)
    fewest = min(mesh.devices for mesh in times)
    ideal = fewest * min(time for mesh, time in times.items() if mesh.devices == fewest)
    counts = sorted({mesh.devices for mesh in times})
    for axis, (colour, marker) in AXES.items():
        points = sorted((mesh.devices, time) for mesh, time in times.items() if getattr(mesh, axis) == mesh.devices)
        if any(devices > 1 for devices, _ in points):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker=marker, label=f"{axis}, {label}", **style)
        mixed = {mesh: time for mesh, time in mixed.items() if getattr(mesh, axis) != mesh.devices}
    for mesh, time in mixed.items():
        axes.plot(mesh.devices, time, "x", color="grey", markersize=5)
        sizes = " x ".join(f"{axis} {size}" for axis, size in asdict(mesh).items() if size > 1)
        axes.annotate(sizes, (mesh.devices, time), fontsize=5, xytext=(-4, 0), textcoords="offset points", ha="right")
    axes.plot(counts, [ideal / count for count in counts], color="black", linestyle=":", linewidth=1)
