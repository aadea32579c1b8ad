"""The chat template of a run is data.encode, whoever reads it."""

import json
import shutil

import pytest
from conftest import BOS, EOS, make_checkpoint
from hypothesis import given, settings, strategies
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from support.template import write_tokenizer

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
    assert asked == bos + data.prompt_text([*messages, {"role": "assistant", "content": ""}], ours.eos)


def test_a_role_that_was_not_trained_is_refused(both):
    with pytest.raises(Exception, match="role tool is not system, user or assistant"):
        both[1].apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_a_run_and_its_merged_model_carry_the_template_and_load(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "run"), "--max-steps", "1", "--merge"]
    train.main([*argv, "--device", "cpu", "--lora-rank", "4"])
    messages = [{"role": "user", "content": "What is two plus two?"}]
    expected = data.prompt_text([*messages, {"role": "assistant", "content": ""}], EOS)
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
