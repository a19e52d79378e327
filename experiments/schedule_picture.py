"""The schedule drawn: ticks x stages, and which requests each stage of each group works on."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.serve.batch import Batch

IDLE = "."


def letters(batches: Sequence[Batch]) -> dict[str | int, str]:
    """A capital letter for each request id, in order of appearance ('?' from the 27th on)."""
    ids = dict.fromkeys(row.request.id for batch in batches for row in (*batch.chunks, *batch.decodes))
    return {id: string.ascii_uppercase[n] if n < 26 else "?" for n, id in enumerate(ids)}


def cells(batches: Sequence[Batch], mesh: MeshSpec) -> list[tuple[tuple[str, ...], ...]]:
    """What runs at [tick][group][stage]: capitals are chunks of prompts, small letters decodes, '.' is idle.

    Stage s works at tick t on the batch of tick t - s. Ticks begin with the first batch and end with the last work.
    """
    names = letters(batches)

    def cell(batch: Batch | None, group: int) -> str:
        if batch is None:
            return IDLE
        chunks = [names[row.request.id] for row in batch.chunks if row.group in (None, group)]
        decodes = [names[row.request.id].lower() for row in batch.decodes if row.group in (None, group)]
        return "".join(sorted(chunks) + sorted(decodes)) or IDLE

    by_tick = {batch.tick: batch for batch in batches}
    working = [batch.tick for batch in batches if not batch.empty]
    if not working:
        return []
    ticks = range(batches[0].tick, working[-1] + mesh.spp)
    return [
        tuple(tuple(cell(by_tick.get(t - s), g) for s in range(mesh.spp)) for g in range(mesh.kvp)) for t in ticks
    ]  # fmt: skip


def lines(batches: Sequence[Batch], mesh: MeshSpec) -> list[str]:
    """The picture as text, a tick a line; ticks that repeat the `spp` before them, or fewer, are counted instead."""
    rows = cells(batches, mesh)
    if not rows:
        return ["nothing was scheduled"]
    width = max(len(text) for row in rows for group in row for text in group)
    width = max(width, -(-len("group 0 ") // mesh.spp) - 1)
    stages = " ".join(str(s).ljust(width) for s in range(mesh.spp))
    groups = [f"group {g}".ljust(len(stages)) for g in range(mesh.kvp)]
    drawn = [*_legend(batches), _line("", groups), _line("tick", [stages] * mesh.kvp)]
    for start, shown, more in _runs(rows, longest_period=mesh.spp):
        for offset, row in enumerate(rows[start : start + shown]):
            drawn.append(
                _line(str(batches[0].tick + start + offset), [" ".join(c.ljust(width) for c in g) for g in row])
            )
        if more:
            above = "the one above" if shown == 1 else f"the {shown} above"
            drawn.append(_line("...", [f"{more} ticks like {above}"]))
    return [line.rstrip() for line in drawn]


def figure(batches: Sequence[Batch], mesh: MeshSpec) -> Any:
    """The picture as a matplotlib Figure: a bar is a chunk, a dot a decode, a row of the axes a stage of a group.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, names = cells(batches, mesh), letters(batches)
    drawn = Figure(figsize=(10, 1.2 + 0.45 * mesh.kvp * mesh.spp), layout="constrained")
    axes = drawn.add_subplot()
    order = {letter: n for n, letter in enumerate(names.values())}
    tracks = [(g, s) for g in range(mesh.kvp) for s in range(mesh.spp)]
    first = batches[0].tick if batches else 0
    for y, (g, s) in enumerate(tracks):
        for x, text in enumerate((row[g][s] for row in rows), start=first):
            chunks = [c for c in text if c.upper() == c and c != IDLE]
            decodes = [c for c in text if c.upper() != c]
            for n, c in enumerate(chunks):
                height = 0.8 / len(chunks)
                axes.broken_barh([(x, 0.95)], (y - 0.4 + n * height, height), color=f"C{order[c]}", alpha=0.45)
            for n, c in enumerate(decodes):
                axes.plot(x + 0.5, y - 0.4 + 0.8 * (n + 1) / (len(decodes) + 1), ".", color=f"C{order[c.upper()]}")
    axes.set_yticks(range(len(tracks)), [f"group {g}, stage {s}" for g, s in tracks])
    axes.invert_yaxis()
    axes.set_xlabel("tick (bar: chunk of a prompt, dot: decode)")
    marks = [Line2D([], [], color=f"C{order[letter]}", lw=4, label=id) for id, letter in names.items() if letter != "?"]
    if marks:
        drawn.legend(handles=marks, loc="outside upper center", ncols=4, frameon=False)
    return drawn


def save_png(batches: Sequence[Batch], mesh: MeshSpec, path: str | Path) -> bool:
    """Whether the figure was written: not without matplotlib."""
    try:
        drawn = figure(batches, mesh)
    except ImportError:
        return False
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)
    return True


def _legend(batches: Sequence[Batch]) -> list[str]:
    placed = {
        row.request.id: (len(row.request.prompt), row.group)
        for batch in batches
        for row in (*batch.chunks, *batch.decodes)
    }
    described = []
    for id, letter in letters(batches).items():
        tokens, group = placed[id]
        described.append(f"{letter} {id}: {tokens} tokens, {'every group' if group is None else f'group {group}'}")
    return [*described, "capital: chunk of the prompt, small: decode, columns: stages"]


def _line(head: str, groups: Sequence[str]) -> str:
    return f"{head:>5} | " + " | ".join(groups)


def _runs(rows: Sequence[Any], longest_period: int) -> list[tuple[int, int, int]]:
    """(start, rows to show, how many more repeat them) that cover all rows in order."""
    runs, start = [], 0
    while start < len(rows):
        repeats = {}
        for period in range(1, longest_period + 1):
            end = start + period
            while end < len(rows) and rows[end] == rows[end - period]:
                end += 1
            repeats[period] = end - start - period
        period = max(repeats, key=lambda p: (repeats[p], -p))
        shown, more = (period, repeats[period]) if repeats[period] > period + 1 else (1, 0)
        runs.append((start, shown, more))
        start += shown + more
    return runs
