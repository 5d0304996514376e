"""What can go wrong, said once: what is wrong, where, and what to do about it."""

from __future__ import annotations

LONGEST = 900  # characters of a message: names in a file have any length


def plain(text: str) -> str:
    """One line of what can be printed: other blanks become blanks, and control and formatting characters "?".

    A terminal obeys escape sequences, marks of direction turn a line around, and a line break forges a second line.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class CurvError(Exception):
    """Base of every error that the user can act on. The command line turns it into exit code 2.

    Args:
        message: what is wrong and where, in one line.
        hint: what to do about it, in one line.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        # One line, whatever a library's own message or a name in a file holds: the terminal and CI logs rely on it.
        message = self.message if len(self.message) <= LONGEST else f"{self.message[:LONGEST]}..."
        return plain(" ".join((f"{message}; {self.hint}" if self.hint else message).split()))


class UsageError(CurvError):
    """The arguments contradict each other or the model."""


class InputError(CurvError):
    """A file is missing, damaged, hostile, or does not hold what was expected."""


class UnsupportedError(CurvError):
    """The input was understood, and the measurement does not exist for it."""


class OutOfTime(BaseException):
    """A time budget ran out. Like KeyboardInterrupt no Exception: code that catches everything must let it through."""
