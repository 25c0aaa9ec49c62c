"""Progress for people: one tqdm bar that follows ``progress(what, done, total)`` calls.

Library code only calls the function it was given; who watches decides what to draw. Nothing here knows what is done.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class ProgressBar:
    """A callable progress sink: a new bar whenever ``what`` changes. Use as a context manager, or close it."""

    def __init__(self, stream: TextIO | None = None, disable: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.disable = disable
        self.what: str | None = None
        self.bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` units of ``what``."""
        if self.disable:
            return
        if what != self.what or self.bar is None or self.bar.total != total or done < self.bar.n:
            self.close()
            self.what = what
            self.bar = tqdm(total=total, desc=what, file=self.stream, leave=False, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Finish the current bar."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.what = None, None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
