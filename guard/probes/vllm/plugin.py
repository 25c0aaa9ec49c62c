"""What vLLM loads in each of its processes: the version gate, and the few places where the guard is let in.

Active only when `headguard` is named in `VLLM_PLUGINS`, vLLM's own way of opting in. Patched are

    the model runners (`runner_v1`, `runner_v2`) where the probe is made, plans a step, looks, and hands in its notes
    Scheduler.update_from_output            notes are obeyed and passed on
    UnitaryKVCacheCoordinator               the prefix cache leaves the prompt rows that are read to be computed
    Worker                                  `headguard_...` calls for the API server

Whatever does not fit raises: a guard that is quietly absent would be worse than none.
"""

from __future__ import annotations

import os
from typing import Any

from guard.probes.vllm import runner_v1, runner_v2
from guard.probes.vllm.attach import let_in
from guard.probes.vllm.scheduling import leaving_prompt_rows, with_notes
from guard.probes.vllm.support import check_version

PLUGIN = "headguard"
_PATCHED = "_headguard"


def register() -> None:
    """Entry point of `vllm.general_plugins`. Raises UnsupportedModel for an unknown vLLM."""
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    import torch
    from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.version import __version__

    check_version(__version__)
    if getattr(Scheduler, _PATCHED, False):
        return
    if torch.cpu._is_amx_tile_supported():
        # vLLM's attention kernel uses AMX tiles without asking the kernel for them; unasked, the process dies.
        torch.cpu._init_amx()
    let_in(Scheduler, "update_from_output", with_notes)
    let_in(UnitaryKVCacheCoordinator, "find_longest_cache_hit", leaving_prompt_rows)
    for runner, places in ((FirstRunner, runner_v1.AROUND), (SecondRunner, runner_v2.AROUND)):
        for name, around in places.items():
            let_in(runner, name, around)
    for call in (headguard_status, headguard_set_profile, headguard_forget, headguard_attach, headguard_record,
                 headguard_recorded):  # fmt: skip
        setattr(Worker, call.__name__, call)
    setattr(Scheduler, _PATCHED, True)


# Calls of the API server ---------------------------------------------------------------------------------------------


def headguard_status(self: Any) -> dict[str, Any]:
    """The worker's probe: counters, profiles, what it runs on."""
    from vllm.version import __version__

    runner = self.model_runner
    return {
        **runner.headguard.status(),
        "version": __version__,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "attention": type(runner.headguard.layers[0].module.impl).__name__,
    }


def headguard_set_profile(self: Any, revision: str, path: str | None, digest: str | None = None) -> None:
    """See `Probe.set_profile`."""
    self.model_runner.headguard.set_profile(revision, path, digest)


def headguard_forget(self: Any, revision: str) -> None:
    """The revision is not served any more."""
    self.model_runner.headguard.set_profile(revision, None, None)


def headguard_attach(self: Any, attached: bool) -> None:
    """See `Probe.attach`."""
    self.model_runner.headguard.attach(attached)


def headguard_record(self: Any, steps: list[int] | None) -> None:
    """See `Probe.record`."""
    self.model_runner.headguard.record(steps)


def headguard_recorded(self: Any, path: str) -> None:
    """Write what was recorded since the last call to an .npz file at `path`, and forget it."""
    import numpy as np

    from guard.probes.vllm.recorded import arrays_of

    probe = self.model_runner.headguard
    recorded, probe.recorded = probe.recorded or {}, {}
    np.savez(path, **arrays_of(recorded))  # type: ignore[arg-type]
