"""Errors a user can act on: each message says where, what was found, what was needed and what to do next."""


class AutoRoundError(ValueError):
    """Base of every error caused by input rather than by a defect of this package."""

    exit_status = 1


class UsageError(AutoRoundError):
    """A setting, flag or combination of settings that cannot work."""

    exit_status = 2


class DataError(AutoRoundError):
    """Calibration or evaluation data that cannot be used."""


class ModelError(AutoRoundError):
    """A checkpoint that is missing, damaged or of an unsupported structure."""


class FormatError(AutoRoundError):
    """Codes that a checkpoint layout cannot hold, or a written file that does not match them."""


class JournalError(AutoRoundError):
    """A journal that belongs to another run or is damaged."""
