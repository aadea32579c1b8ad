"""Rows from files and from the hub."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hub import run_python, serve

from data import conversations, load_conversations
from support.files import UserError
from support.sources import load_rows


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
        assert "UserError: who/several has several configurations, not one: a, b" in mixed.stderr
        missing = run_python(LOAD_FROM_HUB, "who/none", environment)
        assert "UserError" in missing.stderr and "who/none" in missing.stderr
    for name in ("who/own", "who/bare"):  # the server is gone: this is the cache
        offline = run_python(LOAD_FROM_HUB, name, environment | {"HF_HUB_OFFLINE": "1"})
        assert offline.stdout == f"3 {rows[-1]}\n", offline.stderr
