"""Table 1 in small: the plan, the rows that are held out, the bootstrap, and cells from their start to their tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_rows import write_benchmarks
from conftest import write_rows

import evaluate
import train
from paper.benchmarks import GROUPS, TABLE
from support.files import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "results" / "table1"))
import cells
import compare


def test_cells_are_planned_by_what_they_tell_and_cost(llama):
    plan = cells.all_cells([str(llama)], 2)
    assert len(plan) == 1 + 2 * 2 * 10 * 2 and len({tuple(cell.key().values()) for cell in plan}) == len(plan)
    order = [(cell.epochs, cell.lr, cell.seed) for cell in plan]
    names = ["full", "sstoken", "auto", "random"]
    assert order[:9] == [(0, 0.0, 0), *[(1, 3e-4, 42)] * 4, *[(1, 1e-4, 42)] * 4]
    assert [cell.row.method for cell in plan[:9]] == ["base", *names, *names]
    twice = [(1, 3e-4, 42), (1, 3e-4, 43), (1, 1e-4, 42), (1, 1e-4, 43)]  # other methods, or a second seed
    assert order[9:29] == [place for place in twice for _ in range(4 if place[2] == 43 else 6)]
    assert order[29] == (3, 3e-4, 42) and plan[29].row.method == "full"
    for cell in plan[1:]:
        flags = [*cell.row.flags, *(["--reference", "x"] if cell.row.method in cells.WITH_REFERENCE else [])]
        train.parse_arguments(["--model", "x", "--out", "x", *flags])


def test_a_cell_takes_what_those_of_its_model_took_else_what_others_took_by_size(llama):
    cell, own = cells.all_cells([str(llama)], 1)[-1], cells.size(str(llama))
    assert cell.epochs == 3 and cells.expected_seconds(cell, []) == 0
    done = [{"model": "another", "size": 10 * own, "epochs": 1, "seconds": {"training": 1000, "questions": 100}}]
    assert cells.expected_seconds(cell, done) == pytest.approx(3 * 100 + 10)
    done.append({"model": llama.name, "size": own, "epochs": 0, "seconds": {"training": 0.1, "questions": 5}})
    assert cells.expected_seconds(cell, done) == pytest.approx(5)
    for epochs, training in ((1, 10), (1, 20), (3, 90)):  # 10, 20, 30 an epoch
        done.append({"model": llama.name, "size": own, "epochs": epochs})
        done[-1]["seconds"] = {"training": training, "questions": 7}
    assert cells.expected_seconds(cell, done) == pytest.approx(3 * 20 + 7)


def test_rows_with_one_prompt_are_trained_on_or_held_out_but_never_both(tmp_path):
    made = []
    for i in range(400):
        words = 3 if i % 2 else 30
        made.append({"instruction": f"Say {i // 4 * 2 + i % 2}.", "input": "", "output": " ".join(["word"] * words)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    files = cells.split_rows(str(tmp_path / "rows.jsonl"), tmp_path / "parts")
    parts = {name: [json.loads(line)["messages"] for line in path.open()] for name, path in files.items()}
    prompts = {name: {turns[0]["content"] for turns in rows} for name, rows in parts.items()}
    assert not prompts["train"] & prompts["held_out"] and len(parts["train"]) + len(parts["held_out"]) == 400
    assert prompts["reference"] < prompts["train"] and prompts["instructions.test"] < prompts["held_out"]
    assert all(len(turns[-1]["content"].split()) == 3 for turns in parts["instructions.test"])
    short = [len(turns[-1]["content"].split()) == 3 for turns in parts["held_out"]]
    assert 60 < sum(short) < 140 and 4 < len(short) - sum(short) < 40  # a half of 200, a tenth of 200


def random_values(rng, size=None):
    sizes = {name: size or 3 + len(name) % 5 for name in cells.METRICS}
    return {name: rng.random(n) for name, n in sizes.items()}


def test_scores_are_evaluate_s(tmp_path):
    values = random_values(np.random.default_rng(1))
    results = {
        name: evaluate.summarize([dict.fromkeys(metrics_of(name), float(x)) for x in column])
        for name, column in values.items()
    }
    evaluate.add_groups(results)
    expected = [100 * results[task][metric] for _, task, metric in TABLE]
    found = compare.scores(values)
    assert found == pytest.approx([*expected, np.mean(expected), 100 * np.mean(values["instructions"])])


def metrics_of(name: str) -> list[str]:
    return next((metrics for names, metrics, _ in GROUPS.values() if name in names), [cells.METRICS[name]])


def test_the_bootstrap_s_interval_is_the_normal_one_of_paired_differences():
    """For many questions: 1.96 standard errors, of each column and of the average of ten independent ones."""
    values = random_values(np.random.default_rng(2), size=400)
    values = {name: column - 0.3 for name, column in values.items()}
    low, high = compare.bootstrap(values, draws=4000)
    error = {name: 100 * column.std() / 20 for name, column in values.items()}
    groups = [GROUPS.get(task, [[task]])[0] for _, task, _ in TABLE]
    of_column = [np.sqrt(sum(error[name] ** 2 for name in names)) / len(names) for names in groups]
    average = np.sqrt(sum(e**2 for e in of_column)) / 10
    expected = 2 * 1.96 * np.array([*of_column, average, error["instructions"]])
    assert high - low == pytest.approx(expected, rel=0.06)
    assert (low < compare.scores(values)).all() and (compare.scores(values) < high).all()
    assert compare.bootstrap({name: np.full(9, 0.25) for name in values}) == pytest.approx(np.full((2, 12), 25.0))


def test_a_method_is_compared_on_the_seeds_that_full_training_has():
    rng, value = np.random.default_rng(3), {}
    for method, seeds in (("full", (42, 43)), ("auto", (43, 44))):
        value[method] = [{"seed": seed, "scores": random_values(rng)} for seed in seeds]
    found, (low, high), pairs = compare.beside_full(value["auto"], value["full"])
    expected = compare.scores(value["auto"][0]["scores"]) - compare.scores(value["full"][1]["scores"])
    assert pairs == [(value["auto"][0], value["full"][1])] and found == pytest.approx(expected) and (low <= high).all()


@pytest.mark.slow  # four trainings, and all benchmarks four times
def test_cells_are_trained_asked_and_told_once(llama, tmp_path, monkeypatch, capsys):
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    write_benchmarks(tmp_path / "benchmarks")
    made = [json.loads(line) for line in rows.open()]
    made = [row | {"instruction": f"{row['instruction']} {i}"} for i in range(5) for row in made]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    plan = cells.all_cells([str(llama)], 1)
    names = ["base", "full", "sstoken-rho-0.6", "rho1-rho-0.6"]
    wanted = [cell for cell in plan if cell.epochs < 3 and cell.lr < 3e-4 and cell.key()["method"] in names]
    monkeypatch.setattr(cells, "all_cells", lambda models, seeds: wanted)
    argv = ["cells", "--models", str(llama), "--data", str(rows), "--benchmarks", str(tmp_path / "benchmarks")]
    argv += ["--out", str(out), "--eval-limit", "2", "--max-length", "64"]
    monkeypatch.setattr(sys, "argv", [*argv, "--hours", "1"])
    cells.main()
    found = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [record["method"] for record in found] == names
    for record in found:
        assert record["scores"].keys() == cells.METRICS.keys()
        assert max(len(values) for name, values in record["scores"].items() if name != "instructions") == 2
    by_method = {record["method"]: record for record in found}
    assert by_method["full"]["kept"] == 1 and 0.6 <= by_method["sstoken-rho-0.6"]["kept"] < 0.65
    assert by_method["full"]["before"] == by_method["rho1-rho-0.6"]["before"] != by_method["full"]["after"]
    assert [path.parent.name for path in out.rglob("adapter_model.safetensors")] == ["reference-seed42"]
    text = (out / "tables.md").read_text()
    assert text.count("| sstoken-rho-0.6 |") == 2 and "| BASE | 50.85 |" in text
    assert (out / "rho.png").stat().st_size > 10_000
    monkeypatch.setattr(cells.Workshop, "record", lambda *given: pytest.fail("a cell is computed again"))
    cells.main()
    assert (out / "tables.md").read_text() == text
    monkeypatch.setattr(sys, "argv", [*argv, "--hours", "1", "--max-length", "63"])
    with pytest.raises(UserError, match="cells.jsonl holds cells of other rows or limits"):
        cells.main()
