"""Live progress of several trainings: a bar for each on a terminal, a line now and then in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fxcurv.cli.render import console

EVERY = 0.25  # share of its steps after which a lane gets another line in a pipe


class ProgressLanes:
    """A lane for each name; nothing is shown when ``quiet``."""

    def __init__(self, names: Sequence[str], total: int, quiet: bool = False) -> None:
        self.console = console(error=True)
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        self.width = max(map(len, names), default=0)
        self.shown: dict[str, tuple[str, int]] = {}
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {
            name: self.bars.add_task(name, total=total, note="", start=False) for name in names
        }

    def __enter__(self) -> ProgressLanes:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.bars.stop()

    def show(self, lane: str, done: int, total: int, note: str) -> None:
        """``done`` of ``total`` steps, and what there is to say."""
        if self.live:
            task = self.tasks[lane]
            self.bars.start_task(task)
            self.bars.update(task, completed=done, total=total, note=note)
            return
        kind = note.partition(":")[0] if ":" in note else ""
        quarter = int(done / (EVERY * total)) if total else 0
        if not self.quiet and self.shown.get(lane) != (kind, quarter):
            self.shown[lane] = (kind, quarter)
            self.console.print(Text(f"{lane:{self.width}s}  {done:5d}/{total}  {note}"), soft_wrap=True)
