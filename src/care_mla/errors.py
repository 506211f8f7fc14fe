"""Every error that `care` raises on purpose.

A `CareError` is the user's to solve: the command line prints its message alone and exits with 2. Anything
else that escapes is our fault and keeps its traceback (exit 1).
"""


class CareError(Exception):
    """Base of all errors whose message is written for the user: what, where, why, and what to type next."""


class OptionError(CareError, ValueError):
    """An option's value is out of range, or does nothing in this combination."""


class UnsupportedModelError(CareError):
    """The model has a feature that cannot be represented; the message names it."""


class CheckpointError(CareError):
    """Files of a model are missing, truncated, corrupt, or hold NaN or Inf."""


class CalibrationError(CareError):
    """The calibration text cannot be read, or is too short."""


class ResumeError(CareError):
    """A work folder belongs to another model, other data or other options."""


class ExportError(CareError):
    """A profile cannot express this model, or the output cannot be written."""


class TaskError(CareError):
    """A task's items cannot be read or scored, or what scores them is not installed."""
