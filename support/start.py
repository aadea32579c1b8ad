"""How a script ends: a mistake has one line, Ctrl-C no traceback, a closed pipe no word."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

from torch import distributed

from support import command, files, machine, ranks, runs


def run_script(main: Callable[[], None]):
    """Run a script's main. A UserError ends it with status 2 and one line; with --debug, its traceback comes first.

    Any other error is a fault of ours and keeps its traceback. Where the reader has gone (`| head`) nothing is said.
    """
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        # A missing stream is the null device. A character that a stream cannot write becomes its escape, \xe9
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):  # no test's stand-in
            stream.reconfigure(encoding="utf-8" if mode == "r" else None, errors="backslashreplace")
        setattr(sys, name, stream)
    machine.reuse_memory()
    status = 0
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)  # at once: a usual exit would write the rest
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
        os._exit(status)  # a usual exit aborts where one of gloo's threads still holds a tensor
    sys.exit(status)
