"""A signal at a point of a program that no clock decides: before its n-th operation on the files of a folder."""

import os
import signal
from pathlib import Path

SITE = """
import os, signal, sys
folder, number, left, parent = os.environ["INTERRUPT"].split("\\n")
number, left, begun = int(number), int(left), False
def watch(event, given):
    global begun, left
    if not given or not isinstance(given[0], (str, os.PathLike)):
        return
    place, name = os.path.split(os.fspath(given[0]))
    if place == folder and (begun := begun or name == "log.jsonl"):
        left -= 1
        if left == 0 and not parent:
            os.kill(os.getpid(), number)
        elif left == 0:
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            os.kill(os.getppid(), number)
            os.read(read, 1)  # until the parent has passed the signal on
sys.addaudithook(watch)
"""


def interrupted(folder: Path, number: signal.Signals, operation: int, at: Path, parent: bool = False) -> dict:
    """The environment of a run into `folder` that gets signal `number` from itself.

    Before its n-th operation on the files there, counted from the first on the log: whatever a run leaves lies in
    files, so these are all the states that it can be stopped in. parent: it is sent to the process above instead, and
    the run waits until it comes from there. at: a folder for the program that does so.
    """
    at.mkdir(exist_ok=True)
    (at / "sitecustomize.py").write_text(SITE)  # which Python imports before any script
    settings = "\n".join([str(folder), str(int(number)), str(operation), "parent" if parent else ""])
    return os.environ | {"INTERRUPT": settings, "PYTHONPATH": f"{at}{os.pathsep}{os.environ['PYTHONPATH']}"}
