"""Rows from files and from the hub."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hub import run_python, serve

from data import conversations, load_conversations
from support.files import UserError
from support.sources import Account, best_rated, load_rows, rating, source_names


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{"prompt": f"question {i} \u00e9", "completion": "answer"} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))  # JSON lines by the wrong name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    files = [str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.json", "d.parquet")]
    for file in files:
        assert load_rows(file) == rows
        assert load_rows(file, limit=2) == rows[:2]
    assert load_conversations(",".join(files[:2]), limit=3) == 2 * conversations(rows[:3])


def test_broken_files_are_named(tmp_path):
    (tmp_path / "line.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "\u00e9"}'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name, message in {
        "line.jsonl": "line.jsonl, line 2",
        "latin.jsonl": "latin.jsonl cannot be read",
        "empty.jsonl": "has no rows",
        "cut.parquet": "cut.parquet cannot be read",
        "missing.json": "missing.json cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            load_rows(str(tmp_path / name))


LOAD_FROM_HUB = (
    "import sys; from data import load_rows; print(len(load_rows(sys.argv[1], 3)), load_rows(sys.argv[1])[-1])"
)


@pytest.mark.slow
def test_hub_data_sets_from_their_own_files_and_from_the_hubs_parquet_copies(tmp_path):
    rows = [{"prompt": "a", "completion": str(i)} for i in range(7)]
    own, bare, copies, several = tmp_path / "own", tmp_path / "bare", tmp_path / "copies", tmp_path / "several"
    for path in (own / "data", bare, copies / "default" / "train", several / "a", several / "b"):
        path.mkdir(parents=True)
    table = pyarrow.Table.from_pylist
    pyarrow.parquet.write_table(table(rows[:4]), own / "data" / "train-00000-of-00002.parquet")
    pyarrow.parquet.write_table(table(rows[4:]), own / "data" / "train-00001-of-00002.parquet")
    pyarrow.parquet.write_table(table(rows[:1]), own / "data" / "test-00000-of-00001.parquet")
    (bare / "script.py").write_text("")
    for folder in (copies / "default" / "train", several / "a", several / "b"):
        pyarrow.parquet.write_table(table(rows), folder / f"{'0000' if folder.name == 'train' else 'train-0'}.parquet")
    for name in ("data/train_gen-00000-of-00001.parquet", "train.jsonl", "training_config.json"):  # none of it is more
        (own / name).write_text(json.dumps(rows[0]))
    repos = {
        ("dataset", "who/own", "main"): own,
        ("dataset", "who/bare", "main"): bare,
        ("dataset", "who/bare", "refs/convert/parquet"): copies,
        ("dataset", "who/several", "main"): several,
    }
    with serve(repos, tmp_path / "cache") as (environment, requests):
        for name in ("who/own", "who/bare"):
            result = run_python(LOAD_FROM_HUB, name, environment)
            assert result.stdout == f"3 {rows[-1]}\n", result.stderr
        assert not any("test-00000" in path for _, path, _ in requests)  # only the split that is asked for
        mixed = run_python(LOAD_FROM_HUB, "who/several", environment)
        assert "has several configurations, not one: write who/several:a:train or who/several:b:train" in mixed.stderr
        missing = run_python(LOAD_FROM_HUB, "who/none", environment)
        assert "UserError" in missing.stderr and "who/none" in missing.stderr
    for name in ("who/own", "who/bare"):  # the server is gone: this is the cache
        offline = run_python(LOAD_FROM_HUB, name, environment | {"HF_HUB_OFFLINE": "1"})
        assert offline.stdout == f"3 {rows[-1]}\n", offline.stderr


ROWS = [{"prompt": f"question {i}, \u00e9\u2028", "completion": f"answer\n{i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_csv(rows) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# the file's name: what it holds, text or bytes; in every one of them stand the same rows
FORMS = {
    "blank-line.json": "\n" + json.dumps(ROWS),
    "pretty.json": "\n" + json.dumps(ROWS, indent=2),
    "named.json": json.dumps({"version": "1.0", "data": ROWS}, indent=2),
    "named-with-its-first-row.json": '{"data": [' + json.dumps(ROWS)[1:].replace("}, {", "}\n, {") + "}",
    "named-on-one-line.json": json.dumps({"train": ROWS}),
    "lines.json": LINES,
    "LOUD.JSONL": LINES,
    "rows.ndjson": LINES,
    "windows.jsonl": "\ufeff" + LINES.replace("\n", "\r\n"),
    "blank-lines.jsonl": "\n\n" + LINES.replace("\n", "\n\n"),
    "raw.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "rows.csv": as_csv(ROWS),
    "bom.CSV": "\ufeff" + as_csv(ROWS),
    "v1:train.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.GZ": gzip.compress(as_csv(ROWS).encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "rows.ndjson.xz": lzma.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_read_from_whatever_form_their_file_has(tmp_path, name):
    content = FORMS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = str(tmp_path / name)
    assert load_rows(source) == ROWS and load_rows(source, limit=2) == ROWS[:2]
    assert len(load_conversations(f"{source},{source}")) == 2 * len(ROWS)


def test_one_object_is_one_row_and_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert load_rows(str(tmp_path / "one.json")) == ROWS[:1]
    (tmp_path / "first.jsonl").write_text('{"prompt": \n' + LINES)
    (tmp_path / "third.jsonl").write_text("\n" + LINES[: LINES.index("\n") + 1] + "{]\n")
    (tmp_path / "pretty.json").write_text("\n\n" + json.dumps(ROWS, indent=2)[:-20])
    for name, line in {
        "first.jsonl": ", line 1: not JSON",
        "third.jsonl": ", line 3: not",
        "pretty.json": ".* line 22 ",
    }.items():
        with pytest.raises(UserError, match=f"{name}{line}"):
            load_rows(str(tmp_path / name))
    (tmp_path / "two.json").write_text('{"data": [],\n"train": []}')
    assert load_rows(str(tmp_path / "two.json")) == [{"data": [], "train": []}]  # which fits no schema
    (tmp_path / "null.jsonl").write_text("null\n" + LINES)
    assert load_rows(str(tmp_path / "null.jsonl")) == [None, *ROWS]  # which is no row, as its number will say
    account = Account(skip_bad_rows=True)
    assert load_rows(str(tmp_path / "first.jsonl"), account=account) == ROWS
    assert len(account.lines()) == 1 and "skipped: 1 rows, the first" in account.lines()[0]
    assert load_rows(str(tmp_path / "third.jsonl"), account=account) == ROWS[:1]


def test_folders_as_the_library_datasets_saves_them(tmp_path):
    train = datasets.Dataset.from_list(ROWS)
    chosen = train.select([4, 0, 2])  # which it keeps as indices until it is saved
    chosen.save_to_disk(str(tmp_path / "one"), num_shards=2)
    both = datasets.DatasetDict({"train": train, "test": chosen})
    both.save_to_disk(str(tmp_path / "splits"))
    assert load_rows(str(tmp_path / "one")) == [ROWS[4], ROWS[0], ROWS[2]]
    assert load_rows(str(tmp_path / "splits")) == ROWS
    assert load_rows(f"{tmp_path / 'splits'}:test", limit=1) == [ROWS[4]]
    with pytest.raises(UserError, match="splits has no .* file of a split named dev"):
        load_rows(f"{tmp_path / 'splits'}:dev")
    (tmp_path / "one" / "cache-0123.arrow").write_text("what a map of the library's left there")
    assert load_rows(str(tmp_path / "one"), account=(account := Account())) == [ROWS[4], ROWS[0], ROWS[2]]
    assert account.lines() == [f"files passed over: {tmp_path / 'one' / 'cache-0123.arrow'}"]
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="state.json lists files that are not beside it"):
        load_rows(str(tmp_path / "one"))


@pytest.mark.parametrize(
    "text", ['{"_data_files": 5}', '{"_data_files": [{"filename": 3}]}', '{"_data_files": ["a/b"]}', "null", "{"]
)
def test_what_save_to_disk_wrote_is_checked_where_it_is_read(tmp_path, text):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path))
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="state.json (lists files|holds no|cannot be read)"):
        load_rows(str(tmp_path))


def test_hidden_files_and_editors_copies_are_no_rows_as_for_datasets(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES)
    copies = [".ipynb_checkpoints/train-checkpoint.jsonl", ".git/train.jsonl", ".train.jsonl", "._rows.jsonl"]
    copies += ["__MACOSX/train.jsonl", ".#rows.jsonl", "rows.jsonl~", "#rows.jsonl#", "config.json"]
    for name in copies:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no JSON")
    assert load_rows(str(tmp_path), account=(account := Account())) == ROWS and not account.lines()
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))["train"]
    assert theirs.to_list() == ROWS
    (tmp_path / "~$rows.jsonl").write_text("an office program's lock")
    assert load_rows(str(tmp_path)) == ROWS
    with pytest.raises(UserError, match=".train.jsonl, line 1: not JSON"):
        load_rows(str(tmp_path / ".train.jsonl"))  # where its name is asked for, it is read


def test_what_is_no_file_of_rows_is_told_and_never_waited_for(tmp_path):
    row = {"prompt": ["Q"], "completion": ["A"]}
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, column in {
        "date.parquet": pyarrow.array([2**52], pyarrow.timestamp("s")),
        "zone.parquet": pyarrow.array([5], pyarrow.timestamp("us", "Mars/Phobos")),
        "day.parquet": pyarrow.array([2**30], pyarrow.date32()),
    }.items():
        pyarrow.parquet.write_table(pyarrow.table(row | {"when": column}), tmp_path / name)
    for name in ("pipe.jsonl", "zero.json", "date.parquet", "zone.parquet", "day.parquet"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_rows(str(tmp_path / name))
    os.mkfifo(tmp_path / "x.arrow")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    with pytest.raises(UserError, match="state.json lists files that are not beside it"):
        load_rows(str(tmp_path))


def test_names_that_no_file_can_have_are_told(tmp_path):
    for name in ("x" * 5000, "x" * 5000 + ".jsonl", os.fsdecode(b"rows\xff.jsonl")):
        with pytest.raises(UserError, match=f"{name[:9]}.*(cannot be read|neither a local folder)"):
            load_rows(name)
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / os.fsdecode(b"b\xff.csv")).write_text("x")
    load_rows(str(tmp_path), account=(account := Account()))
    assert account.lines()[0].encode().endswith(b"b\\udcff.csv")


def test_a_folder_of_files_is_all_of_them_or_the_split_that_their_names_tell(tmp_path):
    for name, rows in {"b": ROWS[2:], "a": ROWS[:2]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    account = Account()
    assert load_rows(str(tmp_path), account=account) == ROWS and not account.lines()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "c.parquet")
    assert load_rows(str(tmp_path), account=account) == ROWS[:1]  # another form of the same rows, perhaps
    assert account.lines() == [f"files passed over: {tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}"]
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl").write_text(LINES.split("\n")[0])
    assert load_rows(str(tmp_path), account=(account := Account())) == ROWS
    assert str(tmp_path / "test.jsonl") in account.lines()[0] and "train.jsonl" not in account.lines()[0]
    assert load_rows(f"{tmp_path}:test") == ROWS[:1]
    with pytest.raises(UserError, match=f"{tmp_path} has no .* file of a split named dev"):
        load_rows(f"{tmp_path}:dev")


def test_sources_are_parted_at_commas():
    assert source_names("c.jsonl,a b.jsonl , pool,,who/b:test") == ["c.jsonl", "a b.jsonl", "pool", "who/b:test"]
    with pytest.raises(UserError, match="names no source"):
        source_names(" , ")


def test_ratings_may_be_text_as_a_table_has_them(tmp_path):
    rows = [row | {"score": str(i % 3)} for i, row in enumerate(ROWS)]
    (tmp_path / "rows.csv").write_text(as_csv(rows), encoding="utf-8")
    best = load_conversations(str(tmp_path / "rows.csv"), top=2)
    assert [turns[1]["content"] for turns in best] == [ROWS[1]["completion"], ROWS[2]["completion"]]
    rows[3]["score"] = "none"
    with pytest.raises(UserError, match="x, row 4: column score holds no rating"):
        best_rated({"x": rows}, 2, "score", Account())
    account = Account(skip_bad_rows=True)
    assert best_rated({"x": rows}, 4, "score", account) == {"x": rows[:3] + rows[4:]} and account.skipped


def test_a_rating_is_a_number_or_its_text():
    for value, expected in {"3": 3, " 2.5": 2.5, 4: 4, True: None, "": None, "nan": None, None: None}.items():
        assert rating({"score": value}, "score") == expected, value
    assert rating({}, "score") is None and rating("a text", "score") is None


NAMED = "import sys; from data import load_rows\nfor name in sys.argv[1].split():\n    print(len(load_rows(name)))"


@pytest.mark.slow
def test_a_split_and_a_configuration_of_a_hub_data_set_are_named_behind_it(tmp_path):
    splits, parts = tmp_path / "splits", tmp_path / "parts"
    for path, count in {
        splits / "data" / "train_sft-00000-of-00001.parquet": 4,
        splits / "data" / "test_sft-00000-of-00001.parquet": 2,
        parts / "main" / "train-00000-of-00001.parquet": 3,
        parts / "main" / "test-00000-of-00001.parquet": 1,
        parts / "other" / "train-00000-of-00001.parquet": 5,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:count]), path)
    repos = {("dataset", "who/splits", "main"): splits, ("dataset", "who/parts", "main"): parts}
    known = "who/splits:train_sft who/splits:test_sft who/parts:main:train who/parts:main:test who/parts:other:train"
    with serve(repos, tmp_path / "cache") as (environment, requests):
        found = run_python(NAMED, known, environment)
        assert found.stdout.split() == ["4", "2", "3", "1", "5"], found.stderr
        for name, words in {
            "who/splits": "a split named train; huggingface.co/datasets/who/splits lists its files",
            "who/parts": "write who/parts:main:train or who/parts:other:train",
            "who/parts:third:train": "a split named train of configuration third; huggingface.co/datasets/who/par",
        }.items():
            assert words in run_python(NAMED, name, environment).stderr
    offline = run_python(NAMED, known, environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.stdout.split() == ["4", "2", "3", "1", "5"], offline.stderr
