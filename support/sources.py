"""Files, folders and hub data sets -> rows, and the account of what is not read of them.

A source is a file, a folder or the name of a data set on the hub. A data set of several splits or configurations is
named with the one that is meant: NAME:SPLIT, or NAME:CONFIGURATION:SPLIT.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pyarrow
import pyarrow.parquet

from support.checkpoint import find_folder
from support.files import UserError, read_json, readable

KINDS = ("parquet", "arrow", "jsonl", "ndjson", "csv", "json")  # of several in one folder the first is read
OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}  # behind the kind: rows.jsonl.gz
WRAPPERS = ("data", "train", "rows", "examples", "instances")  # {"data": [row, ...]}
csv.field_size_limit(2**31 - 1)
# What readers raise where a file is not what it says; the last two of dates and time zones that nobody has
BROKEN = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error, pyarrow.ArrowException)
BROKEN += (ArithmeticError, LookupError)
ANY_SIZE = 2**63  # of rows
ENDING = re.compile(r"\.(?:(parquet|arrow)|(jsonl|ndjson|csv|json)(?:\.(gz|bz2|xz))?)$", re.IGNORECASE)
HIDDEN = re.compile(r"(^|/)([.~]|__[^/]*/|(config|dataset_infos?|dataset_dict)\.json$)")


class Account:
    """What is not used of the rows as they are given: for a run's first lines, its record, and --skip-bad-rows.

    cut and dropped count samples: those that --max-length cuts, and those that keep no response token within it.
    """

    def __init__(self, skip_bad_rows: bool | None = None):
        """skip_bad_rows: None where there is no such flag to point to."""
        self.skip_bad_rows, self.dropped, self.cut = skip_bad_rows, 0, 0
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
        """What `encode` makes of each conversation of a source, without those that it cannot use.

        left_out: says what is not in that of a conversation's text.
        """
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
        dropped = f"{self.dropped:,} dropped, without a response token in the first {max_length:,}"
        return dropped + (f"; {self.cut:,} cut there, their ends lost" if self.cut else "")

    def lines(self) -> list[str]:
        """What a user is told, a line each."""
        found = [f"{what} passed over: {', '.join(names)}" for what, names in self.passed_over.items() if names]
        for reason, (count, first) in self.skipped.items():
            found.append(f"skipped: {count:,} rows, the first {first}: {reason}")
        for where, text in self.left_out[:1]:
            what = f"passed over by the chat template: part of {len(self.left_out):,} samples"
            found.append(f"{what}, the first {where}: {text[:80]!r}")
        return found

    def record(self) -> dict:
        """The same for run.json."""
        skipped = {reason: count for reason, (count, _) in self.skipped.items()}
        passed_over = {what: list(names) for what, names in self.passed_over.items() if names}
        counts = {"dropped": self.dropped, "cut": self.cut, "left_out": len(self.left_out)}
        return counts | {"skipped": skipped, "passed_over": passed_over}


def visible(text) -> str:
    """A text that any stream can write: what is no character (half a pair, a byte of a path) as its escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


# --------------------------------------------------------------------------------------------------------- a file


def kind_of(path: Path | str) -> tuple[str, str] | None:
    """What a file's name says that it holds, one of KINDS, and how it is packed; None if it says no such thing."""
    found = ENDING.search(str(path).lower())
    return (found[1] or found[2], found[3] or "") if found else None


def read_file(path: Path, account: Account | None = None) -> Iterator[dict]:
    """The rows of a file of one of KINDS, one by one. A UserError names the file and, where it can, the line."""
    account = account or Account()
    kind, packed = kind_of(path) or ("json", "")
    try:
        readable(path, ANY_SIZE)
        if kind == "parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        elif kind == "arrow":
            yield from _arrow_rows(path)
        else:
            read = _csv_rows if kind == "csv" else _json_rows
            with OPENERS.get(packed, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield from read(file, path, account)
    except UserError:
        raise
    except BROKEN as reason:
        raise UserError(f"{path} cannot be read: {reason}") from None


def _arrow_rows(path: Path) -> Iterator[dict]:
    """Rows as the library datasets keeps them: Arrow's stream format, or its file format."""
    with pyarrow.memory_map(str(path)) as file:
        try:
            batches = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
            yield from batch.to_pylist()


def _csv_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of comma-separated text, whose first row names the columns."""
    reader = csv.DictReader(file, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        if None in row or None in row.values():
            names = f"{len(reader.fieldnames)} columns, as the first row names them"
            account.refuse(f"{path}, line {reader.line_num}", f"not {names}")
        else:
            yield row


def _json_rows(file, path: Path, account: Account) -> Iterator[dict]:
    """Rows of JSON: objects, an array of them, or an object that has them under a name of WRAPPERS.

    What a file holds tells which, not its name. Of objects in lines only those that are asked for are read.
    """
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    number, text = next(lines, (0, ""))
    if not text:
        return
    try:
        first = [json.loads(text)]
    except (ValueError, RecursionError) as reason:
        rest = file.read()
        try:
            values = _values(text + rest)
            yield from values if len(values) > 1 else _unwrapped(values[0], path)
            return
        except (ValueError, RecursionError) as whole:
            broken = whole if kind_of(path) == ("json", "") and isinstance(whole, json.JSONDecodeError) else None
            line = number - 1 + broken.lineno if broken else number
            account.refuse(f"{path}, line {line}", f"not JSON ({getattr(broken or reason, 'msg', reason)})")
        first = []
        lines = ((n, line) for n, line in enumerate(io.StringIO(rest, newline=""), number + 1) if line.strip())
    if (following := next(lines, None)) is None:
        yield from (row for value in first for row in _unwrapped(value, path))
        return
    yield from first
    for number, line in itertools.chain([following], lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as reason:
            account.refuse(f"{path}, line {number}", f"not JSON ({getattr(reason, 'msg', reason)})")
            continue
        yield row


def _values(text: str) -> list:
    """The JSON values of a text, one behind the other on as many lines as each may take."""
    found, decoder, space = [], json.JSONDecoder(), re.compile(r"\s*")
    place = space.match(text).end()
    while place < len(text):
        value, end = decoder.raw_decode(text, place)
        found.append(value)
        place = space.match(text, end).end()
    return found


def _unwrapped(value, path: Path) -> list:
    """The rows of a file that holds one JSON value."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    named = [name for name in WRAPPERS if isinstance(value.get(name), list)]
    if len(named) > 1:
        raise UserError(f"{path} has rows under several names, {', '.join(named)}: give each a file of its own")
    return value[named[0]] if named else [value]


# ------------------------------------------------------------------------------------------------------ data sets


def files_below(folder: Path) -> list[str]:
    """The paths of all files in a folder and its folders, from there, in order.

    Hidden ones, editors' copies and what a system keeps for itself (.x, ~x, __x/) are none, as for datasets.
    """
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if not HIDDEN.search(path.as_posix())]


def split_patterns(split: str, configuration: str | None) -> list[str]:
    """The paths in a data set that a split's files may have, without their ends: split.csv, split-*.csv, split/*.csv.

    It stands at the top or in a folder, that of its configuration where the data set has several.
    """
    folders = (f"{configuration}/",) if configuration else ("", "*/")
    return [f"{folder}{split}{rest}" for folder in folders for rest in ("", "-*", "/*")]


def choose_files(name: str, folder: Path, split: str, configuration: str | None) -> list[Path]:
    """The files of a split in `folder`, of the first of KINDS that has any; [] if none has."""
    patterns, found = split_patterns(split, configuration), defaultdict(list)
    for path in filter(kind_of, files_below(folder)):
        if any(fnmatch(ENDING.sub("", path), pattern) for pattern in patterns):
            found[kind_of(path)[0]].append(path)
    found = next((found[kind] for kind in KINDS if kind in found), [])
    if len({os.path.dirname(path) for path in found}) > 1:
        raise UserError(f"{name} has several configurations, not one: write {' or '.join(choices(name, found))}")
    return [folder / path for path in found]


def choices(name: str, paths: list[str]) -> list[str]:
    """How a user names each split that a data set's files are of, by their paths there."""
    found = {}
    for path in filter(kind_of, paths):
        *folders, split = re.sub(r"-\d+(-of-\d+)?$|/\d+$", "", ENDING.sub("", path)).split("/")
        configuration = [part for part in folders[:1] if part != "data"]
        found[":".join([name, *configuration, split])] = True
    return list(found)


def hub_files(name: str, split: str = "train", configuration: str | None = None) -> list[Path]:
    """The files of one split of a hub data set: those that its repository holds, else the hub's own parquet copies."""
    problem = None
    ends = [f".{kind}{packed}" for kind in KINDS for packed in ("", *(f".{packed}" for packed in OPENERS))]
    patterns = [pattern + end for pattern in split_patterns(split, configuration) for end in ends]
    for revision in (None, "refs/convert/parquet"):
        try:
            folder = find_folder(name, patterns, revision, repo_type="dataset")
        except UserError as reason:  # offline, either of the two may be what the cache holds
            problem = problem or reason
            continue
        if found := choose_files(name, folder, split, configuration):
            return found
        problem = problem or _no_split(name, split, configuration, _listed(name, folder))
    raise problem


def _listed(name: str, folder: Path) -> list[str]:
    """The paths of all files of a hub data set, or offline of those in the cache."""
    from huggingface_hub import list_repo_files  # here, as in support/checkpoint.py

    try:
        return list_repo_files(name, repo_type="dataset")
    except Exception:  # whatever the client or its network says: this is only to help with another error
        return files_below(folder)


def _no_split(name: str, split: str, configuration: str | None, paths: list[str]) -> UserError:
    wanted = f"a split named {split}" + (f" of configuration {configuration}" if configuration else "")
    known = f"; it has {', '.join(found)}" if (found := choices(name, sorted(paths))) else ""
    return UserError(f"{name} has no {', '.join(KINDS)} file of {wanted}{known}")


def names_in(path: Path, key: str) -> list[str]:
    """The names of files or folders beside `path`, which save_to_disk wrote, that it lists: texts, or "filename"s."""
    held = read_json(path).get(key)
    names = held if isinstance(held, list) else []
    names = [part.get("filename") if isinstance(part, dict) else part for part in names]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{path} names no {key} of its own folder")
    return names


def folder_files(folder: Path, split: str | None, configuration: str | None, account: Account) -> list[Path]:
    """The files of rows in a local folder: what save_to_disk wrote, a data set as on the hub, or files beside another.

    Where no split is asked for it is train, or all files where no name says that. The account tells of files of rows
    that lie there and are not read.
    """
    name = str(folder)
    if (folder / "dataset_dict.json").exists():
        splits = names_in(folder / "dataset_dict.json", "splits")
        if (split or "train") not in splits:
            known = ", ".join(f"{name}:{split}" for split in splits)
            raise UserError(f"{name} has no split {split or 'train'}; it has {known}")
        folder = folder / (split or "train")
        read_json(folder / "state.json")  # UserError where it is missing
    if (folder / "state.json").exists():
        return [folder / file for file in names_in(folder / "state.json", "_data_files")]
    found = choose_files(name, folder, split or "train", configuration)
    beside = [folder / path for path in files_below(folder) if "/" not in path and kind_of(path)]
    if not found and not split:
        kind = min((KINDS.index(kind_of(path)[0]) for path in beside), default=None)
        found = [path for path in beside if KINDS.index(kind_of(path)[0]) == kind]
    if not found:
        raise _no_split(name, split or "train", configuration, files_below(folder))
    account.pass_over("files", [str(path) for path in beside if path not in found])
    return found


# -------------------------------------------------------------------------------------------------------- sources


def source_names(sources: str) -> list[str]:
    """Comma-separated sources; where a name with a comma in it exists, it is one name."""
    pieces, found = sources.split(","), []
    while pieces:
        sizes = range(len(pieces), 1, -1)
        size = next((n for n in sizes if os.path.exists(",".join(pieces[:n]).strip())), 1)
        found.append(",".join(pieces[:size]).strip())
        pieces = pieces[size:]
    if not any(found):
        raise UserError(f"--data names no source: {sources!r}")
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
    if os.path.isfile(name) or kind_of(path):
        if not kind_of(path):
            kinds = ", ".join(f".{kind}" for kind in KINDS)
            raise UserError(f"{source} is no {kinds} file, as it is or packed (.{', .'.join(OPENERS)})")
        if rest:
            raise UserError(f"{source}: {name} is one file, it has no split {split}")
        try:
            readable(path, ANY_SIZE)
        except (OSError, ValueError) as reason:
            raise UserError(f"{name} cannot be read: {reason}") from None
        return [path]
    if name.count("/") == 2 and not name.startswith(("/", ".")):
        owner, repository, part = name.split("/")
        raise UserError(
            f"{name} is no file; a configuration of {owner}/{repository} is {owner}/{repository}:{part}:train"
        )
    return hub_files(name, split or "train", configuration)


def load_rows(source: str, limit: int | None = None, account: Account | None = None) -> list[dict]:
    """The first `limit` rows (default: all) of a source: a file, a folder, NAME, NAME:SPLIT, NAME:CONFIGURATION:SPLIT.

    Files are .json, .jsonl, .ndjson, .csv (perhaps with .gz, .bz2, .xz behind), .parquet and .arrow; a split is train
    where none is named.
    """
    account = account or Account()
    files = find_files(source, account)
    rows = itertools.chain.from_iterable(read_file(path, account) for path in files)
    rows = list(itertools.islice(rows, limit))
    if not rows:
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
            try:  # .csv has text only
                ratings[source, number] = math.nan if isinstance(rating, bool) else float(rating)
            except (ValueError, TypeError, OverflowError):
                ratings[source, number] = math.nan
            if math.isnan(ratings[source, number]):
                del ratings[source, number]
                account.refuse(f"{source}, row {number}", f"column {field} holds {rating!r:.60}, not a rating")
    if len(ratings) < top:
        raise UserError(f"{', '.join(rows)}: {len(ratings)} rated rows, {top} are to be taken")
    best = set(sorted(ratings, key=ratings.get, reverse=True)[:top])
    return {name: [row for i, row in enumerate(found, 1) if (name, i) in best] for name, found in rows.items()}


def add_flags(parser, group: str = "model and data"):
    """What is done about rows that cannot be used."""
    add = parser.group(group)
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and say how many and why")
