"""The errors of the project. `UserError` means that the user can fix it: the command line prints it in one line and exits with 2."""


class UserError(ValueError):
    """Input that the user can correct; the message names the file, row or field and what to do."""


class NonFiniteLossError(UserError):
    """The loss became nan or inf; every rank raises it at the same step, with the step and the image ids."""


class BadImagesError(UserError):
    """More images failed to decode than `data.max_bad_fraction` allows; the message names them."""


class NoDecodeCpuError(UserError):
    """The workers hold every CPU of the cluster and would wait for images forever; fewer workers can continue."""


class StoppedEarlyError(Exception):
    """Ends a run from inside Ray Train's controller, which then frees its workers: a search has seen enough of the trial."""


class AccountingError(RuntimeError):
    """Images of an epoch were trained on twice, too early or not at all; training stops rather than continue a wrong epoch."""


def is_stopped_early(failure: BaseException) -> bool:
    """Return whether a run's failure is Ray Train's TrainingFailedError around a StoppedEarlyError."""
    return isinstance(getattr(failure, "controller_failure", None), StoppedEarlyError)
