"""A progress bar with rate and time left; plain lines now and then where the output is no terminal."""

import shutil
import sys
import time


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def pace(rate: float) -> str:
    """``1234``, or ``0.25`` of what is slow."""
    return f"{rate:.0f}" if rate >= 3 else f"{rate:.2f}"


class Progress:
    """Progress of `total` items.

    Call :meth:`advance` for every batch and :meth:`draw` when :meth:`due`, so that figures which cost something, such
    as a loss on a GPU, are fetched only when they are shown. Leave the ``with`` block and a bar vanishes.

    Args:
        label: What is going on.
        total: Items in all.
        unit: What an item is.
        plain_interval: Seconds between lines where the output is no terminal.
    """

    WIDTH = 24

    def __init__(self, label: str, total: int, unit: str = "images", plain_interval: float = 20.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.interval = 0.5 if self.terminal else plain_interval

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Items per second so far."""
        return self.done / max(self.elapsed, 1e-9)

    def advance(self, items: int) -> None:
        """Count `items` as done."""
        self.done += items

    def due(self) -> bool:
        """Whether it is time to draw again."""
        return time.monotonic() - self.last >= self.interval

    def draw(self, **figures: str) -> None:
        """Show the state with more `figures`, as ``name value``."""
        self.last = time.monotonic()
        share = min(self.done / max(self.total, 1), 1.0)
        left = duration(self.elapsed * (1 - share) / share) if share else "?"
        parts = [f"{self.done}/{self.total} {self.unit}", f"{pace(self.rate)}/s"]
        parts += [f"{name} {value}" for name, value in figures.items()] + [f"{left} left"]
        if not self.terminal:
            print(f"{self.label}  {'  '.join(parts)}", flush=True)
            return
        filled = round(share * self.WIDTH)
        line = f"{self.label} {'━' * filled}{'╌' * (self.WIDTH - filled)} {'  '.join(parts)}"
        print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
