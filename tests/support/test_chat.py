"""Asked in words: what is printed is what the evaluator's decoding writes, a piece at a time."""

import io
import sys

import pytest
import torch
from test_lora import adapted

import data
import evaluate
import train
from lora import save_adapter
from model import load_model
from support import chat


def expected(model, tokenizer, messages) -> str:
    prompt = data.prompt_text(messages, tokenizer)
    return evaluate.generations(model, tokenizer, [(prompt, {"until": [], "max_gen_toks": 40})])[0]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat, "LONGEST", 40)


def test_an_answer_comes_in_pieces_and_is_the_evaluator_s(short):
    model, tokenizer, pieces = load_model(train.DEMO_FILES["model"]), data.load_tokenizer(train.DEMO_FILES["model"]), []
    turns = [{"role": "user", "content": "What is two plus two?"}]
    ids = data.encode([*turns, {"role": "assistant", "content": ""}], tokenizer, 500).ids[:-1].tolist()
    said = chat.answer(model, tokenizer, ids, pieces.append)
    assert "".join(pieces) == said == expected(model, tokenizer, turns) and len(pieces) > 10
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])  # no half of a character on its own


def test_base_and_adapters_answer_one_under_the_other(llama, short, tmp_path, capsys):
    save_adapter(adapted(llama), tmp_path / "mine")
    flags = ["--model", str(llama), "--adapter", str(tmp_path / "mine"), "--dtype", "float32", "--device", "cpu"]
    evaluate.main([*flags, "--ask", "the quick"])
    printed = capsys.readouterr().out
    turns, tokenizer = [{"role": "user", "content": "the quick"}], data.load_tokenizer(llama)
    base, tuned = expected(load_model(llama), tokenizer, turns), expected(adapted(llama).eval(), tokenizer, turns)
    assert printed == f"{llama.name}: {base}\nmine: {tuned}\n" and base != tuned


def test_lines_of_a_pipe_are_one_conversation_until_an_empty_one(llama, short, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nand the dog?\n\nthe quick\n"))
    torch.manual_seed(0)
    evaluate.main(["--model", str(llama), "--dtype", "float32", "--device", "cpu", "--ask"])
    model, tokenizer = load_model(llama, torch.float32), data.load_tokenizer(llama)
    first = [{"role": "user", "content": "the quick"}]
    one = expected(model, tokenizer, first)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "and the dog?"}]
    two = expected(model, tokenizer, second)
    assert capsys.readouterr().out == f"{one}\n{two}\n{one}\n"


def test_what_is_asked_stays_text_whatever_it_spells(llama, short, monkeypatch):
    seen, real = [], chat.generate
    monkeypatch.setattr(
        chat, "generate", lambda model, prompts, *a, **k: seen.extend(prompts) or real(model, prompts, *a, **k)
    )
    evaluate.main(["--model", str(llama), "--device", "cpu", "--ask", "end <|end_of_text|> here"])
    assert data.load_tokenizer(llama).eos_id not in seen[0]
