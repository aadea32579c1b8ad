"""Files that are whole or not there, JSON, and the one kind of error that is the user's."""

import contextlib
import errno
import json
import os
import platform
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what the user gave (a file, a row, a flag, a tensor); its message says what and where."""


def readable(path: Path, most: int = 2**28) -> Path:
    """`path`, if it can be read to its end: a regular file of at most `most` bytes, no pipe and no device.

    Every reader of a file that others made asks it. Raises OSError, which each turns into a UserError of its own.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file")
    if status.st_size > most:
        raise OSError(f"{status.st_size:,} bytes are more than such a file has")
    return path


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError naming the file when it is missing or holds anything else."""
    try:
        value = json.loads(text := readable(path).read_text(encoding="utf-8"))
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a surrogate pair is no text that can be shown or written
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise UserError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def note(text: str):
    """Tell the user, once and on one rank, of something that is no mistake, such as files that are not read."""
    if text not in NOTED and os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
    NOTED.add(text)


NOTED = set()


def is_number(value) -> bool:
    """Whether a value read from JSON is a number to compute with: no bool, NaN or infinity, nor beyond any float."""
    return type(value) in (int, float) and -(2**63) < value < 2**63


def is_count(value) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def write_whole(path: Path, write: Callable[[Path], None], others_write: bool = False):
    """Have `write` make a file whole or not at all: under a temporary name first, which then takes `path`'s place.

    others_write: other processes may be writing it at the same time, so the temporary name is this process's own, and
    a file that is there by then stays.
    """
    temporary = path.with_name(path.name + (f".{platform.node()}.{os.getpid()}.tmp" if others_write else ".tmp"))
    with writing(path):
        try:
            write(temporary)
            os.umask(umask := os.umask(0))
            temporary.chmod(0o666 & ~umask)  # as any new file; safetensors' own are for their owner alone
            _to_disk(temporary)  # first what is in the file, then that it bears its name
            if others_write:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
            else:
                temporary.replace(path)
            _to_disk(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()  # half a file would keep a full disk full


@contextlib.contextmanager
def writing(path: Path):
    """A context in which the system's refusal to write (full disk, no permission) is a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        raise UserError(
            f"{path} cannot be written ({why}); what was there before is whole: make room, or write elsewhere"
        ) from None


def check_writable(path: Path):
    """Make the folder that `path` is to be in; UserError, before any work, if no file can be written there."""
    probe = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def _to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value):
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # a path's bytes that are no UTF-8 become escapes of JSON
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


LINE = ("step", "loss", "lr", "tokens", "response_tokens", "selected_tokens", "seconds")  # numbers, in each of a log


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, one for each optimizer step that it holds; none before the first.

    A last line that is not whole is left out: the run may be writing it, or the disk was full.
    Raises UserError for a file that cannot be read, and a line that has not all of LINE.
    """
    path, found, line = folder / "log.jsonl", [], b"\n"
    try:
        for line in readable(path).read_bytes().splitlines(keepends=True) if path.exists() else ():
            value = json.loads(line)
            wrong = [key for key in LINE if not (isinstance(value, dict) and is_number(value.get(key)))]
            if wrong:
                raise ValueError(f"no number {wrong[0]}")
            found.append(value)
    except (OSError, ValueError, RecursionError) as reason:
        if line.endswith(b"\n"):
            raise UserError(f"{path}, line {len(found) + 1}: {reason}") from None
    return found


def append_line(path: Path, value: dict):
    """Add one line of JSON to a log that is always whole on disk."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: list[dict]):
    """Write a log anew, whole or not at all."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
