"""The command line: a verb parses, calls and renders. Heavy modules are imported inside the verbs.

Exit codes: 0 done or passed, 1 a gate's rule broken or a schedule that does not fit, 2 could not run (usage, input,
or a bug), 3 a gate unresolved, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys

# Each registers its verbs, in the order of the help.
from curvcli.cli import analyze, demo, doctor, init, gate, report, track, compare, explain, watch, schedule  # noqa: F401  # isort: skip
from curvcli.analysis.launch import launched, leads, leave
from curvcli.cli.app import app, interrupt, readers_may_leave

__all__ = ["app", "main"]

RANKED = ("analyze", "track", "gate")  # what several ranks do together; of anything else rank 0 alone does it


def main() -> None:
    """Entry point of `curv`."""
    # Before torch is loaded: its threads otherwise wait for each other in loops, each on a core that another process wants.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # The thousands of modules of torch and transformers leave no garbage, and looking for it is a fifth of their import.
    gc.set_threshold(200_000, 50, 100)
    # Shells start background jobs with SIGINT ignored: leave that as it is.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if shutil.get_terminal_size().columns < 80:
        app.rich_markup_mode = None  # the help's panels would cut the names of options
    if not launched():
        with readers_may_leave():
            app(prog_name="curv")
        return
    code = 0
    try:
        with readers_may_leave():
            # Nothing is parsed yet, and ranks with nothing to do should not print usage errors: look at the first word.
            if leads() or sys.argv[1:2] in ([verb] for verb in RANKED):
                app(prog_name="curv")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 2
    leave(code)
