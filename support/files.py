"""Files that are whole or not there, JSON, and the one kind of error that is the user's."""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what the user gave (a file, a row, a flag, a tensor); its message says what and where."""


def check(fits, words: str):
    """UserError, in these words, unless it fits."""
    if not fits:
        raise UserError(words)


@contextlib.contextmanager
def told(what: str):
    """A context in which whatever a library or the system raises becomes a UserError: `what` and its reason."""
    try:
        yield
    except BaseException as reason:  # as where tokenizers' Rust code panics
        caught = isinstance(reason, Exception) or type(reason).__name__ == "PanicException"
        if isinstance(reason, UserError) or not caught:
            raise
        raise UserError(f"{what}: {reason}") from None


def readable(path: Path, most: int = 2**28) -> Path:
    """`path`, if it is a regular file of at most `most` bytes; else OSError, of which a reader makes a UserError."""
    check_regular(path)
    if (size := path.stat().st_size) > most:
        raise OSError(f"{size:,} bytes are more than such a file has")
    return path


def check_regular(path: Path):
    """OSError where `path` is a folder, a pipe or a device: no file to read, nor one to put another in the place of."""
    if path.exists() and not path.is_file():
        raise OSError("Is a directory" if path.is_dir() else "it is no regular file")


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


@functools.cache
def note(text: str):
    """Tell the user, once and on one rank, of something that is no mistake, such as files that are not read."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def is_number(value) -> bool:
    """Whether a value read from JSON is a number to compute with: no bool, NaN or infinity, nor beyond any float."""
    return type(value) in (int, float) and -(2**63) < value < 2**63


def is_count(value) -> bool:
    return type(value) is int and value > 0


def write_whole(path: Path, write: Callable[[Path], None], others_write: bool = False):
    """Have `write` make a file whole or not at all: under a temporary name first, then in `path`'s place.

    others_write: other processes may do so at the same time; the first file stays. Errors as `writing`'s.
    """
    temporary = path.with_name(path.name + (f".{os.uname().nodename}.{os.getpid()}.tmp" if others_write else ".tmp"))
    with writing(path):
        check_regular(path)
        try:
            write(temporary)
            os.umask(umask := os.umask(0))
            temporary.chmod(0o666 & ~umask)  # as any new file; safetensors' own are for their owner alone
            _to_disk(temporary)  # first what is in the file, then that it bears its name
            with contextlib.suppress(FileExistsError):
                (os.link if others_write else os.replace)(temporary, path)
            _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # half a file would keep a full disk full


@contextlib.contextmanager
def writing(path: Path):
    """A context in which the system's refusal to write (full disk, no permission) is a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        advice = "what was there before is whole: make room, or write elsewhere"
        raise UserError(f"{path} cannot be written ({why}); {advice}") from None


def check_writable(path: Path):
    """Make the folder that `path` is to be in; UserError, before any work, if no file can be written there."""
    probe = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with writing(path):
        check_regular(path)
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
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


LINE = ("step", "loss", "lr", "tokens", "response_tokens", "selected_tokens", "seconds")  # numbers, in each of a log


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, but for half a line at its end; UserError for a line that has not all of LINE."""
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


def write_lines(path: Path, values: list[dict]):
    """Write a log anew, whole or not at all."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
