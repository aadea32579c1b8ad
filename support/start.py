"""How a script starts and ends: from this, its first import, on Ctrl-C leaves no traceback, and no stream fails."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CLOSED_PIPE = 128 + signal.SIGPIPE

started = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
# Not for a program of somebody else that imports ours, nor where Ctrl-C is ignored, as behind nohup
ours = started.is_file() and b"run_script(main)" in started.read_bytes()
if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items() if ours else ():
    # A missing stream is the null device, before another file gets its number; what one cannot write is spelled, \xe9
    stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
    stream.reconfigure(encoding="utf-8" if mode == "r" else None, errors="backslashreplace")
    setattr(sys, name, stream)


def run_script(main: Callable[[], None]):
    """Run a script's main; a mistake of the user's ends it with status 2 and one line, after a traceback with --debug.

    Any other error is one of ours, and has a traceback. Where the reader has gone (`| head`) it ends without a word.
    """
    from torch import distributed  # here, since what is above is to run before torch is imported

    from support import command, files, machine, ranks, runs

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    machine.reuse_memory()
    status = 0
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what Python flushes when it ends
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(CLOSED_PIPE)
    except files.UserError as mistake:
        if "--debug" in sys.argv:
            mistake.__suppress_context__ = False  # what it was made from as well
            traceback.print_exc()
        print(f"error: {command.one_line(str(mistake))}", file=sys.stderr)
        sys.exit(2)
    except (runs.Stopped, KeyboardInterrupt) as reason:
        number, message = reason.args or (signal.SIGINT, "stopped")
        if ranks.first_rank():
            print(message, file=sys.stderr)
        status = 128 + number
    if distributed.is_initialized():  # not after an error: the others may never come to the same place
        distributed.destroy_process_group()
    if status:
        sys.exit(status)
