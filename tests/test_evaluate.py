"""The evaluator alone: trees and aggregation by hand, the command and its files. Against lm-eval: test_parity.py."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from benchmark_rows import write_benchmarks
from conftest import edit_json, make_checkpoint
from hub import serve
from test_lora import adapted

import evaluate
import train
from evaluate import loglikelihoods, summarize, table, token_scores
from lora import save_adapter
from model import load_model, token_nll
from paper import benchmarks
from paper.benchmarks import TABLE, TASKS
from support import decoding, losses, packing
from support.decoding import generate
from support.files import UserError
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def run(*arguments, **settings):
    command = [sys.executable, ROOT / "evaluate.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **settings)


# ------------------------------------------------------------------------------------------------------------ trees


PAIRS = [
    (f"{start} {n} and", f" {end}")
    for n in (1, 22)
    for start in ("The quick brown fox", "A sentence with numbers", "f(y) =")
    for end in ("two", "two and two is four", "jumps over the dog", "\U0001f44d")
]


def test_neither_order_nor_batches_change_a_likelihood(llama):
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    plain = loglikelihoods(model, tokenizer, PAIRS, 4096)
    order = random.Random(1).sample(range(len(PAIRS)), len(PAIRS))
    shuffled = loglikelihoods(model, tokenizer, [PAIRS[i] for i in order], 60)
    for i, (log_p, greedy) in zip(order, shuffled, strict=True):
        assert abs(log_p - plain[i][0]) < 1e-4 and greedy == plain[i][1]
    alone = [loglikelihoods(model, tokenizer, [pair])[0] for pair in PAIRS]
    assert [log_p for log_p, _ in plain] == pytest.approx([log_p for log_p, _ in alone], abs=1e-4)


def test_shared_tokens_run_once_and_only_scored_ones_meet_the_vocabulary(llama, monkeypatch):
    model, tokenizer, tokens, rows = load_model(llama), load_tokenizer(llama), [], []
    model.register_forward_pre_hook(lambda module, args: tokens.append(args[0].numel()))
    scores = token_scores
    monkeypatch.setattr(evaluate, "token_scores", lambda h, w, t: rows.append(len(t)) or scores(h, w, t))
    prefix = "The quick brown fox jumps over the lazy dog. " * 4
    pairs = [(f"{prefix}Question {n}?", end) for n in range(6) for end in (" two", " the dog", " is four")]
    encoded = packing.encode_pairs(tokenizer, pairs, 512)
    loglikelihoods(model, tokenizer, pairs, 100_000)
    assert sum(rows) == sum(len(request.targets) for request in encoded)
    assert sum(tokens) < 0.25 * sum(len(request.inputs) for request in encoded)


@torch.no_grad()
def test_token_scores_are_token_nll_s_and_know_the_greedy_token():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 16), torch.randn(30, 16), torch.randint(30, (50,))
    targets[::5] = (hidden @ weight.T).argmax(1)[::5]
    for chunk in (1, 7, None):
        log_p, greedy = token_scores(hidden, weight, targets, chunk)
        assert torch.allclose(log_p, -token_nll(hidden, weight, targets), atol=1e-6)
        assert greedy.tolist() == ((hidden @ weight.T).argmax(1) == targets).tolist()


# ------------------------------------------------------------------------------------------------ what is reported


def test_summary_and_groups_by_hand():
    assert summarize([{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}, {"acc": 1.0}]) == {
        "acc": 0.75,
        "acc_stderr": pytest.approx(0.25),  # sqrt(0.75 / 3) / 2
        "n": 4,
    }
    assert summarize([{"acc": 1.0}])["acc_stderr"] is None
    results = {name: {"exact_match": 0.0, "f1": 0.0, "n": 9} for name in TASKS if name.startswith("tydiqa_goldp")}
    for scores in results.values():
        scores |= {"exact_match_stderr": 0.3, "f1_stderr": None}
    results["tydiqa_goldp_ar"] |= {"f1": 0.9, "n": 1}
    benchmarks.add_groups(results)
    assert results["tydiqa"]["f1"] == pytest.approx(0.1) and results["tydiqa"]["n"] == 73
    assert results["tydiqa"]["exact_match_stderr"] == pytest.approx(0.1) and results["tydiqa"]["f1_stderr"] is None
    assert "mmlu" not in results and "agieval" not in results


def test_the_table_has_table_1_s_columns_and_an_average_of_all_ten():
    results = {task: {metric: n / 100, "n": 1} for n, (_, task, metric) in enumerate(TABLE, 1)}
    results["logiqa"]["acc_norm"] = 0.5
    full = {"model": "m/Base", "adapter": None, "results": results}
    part = {"model": "m/Base", "adapter": "runs/one", "results": {"arc_easy": {"acc": 0.25, "n": 4}}}
    header, _, first, second, note = table([full, part]).splitlines()
    columns = "model TriviaQA TruthfulQA MMLU ARC-C ARC-E TyDiQA Wino HS LogiQA AGIEval AVG"
    assert header.replace("|", " ").split() == columns.split()
    assert first.replace("|", " ").split() == ["Base", *(f"{n}.00" for n in range(1, 11)), "5.50"]
    assert second.replace("|", " ").split() == ["one", "-", "-", "-", "-", "25.00", *["-"] * 6]
    assert "logiqa acc_norm 50.00" in note


# ------------------------------------------------------------------------------------------------------ the command


def test_rows_of_one_name_are_told_apart_in_the_table():
    results = {"arc_easy": {"acc": 0.25, "n": 4}, "logiqa": {"acc": 0.5, "acc_norm": 0.5, "n": 4}}
    adapters = [None, "runs/a/step-00000028", "runs/b/step-00000028/", "x/base"]
    lines = table([{"model": "org/base", "adapter": adapter, "results": results} for adapter in adapters]).splitlines()
    names = ["org/base", "a/step-00000028", "b/step-00000028", "x/base"]
    assert [line.split("|")[1].strip() for line in lines[2:6]] == names
    assert [line.split(":")[0] for line in lines[6:]] == names  # the notes below


def test_choices_too_unlikely_to_be_told_from_zero_have_a_share_all_the_same():
    row = {"mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]}}
    answers = [(-1000.0, False), (-1001.0, False), (-2000.0, False)]
    share = torch.tensor([-1000.0, -1001.0, -2000.0], dtype=torch.float64).softmax(0)[0].item()
    assert TASKS["truthfulqa_mc2"]["metrics"](row, answers)["acc"] == pytest.approx(share)


def test_the_command_writes_results_and_runs_nothing_twice(llama, questions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    data = tmp_path / "rows"
    subprocess.run(["cp", "-r", questions, data], check=True)
    command = ["--model", str(llama), "--data", str(data), "--out", str(out), "--dtype", "float32"]
    evaluate.main([*command, "--tasks", "arc_easy,agieval_lsat_ar,triviaqa"])
    assert "| ARC-E |" in capsys.readouterr().out
    held = json.loads(out.read_text())
    assert held["results"].keys() == {"arc_easy", "agieval_lsat_ar", "triviaqa"} and held["seconds"] > 0
    assert held["results"]["arc_easy"].keys() == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "n"}
    assert held["results"]["triviaqa"]["n"] == 10 and held["model"] == str(llama) and held["adapter"] is None
    assert "torch" in held["versions"]

    asked, real = [], evaluate.answer

    def answer(model, tokenizer, tasks, *rest):
        asked.append(sum(len(task.rows) for task in tasks.values()))
        return real(model, tokenizer, tasks, *rest)

    monkeypatch.setattr(evaluate, "answer", answer)
    evaluate.main([*command, "--tasks", "arc_easy,triviaqa"])
    assert asked == [] and json.loads(out.read_text()) == held
    rows = (data / "arc_easy.test.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "arc_easy.test.jsonl").write_text("\n".join(rows[:3]), encoding="utf-8")
    evaluate.main([*command, "--tasks", "arc_easy,triviaqa"])
    assert asked == [3]
    evaluate.main([*command, "--tasks", "arc_easy,triviaqa", "--limit", "0.5"])
    assert asked == [3, 2, 5]
    evaluate.main([*command, "--tasks", "tydiqa_goldp_en,arc_challenge,tydiqa_goldp_fi", "--limit", "1"])
    assert sorted(asked[3:]) == [1, 2]  # what a group has to write is written at once
    *_, held = json.loads(out.read_text())["runs"]
    assert held["seconds"] == pytest.approx(sum(held["timing"].values())) and held["timing"]["tydiqa_goldp_fi"] > 0


def interrupt_second_answer(monkeypatch) -> list:
    """Ctrl-C in the second of evaluate's calls of `answer`; returns the list that each call is added to."""
    calls, real = [], evaluate.answer

    def answer(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evaluate, "answer", answer)
    return calls


def test_results_survive_an_interrupt(llama, questions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    calls = interrupt_second_answer(monkeypatch)
    command = ["--model", str(llama), "--data", str(questions), "--out", str(out), "--tasks", "arc_easy,logiqa"]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(command)
    assert stopped.value.code == 130 and json.loads(out.read_text())["results"].keys() == {"arc_easy"}
    printed = capsys.readouterr()
    assert f"{out} holds what is done" in printed.err and "| ARC-E |" in printed.out
    evaluate.main(command)
    assert len(calls) == 3 and json.loads(out.read_text())["results"].keys() == {"arc_easy", "logiqa"}


def test_results_of_other_rows_are_gone_once_new_ones_are_asked_for(llama, questions, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    data = shutil.copytree(questions, tmp_path / "rows")
    command = ["--model", str(llama), "--data", str(data), "--out", str(out), "--tasks", "arc_easy,logiqa"]
    evaluate.main(command)
    for path in data.rglob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    interrupt_second_answer(monkeypatch)
    with pytest.raises(SystemExit):
        evaluate.main(command)
    record = json.loads(out.read_text())
    assert {name: result["n"] for name, result in record["results"].items()} == {"arc_easy": 2}


def rows_answered(out: Path) -> list[tuple]:
    """Of each record of a report: its limit, and of how many rows each result is."""
    held = json.loads(out.read_text())
    return [
        (record["limit"], {name: result["n"] for name, result in record["results"].items()})
        for record in held.get("runs", [held])
    ]


def test_a_smaller_look_stands_beside_full_results_and_speaks_for_itself(llama, questions, tmp_path, monkeypatch):
    out, other = tmp_path / "out.json", shutil.copytree(questions, tmp_path / "rows")
    command = ["--model", str(llama), "--data", str(questions), "--out", str(out), "--tasks"]
    evaluate.main([*command, "arc_easy,logiqa", "--limit", "3"])
    evaluate.main([*command, "arc_easy,logiqa"])
    first = json.loads(out.read_text())["runs"]
    evaluate.main([*command, "arc_easy", "--limit", "2"])
    evaluate.main([*command[:2], "--data", str(other), *command[4:], "logiqa"])
    every = {"arc_easy": 4, "logiqa": 4}
    assert rows_answered(out) == [
        (3, {"arc_easy": 3, "logiqa": 3}),
        (None, every),
        (2, {"arc_easy": 2}),
        (None, {"logiqa": 4}),
    ]
    assert json.loads(out.read_text())["runs"][:2] == first
    monkeypatch.setattr(evaluate, "answer", lambda *given: pytest.fail("held already"))
    evaluate.main([*command, "arc_easy,logiqa"])


def test_processes_that_write_one_report_at_once_keep_each_other_s_answers(tmp_path):
    """Four write each task of one record in turn, a fifth one of another record."""
    context = multiprocessing.get_context("fork")
    at_once, start = 8, context.Barrier(5)

    def write(model, names):
        report = losses.Report(tmp_path / "out.json")
        record = report.record("key", {"model": model})
        start.wait()
        for name in names:
            with report.saving(record):
                record["results"][name] = {"n": len(name)}

    names = [[f"task {i} {j}" for j in range(at_once)] for i in range(5)]
    processes = [context.Process(target=write, args=("a" if i < 4 else "b", names[i])) for i in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    a, b = sorted(json.loads((tmp_path / "out.json").read_text())["runs"], key=lambda record: record["model"])
    assert sorted(a["results"]) == sum(names[:4], []) and sorted(b["results"]) == names[4]


def change(path: Path, **settings):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


# What an answer depends on, beside the weights
CHANGES = {
    "rope": lambda at: change(at / "m" / "config.json", rope_theta=3.0, rope_parameters={"rope_theta": 3.0}),
    "norm": lambda at: change(at / "m" / "config.json", rms_norm_eps=0.5),
    "ends": lambda at: change(at / "m" / "generation_config.json", eos_token_id=7),
    "penalty": lambda at: change(at / "m" / "generation_config.json", repetition_penalty=1.5),
    "tokens": lambda at: change(at / "m" / "tokenizer_config.json", bos_token=None),
    "vocabulary": lambda at: (at / "m" / "tokenizer.json").write_text((at / "m" / "tokenizer.json").read_text() + " "),
    "map": lambda at: change(at / "m" / "special_tokens_map.json", pad_token="<|end_of_text|>"),
    "template": lambda at: (at / "m" / "chat_template.jinja").write_text("{{ messages }}"),
    "alpha": lambda at: change(at / "a" / "adapter_config.json", lora_alpha=99),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_answer_is_asked_again_once_a_file_has_changed_that_it_depends_on(
    llama, questions, tmp_path, monkeypatch, name
):
    model, out = shutil.copytree(llama, tmp_path / "m"), tmp_path / "out.json"
    save_adapter(adapted(llama), tmp_path / "a")
    command = ["--model", str(model), "--adapter", str(tmp_path / "a"), "--data", str(questions), "--out", str(out)]
    command += ["--tasks", "arc_easy", "--limit", "2", "--dtype", "float32"]
    asked, real = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *given: asked.append(1) or real(*given))
    evaluate.main(command)
    evaluate.main(command)
    assert len(asked) == 1
    (tmp_path / "m" / "README.md").write_text("changes nothing")
    evaluate.main(command)
    assert len(asked) == 1
    CHANGES[name](tmp_path)
    evaluate.main(command)
    assert len(asked) == 2 and len(rows_answered(out)) == 1


REPORTS = [
    {"runs": 5}, {"runs": {}}, {"runs": [5]}, {"runs": None}, {"results": {}},
    {"results": [], "keys": {}, "timing": {}},
    {"runs": [{"results": {"arc_easy": 5}, "keys": {}, "timing": {}}]},
    {"results": {"arc_easy": {"acc": "high"}}, "keys": {}, "timing": {}},
    {"results": {"arc_easy": {"acc": 10**400}}, "keys": {}, "timing": {}},
    {"results": {}, "keys": None, "timing": {}}, {"results": {}, "keys": {}, "timing": {"arc_easy": []}},
    {"results": {}, "keys": {}, "timing": {}, "model": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("content", REPORTS)
def test_a_report_of_another_shape_is_refused_and_stays(llama, questions, tmp_path, content):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(content))
    command = ["--model", str(llama), "--data", str(questions), "--out", str(out), "--tasks", "arc_easy"]
    with pytest.raises(UserError, match="out.json exists and holds no evaluation|out.json cannot be read as JSON"):
        evaluate.main(command)
    assert json.loads(out.read_text()) == content


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "long"])
def test_a_report_that_is_no_file_is_named(llama, questions, tmp_path, kind):
    out = tmp_path / ("o" * 5000 if kind == "long" else "out.json")
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "device":
        out.symlink_to("/dev/zero")
    elif kind == "folder":
        out.mkdir()
    command = ["--model", str(llama), "--data", str(questions), "--out", str(out), "--tasks", "arc_easy"]
    with pytest.raises(UserError, match=out.name[:9]):
        evaluate.main(command)


def test_base_and_adapters_in_one_go_load_the_base_once(llama, questions, tmp_path, monkeypatch, capsys):
    folders = [tmp_path / "one", tmp_path / "two"]
    for n, folder in enumerate(folders):
        model = adapted(llama)
        with torch.no_grad():
            [layer.lora_B.mul_(1 + 5 * n) for layer in evaluate.lora.lora_layers(model).values()]
        save_adapter(model, folder)
    loads, real = [], load_model
    monkeypatch.setattr(evaluate, "load_model", lambda *a: loads.append(a) or real(*a))
    out = tmp_path / "out.json"
    command = ["--model", str(llama), "--data", str(questions), "--tasks", "truthfulqa_mc2", "--dtype", "float32"]
    flags = [flag for folder in folders for flag in ("--adapter", str(folder))]
    evaluate.main([*command, *flags, "--out", str(out)])
    assert len(loads) == 1
    together = json.loads(out.read_text())["runs"]
    assert [record["adapter"] for record in together] == [None, *map(str, folders)]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == [llama.name, "one", "two"]
    for record, own in zip(together, ([], flags[:2], flags[2:]), strict=True):
        evaluate.main([*command, *own, "--out", str(tmp_path / "alone.json")])
        alone = json.loads((tmp_path / "alone.json").read_text())
        alone = alone.get("runs", [alone])[-1]
        assert alone["results"] == record["results"] and alone["adapter"] == record["adapter"]
    assert len({record["results"]["truthfulqa_mc2"]["acc"] for record in together}) == 3

    save_adapter(adapted(llama, rank=2), folders[1])  # other weights under the same name are another model
    evaluate.main([*command, "--adapter", str(folders[1]), "--out", str(out)])
    again = json.loads(out.read_text())["runs"]
    assert again[:2] == together[:2] and again[2]["results"] != together[2]["results"] and len(again) == 3


@pytest.mark.slow
def test_ranks_share_the_work_and_agree_with_one(llama, questions, tmp_path):
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    common = ["--model", str(llama), "--data", str(questions), "--dtype", "float32"]
    common += ["--tasks", "arc_easy,winogrande,triviaqa,mmlu_anatomy,agieval_math"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = run(*common, "--out", outs[0], env=environment)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluate.py"]
    second = subprocess.run(
        [*launch, *common, "--out", str(outs[1])], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert first.returncode == second.returncode == 0, second.stderr
    one, two = (json.loads(out.read_text()) for out in outs)
    assert one["results"] == two["results"]
    assert first.stdout == second.stdout and second.stdout.count("ARC-E") == 1


@pytest.mark.slow
def test_rows_come_from_the_hub_one_configuration_at_a_time(llama, questions, tmp_path):
    def publish(source, path):
        rows = [json.loads(line) for line in (questions / f"{source}.jsonl").read_text().splitlines()]
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    mmlu, arc, sat = tmp_path / "mmlu", tmp_path / "arc", tmp_path / "sat"
    for subject in ("anatomy", "virology"):
        for split in ("dev", "test"):
            publish(f"mmlu/{subject}.{split}", mmlu / subject / f"{split}-00000-of-00001.parquet")
    publish("arc_easy.test", arc / "ARC-Easy" / "test-00000-of-00001.parquet")
    publish("arc_challenge.test", arc / "ARC-Challenge" / "test-00000-of-00001.parquet")
    publish("agieval/sat-math.test", sat / "data" / "test-00000-of-00001.parquet")
    repos = {
        ("dataset", "cais/mmlu", "main"): mmlu,
        ("dataset", "allenai/ai2_arc", "main"): arc,
        ("dataset", "hails/agieval-sat-math", "main"): sat,
    }
    tasks = "arc_easy,mmlu_virology,agieval_sat_math"
    command = ["--model", llama, "--dtype", "float32", "--tasks", tasks]
    outs = [tmp_path / f"{name}.json" for name in ("hub", "offline", "folder")]
    with serve(repos, tmp_path / "cache") as (environment, requests):
        found = run(*command, "--out", outs[0], env=environment)
        assert found.returncode == 0, found.stderr
        assert not any("anatomy" in path or "Challenge" in path for _, path, _ in requests if "/resolve/" in path)
        refused = run(*command, "--tasks", "logiqa", env=environment)
        assert refused.returncode == 2 and refused.stderr.startswith("error: logiqa: EleutherAI/logiqa is neither")
    assert run(*command, "--out", outs[1], env=environment | {"HF_HUB_OFFLINE": "1"}).returncode == 0
    assert run(*command, "--out", outs[2], "--data", questions).returncode == 0
    hub, offline, folder = (json.loads(out.read_text())["results"] for out in outs)
    assert hub == offline == folder and len(hub) == 3


def test_mistakes_end_with_one_line_that_names_them(llama, questions, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "arc_easy.test.jsonl").write_text('{"question": "?", "choices": {"text": ["a"], "label": ["A"]}}\n')
    (rows / "logiqa.test.jsonl").write_text("{\n")
    (rows / "tydiqa.train.jsonl").write_text('{"id": "english-1"}\n')
    (rows / "winogrande.validation.jsonl").write_text("")
    (tmp_path / "other.json").write_text('{"something": 1}')
    for flags, message in [
        (["--tasks", "arc"], "--tasks 'arc' is not one of all, triviaqa,"),
        (["--limit", "0"], "--limit is 0.0; it must be above 0"),
        (["--batch-tokens", "0"], "--batch-tokens is 0; it must be at least 1"),
        (["--data", tmp_path / "nowhere"], "nowhere is not a folder"),
        (["--data", rows, "--tasks", "arc_easy"], "arc_easy, row 1: KeyError 'answerKey'"),
        (["--data", rows, "--tasks", "logiqa"], "logiqa: .*logiqa.test.jsonl, line 1: not JSON"),
        (["--data", rows, "--tasks", "tydiqa_goldp_fi"], "tydiqa_goldp_fi: no row's id starts with finnish-"),
        (["--data", rows, "--tasks", "winogrande"], "winogrande.validation.jsonl has no rows"),
        (["--data", rows, "--tasks", "hellaswag"], "hellaswag.validation.jsonl cannot be read"),
        (["--data", questions, "--tasks", "arc_easy", "--out", tmp_path / "other.json"], "holds no evaluation"),
        (["--data", questions, "--tasks", "arc_easy", "--adapter", rows], "adapter_config.json"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate.main(["--model", str(llama), *map(str, flags)])
    found = run("--model", llama, "--tasks", "arc")
    assert found.returncode == 2 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_a_tokenizer_larger_than_the_embedding_is_refused(questions, tmp_path):
    folder = make_checkpoint(tmp_path / "small", "llama", vocab_size=300)
    with pytest.raises(UserError, match=r"token '.*', id \d+, is outside the embedding of 300 rows"):
        evaluate.main(["--model", str(folder), "--data", str(questions), "--tasks", "arc_easy"])


def test_a_token_that_no_text_makes_may_lie_beyond_the_embedding(llama, questions, rows, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "padded")
    pad = {"id": 400, "content": "<pad>", "special": True}
    edit_json(folder / "tokenizer.json", lambda held: held["added_tokens"].append(held["added_tokens"][0] | pad))
    flags = ["--model", str(folder), "--device", "cpu"]
    evaluate.main([*flags, "--data", str(questions), "--tasks", "arc_easy"])
    train.main([*flags, "--data", str(rows), "--out", str(tmp_path / "out"), "--max-steps", "1"])
    asked = [("what is <pad>?", {"until": ["\x00"], "max_gen_toks": 2})]
    with pytest.raises(UserError, match="token '<pad>', id 400, is outside the embedding of 400 rows"):
        evaluate.generations(load_model(folder), load_tokenizer(folder), asked)


def test_answers_end_where_the_checkpoint_says(llama, tmp_path):
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    model.folder = tmp_path
    assert decoding.generation_settings(model, tokenizer) == {"stop_ids": {1}, "repetition_penalty": 1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "repetition_penalty": 1.3}')
    assert decoding.generation_settings(model, tokenizer) == {"stop_ids": {1, 5, 6}, "repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").unlink()
    free = evaluate.generations(model, tokenizer, [("the quick", {"until": ["\x00"], "max_gen_toks": 9})])[0]
    first = tokenizer.encode_prompts([free])[0][0]
    third = generate(model, tokenizer.encode_prompts(["the quick"]), 9)[0][2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": third}))
    ended = evaluate.generations(model, tokenizer, [("the quick", {"until": ["\x00"], "max_gen_toks": 9})])[0]
    assert free.startswith(ended) and len(ended) < len(free) and first != tokenizer.eos_id
