"""What a run leaves: a chat template that is data.encode whoever reads it, a model card, commands that work."""

import importlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import BOS, EOS, make_checkpoint
from huggingface_hub import ModelCard
from hypothesis import given, settings, strategies
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from support.handoff import card, write_card, write_tokenizer
from support.machine import find_device, usual_dtype

TEXT = strategies.text(max_size=40).filter(lambda text: BOS not in text and EOS not in text)
ROLE = strategies.sampled_from(["system", "user", "assistant"])
CONVERSATION = strategies.lists(strategies.fixed_dictionaries({"role": ROLE, "content": TEXT}), min_size=1, max_size=6)


@pytest.fixture(scope="module", params=[True, False], ids=["adds BOS", "adds none"])
def both(request, tmp_path_factory):
    """A run's tokenizer as we read the base's, and as transformers reads what is written beside the run."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    make_checkpoint(base, "llama", adds_bos=request.param)
    (base / "chat_template.jinja").write_text("the base's own, which the run never saw")
    shutil.copy(base / "chat_template.jinja", folder)
    ours = data.load_tokenizer(base)
    write_tokenizer(ours, base, folder)
    return ours, AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(messages=CONVERSATION)
def test_transformers_renders_a_conversation_to_the_ids_that_were_trained_on(both, messages):
    ours, theirs = both
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == data.encode(messages, ours, 10_000).ids.tolist()
    asked = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = BOS if ours.prefix else ""
    assert asked == bos + data.prompt_text(messages, ours)


def test_a_role_that_was_not_trained_is_refused(both):
    with pytest.raises(Exception, match="role tool is not system, user or assistant"):
        both[1].apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_a_run_and_its_merged_model_carry_the_template_and_load(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "run"), "--max-steps", "1", "--merge"]
    train.main([*argv, "--device", "cpu", "--lora-rank", "4"])
    messages = [{"role": "user", "content": "What is two plus two?"}]
    expected = data.prompt_text(messages, data.load_tokenizer(llama))
    for folder in (tmp_path / "run", tmp_path / "run" / "merged"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == BOS + expected
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"  # peft's way, and by itself
        assert data.load_tokenizer(folder).eos == EOS
    again = ["--method", "rho1", "--reference", str(tmp_path / "run"), "--out", str(tmp_path / "rho1")]
    train.main(
        [*argv[:4], *again, "--max-steps", "1", "--device", "cpu", "--lora-rank", "4"]
    )  # with a tokenizer beside
    config = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    config["eos_token"] = BOS
    (tmp_path / "run" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="has another tokenizer than"):
        train.main([*argv[:4], *again, "--overwrite", "--max-steps", "1", "--device", "cpu"])


def test_a_model_s_own_folder_is_no_place_for_a_run(llama, rows, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for flags in ([], ["--overwrite"]):
        with pytest.raises(Exception, match="holds a model .config.json.: choose another --out"):
            train.main(["--model", str(folder), "--data", str(rows), "--out", str(folder), *flags, "--device", "cpu"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------- the card, the next step


def words(printed: str) -> list[list[str]]:
    """The commands that train.py prints after a run."""
    lines = printed.split("go on with:\n")[1].splitlines()
    return [shlex.split(line) for line in lines]


def in_this_process(command: list[str]):
    """Run what a line says, without a Python of its own."""
    python, *rest = command
    assert python == "python"
    module = rest[1] if rest[0] == "-m" else rest[0].removesuffix(".py")
    importlib.import_module(module).main(rest[2:] if rest[0] == "-m" else rest[1:])


@pytest.mark.parametrize("method", ["sstoken", "rho1"])
def test_the_commands_that_a_run_ends_with_can_be_typed(llama, rows, tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", str(llama), "--data", str(rows), "--out", "my run", "--max-steps", "1"]
    argv += ["--dtype", "float32" if usual_dtype(find_device("auto")) == "bfloat16" else "bfloat16"]
    argv += ["--reference-data", str(rows)] if method == "rho1" else []
    train.main([*argv, "--method", method, "--lora-rank", "4", "--max-length", "90", "--device", "cpu"])
    asked, graded, shown = words(capsys.readouterr().out)
    assert ("--reference" in shown) == (method == "rho1") and "--dtype" in asked and "90" in shown
    assert graded == ["python", "evaluate.py", *asked[2:-2]]  # the benchmarks themselves are the hub's
    in_this_process(asked)
    said = capsys.readouterr().out
    assert f"{llama.name}: " in said and "my run: " in said
    in_this_process(shown)
    assert (tmp_path / "explorer.html").exists()


def test_a_card_is_what_the_hub_reads_and_nothing_in_it_is_markup(llama, rows, tmp_path):
    odd = rows.rename(tmp_path / "a | b `c` <i>.jsonl")
    out = tmp_path / "run_1"
    train.main(
        ["--model", str(llama), "--data", str(odd), "--eval-data", str(odd), "--out", str(out), "--max-steps", "1"]
        + ["--lr", "0.01", "--gain", "probability", "--lora-rank", "4", "--device", "cpu", "--dtype", "float32"]
    )
    text = (out / "README.md").read_text()
    head = ModelCard(text).data
    assert (head.base_model, head.library_name, head.tags[1]) == (None, "peft", "sstoken")  # no model of the hub's
    assert "A LoRA adapter of the model in the local folder " in text and llama.name in text.split("The command:")[0]
    record = json.loads((out / "run.json").read_text())
    for when in ("before", "after"):
        assert f"| held-out response loss {when} | {record[f'held_out_loss_{when}']:.4f} nats a token |" in text
    assert "<i>" not in text.split("The command:")[0] and "a \\| b" in text
    (command,) = [line for line in text.splitlines() if line.startswith("    python train.py")]
    again = shlex.split(command)[2:]
    given = vars(train.parse_arguments([*again, "--device", "cpu"]))
    same = {name: value for name, value in record["arguments"].items() if name not in ("out", "device")}
    assert {name: given[name] for name in same} == same  # the command is the run's
    assert "--rho" not in again and "--gain" in again  # and no longer than it must be


def test_a_card_names_a_base_that_the_hub_knows(tmp_path, monkeypatch):
    record = {"arguments": vars(train.parse_arguments(["--model", "org/name"])), "samples": 1, "versions": {}}
    monkeypatch.chdir(tmp_path)
    assert ModelCard(card(record, "run", {})).data.base_model == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)  # what a folder here is called is no name there
    assert ModelCard(text := card(record, "run", {})).data.base_model is None
    assert "A LoRA adapter of the model in the local folder org/name, trained with" in text
    monkeypatch.chdir(tmp_path / "org")
    assert ModelCard(card(record, "run", {})).data.base_model == "org/name"


@pytest.mark.parametrize("what", ["of somebody else", "a pipe", "a folder", "without end"])
def test_a_card_that_somebody_wrote_stays(tmp_path, what):
    path = tmp_path / "README.md"
    make = {"a pipe": os.mkfifo, "a folder": Path.mkdir, "without end": lambda path: path.symlink_to("/dev/zero")}
    make.get(what, lambda path: path.write_text("# mine"))(path)
    before = path.lstat()
    write_card({}, tmp_path, {})
    assert path.lstat() == before
