"""A process that runs (or resumes) a repair and kills itself with SIGKILL at a named step: started by test_workflow.

    python -m tests.offline_purify.killed_run SPEC_JSON DATABASE_URL LOG_FILE [STEP middle|unrecorded]

``middle`` dies at the first sign of progress within the step; ``unrecorded`` dies when the step has done its work but
before the workflow could record it. Every step that begins is appended to the log.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offline_purify import purify, workflow
from offline_purify.spec import RepairSpec


def main(spec_json: str, url: str, log: str, kill: str = "", moment: str = "") -> None:
    torch.set_num_threads(1)
    now = ""
    original = purify.plan

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(what: str, done: int, total: int) -> None:
        if now == kill and moment == "middle":
            die()

    def watched(name: str, step: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            nonlocal now
            now = name
            with open(log, "a", encoding="utf-8") as file:
                file.write(name + "\n")
            result = step()
            if name == kill:
                die()
            return result

        return run

    def plan(steps: Any) -> purify.Plan:
        walk = original(steps)
        name, step = next(walk)
        while True:
            sent = yield name, watched(name, step)
            try:
                name, step = walk.send(sent)
            except StopIteration as end:
                return end.value

    purify.plan = plan  # type: ignore[assignment]
    spec = RepairSpec.model_validate_json(Path(spec_json).read_text(encoding="utf-8"))
    result = workflow.run(spec, url, progress=watch)
    Path(log).with_suffix(".result").write_text(result.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
