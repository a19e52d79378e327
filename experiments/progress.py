"""A progress bar for whatever takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bar(console: Console, title: str, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on the console while the block runs: call what it gives with (done, total) and perhaps a note."""
    count = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(24), count, TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(title, total=1, note="")

        def show(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield show
