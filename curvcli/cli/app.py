"""The application that verbs register with, exit codes, and what verbs share.

Exit codes: 0 done, 2 could not run (usage, input, or a bug), 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from curvcli.analysis.launch import leads, told
from curvcli.errors import CurvError, UsageError, exhausted, plain, shortage

# Larger counts and rates say nothing, and overflow somewhere.
MOST = 2**53
F = TypeVar("F", bound=Callable[..., Any])


class BoundedCommand(TyperCommand):
    """A verb whose every number is one: finite, and of a size that a computation can hold."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left, as click gives them. Exits with 2 where a number is NaN or above 2**53 in size."""
        rest = super().parse_args(ctx, args)
        _check_numbers(self, ctx)
        return rest


class BoundedGroup(TyperGroup):
    """The same of a verb that has others below it. What is wrong with a command's words is one line, as any error."""

    def main(self, *given: Any, **settings: Any) -> Any:
        """Run the command line and end the process. Exits with 2 where the words are not understood."""
        # In its standalone mode click prints several lines for each error, in a box.
        if not settings.pop("standalone_mode", True):
            return super().main(*given, **{**settings, "standalone_mode": False})
        try:
            code = super().main(*given, **{**settings, "standalone_mode": False})
        except Exception as error:
            # click's errors, or those of the click that typer brings along: told apart by what they have.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError":
                print(context.get_help() if context else "")
                sys.exit(2)
            help_of = f"{context.command_path if context else 'curv'} -h"
            # As pydantic begins what typer took from it: that the value is wrong is said already.
            said = plain(" ".join(message().split())).rstrip(".").replace(": Value error, ", ": ", 1)
            writes = context is not None and any(parameter.name == "output" for parameter in context.command.params)
            page = "curv report makes a page of what -o wrote; " if writes and "'--format': 'html'" in said else ""
            typer.echo(f"curv: error: {said}; {page}see {help_of}", err=True)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left, as click gives them. Exits with 2 where a number is NaN or above 2**53 in size."""
        rest = super().parse_args(ctx, args)
        _check_numbers(self, ctx)
        return rest


def _check_numbers(command: Any, ctx: Any) -> None:
    for parameter in command.params:
        value = ctx.params.get(parameter.name)
        if isinstance(value, (int, float)) and not -MOST <= value <= MOST:  # nor is nan
            _fail(f"curv: error: {parameter.opts[0]} {str(value)[:40]} is out of any range; give a smaller number", 2)


class BoundedTyper(typer.Typer):
    """An application all of whose verbs are bounded."""

    def command(self, *names: Any, **settings: Any) -> Callable[[F], F]:
        """Typer's decorator; the verb is a `BoundedCommand` unless `cls` names another class."""
        return super().command(*names, **{"cls": BoundedCommand, **settings})


app = BoundedTyper(
    name="curv",
    cls=BoundedGroup,
    help="Know how close a training run is to blowing up, before it does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},  # of every verb, too
)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors to one line on stderr and an exit code, inside a verb so that no framework sees them first."""
    try:
        with warnings.catch_warnings():
            # Deprecations inside libraries are not the user's to act on, and would stand before the result.
            warnings.simplefilter("ignore")
            # Nor is a font that another environment's matplotlib put into the shared list of fonts.
            logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
            with readers_may_leave(), _interruptible():
                yield
                return
    except CurvError as error:
        _failed("error", str(error), error)
    except KeyboardInterrupt:
        _fail("curv: interrupted", 130)
    except Exception as error:
        if os.environ.get("CURV_TRACEBACK"):
            raise
        if exhausted(error):
            hint = "use --mode fresh, a smaller --batch-size or fewer --tokens"
            _failed("error", f"out of memory: {shortage(error)}; {hint}", error)
        text = plain(" ".join(str(error)[:2000].split()))[:300]  # cut first: a message may hold a whole tensor
        _failed("internal error", f"{type(error).__name__}: {text}; set CURV_TRACEBACK=1 and report it", error)
    raise typer.Exit(0)  # the reader of stdout has gone


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Ends the block where the reader of stdout has gone (curv ... | head): nothing is left to say, and no flush may try."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        # rich and typer end the process with 1 in its place, which would read as a gate's broken rule.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The interpreter flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, whatever a library makes of it: an import in C that is broken into reports an error."""
    noticed = False

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal noticed
        noticed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # A job in the background ignores it, and whoever embeds the verbs may have a handler of their own.
    ours = before in (signal.default_int_handler, interrupt) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, notice)
    try:
        yield
    except Exception as error:
        if noticed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C outside a verb's own work: while options are parsed, and at the end."""
    raise SystemExit(130)


def _failed(kind: str, text: str, error: BaseException) -> None:
    """One line, where several ranks know of an error from rank 0 alone, and exit code 2."""
    known, whose = told(error)
    # Each rank comes here with it; once is enough.
    if known and not leads():
        raise typer.Exit(2)
    _fail(f"curv: {kind}: {whose}{text}", 2)


def _fail(line: str, code: int) -> None:
    typer.echo(line, err=True)
    raise typer.Exit(code)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v))
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        from curvcli.documents.version import package_version

        typer.echo(f"curv {package_version()}")
        raise typer.Exit


def check_outputs(output: Path | None, plot: Path | None) -> None:
    """Fail before the minute of work, not after it; of several ranks only the one that writes looks."""
    if not leads():
        return
    from curvcli.documents import check_writable

    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"cannot draw to {plot}", hint="end the name in .png, .svg or .pdf")
