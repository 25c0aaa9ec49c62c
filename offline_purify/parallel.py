"""Independent trainings side by side: processes that share the processors, one bar for all of them.

Small models train faster as several one-threaded processes than one after the other on all threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from typing import Any

from offline_purify.train import Progress


def side_by_side(
    work: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    jobs: int | None = None,
    progress: Progress | None = None,
    what: str = "working",
) -> list[Any]:
    """``work(*arguments[i])`` for every i, ``jobs`` at a time (default: one per processor); results in order.

    ``work`` and its arguments must be picklable. The first error stops what has not begun and is raised. Processes end
    with the one that started them, however it ends.
    """
    processors = os.cpu_count() or 1
    jobs = max(1, min(jobs or processors, len(arguments)))
    done = 0
    # Spawned: a fork of a process that has run torch may hang.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (max(1, processors // jobs),)) as workers:
        waiting = [workers.submit(work, *given) for given in arguments]
        try:
            for finished in as_completed(waiting):
                finished.result()
                done += 1
                if progress is not None:
                    progress(what, done, len(arguments))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
        return [finished.result() for finished in waiting]


def _prepare(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    disable_progress_bar()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
