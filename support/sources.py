"""Sources -> rows. A source is a file, a folder, or a hub data set: NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT."""

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet

from support.checkpoint import find_folder
from support.files import UserError, check, read_json, readable, told

KINDS = ("parquet", "arrow", "jsonl", "ndjson", "csv", "json")  # of several, the first is read
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # of a packed file
ENDING = re.compile(rf"\.({'|'.join(KINDS)})(\.gz|\.bz2|\.xz)?$", re.IGNORECASE)
# No files of rows: hidden ones, editors' copies (~x), what a system (__x/) or a library keeps for itself
HIDDEN = re.compile(r"(^|/)([.~]|__[^/]*/|(config|dataset_infos?|dataset_dict|state)\.json$)")
BATCHES = {
    "parquet": lambda path: pyarrow.parquet.ParquetFile(path).iter_batches(),
    "arrow": lambda path: pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))),  # as the library datasets saves
}
WRAPPERS = ("data", "train", "rows", "examples", "instances")  # {"data": [row, ...]}
csv.field_size_limit(2**31 - 1)  # csv and json are Python's: pyarrow's make dates and numbers of texts


class Account:
    """What is not used of the rows: for a run's first lines, its record, and --skip-bad-rows."""

    def __init__(self, skip_bad_rows: bool | None = None):
        self.skip_bad_rows = skip_bad_rows  # None where the script has no such flag
        self.dropped, self.cut = 0, 0  # samples without a response token within --max-length; samples cut there
        self.passed_over = {"columns": {}, "keys of messages": {}, "files": {}}  # names, as the keys of each dict
        self.skipped = {}  # reason: where the rows are
        self.left_out = []  # (where, text) of each sample of which the chat template leaves a text out

    def refuse(self, where: str, reason: str):
        """UserError for a row that cannot be used. With --skip-bad-rows it is counted instead."""
        if not self.skip_bad_rows:
            way_on = "; --skip-bad-rows leaves such rows out" if self.skip_bad_rows is False else ""
            raise UserError(f"{where}: {reason}{way_on}")
        self.skipped.setdefault(visible(reason), []).append(visible(where))

    def each(self, source: str, conversations: list, encode: Callable, left_out: Callable | None) -> list:
        """encode(conversation) of each one that can be used. left_out(conversation): text that it loses."""
        found = []
        for number, messages in enumerate(conversations, 1):
            where = f"{source}, conversation {number}"
            try:
                found.append(encode(messages))
                if left_out and (text := left_out(messages)):
                    self.left_out.append((visible(where), text))
            except UserError as reason:
                self.refuse(where, str(reason))
        return found

    def pass_over(self, what: str, names):
        """Note columns, keys or files that are not read, since they change neither the text nor the mask."""
        self.passed_over[what] |= dict.fromkeys(map(visible, names))

    def lengths(self, max_length: int) -> str:
        cut = f"; {self.cut:,} cut there, their ends lost" if self.cut else ""
        return f"{self.dropped:,} dropped, without a response token in the first {max_length:,}{cut}"

    def lines(self) -> list[str]:
        """What the user is told, a line each."""
        found = [f"{what} passed over: {', '.join(names)}" for what, names in self.passed_over.items() if names]
        found += [f"skipped: {len(at):,} rows, the first {at[0]}: {reason}" for reason, at in self.skipped.items()]
        what = f"passed over by the chat template: part of {len(self.left_out):,} samples, the first "
        return found + [f"{what}{where}: {text[:80]!r}" for where, text in self.left_out[:1]]

    def record(self) -> dict:
        """The same for run.json."""
        found = {"dropped": self.dropped, "cut": self.cut, "left_out": len(self.left_out)}
        found["skipped"] = {reason: len(places) for reason, places in self.skipped.items()}
        return found | {"passed_over": {what: list(names) for what, names in self.passed_over.items() if names}}


def visible(text) -> str:
    """A text that any stream can write: what is no character becomes its escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def kind_of(path: Path | str) -> str | None:
    """The one of KINDS that a file's name says, or None."""
    found = ENDING.search(str(path))
    return found and found[1].lower()


def read_file(path: Path, account: Account | None = None) -> Iterator[dict]:
    """The rows of a file of one of KINDS, one by one. A UserError names the file and, where it can, the line."""
    kind, account = kind_of(path), account or Account()
    with told(f"{path} cannot be read"):  # also where a date is none that Python has
        readable(path, sys.maxsize)
        if kind in BATCHES:
            for batch in BATCHES[kind](path):
                batch.validate(full=True)
                yield from batch.to_pylist()
        else:
            read = _csv_rows if kind == "csv" else _json_rows
            with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield from read(file, path, account)


def _csv_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of comma-separated text, whose first row names the columns."""
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            account.refuse(f"{path}, line {reader.line_num}", f"not {len(reader.fieldnames)} columns, as the first row")
        else:
            yield row


def _json_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of JSON, one on each line; of .json also one value: a row, or a list of rows, as it is or in WRAPPERS."""
    filled = filter(str.strip, file)
    first, second = next(filled, ""), next(filled, "")
    file.seek(0)
    lines = kind_of(path) != "json"
    with contextlib.suppress(ValueError, RecursionError):  # a second line, and the first is JSON
        lines = lines or (second and json.loads(first))
    if not lines:
        value = json.load(file)  # its error names the line
        held = [value[name] for name in WRAPPERS if isinstance(value, dict) and isinstance(value.get(name), list)]
        value = held[0] if len(held) == 1 else value
        yield from value if isinstance(value, list) else [value]
        return
    for number, line in ((number, line) for number, line in enumerate(file, 1) if line.strip()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as reason:
            account.refuse(f"{path}, line {number}", f"not JSON ({getattr(reason, 'msg', reason)})")
        else:
            yield row


def choose_files(name: str, folder: Path, split: str | None, configuration: str | None, account: Account) -> list[Path]:
    """The files in a folder that hold the rows of a split, all of one kind. UserError if there are none.

    A path says its split, and by a folder above it the configuration: train.csv, train-00000-of-00002.parquet,
    main/train/0.arrow. If no split is named, it is train; if no path says that, the split is all files at the top.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    paths = [path.as_posix() for path in paths if kind_of(path) and not HIDDEN.search(path.as_posix())]
    says = re.compile(rf"(?:(.*)/)?{re.escape(split or 'train')}(?:[-/].*)?")
    found = {path: match[1] for path in paths if (match := says.fullmatch(ENDING.sub("", path)))}
    found = {path: part for path, part in found.items() if configuration in (None, part)}
    found = found or dict.fromkeys(path for path in paths if not split and "/" not in path)
    wanted = f"a split named {split or 'train'}" + f" of configuration {configuration}" * bool(configuration)
    check(found, f"{name} has no {', '.join(KINDS)} file of {wanted}")
    kind = min(map(kind_of, found), key=KINDS.index)
    found = {path: part for path, part in found.items() if kind_of(path) == kind}
    parts = dict.fromkeys(found.values())  # None: at the top
    named = " or ".join(f"{name}:{part}:{split or 'train'}" for part in parts if part)
    check(len(parts) == 1, f"{name} has several configurations, not one: write {named}")
    state = (folder / next(iter(found))).with_name("state.json")
    if state.exists():  # save_to_disk lists its files there; others beside it are a cache of the library's
        with told(f"{state} cannot be read"):
            names = {file["filename"] for file in read_json(state)["_data_files"]}
        check(names <= {os.path.basename(path) for path in found}, f"{state} lists files that are not beside it")
        found = [path for path in found if os.path.basename(path) in names]
    account.pass_over("files", [str(folder / path) for path in paths if "/" not in path and path not in found])
    return [folder / path for path in found]


def hub_files(name: str, split: str = "train", configuration: str | None = None) -> list[Path]:
    """The files of a split of a hub data set: those of its repository, else the hub's parquet copies."""
    folders, problems = (f"{configuration}/",) if configuration else ("", "*/"), []
    patterns = [f"{folder}{split}{rest}.{kind}*" for folder in folders for rest in ("", "-*", "/*") for kind in KINDS]
    for revision in (None, "refs/convert/parquet"):
        try:
            folder = find_folder(name, patterns, revision, repo_type="dataset")
            return choose_files(name, folder, split, configuration, Account())
        except UserError as reason:  # offline, either of the two may be what the cache holds
            problems.append(reason)
    raise UserError(f"{problems[0]}; huggingface.co/datasets/{name} lists its files")


def source_names(sources: str) -> list[str]:
    """The sources in a comma-separated list."""
    found = [name.strip() for name in sources.split(",") if name.strip()]
    check(found, f"--data names no source: {sources!r}")
    return found


def find_files(source: str, account: Account) -> list[Path]:
    """The files that hold a source's rows. Raises UserError where it is not one split of one data set."""
    name, *rest = [source] if os.path.exists(source) else source.split(":")
    path, split, configuration = Path(name), rest[-1] if rest else None, rest[0] if len(rest) > 1 else None
    understood = len(rest) < 3 and all([name, *rest]) and "://" not in source
    check(understood, f"{source} is no file, no folder, and no NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT of the hub")
    with told(f"{source:.300} cannot be read"):
        if path.is_dir():
            return choose_files(name, path, split, configuration, account)
        if kind_of(path):
            check(not rest, f"{source}: {name} is one file, it has no split {split}")
            return [readable(path, sys.maxsize)]
        check(not path.exists(), f"{source} is no .{', .'.join(KINDS)} file, plain or packed (.gz, .bz2, .xz)")
        return hub_files(name, split or "train", configuration)


def load_rows(source: str, limit: int | None = None, account: Account | None = None) -> list[dict]:
    """The first `limit` rows (default: all) of a source, of its split train where none is named."""
    account = account or Account()
    rows = (row for path in find_files(source, account) for row in read_file(path, account))
    rows = list(itertools.islice(rows, limit))
    check(rows, f"{source} has no rows" + " that can be used" * bool(account.skipped))
    return rows


def rating(row, field: str) -> float | None:
    """The number in column `field` of a row, also where it is spelled as text (.csv); None if there is none."""
    with contextlib.suppress(ValueError, TypeError, OverflowError, KeyError):
        number = float(row[field])
        return None if isinstance(row[field], bool) or number != number else number
    return None


def best_rated(rows: dict[str, list[dict]], top: int, field: str, account: Account) -> dict[str, list[dict]]:
    """The `top` best-rated rows of all sources; of equals the first. UserError for a row without a rating."""
    ratings = {(name, i): rating(row, field) for name, found in rows.items() for i, row in enumerate(found, 1)}
    rated = [place for place in ratings if ratings[place] is not None]
    for source, number in [place for place in ratings if ratings[place] is None]:
        account.refuse(f"{source}, row {number}", f"column {field} holds no rating, which is a number")
    check(len(rated) >= top, f"{', '.join(rows)}: {len(rated)} rated rows, {top} are to be taken")
    best = set(sorted(rated, key=ratings.get, reverse=True)[:top])
    return {name: [row for i, row in enumerate(found, 1) if (name, i) in best] for name, found in rows.items()}


def add_flags(parser, group: str = "model and data"):
    """What is done about rows that cannot be used."""
    say = "skip rows that cannot be used, and say how many and why"
    parser.group(group)("--skip-bad-rows", action="store_true", help=say)
