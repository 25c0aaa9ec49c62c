"""From answered clean prompts to a profile, whatever engine answered them: hygiene first, then the fit.

The answers only serve hygiene: prompts that seem to have fired a backdoor are set aside (`guard.hygiene`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from guard.calibration import fit_profile
from guard.errors import CalibrationError
from guard.hygiene import find_repeated
from guard.profile import Profile, ProfileKey
from guard.readings import Measurement
from guard.rows import Row, row_key
from guard.vaccine import Vaccine


def unique_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with different prompts, the last of equal ones. Raises CalibrationError when there are none."""
    unique = list({row_key(row): row for row in rows}.values())
    if not unique:
        raise CalibrationError("no calibration prompts were given.")
    return unique


def profile_of(
    measurement: Measurement,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    key: ProfileKey,
    *,
    vaccine: Vaccine | None = None,
    keep_repeated: bool = False,
    seed: int = 0,
    n_repeated: int = 0,
) -> Profile:
    """The profile of what was measured: n requests, their prompts (token ids) and rows, in one order.

    `keep_repeated`: prompts with repeated answers are innocent; n_repeated: rows that were given more than once.
    Raises CalibrationError for too few prompts, ProfileMismatch for a vaccine of another base or probe.
    """
    hygiene = find_repeated(measurement.answers, prompts)
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompts_sha256": prompts_digest(rows),
        "n_repeated": n_repeated,
        "n_set_aside": 0 if keep_repeated else len(measurement) - len(hygiene.keep),
        "repeated_answers": [len(found.prompts) for found in hygiene.repeated],
        "hygiene": "Repeated answers were kept, as asked." if keep_repeated else hygiene.sentence,
        "vaccine": vaccine.digest if vaccine is not None else None,
    }
    if vaccine is not None:
        vaccine.check(key.base, key.probe)
    fit = measurement if keep_repeated else measurement.take(hygiene.keep)
    return fit_profile(fit, key, seed=seed, vaccine=vaccine, facts=facts)


def prompts_digest(rows: Sequence[Row]) -> str:
    """SHA-256 (64 hex) of a set of prompts, in any order."""
    return hashlib.sha256("\n".join(sorted(row_key(row) for row in rows)).encode()).hexdigest()
