"""reproduce.py: the rows of its tables, its statistics against scipy's, a small reproduction."""

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_rows import write_benchmarks
from conftest import edit_json
from interrupt import interrupted
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

import evaluate
import train
from paper import ds2, reproduce, tables
from paper.benchmarks import TABLE
from paper.reproduce import table_rows
from paper.tables import Line, interval, markdown, paper_rho
from support.files import UserError

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------------ rows, statistics


def test_table_1_takes_other_objectives_where_they_are_named():
    given = SimpleNamespace(table=1, rho=0.6, methods=["surprise", "full", "dft"])
    rows = reproduce.asked_rows(given, 28)
    assert [(row.label, row.flags[1]) for row in rows] == [("FULL", "full"), ("DFT", "dft"), ("SURPRISE", "surprise")]
    given.table = 3
    assert [row.method for row in reproduce.asked_rows(given, 28)] == ["full"]
    given.methods = ["dft"]
    with pytest.raises(UserError, match="--table 3 has none of the rows of --methods; it has base, full, sstoken"):
        reproduce.asked_rows(given, 28)


def test_methods_are_train_s_and_auto_and_each_cell_s_flags_say_what_differs():
    """By the names of --method; --rho for those alone that select a share of the tokens."""
    names = [*train.METHODS, "auto"]
    args = reproduce.parse_arguments(
        ["--model", "x", "--out", "x", "--reference-limit", "5", "--methods", ",".join(names)]
    )
    rows = {row.method: row for row in reproduce.asked_rows(args, 28)}
    assert rows.keys() == set(names) and len({row.name for row in rows.values()}) == len(names)
    for name, row in rows.items():
        reference = ["--reference", "x"] if name in ("rho1", "tokencleaning") else []
        given = train.parse_arguments(["--model", "x", "--out", "x", *row.flags, *reference])
        assert (given.method, given.rho) == (("sstoken", "auto") if name == "auto" else (name, 0.6))
    assert {name for name, row in rows.items() if "--rho" not in row.flags} == {
        *("full", "dft", "eaft", "stm", "profit", "surprise")
    }
    assert (rows["auto"].label, rows["auto"].name, rows["dft"].name) == ("AUTO", "sstoken-rho-auto", "dft")


@pytest.mark.parametrize("table", [1, 2, 3, 4, 5])
def test_a_table_has_the_paper_s_rows_in_its_order(table):
    labels = [row.label for row in table_rows(table, 0.6, layers=28)]
    paper = tables.PAPER["tables"][str(table)]
    theirs = list(paper["Qwen-2.5-14B" if table == 5 else "LLaMA-3.2-3B"])
    ours = []
    for label in labels:  # the paper's one row of TokenCleaning is the better of our two
        plain = label.replace(", fixed-model", "").replace(", self-evolving", "")
        ours += [plain] if plain not in ours else []
    assert ours == theirs


def test_rows_differ_in_what_their_label_says_and_share_cells_between_tables():
    flags = {row.label: row.flags for row in table_rows(2, 0.6, layers=28)}
    assert flags["SHALLOW"][-2:] == ("--layer", "0") and flags["MEDIUM"][-2:] == ("--layer", "14")
    sstoken = next(row for row in table_rows(1, 0.6, 28) if row.label == "SSTOKEN")
    assert flags["DEEP"] == sstoken.flags == ("--method", "sstoken", "--rho", "0.6")
    names = [{row.name for row in table_rows(table, 0.6, 28)} for table in (1, 2, 3, 4, 5)]
    assert all("sstoken-rho-0.6" in cells for cells in names)
    everything = [row for table in (1, 2, 3, 4, 5) for row in table_rows(table, 0.6, 28)]
    assert len({row.name for row in everything}) == len({row.flags for row in everything}) == 20
    gammas = {row.label: row.flags for row in table_rows(3, 0.6, 28)}
    assert gammas["SSTOKEN (gamma 0.0)"][-2:] == ("--gamma", "0.0")


def test_rho_is_the_paper_s_for_its_model():
    names = ("meta-llama/Llama-3.2-3B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "models/Qwen2.5-14B-Instruct")
    assert [paper_rho(name) for name in names] == [0.6, 0.6, 0.8, 0.8]


def test_the_paper_s_averages_are_those_of_its_columns_but_for_one():
    wrong = []
    for table, models in tables.PAPER["tables"].items():
        for model, rows in models.items():
            for label, (*values, average) in rows.items():
                assert len(values) == 10
                if abs(statistics.mean(values) - average) > 0.0051:
                    wrong.append((table, model, label))
    assert wrong == [("1", "LLaMA-3.2-3B", "SSTOKEN")]  # the note on Winogrande says so


def test_the_paper_s_lines_are_of_the_model_and_the_columns_asked_for():
    base, lines = tables.paper_lines(1, "x/Llama-3.1-8B-Instruct", ["Wino", "ARC-E"])
    assert base == "LLaMA-3.1-8B" and lines["BASE"] == [73.56, 81.57, (73.56 + 81.57) / 2] and len(lines) == 6
    base, lines = tables.paper_lines(3, "x/another", [column for column, _, _ in TABLE])
    assert base == "LLaMA-3.2-3B" and lines["SSTOKEN (gamma 0.5)"][-2:] == [33.97, 52.5]  # the average that it prints


def test_intervals_are_student_s():
    import scipy.stats  # here, since it takes a second

    quantiles = [scipy.stats.t.ppf(0.975, freedom) for freedom in range(1, 31)]
    assert tables.PAPER["student_t"] == pytest.approx(quantiles, rel=1e-6)
    values = [50.1, 51.7, 50.4]
    low, high = scipy.stats.t.interval(0.95, 2, statistics.mean(values), scipy.stats.sem(values))
    assert interval(values) == pytest.approx((high - low) / 2, rel=1e-5)
    many = [0.0, 1.0] * 20
    low, high = scipy.stats.t.interval(0.95, 39, 0.5, scipy.stats.sem(many))
    assert (high - low) / 2 < interval(many) < 1.02 * (high - low) / 2  # more than the table has
    assert interval([1.0]) is None


def test_a_table_by_hand():
    lines = [Line("BASE", [42], [[50.0, 20.0]], []), Line("SSTOKEN", [42, 43], [[49.0, 30.0], [50.0, 31.0]], [{}, {}])]
    text = markdown(lines, ["A", "AVG"], {"BASE": [1.0, 2.0], "FULL": [0.5, 3.0]}, "*the paper*")
    half = f"{12.706 * math.sqrt(0.5) / math.sqrt(2):.2f}"
    assert text.splitlines() == [
        "| Methods | A | AVG | seeds |",
        "| --- | ---: | ---: | ---: |",
        "| BASE | **50.00** | 20.00 | 1 |",
        f"| SSTOKEN | 49.50 ± {half} | **30.50 ± {half}** | 2 |",
        "| *the paper* |  |  |  |",
        "| BASE | **1.00** | 2.00 |  |",
        "| FULL | 0.50 | **3.00** |  |",
    ]
    alike = [Line("A", [42], [[50.001]], []), Line("B", [42], [[50.004]], [])]
    assert markdown(alike, ["AVG"], {"BASE": [1.0]}, "").count("**50.00**") == 2  # what reads alike is marked alike


# ------------------------------------------------------------------------------------------ a small reproduction


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def command(llama, rows, benchmarks, out, *more):
    flags = ["--model", llama, "--data", rows, "--benchmarks", benchmarks, "--out", out, "--reference-limit", "6"]
    flags += ["--tasks", "arc_easy,winogrande", "--eval-limit", "3", "--dtype", "float32"]
    return [*map(str, flags), *more, "--", *"--batch-size 10 --lora-rank 4 --lr 0.01 --max-steps 50".split()]


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells are made here, not in processes of their own, which take longer to start than to work."""
    scripts = {"train.py": train.main, "evaluate.py": evaluate.main}

    def call(given):
        name, *flags = map(str, given[1:])
        scripts[Path(name).name](flags)

    monkeypatch.setattr(reproduce, "call", call)


@pytest.mark.slow  # 14 trainings and 13 evaluations
def test_a_small_table_1_from_start_to_end(llama, rows, benchmarks, tmp_path, monkeypatch, capsys, in_this_process):
    reproduce.main(command(llama, rows, benchmarks, tmp_path, "--seeds", "2"))
    printed = capsys.readouterr().out
    text = (tmp_path / "table1.md").read_text()
    assert text in printed and "AVG of 2" in text and "TyDiQA" in text  # the notes
    record = json.loads((tmp_path / "table1.json").read_text())
    labels = ["BASE", "FULL", "RANDOM", "RHO-1", "TOKENCLEANING, fixed-model", "TOKENCLEANING, self-evolving"]
    assert list(record["rows"]) == [*labels, "TOKENCLEANING, the better", "SSTOKEN"]
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")

    def scores(folder):  # from evaluate.py's own file
        results = json.loads((folder / "evaluation.json").read_text())["results"]
        values = [100 * results["arc_easy"]["acc"], 100 * results["winogrande"]["acc"]]
        return [*values, sum(values) / 2]

    for label, name in {"FULL": "full", "RHO-1": "rho1-rho-0.6", "SSTOKEN": "sstoken-rho-0.6"}.items():
        row, folders = record["rows"][label], [tmp_path / f"{name}-seed{seed}" for seed in (42, 43)]
        assert row["seeds"] == [42, 43] and row["scores"] == [scores(folder) for folder in folders]
        for folder, seed, taken in zip(folders, (42, 43), row["seconds"], strict=True):
            run = json.loads((folder / "run.json").read_text())
            given = run["arguments"]
            assert (given["seed"], given["loss_mean"], given["batch_size"]) == (seed, "batch", 10)
            reference = sum(
                json.loads((tmp_path / f"reference-seed{seed}" / "run.json").read_text())["seconds"].values()
            )
            assert taken["training"] == run["seconds"]["training"] > 0
            assert taken["reference"] == (reference if label == "RHO-1" else 0)
    rho1 = json.loads((tmp_path / "rho1-rho-0.6-seed43" / "run.json").read_text())["arguments"]
    assert rho1["reference"] == str(tmp_path / "reference-seed43")
    assert not list(tmp_path.rglob("checkpoint-*"))

    calls = []
    monkeypatch.setattr(reproduce, "call", calls.append)
    reproduce.main(command(llama, rows, benchmarks, tmp_path, "--seeds", "2"))
    assert calls == []  # all is there
    (tmp_path / "random-rho-0.6-seed43" / "evaluation.json").unlink()
    with pytest.raises(UserError, match="evaluation.json"):  # asked again, and only that
        reproduce.main(command(llama, rows, benchmarks, tmp_path, "--seeds", "2"))
    assert len(calls) == 1 and str(calls[0][1]).endswith("evaluate.py")
    with pytest.raises(UserError, match="--limit was None, now it is 7"):
        reproduce.main(command(llama, rows, benchmarks, tmp_path, "--limit", "7"))
    evaluation = json.loads((tmp_path / "full-seed42" / "evaluation.json").read_text())
    assert evaluation["dtype"] == "float32"


def test_the_reference_can_be_trained_on_what_ds2_selects(llama, rows, benchmarks, tmp_path, in_this_process):
    rated = tmp_path / "rated.jsonl"
    ds2.main(["--model", str(llama), "--data", str(rows), "--top", "5", "--out", str(rated), "--dtype", "float32"])
    assert [json.loads(line)["selected"] for line in rated.read_text().splitlines()].count(True) == 5
    flags = ["--reference-data", str(rated), "--reference-top", "5", "--rating-field", "curated"]
    reproduce.main(command(llama, rows, benchmarks, tmp_path, "--methods", "rho1", "--seeds", "2", *flags))
    for seed in (42, 43):
        run = json.loads((tmp_path / f"reference-seed{seed}" / "run.json").read_text())
        assert run["samples"] == 5 and run["arguments"]["rating_field"] == "curated"


def test_an_evaluation_of_other_weights_is_not_taken(llama, rows, benchmarks, tmp_path, in_this_process):
    flags = command(llama, rows, benchmarks, tmp_path, "--methods", "full", "--seeds", "1")
    reproduce.main(flags)
    cell = tmp_path / "full-seed42"
    first = json.loads((cell / "evaluation.json").read_text())
    adapter = load_file(cell / "adapter_model.safetensors")
    save_file({name: 9 * tensor for name, tensor in adapter.items()}, cell / "adapter_model.safetensors")
    reproduce.main(flags)
    second = json.loads((cell / "evaluation.json").read_text())
    assert second["key"] != first["key"] and second["keys"] == first["keys"]
    reproduce.main(flags)
    assert json.loads((cell / "evaluation.json").read_text()) == second


def test_a_cell_answers_for_the_files_that_it_was_made_of(
    llama, rows, benchmarks, tmp_path, monkeypatch, in_this_process
):
    """Benchmark rows and an adapter's settings: asked again, that alone. The model's: cells of another setting."""
    model, questions = shutil.copytree(llama, tmp_path / "model"), shutil.copytree(benchmarks, tmp_path / "questions")
    flags = command(model, rows, questions, tmp_path / "out", "--methods", "base,full", "--seeds", "1")
    reproduce.main(flags)
    calls, real = [], reproduce.call

    def call(given):
        calls.append(Path(given[1]).name)
        real(given)

    monkeypatch.setattr(reproduce, "call", call)
    reproduce.main(flags)
    assert calls == []
    edit_json(tmp_path / "out" / "full-seed42" / "adapter_config.json", lambda config: config.update(lora_alpha=99))
    reproduce.main(flags)
    assert calls == ["evaluate.py"]
    path = next(questions.rglob("arc_easy.test.jsonl"))
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    reproduce.main(flags)
    assert calls == ["evaluate.py"] * 3
    reproduce.main(flags)
    (tmp_path / "out" / "base.json").write_text('{"runs": 5}')
    with pytest.raises(UserError, match="base.json exists and holds no evaluation"):
        reproduce.main(flags)
    edit_json(model / "config.json", lambda config: config.update(rms_norm_eps=0.1))
    with pytest.raises(UserError, match="cells of another configuration: the content of --model was"):
        reproduce.main(flags)
    assert calls == ["evaluate.py"] * 3


@pytest.mark.parametrize("text", ["[]", '{"seconds": 5}', '{"seconds": {"training": "x"}}', '{"seconds": {}'])
def test_a_cell_whose_record_is_of_another_shape_is_named(llama, rows, benchmarks, tmp_path, in_this_process, text):
    flags = command(llama, rows, benchmarks, tmp_path, "--methods", "full", "--seeds", "1")
    reproduce.main(flags)
    (tmp_path / "full-seed42" / "run.json").write_text(text)
    with pytest.raises(UserError, match="full-seed42/run.json"):
        reproduce.main(flags)


def test_what_is_named_is_there_before_anything_is_made(llama, rows, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "call", lambda given: pytest.fail("started"))
    out = tmp_path / "out"
    for change, message in [
        (("--data", tmp_path / "no.jsonl"), "no rows|no.jsonl"),
        (("--benchmarks", tmp_path / "nothing"), "--benchmarks .*nothing is no folder"),
        (("--out", rows / "out"), "cannot be written"),
        (("--launcher", "torchrun-of-nobody --nproc_per_node 2"), "--launcher torchrun-of-nobody is no command"),
        (("--reference-data", tmp_path / "folder-without"), "is neither a local folder nor available"),
    ]:
        with pytest.raises(UserError, match=message):
            reproduce.main(command(llama, rows, benchmarks, out, *map(str, change)))


def test_cells_of_other_rows_are_not_averaged(llama, rows, benchmarks, tmp_path, in_this_process):
    flags = command(llama, rows, benchmarks, tmp_path, "--methods", "full", "--seeds")
    place = flags.index("--seeds") + 1
    reproduce.main([*flags[:place], "1", *flags[place:]])
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="the content of --data was "):
        reproduce.main([*flags[:place], "2", *flags[place:]])


def test_a_command_that_failed_leaves_nothing_in_the_way_of_the_next(llama, rows, benchmarks, tmp_path):
    with pytest.raises(UserError):
        reproduce.main(command(tmp_path / "no-model", rows, benchmarks, tmp_path / "out", "--methods", "base"))
    reproduce.main(command(llama, rows, benchmarks, tmp_path / "out", "--methods", "base", "--seeds", "1"))
    with pytest.raises(UserError, match="--table 3 has none of the rows of --methods; it has base, full, sstoken"):
        reproduce.main(command(llama, rows, benchmarks, tmp_path / "out", "--table", "3", "--methods", "rho1"))


def test_a_cell_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(UserError, match="ended by signal 9"):
        reproduce.call([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(SystemExit, match="3"):
        reproduce.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_figure_3_has_gamma_over_full_and_rho_from_base_to_full(tmp_path, monkeypatch):
    drawn, real = [], Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda figure: drawn.append(real(figure)) or drawn[-1])
    line = lambda label, score: Line(label, [42, 43], [[score], [score + 1]], [{}, {}])
    ends = [line("BASE", 30.0), line("FULL", 40.0)]
    tables.plot_sweep([*ends, *(line(f"SSTOKEN (gamma {g})", 50 + g) for g in (1.0, 0.0))], "gamma", tmp_path / "a.png")
    tables.plot_sweep([*ends, *(line(f"SSTOKEN (rho {r})", 50 + r) for r in (0.2, 0.8))], "rho", tmp_path / "b.png")
    curves = [[list(curve.get_xydata().ravel()) for curve in axes.get_lines()] for axes in drawn]
    assert curves[0][0] == [0.0, 50.5, 1.0, 51.5]
    assert any(set(curve[1::2]) == {40.5} for curve in curves[0][1:])  # FULL, dashed
    assert curves[1][0] == [0.0, 30.5, 0.2, 50.7, 0.8, 51.3, 1.0, 40.5]


def test_a_sweep_has_its_figure_and_only_the_rows_asked_for(llama, rows, benchmarks, tmp_path, in_this_process):
    reproduce.main(
        command(llama, rows, benchmarks, tmp_path, "--table", "4", "--seeds", "1", "--methods", "base,sstoken")
    )
    record = json.loads((tmp_path / "table4.json").read_text())
    assert list(record["rows"]) == ["BASE", *(f"SSTOKEN (rho {rho})" for rho in (0.2, 0.4, 0.6, 0.8))]
    assert (tmp_path / "figure3b.png").exists()
    given = [
        json.loads((tmp_path / f"sstoken-rho-{rho}-seed42" / "run.json").read_text())["arguments"]["rho"]
        for rho in (0.2, 0.8)
    ]
    assert given == [0.2, 0.8]


def test_auto_and_an_objective_have_their_rows_and_share_no_cell(llama, rows, benchmarks, tmp_path, in_this_process):
    given = command(llama, rows, benchmarks, tmp_path, "--seeds", "1", "--methods", "sstoken,auto,dft")
    shared = ["--history", "ema", "--gain=probability", "--warmup-ratio", "0.1"]  # two of them for sstoken alone
    reproduce.main([*given, *shared])
    record = json.loads((tmp_path / "table1.json").read_text())
    assert list(record["rows"]) == ["SSTOKEN", "AUTO", "DFT"] and (tmp_path / "figure2.png").exists()
    runs = [json.loads(path.read_text())["arguments"] for path in sorted(tmp_path.glob("*-seed42/run.json"))]
    assert [(run["method"], run["rho"]) for run in runs] == [("dft", 0.6), ("sstoken", 0.6), ("sstoken", "auto")]
    assert [(run["history"], run["gain"]) for run in runs] == [("base", "log"), ("ema", "probability"), ("base", "log")]
    assert all(run["warmup_ratio"] == 0.1 for run in runs)
    assert all(0 <= row["mean"][-1] <= 100 and sum(row["seconds"][0].values()) > 0 for row in record["rows"].values())


@pytest.mark.slow
def test_a_stopped_reproduction_goes_on_where_it_was(llama, rows, benchmarks, tmp_path):
    script = [sys.executable, "-m", "paper.reproduce"]
    flags = command(llama, rows, benchmarks, tmp_path, "--seeds", "1", "--methods", "full,random")
    flags += ["--epochs", "6", "--checkpoint-every", "2"]
    environment = interrupted(tmp_path / "full-seed42", signal.SIGTERM, 8, tmp_path / "site", parent=True)
    stopped = subprocess.run([*script, *flags], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert stopped.returncode == 128 + signal.SIGTERM and "the same command goes on from here" in stopped.stderr
    log = tmp_path / "full-seed42" / "log.jsonl"
    assert 0 < len(log.read_text().splitlines()) < 12
    first = log.read_text().splitlines()[0]
    subprocess.run([*script, *flags], check=True, capture_output=True, cwd=ROOT)
    lines = log.read_text().splitlines()
    assert len(lines) == 12 and lines[0] == first  # its time of day too: that step was not done again
    assert list(json.loads((tmp_path / "table1.json").read_text())["rows"]) == ["FULL", "RANDOM"]


MISTAKES = {
    "--seeds is 0": ["--seeds", "0"],
    "--rho is 2.0": ["--rho", "2"],
    "--methods 'best' is not one of": ["--methods", "base,best"],
    "holds none of the table's columns": ["--tasks", "mmlu_anatomy"],
    "--eval-limit is 0.0": ["--eval-limit", "0"],
    "say what the reference model is trained on": ["--limit", "9"],
    "--gamma after -- would undo": ["--", "--gamma", "1"],
    "--seed=7 after -- would undo": ["--", "--seed=7"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_refused(message):
    with pytest.raises(UserError, match=message):
        reproduce.parse_arguments(["--model", "x", "--out", "x", *MISTAKES[message]])


def test_the_reference_of_the_released_pool_is_trained_on_its_best_rated_rows():
    parse = lambda *more: reproduce.parse_arguments(["--model", "x", "--out", "x", *more])
    assert parse().reference_top == 10_000 and parse("--reference-limit", "5").reference_top is None
    assert parse("--methods", "full,sstoken", "--limit", "9").reference_top is None
    assert parse("--table", "3").reference_top == parse("--methods", "full").reference_top == 10_000  # they share cells


def test_a_part_of_the_columns_needs_all_its_tasks():
    asked = lambda tasks: reproduce.parse_arguments(["--model", "x", "--out", "x", "--tasks", tasks]).asked
    assert asked("all") == [task for _, task, _ in TABLE]
    assert asked("arc_easy,mmlu_anatomy,agieval") == ["arc_easy", "agieval"]


def test_a_figure_without_matplotlib_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(UserError, match="figures need matplotlib: pip install matplotlib"):
        tables.find_matplotlib()
