"""Files and hub data sets -> rows."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pyarrow
import pyarrow.parquet

from support.checkpoint import find_folder
from support.files import UserError


def read_file(path: Path) -> Iterator[dict]:
    """The rows of a .json, .jsonl or .parquet file, one by one. A UserError names the file and, in JSONL, the line."""
    try:
        if path.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".json" and file.read(1) == "[":
                file.seek(0)
                yield from json.load(file)
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as reason:
                        raise UserError(f"{path}, line {number}: not JSON ({reason})") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as reason:
        raise UserError(f"{path} cannot be read: {reason}") from None


def hub_files(name: str, split: str = "train", configuration: str | None = None) -> list[Path]:
    """The files of one split of a hub data set: those that its repository holds, else the hub's own parquet copies.

    A split is known by its name: split.parquet, split-*.parquet or split/*.parquet, or the same as jsonl or json, in
    the folder of its configuration where the data set has several.
    """
    problem = UserError(f"{name} has no parquet, jsonl or json file of a split named {split}")
    folders = (f"{configuration}/",) if configuration else ("", "*/")
    patterns = {
        suffix: [f"{folder}{split}{rest}.{suffix}" for folder in folders for rest in ("", "-*", "/*")]
        for suffix in ("parquet", "jsonl", "json")
    }
    for revision in (None, "refs/convert/parquet"):
        try:
            folder = find_folder(name, sum(patterns.values(), []), revision, repo_type="dataset")
        except UserError as reason:  # offline, either of the two may be what the cache holds
            problem = problem if revision else reason
            continue
        for suffix, forms in patterns.items():
            paths = {str(path.relative_to(folder)): path for path in folder.rglob(f"*.{suffix}")}
            names = [path for path in sorted(paths) if any(fnmatch(path, form) for form in forms)]
            if len(folders := sorted({str(Path(path).parent) for path in names})) > 1:
                raise UserError(f"{name} has several configurations, not one: {', '.join(folders)}")
            if names:
                return [paths[path] for path in names]
    raise problem


def load_rows(source: str, limit: int | None = None) -> list[dict]:
    """The first `limit` rows (default: all) of a .json, .jsonl or .parquet file, or of a hub data set's train split."""
    path = Path(source)
    local = path.suffix in (".json", ".jsonl", ".parquet")
    if path.is_file() and not local:
        raise UserError(f"{source} is no .json, .jsonl or .parquet file")
    rows = itertools.chain.from_iterable(map(read_file, [path] if local else hub_files(source)))
    rows = list(itertools.islice(rows, limit))
    if not rows:
        raise UserError(f"{source} has no rows")
    return rows


def best_rated(rows: dict[str, list[dict]], top: int, field: str) -> dict[str, list[dict]]:
    """Of the rows of several sources together, the `top` with the highest number in column `field`; ties: the first.

    Raises UserError with source and row where a row has no number there, or where there are fewer rows.
    """
    ratings = []
    for source in rows:
        for number, row in enumerate(rows[source], 1):
            rating = row.get(field) if isinstance(row, dict) else None
            if isinstance(rating, bool) or not isinstance(rating, int | float) or math.isnan(rating):
                raise UserError(f"{source}, row {number}: column {field} holds {rating!r}, not a rating")
            ratings.append(rating)
    if len(ratings) < top:
        raise UserError(f"{', '.join(rows)}: {len(ratings)} rated rows, {top} are to be taken")
    best = set(sorted(range(len(ratings)), key=lambda i: -ratings[i])[:top])
    places = itertools.count()
    return {source: [row for row in rows[source] if next(places) in best] for source in rows}


def build_trees(rows: list[dict]) -> list[dict]:
    """OpenAssistant's rows of one message each -> its trees: the roots, each message with its "replies"."""
    replies = defaultdict(list)
    for row in rows:
        replies[row["parent_id"]].append(row)
    for row in rows:
        row["replies"] = replies[row["message_id"]]
    return replies[None]
