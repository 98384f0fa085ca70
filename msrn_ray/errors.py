"""What the project raises: `UserError` means "the user can mend this"; the command line prints it in one line and exits with 2."""


class UserError(ValueError):
    """Input that the user can correct; the message names the file, row or field and the mend."""


class NonFiniteLossError(UserError):
    """The loss became nan or inf; raised by every rank at the same step, with the step and the image ids."""


class BadImagesError(UserError):
    """More images could not be decoded than `data.max_bad_fraction` allows; the message names them."""


class NoDecodeCpuError(UserError):
    """The workers hold every CPU of the cluster and would wait for images for ever; fewer workers can go on."""


class StoppedEarlyError(Exception):
    """Ends a training run from inside Ray Train's controller, which then frees its workers: a search has seen enough of it."""


class AccountingError(RuntimeError):
    """Images of an epoch were trained on twice, too early or not at all; training stops rather than go on with a wrong epoch."""
