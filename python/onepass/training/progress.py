"""A progress bar."""

from __future__ import annotations

import shutil
import sys
import time


class Bar:
    """A progress bar on standard error, or four lines where that is not a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.start, self.live = name, total, time.perf_counter(), sys.stderr.isatty()
        self._open = False  # whether the bar's line still lacks its newline

    def show(self, done: int, note: str) -> None:
        """Show that `done` of all steps are done."""
        left = (time.perf_counter() - self.start) * (self.total / done - 1)
        note = f", {note}" if note else ""
        if self.live:
            filled = 24 * done // self.total
            line = f"{self.name:6} [{'#' * filled}{'.' * (24 - filled)}] {done}/{self.total}{note}, {left:.0f} s left"
            width = shutil.get_terminal_size().columns - 1
            self._open = done < self.total
            print("\r" + line[:width].ljust(width), end="" if self._open else "\n", file=sys.stderr, flush=True)
        elif done * 4 // self.total > (done - 1) * 4 // self.total:
            print(f"{self.name}: {done} of {self.total} steps{note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line if the bar has not reached its end."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False
