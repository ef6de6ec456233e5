"""How a command ends badly on purpose: one sentence for the user and an exit code, never a traceback."""

from __future__ import annotations

FAILED = 1  # what was asked for did not happen
USAGE = 2  # the command or the configuration is wrong
INTERRUPTED = 130  # Ctrl-C, as of every command


class CliError(Exception):
    """What went wrong and what to do about it, as one sentence; `exit_code` is one of the above."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
