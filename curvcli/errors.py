"""What can go wrong, said once: what is wrong, where, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

LEANER = "use --mode fresh, --batch-size 1, a shorter --sequence-length or fewer --tokens"
LONGEST = 900  # characters of a message: names in a file have any length


def plain(text: str) -> str:
    """One line of what can be printed: other blanks become blanks, and control and formatting characters "?".

    A terminal obeys escape sequences, marks of direction turn a line around, and a line break forges a second line.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def counted(count: int, word: str) -> str:
    """A number of things as people read it: 1 rule, 2 rules."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """The verb to a number of things."""
    return "is" if count == 1 else "are"


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


class FullDiskError(InputError):
    """A disk has no room left for what is to lie there while an analysis goes on."""


class UnsupportedError(CurvError):
    """The input was understood, and the measurement does not exist for it."""


class OutOfMemoryError(CurvError):
    """The memory of the device or of the machine does not do."""


class RankError(CurvError):
    """Another process of a measurement on several ranks has broken down or gone: there is nothing to go on with."""


class LostError(RankError):
    """Another process has gone, or is somewhere else: no word of it will come any more."""


_NO_MEMORY = (
    "out of memory", "t allocate memory", "not enough memory", "alloc_failed", "cannot allocate", "bad_alloc",
    "cublascreate", "cusolverdncreate", "cudnncreate",  # a GPU's libraries, which find no room for themselves
)  # fmt: skip


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, here or in what caused it.

    Allocators raise MemoryError (Python, numpy), torch.OutOfMemoryError (CUDA) or a plain RuntimeError (torch on the CPU,
    MPS, cuBLAS), which words alone tell from a model's own.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == OutOfMemoryError.__name__:
        return True
    if isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _NO_MEMORY):
        return True
    return error.__cause__ is not None and exhausted(error.__cause__)


def shortage(error: BaseException) -> str:
    """What an allocator's error says that it was asked for, in a few words."""
    text = " ".join(str(error).split())
    asked = re.search(r"tried to allocate ([\d.]+ ?[a-z]+)", text, re.IGNORECASE)
    return f"{asked[1]} more were asked for" if asked else plain(text[:120]) or type(error).__name__


@contextmanager
def memory_named(what: str, hint: str = LEANER) -> Iterator[None]:
    """An allocator's error within becomes one line that says what ran out of memory. Raises OutOfMemoryError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CurvError) or not exhausted(error):
            raise
        raise OutOfMemoryError(f"out of memory {what}: {shortage(error)}", hint=hint) from error


class OutOfTime(BaseException):
    """A time budget ran out. Like KeyboardInterrupt no Exception: code that catches everything must let it through."""
