"""The embedded demo: that it is what demo/make.py makes, that anybody can load it, and that fine-tuning teaches it."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import model as decoder
import train
from demo import make
from paper import benchmarks
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
        assert benchmarks.TASKS["instructions"]["metrics"](row, [row["output"]]) == {"exact_match": 1.0}


def test_the_model_has_never_read_what_it_will_be_taught():
    rng = random.Random(1)
    read, taught = [make.plain_text(rng) for _ in range(3000)], json.dumps(rows("sft.jsonl"))
    for phrase in ("opposites", "opposite of each", "to each", "after each", "up by one"):
        assert phrase in taught and not any(phrase in text for text in read), phrase
    assert not any("<|" in text for text in read)  # nor the template


@pytest.mark.slow
def test_train_with_no_arguments_learns_and_says_how_to_go_on(tmp_path):
    """The first commands that anybody types, cut short to 60 steps."""
    command = [sys.executable, str(ROOT / "train.py"), "--max-steps", "60"]
    for _ in range(2):  # it can be run again at once
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"held-out response loss \w+ training: ([\d.]+)", done.stdout))
    assert after < before / 2
    last = done.stdout.splitlines()[-3:]
    assert [line.split()[1] for line in last] == ["evaluate.py", "-m", "train.py"]
    for line in last[:2]:
        script, *given = line.split()[1:]
        script = script if script == "-m" else str(ROOT / script)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for the one that is a module
        command = [sys.executable, script, *given]
        again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "explorer.html").stat().st_size > 10_000


def test_flags_count_in_the_demo_too():
    args = train.parse_arguments(["--method", "full", "--lr", "0.5"])
    assert (args.lr, args.out, args.overwrite) == (0.5, "runs/demo-full", True)
    assert Path(args.model).resolve() == DEMO / "model" and args.epochs == train.DEMO_SETTINGS["epochs"]
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
    with pytest.raises(files.UserError, match=r"instructions.test.jsonl by --data"):
        evaluate.prepare("instructions", benchmarks.loader("instructions", None), tokenizer)
    row = {"messages": [{"role": "user", "content": "hot"}]}
    (tmp_path / "instructions.test.jsonl").write_text(json.dumps(row))
    with pytest.raises(files.UserError, match="ends with the answer that is asked for"):
        evaluate.prepare("instructions", benchmarks.loader("instructions", tmp_path), tokenizer)
