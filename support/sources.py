"""Sources -> rows, and the account of what is not read of them.

A source is a file, a folder, or a data set on the hub: NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT.
"""

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet

from support.checkpoint import find_folder
from support.files import UserError, check, read_json, readable, told

KINDS = ("parquet", "arrow", "jsonl", "ndjson", "csv", "json")  # of several in one folder the first is read
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # behind the kind: rows.jsonl.gz
ENDS = [f".{kind}{packed}" for kind in KINDS for packed in ("", *OPENERS)]
ENDING = re.compile(r"\.(?:(parquet|arrow)|(jsonl|ndjson|csv|json)(?:\.(?:gz|bz2|xz))?)$", re.IGNORECASE)
WRAPPERS = ("data", "train", "rows", "examples", "instances")  # {"data": [row, ...]}
SPACE, DECODER = re.compile(r"\s*"), json.JSONDecoder()
csv.field_size_limit(2**31 - 1)
# No files of rows: hidden ones, editors' copies (~x), what a system (__x/) or a library keeps for itself
HIDDEN = re.compile(r"(^|/)([.~]|__[^/]*/|(config|dataset_infos?|dataset_dict)\.json$)")


class Account:
    """What is not used of the rows as they are given: for a run's first lines, its record, and --skip-bad-rows."""

    def __init__(self, skip_bad_rows: bool | None = None):
        """skip_bad_rows: None where there is no such flag to point to."""
        self.skip_bad_rows = skip_bad_rows
        self.dropped, self.cut = 0, 0  # samples that keep no response token within --max-length, and that it cuts
        self.passed_over = {"columns": {}, "keys of messages": {}, "files": {}}  # each dict's keys, as they came up
        self.skipped = {}  # reason: how many rows, and where the first is
        self.left_out = []  # of each sample of which a chat template leaves something out: where it is, and what

    def refuse(self, where: str, reason: str):
        """A row that cannot be used: a UserError, or with --skip-bad-rows one more to be counted."""
        if not self.skip_bad_rows:
            way_on = "; --skip-bad-rows leaves such rows out" if self.skip_bad_rows is False else ""
            raise UserError(f"{where}: {reason}{way_on}")
        count, first = self.skipped.get(visible(reason), (0, visible(where)))
        self.skipped[visible(reason)] = (count + 1, first)

    def each(self, source: str, conversations: list, encode: Callable, left_out: Callable | None) -> list:
        """What `encode` makes of each conversation that it can use; left_out: what it leaves out of one's text."""
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
        """Take note of columns, keys or files that are not read since they change neither the text nor the mask."""
        self.passed_over[what] |= dict.fromkeys(map(visible, names))

    def lengths(self, max_length: int) -> str:
        """What became of samples that are longer than that."""
        cut = f"; {self.cut:,} cut there, their ends lost" if self.cut else ""
        return f"{self.dropped:,} dropped, without a response token in the first {max_length:,}{cut}"

    def lines(self) -> list[str]:
        """What a user is told, a line each."""
        found = [f"{what} passed over: {', '.join(names)}" for what, names in self.passed_over.items() if names]
        found += [f"skipped: {count:,} rows, the first {at}: {reason}" for reason, (count, at) in self.skipped.items()]
        what = f"passed over by the chat template: part of {len(self.left_out):,} samples, the first "
        return found + [f"{what}{where}: {text[:80]!r}" for where, text in self.left_out[:1]]

    def record(self) -> dict:
        """The same for run.json."""
        found = {"dropped": self.dropped, "cut": self.cut, "left_out": len(self.left_out)}
        found["skipped"] = {reason: count for reason, (count, _) in self.skipped.items()}
        return found | {"passed_over": {what: list(names) for what, names in self.passed_over.items() if names}}


def visible(text) -> str:
    """A text that any stream can write: what is no character (half a pair, a byte of a path) as its escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def kind_of(path: Path | str) -> str | None:
    """What a file's name says that it holds, one of KINDS; None if it says no such thing."""
    found = ENDING.search(str(path).lower())
    return found and (found[1] or found[2])


def read_file(path: Path, account: Account | None = None) -> Iterator[dict]:
    """The rows of a file of one of KINDS, one by one. A UserError names the file and, where it can, the line."""
    kind, account = kind_of(path), account or Account()
    with told(f"{path} cannot be read"):  # by a reader's error, the system's, or that of a date that nobody has
        readable(path, sys.maxsize)
        if kind in ("parquet", "arrow"):
            for batch in _batches(path, kind):
                batch.validate(full=True)
                yield from batch.to_pylist()
        else:
            read = _csv_rows if kind == "csv" else _json_rows
            with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield from read(file, path, account)


def _batches(path: Path, kind: str) -> Iterable[pyarrow.RecordBatch]:
    """Of parquet, or of Arrow's stream format, in which the library datasets saves, or its file format."""
    if kind == "parquet":
        return pyarrow.parquet.ParquetFile(path).iter_batches()
    file = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        return map(reader.get_batch, range(reader.num_record_batches))


def _csv_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of comma-separated text, whose first row names the columns."""
    reader = csv.DictReader(file, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        if None in row or None in row.values():
            reason = f"not {len(reader.fieldnames)} columns, as the first row names them"
            account.refuse(f"{path}, line {reader.line_num}", reason)
        else:
            yield row


def _json_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of JSON: objects, an array of them, or an object that has them under a name of WRAPPERS.

    What a file holds tells which, not its name. Of objects in lines only those that are asked for are read.
    """
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    head = list(itertools.islice(lines, 2))
    if len(head) == 1 or (head and _parsed(head[0][1])[1]):
        head += lines
        values, broken = _parsed("".join(line for _, line in head), _values)
        if not broken:
            yield from values if len(values) > 1 else _unwrapped(values[0], path)
            return
        if path.suffix.lower() == ".json" and isinstance(broken, json.JSONDecodeError):
            account.refuse(f"{path}, line {head[: broken.lineno][-1][0]}", f"not JSON ({broken.msg})")
            del head[0]
    for number, line in itertools.chain(head, lines):
        row, broken = _parsed(line)
        if broken:
            account.refuse(f"{path}, line {number}", f"not JSON ({getattr(broken, 'msg', broken)})")
        else:
            yield row


def _parsed(text: str, read: Callable = json.loads) -> tuple:
    """What `read` makes of a text, or None, and the error if it is not JSON."""
    try:
        return read(text), None
    except (ValueError, RecursionError) as reason:
        return None, reason


def _values(text: str) -> list:
    """The JSON values of a text, one behind the other on as many lines as each may take."""
    found, place = [], 0
    while (place := SPACE.match(text, place).end()) < len(text):
        value, place = DECODER.raw_decode(text, place)
        found.append(value)
    return found


def _unwrapped(value, path: Path) -> list:
    """The rows of a file that holds one JSON value."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    named = [name for name in WRAPPERS if isinstance(value.get(name), list)]
    if len(named) > 1:
        raise UserError(f"{path} has rows under several names, {', '.join(named)}: give each a file of its own")
    return value[named[0]] if named else [value]


def files_below(folder: Path) -> list[str]:
    """The files of rows in a folder and below, by their paths there; as for datasets none that is hidden or a copy."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if kind_of(path) and not HIDDEN.search(path.as_posix())]


def of_one_kind(paths: list[str]) -> list[str]:
    """Of files of rows those of the first of KINDS that there is."""
    return next((found for kind in KINDS if (found := [path for path in paths if kind_of(path) == kind])), [])


def split_patterns(split: str, configuration: str | None) -> list[str]:
    """The paths that a split's files may have, without their ends: split, split-*, split/*, there or in a folder."""
    folders = (f"{configuration}/",) if configuration else ("", "*/")
    return [f"{folder}{split}{rest}" for folder in folders for rest in ("", "-*", "/*")]


def choose_files(name: str, paths: list[str], split: str, configuration: str | None) -> list[str]:
    """Those of a data set's files of rows that a split is read from."""
    patterns = split_patterns(split, configuration)
    found = of_one_kind([path for path in paths if any(fnmatch(ENDING.sub("", path), glob) for glob in patterns)])
    if len({os.path.dirname(path) for path in found}) > 1:
        raise UserError(f"{name} has several configurations, not one: write {' or '.join(choices(name, found))}")
    return found


def choices(name: str, paths: list[str]) -> list[str]:
    """How a user names each split that a data set's files of rows are of, by their paths there."""
    parts = (re.sub(r"-\d+(-of-\d+)?$|/\d+$", "", ENDING.sub("", path)).split("/") for path in paths)
    named = (":".join([name, *({*folders[:1]} - {"data"}), split]) for *folders, split in parts)
    return list(dict.fromkeys(named))


def no_split(name: str, split: str, configuration: str | None, paths: Iterable[str]) -> UserError:
    wanted = f"a split named {split}" + (f" of configuration {configuration}" if configuration else "")
    known = f"; it has {', '.join(found)}" if (found := choices(name, sorted(paths))) else ""
    return UserError(f"{name} has no {', '.join(KINDS)} file of {wanted}{known}")


def hub_files(name: str, split: str = "train", configuration: str | None = None) -> list[Path]:
    """The files of one split of a hub data set: those that its repository holds, else the hub's own parquet copies."""
    from huggingface_hub import list_repo_files  # here, as in support/checkpoint.py

    problem, patterns = None, [pattern + end for pattern in split_patterns(split, configuration) for end in ENDS]
    for revision in (None, "refs/convert/parquet"):
        try:
            folder = find_folder(name, patterns, revision, repo_type="dataset")
        except UserError as reason:  # offline, either of the two may be what the cache holds
            problem = problem or reason
            continue
        paths = files_below(folder)
        if found := choose_files(name, paths, split, configuration):
            return [folder / path for path in found]
        if not problem:
            with contextlib.suppress(Exception):  # whatever it is: this is only to help with another error
                paths = filter(kind_of, list_repo_files(name, repo_type="dataset"))
            problem = no_split(name, split, configuration, paths)
    raise problem


def names_in(path: Path, key: str) -> list[str]:
    """The names of files or folders beside `path`, which save_to_disk wrote, that it lists: texts, or "filename"s."""
    held = read_json(path).get(key)
    names = [one.get("filename") if isinstance(one, dict) else one for one in held] if isinstance(held, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{path} names no {key} of its own folder")
    return names


def folder_files(folder: Path, split: str | None, configuration: str | None, account: Account) -> list[Path]:
    """The files of rows in a local folder: what save_to_disk wrote, a data set as on the hub, or files beside another.

    The split is train unless one is asked for, or all files where no name says that. Others are passed over.
    """
    name, wanted = str(folder), split or "train"
    if saved := (folder / "dataset_dict.json").exists():
        splits = names_in(folder / "dataset_dict.json", "splits")
        if wanted not in splits:
            raise UserError(f"{name} has no split {wanted}; it has {', '.join(f'{name}:{split}' for split in splits)}")
        folder = folder / wanted
    if saved or (folder / "state.json").exists():
        return [folder / file for file in names_in(folder / "state.json", "_data_files")]
    paths = files_below(folder)
    beside = [path for path in paths if "/" not in path]
    found = choose_files(name, paths, wanted, configuration) or of_one_kind([] if split else beside)
    if not found:
        raise no_split(name, wanted, configuration, paths)
    account.pass_over("files", [str(folder / path) for path in beside if path not in found])
    return [folder / path for path in found]


def source_names(sources: str) -> list[str]:
    """Comma-separated sources; where a name with a comma in it exists, it is one name."""
    found, rest = [], sources.split(",")
    while rest:
        size = next((n for n in range(len(rest), 1, -1) if os.path.exists(",".join(rest[:n]).strip())), 1)
        found.append(",".join(rest[:size]).strip())
        rest = rest[size:]
    check(any(found), f"--data names no source: {sources!r}")
    return [name for name in found if name]


def find_files(source: str, account: Account) -> list[Path]:
    """The files that hold a source's rows; UserError that says what to write where it is not one split of one set."""
    if "://" in source and not os.path.exists(source):
        raise UserError(f"{source}: no addresses; name a file, a folder or a data set of the hub (OWNER/NAME)")
    if visible(source) != source or (len(source) > 300 and not os.path.exists(source)):
        raise UserError(f"{visible(source)[:80]}: its name is not UTF-8, or too long for any file or data set")
    name, *rest = [source] if os.path.exists(source) else source.split(":")
    path, split, configuration = Path(name), rest[-1] if rest else None, rest[0] if len(rest) > 1 else None
    if len(rest) > 2 or not all([name, *rest]):
        raise UserError(f"{source}: a data set is named NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT")
    if os.path.isdir(name):  # not Path's: it raises where a name is too long
        return folder_files(path, split, configuration, account)
    if os.path.isfile(name) and not kind_of(path):
        raise UserError(f"{source} is no .{', .'.join(KINDS)} file, as it is or packed ({', '.join(OPENERS)})")
    if kind_of(path):
        check(not rest, f"{source}: {name} is one file, it has no split {split}")
        with told(f"{name} cannot be read"):
            return [readable(path, sys.maxsize)]
    if name.count("/") == 2 and not name.startswith(("/", ".")):
        of, part = name.rsplit("/", 1)
        raise UserError(f"{name} is no file; a configuration of {of} is {of}:{part}:train")
    return hub_files(name, split or "train", configuration)


def load_rows(source: str, limit: int | None = None, account: Account | None = None) -> list[dict]:
    """The first `limit` rows (default: all) of a source, of its split train where none is named."""
    account = account or Account()
    rows = (row for path in find_files(source, account) for row in read_file(path, account))
    if not (rows := list(itertools.islice(rows, limit))):
        raise UserError(f"{source} has no rows" + " that can be used" * bool(account.skipped))
    return rows


def best_rated(rows: dict[str, list[dict]], top: int, field: str, account: Account) -> dict[str, list[dict]]:
    """Of the rows of several sources together, the `top` with the highest number in column `field`; ties: the first.

    Raises UserError with source and row where a row has no number there, or where there are fewer rows.
    """
    ratings = {}  # of each row that has one, by its source and number
    for source in rows:
        for number, row in enumerate(rows[source], 1):
            rating = row.get(field) if isinstance(row, dict) else None
            with contextlib.suppress(ValueError, TypeError, OverflowError):  # .csv has text only
                if not (isinstance(rating, bool) or math.isnan(value := float(rating))):
                    ratings[source, number] = value
            if (source, number) not in ratings:
                account.refuse(f"{source}, row {number}", f"column {field} holds {rating!r:.60}, not a rating")
    check(len(ratings) >= top, f"{', '.join(rows)}: {len(ratings)} rated rows, {top} are to be taken")
    best = set(sorted(ratings, key=ratings.get, reverse=True)[:top])
    return {name: [row for i, row in enumerate(found, 1) if (name, i) in best] for name, found in rows.items()}


def add_flags(parser, group: str = "model and data"):
    """What is done about rows that cannot be used."""
    add = parser.group(group)
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and say how many and why")
