"""The terminal: progress, tables, notes and warnings. The only module that prints.

Results go to standard output; everything else to standard error, drawn by rich on a terminal and as one plain
line per step otherwise. Libraries call `current()`; only the command line sets it up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

# Shows how far a step is: items done, and what the last one gave.
Draw = Callable[[int, str], None]


class Progress:
    """Counts the items of one step.

    Args:
        draw: called with the number done and a short text, after every `advance`.
    """

    def __init__(self, draw: Draw) -> None:
        self.done = 0
        self._draw = draw

    def advance(self, n: int = 1, text: str = "") -> None:
        """Count n more items; `text` says what the last one gave."""
        self.done += n
        self._draw(self.done, text)


class Console:
    """What a command says while it works. `warnings` keeps every warning, for JSON and model card."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.warnings: list[str] = []

    def step(self, title: str) -> None:
        """Say that a step begins."""
        if not self.quiet:
            self._say(title, style="bold")

    def note(self, text: str) -> None:
        """Say something that is good to know."""
        if not self.quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """Say something that changes the meaning of the result, once, also when quiet."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._say(f"Warning: {text}", style="yellow")

    def error(self, text: str) -> None:
        """Say why the command ends without a result."""
        self._say(text, style="red")

    def out(self, text: str) -> None:
        """Print a line of the result, as it is."""
        print(text, flush=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Progress]:
        """Count a step's items: a bar on a terminal, a line per item (at most some 40) otherwise."""
        if self.quiet:
            yield Progress(lambda done, text: None)
        elif sys.stderr.isatty():
            with _bar(title, total) as progress:
                yield progress
        else:
            yield Progress(_lines(title, total))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table of the result; columns of numbers are set to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        is_number = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
        if sys.stdout.isatty():
            _rich_table(title, columns, cells, is_number)
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        self.out(f"\n{title}")
        for row in [list(columns), ["-" * width for width in widths], *cells]:
            texts = zip(row, widths, is_number, strict=True)
            self.out("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in texts).rstrip())

    def _say(self, text: str, style: str | None = None) -> None:
        if sys.stderr.isatty():
            _rich_stderr().print(text, style=style, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def current() -> Console:
    """The console of this process."""
    return _console


def set_quiet(quiet: bool) -> None:
    """Turn progress and notes off or on."""
    _console.quiet = quiet


def silence_transformers() -> None:
    """Stop transformers' own warnings and loading bars; call it wherever we import transformers.

    Downloads from the hub keep their bars, since they may take an hour, unless the console is quiet.
    """
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if _console.quiet:
        disable_progress_bars()


_console = Console()


@cache
def _rich_stderr() -> RichConsole:
    """One for the whole process, so that a warning appears above the bar that is being drawn."""
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True, highlight=False)


def _lines(title: str, total: int) -> Draw:
    start = time.perf_counter()
    shown = 0

    def draw(done: int, text: str) -> None:
        nonlocal shown
        if done < total and (done - shown) * 40 < total:
            return
        shown = done
        _console._say(f"{title} {done}/{total}  {time.perf_counter() - start:.1f} s  {text}".rstrip())

    return draw


@contextmanager
def _bar(title: str, total: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    tail = (TimeElapsedColumn(), TextColumn("{task.fields[text]}", markup=False))
    with RichProgress(*columns, *tail, console=_rich_stderr()) as bar:
        task = bar.add_task(title, total=total, text="")
        yield Progress(lambda done, text: bar.update(task, completed=done, text=text))


def _rich_table(title: str, columns: Sequence[str], cells: list[list[str]], is_number: list[bool]) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name, right in zip(columns, is_number, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    RichConsole().print(table)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
        case _:
            return str(value)
