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

LINE = ("step", "loss", "lr", "tokens", "response_tokens", "selected_tokens", "seconds")  # numbers in each log line


class UserError(ValueError):
    """A mistake in what the user gave (a file, a row, a flag, a tensor); its message says what and where."""


def check(fits, words: str):
    """UserError, in these words, unless it fits."""
    if not fits:
        raise UserError(words)


@contextlib.contextmanager
def told(what: str):
    """A context in which any error of a library or the system becomes a UserError: `what`, and the reason."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as reason:  # the Rust code of tokenizers panics with one that is no Exception
        raise UserError(f"{what}: {str(reason) or type(reason).__name__}") from None


def readable(path: Path, most: int = 2**28) -> Path:
    """`path`. Raises OSError unless it is a regular file of at most `most` bytes."""
    check_regular(path)
    if (size := path.stat().st_size) > most:
        raise OSError(f"{size:,} bytes are more than such a file has")
    return path


def check_regular(path: Path):
    """OSError where `path` is a folder, a pipe or a device."""
    if path.exists() and not path.is_file():
        raise OSError("Is a directory" if path.is_dir() else "it is no regular file")


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError naming the file when it is missing or holds anything else."""
    with told(f"{path} cannot be read as JSON"):
        check(path.exists(), f"{path.parent} has no {path.name}")
        value = json.loads(text := readable(path).read_text(encoding="utf-8"))
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a surrogate pair is no text that can be shown or written
            json.dumps(value, ensure_ascii=False).encode()
        check(isinstance(value, dict), f"{path} holds no JSON object")
    return value


@functools.cache
def note(text: str):
    """Tell the user something that is no mistake, once and on one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def is_number(value) -> bool:
    """Whether a value from JSON is a number to compute with: no bool, no NaN, no infinity, no huge integer."""
    return type(value) in (int, float) and -(2**63) < value < 2**63


def is_count(value) -> bool:
    return type(value) is int and value > 0


@contextlib.contextmanager
def writing(path: Path):
    """A context in which an error of the system becomes a UserError: `path` cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or reason
        advice = "what was there before is whole: make room, or write elsewhere"
        raise UserError(f"{path} cannot be written ({why}); {advice}") from None


def check_writable(path: Path):
    """Make the folder of `path`. Raises UserError, before any work, if no file can be written there."""
    probe = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with writing(path):
        check_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def write_whole(path: Path, write: Callable[[Path], None], others_write: bool = False):
    """Write `path` whole or not at all, by write(temporary). others_write: others may too, and the first file stays."""
    temporary = path.with_name(path.name + (f".{os.uname().nodename}.{os.getpid()}.tmp" if others_write else ".tmp"))
    with writing(path):
        check_regular(path)
        try:
            write(temporary)
            os.umask(umask := os.umask(0))
            temporary.chmod(0o666 & ~umask)  # as any new file; safetensors' own are for their owner alone
            _to_disk(temporary)  # first the content, then the name
            with contextlib.suppress(FileExistsError):
                (os.link if others_write else os.replace)(temporary, path)
            _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)  # half a file would keep a full disk full


def _to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str):
    """Write UTF-8, whole or not at all. Half a surrogate pair becomes its escape."""
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


def write_json(path: Path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, values: list[dict]):
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log, but for half a line at its end. UserError for a line that lacks one of LINE."""
    path, found, line = folder / "log.jsonl", [], b"\n"
    try:
        for line in readable(path).read_bytes().splitlines(keepends=True) if path.exists() else ():
            value = json.loads(line)
            for key in LINE:
                check(isinstance(value, dict) and is_number(value.get(key)), f"no number {key}")
            found.append(value)
    except (OSError, ValueError, RecursionError) as reason:
        if line.endswith(b"\n"):
            raise UserError(f"{path}, line {len(found) + 1}: {reason}") from None
    return found
