"""Errors that are the user's to fix; their message is all there is to know. `us3l` prints it without a traceback."""

from __future__ import annotations


class SettingError(ValueError):
    """An environment variable has a value that it cannot have: the message names it, its value and what is allowed."""


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run an operation."""
