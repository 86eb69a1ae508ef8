# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error, and the end of a measurement by a signal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from rich.console import Console


@contextlib.contextmanager
def status(shown: bool) -> Iterator[Callable[[str], None]]:
    """A spinner beside the current step; yields a function that takes the next one."""
    console = Console(stderr=True, quiet=not shown)
    with console.status("starting") as spinner:
        yield lambda what: spinner.update(f"{what} ...")


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, float], None]]:
    """A bar; yields a function that takes the current step and the finished fraction."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Context in which SIGTERM, sent by time limits, ends a measurement like Ctrl-C."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the calling program
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
