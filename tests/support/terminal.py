"""curv in a real terminal: a pseudo-terminal and an emulator that says what is on its screen."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from fcntl import ioctl

import pyte
from real import CURV


class Terminal:
    """A command in a pseudo-terminal, its output fed to a terminal emulator."""

    def __init__(self, columns: int, lines: int, *arguments: str, command: Sequence[str] = CURV, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.size(columns, lines, slave)
        self.raw = b""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        drop = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        kept = {k: v for k, v in os.environ.items() if k not in drop}

        def foreground() -> None:
            """As a shell starts it: the terminal is its own, and so is Ctrl-C."""
            ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [*command, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**kept, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
            preexec_fn=foreground,
        )  # fmt: skip
        os.close(slave)

    def size(self, columns: int, lines: int, handle: int | None = None) -> None:
        ioctl(self.master if handle is None else handle, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.size(columns, lines)
        self.screen.resize(lines, columns)

    def until(self, *wanted: str, seconds: float = 60) -> str:
        """Read until the screen shows all of it: a frame may come in pieces."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = "\n".join(self.screen.display)
            if all(text in shown for text in wanted):
                return shown
            self.read()
        raise AssertionError(f"{wanted!r} never came:\n" + "\n".join(self.screen.display))

    def read(self, seconds: float = 0.2) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def interrupt(self, sent: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(sent)
        return self.finish()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def finish(self) -> int:
        """Read to the end of the command; its exit code."""
        while self.read(1.0) and self.process.poll() is None:
            pass
        while select.select([self.master], [], [], 0.1)[0] and self.read(0.1):
            pass
        os.close(self.master)
        return self.process.wait(timeout=60)
