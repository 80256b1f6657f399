"""Errors that are the user's to fix.

The command line prints their message alone; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class US3LError(Exception):
    """Base class of the errors below."""


class ConfigError(US3LError):
    """A configuration key or value is wrong; the message names the key, what was expected and given."""


class DataError(US3LError):
    """A data set is missing or broken; the message says where it was looked for and what to do."""


class CheckpointError(US3LError):
    """A checkpoint is missing, broken, or belongs to another run; the message says which and why."""


class TrainingError(US3LError):
    """Training cannot go on, e.g. because the loss is no longer finite."""
