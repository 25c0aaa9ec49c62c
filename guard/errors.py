"""Every error that the guard raises on purpose. Each names what was wrong, what was expected and what to do."""


class GuardError(Exception):
    """Root of the guard's errors; a caller that catches it never sees a stack trace for bad input."""


class AdapterRejected(GuardError):
    """An adapter (or its name) that must not be loaded: pickle, non-finite values, another base, unknown kind."""


class ProfileMismatch(GuardError):
    """A calibration profile that was fitted for something else than what is being served."""


class AlphaTooFine(GuardError):
    """A false-alarm rate finer than the calibration requests can support."""

    def __init__(self, alpha: float, smallest: float, requests: int) -> None:
        self.alpha, self.smallest, self.requests = alpha, smallest, requests
        super().__init__(
            f"alpha={alpha:g} is finer than this calibration supports: {requests} held-out clean requests give no "
            f"p-value below {smallest:.4g}. Calibrate with more clean prompts, or ask for alpha >= {smallest:.4g}."
        )


class CalibrationError(GuardError):
    """Clean measurements from which no profile can be fitted."""


class RowsError(GuardError):
    """A data file that is not a list of {instruction, input, output} rows, or splits that share rows."""


class UnsupportedModel(GuardError):
    """A model whose attention cannot be measured truthfully (named), so the guard refuses to watch it."""


class NoReference(GuardError):
    """Work that needs a trusted model to compare with, where none was given."""


class PromptTooLong(GuardError):
    """A prompt that does not fit the context."""


class KernelError(GuardError):
    """A kernel that cannot run: its library is missing, or what it was given is not what it reads (named)."""
