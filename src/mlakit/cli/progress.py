"""Progress on stderr: rich bars with time left on a terminal, silence elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(
    spent: dict[str, float] | None = None,
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function to be told (what, done, total); one bar per ``what``.

    Args:
        spent: gets the seconds from each call to the next, summed by ``what``.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}
        last: tuple[str, float] | None = None

        def note(what: str | None) -> None:
            nonlocal last
            now = time.monotonic()
            if last is not None and spent is not None:
                spent[last[0]] = spent.get(last[0], 0.0) + now - last[1]
            last = None if what is None else (what, now)

        def tell(what: str, done: int, total: int) -> None:
            note(what)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield tell
        note(None)
