"""Asked in words: what is printed is what the evaluator's decoding writes, a piece at a time."""

import io
import shutil
import sys
import unicodedata

import pytest
import torch
from test_lora import adapted

import data
import evaluate
import train
from lora import save_adapter
from model import load_model
from support import chat, files
from support.command import SHOWN, short_names


def printed(model, tokenizer, messages) -> str:
    """What is to be seen of an answer, on the screen."""
    return expected(model, tokenizer, messages).translate(SHOWN)


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
    seen = capsys.readouterr().out
    turns, tokenizer = [{"role": "user", "content": "the quick"}], data.load_tokenizer(llama)
    base, tuned = printed(load_model(llama), tokenizer, turns), printed(adapted(llama).eval(), tokenizer, turns)
    assert seen == f"{llama.name}: {base}\nmine: {tuned}\n" and base != tuned


def test_models_of_one_name_all_answer_and_are_told_apart(llama, short, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(llama, tmp_path / "runs" / "last")
    for folder in ("a/last", "b/last"):
        save_adapter(adapted(llama), tmp_path / folder)
    monkeypatch.chdir(tmp_path / "b" / "last")
    flags = ["--model", str(base), "--adapter", "../../a/last/", "--adapter", ".", "--adapter", "../../a/last"]
    evaluate.main([*flags, "--dtype", "float32", "--device", "cpu", "--ask", "the quick"])
    seen = capsys.readouterr().out
    turns, tokenizer = [{"role": "user", "content": "the quick"}], data.load_tokenizer(llama)
    plain, tuned = printed(load_model(llama), tokenizer, turns), printed(adapted(llama).eval(), tokenizer, turns)
    names = {"runs/last": plain, "a/last": tuned, "b/last": tuned}
    lines = [f"{name}: {text}\n" for name, text in [*names.items(), ("a/last", tuned)]]
    assert seen == "".join(lines) and plain != tuned  # the one that is named twice answers twice


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["org/base", "runs/x"], ["base", "x"]),
        (["org/base", "/y/base"], ["org/base", "y/base"]),
        (["m", "a/1/s", "b/1/s", "b/2/s", "b/2/s/"], ["m", "a/1/s", "b/1/s", "2/s", "2/s"]),
        (["/m", "/x/m"], ["//m", "x/m"]),
        (["a\u202eb\x1b"], ["a\\u202eb\\x1b"]),
    ],
)
def test_a_name_is_as_long_as_it_must_be(paths, names):
    assert short_names(paths) == names


def test_lines_of_a_pipe_are_one_conversation_until_an_empty_one(llama, short, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nand the dog?\n\nthe quick\n"))
    torch.manual_seed(0)
    evaluate.main(["--model", str(llama), "--dtype", "float32", "--device", "cpu", "--ask"])
    model, tokenizer = load_model(llama, torch.float32), data.load_tokenizer(llama)
    first = [{"role": "user", "content": "the quick"}]
    one = expected(model, tokenizer, first)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "and the dog?"}]
    two = expected(model, tokenizer, second)
    assert capsys.readouterr().out == f"{one}\n{two}\n{one}\n".translate(SHOWN)


def test_a_conversation_beyond_the_context_goes_on_without_its_oldest_turns(llama, monkeypatch, capsys):
    files.note.cache_clear()
    monkeypatch.setattr(chat, "LONGEST", 30)
    asked = [*(f"the quick brown fox number {n} jumps over" for n in range(24)), "", "the quick"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked)))
    tokenizer, model, talk, answers, left = data.load_tokenizer(llama), load_model(llama), [], "", 0
    for question in asked:
        if not question:  # a new conversation
            talk = []
            continue
        talk.append({"role": "user", "content": question})
        while len(data.prompt_ids(talk, tokenizer)) > 512 - 30:
            talk, left = talk[2:], left + 1
        settings = {"until": [], "max_gen_toks": 30}
        (said,) = evaluate.generations(model, tokenizer, [(data.prompt_text(talk, tokenizer), settings)])
        talk.append({"role": "assistant", "content": said})
        answers += f"{said}\n".translate(SHOWN)
    evaluate.main(["--model", str(llama), "--device", "cpu", "--dtype", "float32", "--ask"])
    seen = capsys.readouterr()
    assert left > 3 and seen.out == answers
    assert seen.err.count("note: the model reads 512 tokens: a conversation of more than 482 loses its beginning") == 1


def test_a_question_beyond_the_context_is_answered_by_its_end_and_told(llama, short, monkeypatch, capsys):
    files.note.cache_clear()
    question = "the quick brown fox " * 200
    evaluate.main(["--model", str(llama), "--device", "cpu", "--dtype", "float32", "--ask", question])
    seen, tokenizer = capsys.readouterr(), data.load_tokenizer(llama)
    messages = [{"role": "user", "content": question}]
    assert seen.out == printed(load_model(llama), tokenizer, messages) + "\n"  # evaluate's cut on the left is the same
    assert "note: the model reads 512 tokens: a conversation of more than 472 loses its beginning" in seen.err


def test_an_answer_is_shown_and_not_obeyed(llama, monkeypatch, capsys):
    said = "see\n\tgnp\u202eexe\u2066.\u200f\u061c \x1b[31m\x9b2J\rfamily \U0001f468\u200d\U0001f469"
    monkeypatch.setattr(chat, "generate", lambda *given, stop, **more: [data.load_tokenizer(llama).encode(said)[0]])
    evaluate.main(["--model", str(llama), "--device", "cpu", "--ask", "the quick"])
    seen = capsys.readouterr().out
    assert seen == (
        "see\n\tgnp\\u202eexe\\u2066.\\u200f\\u061c \u241b[31m\ufffd2J\u240dfamily \U0001f468\u200d\U0001f469\n"
    )


def test_bytes_of_a_question_that_are_no_text_are_spelled_out(llama, monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "converse", lambda model, tokenizer, text, *more: seen.append(text))
    for text in ("caf\udce9 \udcff", "caf\u00e9"):  # as Python decodes the bytes of a command line
        evaluate.main(["--model", str(llama), "--device", "cpu", "--ask", text])
    assert seen == ["caf\\xe9 \\xff", "caf\u00e9"]


def test_unicode_s_list_of_what_turns_a_text_is_what_is_shown():
    turns = {i for i in range(0x110000) if unicodedata.bidirectional(chr(i)) in TURNS}
    marks = {i for i in range(0x110000) if unicodedata.name(chr(i), "") in MARKS}
    assert {i for i in SHOWN if i > 0xFF} == turns | marks and len(turns | marks) == 12


TURNS = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
MARKS = ("LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK")


def test_what_is_asked_stays_text_whatever_it_spells(llama, short, monkeypatch):
    seen, real = [], chat.generate
    monkeypatch.setattr(
        chat, "generate", lambda model, prompts, *a, **k: seen.extend(prompts) or real(model, prompts, *a, **k)
    )
    evaluate.main(["--model", str(llama), "--device", "cpu", "--ask", "end <|end_of_text|> here"])
    assert data.load_tokenizer(llama).eos_id not in seen[0]
