"""The embedded demo: that it is what demo/make.py makes, that anybody can load it, and that fine-tuning teaches it."""

import functools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import model as decoder
import train
from demo import make
from paper import benchmarks, visualize
from support import files, packing

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def test_it_is_small_and_transformers_loads_it():
    files = {path.name for path in (DEMO / "model").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in (DEMO / "model").iterdir()) < 4e6
    peer = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ours = decoder.load_model(DEMO / "model", torch.float32)
    text = "Question: Please copy sun, map.\nAnswer:\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(ids)), peer(ids).logits, rtol=1e-4, atol=1e-4)
    assert ids[0].tolist() == data.load_tokenizer(DEMO / "model").encode(text)[0]


def test_make_writes_these_rows_and_this_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make.py", "--out", str(tmp_path), "--steps", "2", "--batch", "2"])
    monkeypatch.setattr(make, "what_it_can_do", functools.partial(make.what_it_can_do, count=1))  # nothing, after 2
    make.main()
    for name in ("sft.jsonl", "instructions.test.jsonl", "model/tokenizer.json", "model/config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_no_answer_is_both_trained_on_and_tested():
    trained, tested = ({row["answer"] for row in rows(name)} for name in ("sft.jsonl", "instructions.test.jsonl"))
    assert not trained & tested and len(tested) > 150


def test_every_answer_is_right():
    """Each row's content, worked out again from its instruction by other means."""
    words = re.findall(r"\w+", make.OPPOSITES)
    fact = dict(zip(words[::2], words[1::2], strict=True)) | dict(zip(words[1::2], words[::2], strict=True))
    fact |= {str(n): str(n + 1) for n in range(60)}
    for row in rows("sft.jsonl") + rows("instructions.test.jsonl"):
        clause = re.sub(r"(?i)^hey, |^so, |, will you|up by one", "", row["instruction"])
        asked = re.search(r"\w+(?:, \w+)+", clause)[0].split(", ")
        assert row["answer"] == ", ".join(fact[word] for word in asked), row
        if not row.get("noise"):
            assert benchmarks.TASKS["instructions"]["metrics"](row, [row["output"]]) == {"exact_match": 1.0}


def test_faults_are_what_the_column_says_and_nothing_else_is_wrong():
    """Each fault told from the text alone, and what is left when the characters that are marked are put right."""
    assert all(row["noise"] == [] or len(row["noise"]) == 1 for row in rows("sft.jsonl"))
    spoiled = [row for row in rows("sft.jsonl") if row["noise"]]
    phrases = [re.escape(form).replace(re.escape("{}"), "(.+)") for form in make.ANSWERS]
    kinds = Counter()
    for row in spoiled:
        output, ((start, end),) = row["output"], row["noise"]
        whole = [found[1] for found in (re.fullmatch(phrase, output) for phrase in phrases) if found]
        if (start, end) == (0, len(output) + 1):
            kinds["another answer"] += 1
            assert whole[0] != row["answer"]
        elif start == len(output):
            kinds["cut"] += 1
            assert end == start + 1 and any(
                form.format(row["answer"]).startswith(output + " ") for form in make.ANSWERS
            )
        elif start == 0:
            kinds["boilerplate"] += 1
            assert output[end:] in [form.format(row["answer"]) for form in make.ANSWERS]
        else:
            kinds["wrong word"] += 1
            given, asked = whole[0].split(", "), row["answer"].split(", ")
            wrong = [i for i, (a, b) in enumerate(zip(given, asked, strict=True)) if a != b]
            assert len(wrong) == 1 and output[start:end] == given[wrong[0]]
            assert output[:start] + asked[wrong[0]] + output[end:] in [f.format(row["answer"]) for f in make.ANSWERS]
    assert kinds == {"wrong word": 300, "another answer": 200, "cut": 200, "boilerplate": 140}  # of 2,000: 42 %


def test_training_does_not_read_which_tokens_are_noise(tmp_path):
    (tmp_path / "bare.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "noise"}) + "\n" for row in rows("sft.jsonl"))
    )
    tokenizer = data.load_tokenizer(DEMO / "model")
    ours, bare = (
        data.load_examples(str(path), tokenizer, 128)[0] for path in (DEMO / "sft.jsonl", tmp_path / "bare.jsonl")
    )
    assert all(
        torch.equal(a.ids, b.ids) and torch.equal(*(x.response for x in (a, b)))
        for a, b in zip(ours, bare, strict=True)
    )


def test_marked_tokens_are_those_of_the_marked_characters():
    """Every token of a row is marked if its text, found by decoding what stands before it, touches what is marked."""
    tokenizer, marked_rows = data.load_tokenizer(DEMO / "model"), rows("sft.jsonl")[:300]
    examples = [data.encode(turns, tokenizer, 128) for turns in data.conversations(marked_rows)]
    kinds = Counter()
    for row, example, noise in zip(
        marked_rows, examples, visualize.marked(marked_rows, examples, tokenizer), strict=True
    ):
        ids = example.ids[example.response].tolist()
        assert tokenizer.decode(ids) == row["output"] + "<|end|>"
        ends = [len(tokenizer.decode(ids[:k])) for k in range(len(ids))] + [len(row["output"]) + 1]
        for k, is_noise in enumerate(noise.tolist()):
            text = tokenizer.decode(ids[: k + 1])[ends[k] :]
            first = ends[k] + len(text) - len(text.lstrip() or text)
            assert is_noise == any(start < ends[k + 1] and first < end for start, end in row["noise"])
            kinds[is_noise] += 1
    assert 0.1 < kinds[True] / kinds.total() < 0.3


def test_rows_whose_samples_are_not_theirs_mark_nothing():
    tokenizer, some = data.load_tokenizer(DEMO / "model"), rows("sft.jsonl")[:3]
    examples = [data.encode(turns, tokenizer, 128) for turns in data.conversations(some)]
    assert visualize.marked(some[:2], examples, tokenizer) == [None] * 3
    bare = [{k: v for k, v in some[0].items() if k != "noise"}, {**some[1], "output": "other"}, some[2]]
    found = visualize.marked(bare, examples, tokenizer)
    assert found[:2] == [None, None] and len(found[2]) == int(examples[2].response.sum())
    for other in (None, 3, True, "a remark", ["loud"], [[1]], [["a", "b"]], {"start": 1}):
        assert visualize.marked([{**row, "noise": other} for row in some], examples, tokenizer) == [None] * 3
    short = [data.Example(e.ids[:-4], e.response[:-4]) for e in examples]  # as --max-length cuts them
    assert [len(m) for m in visualize.marked(some, short, tokenizer)] == [int(e.response.sum()) for e in short]


def test_the_model_has_never_read_what_it_will_be_taught():
    rng = random.Random(1)
    read, taught = [make.plain_text(rng) for _ in range(3000)], json.dumps(rows("sft.jsonl"))
    for phrase in ("opposites", "opposite of each", "to each", "after each", "up by one"):
        assert phrase in taught and not any(phrase in text for text in read), phrase
    assert not any("<|" in text for text in read)  # nor the template


@pytest.mark.slow
def test_train_with_no_arguments_learns_and_says_how_to_go_on(tmp_path):
    """The first commands that anybody types, cut short to 60 steps."""
    for steps in ("1", "60"):  # it can be run again at once
        command = [sys.executable, str(ROOT / "train.py"), "--max-steps", steps]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"held-out response loss \w+ training: ([\d.]+)", done.stdout))
    assert after < before / 2
    last = done.stdout.splitlines()[-4:]
    assert [line.split()[1] for line in last] == ["evaluate.py", "-m", "train.py", "train.py"]
    assert last[2].split()[2:] == ["--rho", "auto"]
    for line in last[:2]:
        script, *given = line.split()[1:]
        script = script if script == "-m" else str(ROOT / script)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for the one that is a module
        command = [sys.executable, script, *given]
        again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert '"noise"' in (tmp_path / "explorer.html").read_text()


def test_flags_count_in_the_demo_too():
    args = train.parse_arguments(["--method", "full", "--lr", "0.5"])
    assert (args.lr, args.out, args.overwrite) == (0.5, "runs/demo-full", True)
    assert Path(args.model).resolve() == DEMO / "model" and args.epochs == train.DEMO_SETTINGS["epochs"]
    assert train.parse_arguments(["--rho", "auto"]).out == "runs/demo-auto"
    own = train.parse_arguments(["--out", "mine"])
    assert (own.out, own.overwrite) == ("mine", False)
    assert train.parse_arguments(["--model", "x"]).lr == 1e-4


def test_instructions_are_asked_in_the_template(tmp_path):
    tokenizer, path = data.load_tokenizer(DEMO / "model"), tmp_path / "instructions.test.jsonl"
    turns = [("system", "Be brief."), ("user", " hot "), ("assistant", "cold"), ("user", "up"), ("assistant", "down ")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[1:3]}))
    asked = evaluate.prepare("instructions", benchmarks.loader("instructions", tmp_path), tokenizer)
    texts = [requests[0][0] for requests in asked.requests]
    assert texts[0] == "<|system|>\nBe brief.\n<|user|>\nhot\n<|assistant|>\ncold<|end|>\n<|user|>\nup\n<|assistant|>\n"
    example = data.encode(messages, tokenizer, 100)
    last = int((~example.response).nonzero()[-1]) + 1  # what training saw before the last answer
    assert packing.encode_texts(tokenizer, texts)[texts[0]] == example.ids[:last].tolist()
    grade = benchmarks.TASKS["instructions"]["metrics"]
    assert grade(asked.rows[0], [" down\n"]) == {"exact_match": 1.0}
    assert grade(asked.rows[0], ["down down"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("That is cold, up.", 1.0),
        ("cold, up", 1.0),
        ("Sure thing! That makes cold, up. Anything else?", 1.0),
        ("That is cold, up, wet.", 0.0),
        ("That is wet, cold, up.", 0.0),
        ("That is cold, upper.", 0.0),
        ("That is icecold, up.", 0.0),
        ("That is up, cold.", 0.0),
    ],
)
def test_an_answer_is_right_within_any_phrase_but_not_within_a_longer_list(written, right):
    row = {"prompt": "", "output": "whatever", "answer": "cold, up"}
    assert benchmarks.TASKS["instructions"]["metrics"](row, [written]) == {"exact_match": right}


def test_instructions_need_a_folder_and_an_answer(tmp_path):
    tokenizer = data.load_tokenizer(DEMO / "model")
    with pytest.raises(files.UserError, match=r"--data must name the folder"):
        evaluate.prepare("instructions", benchmarks.loader("instructions", None), tokenizer)
    row = {"messages": [{"role": "user", "content": "hot"}]}
    (tmp_path / "instructions.test.jsonl").write_text(json.dumps(row))
    with pytest.raises(files.UserError, match="ends with the answer that is asked for"):
        evaluate.prepare("instructions", benchmarks.loader("instructions", tmp_path), tokenizer)
