"""The tokenizer's own word on where a text ends."""

import json
import shutil

import pytest
from conftest import BOS, EOS, edit_json
from transformers import PreTrainedTokenizerFast

from support.files import UserError
from support.tokenizer import load_tokenizer


@pytest.mark.parametrize("eos", [EOS, {"content": EOS, "special": True}, None, "<nothing>"])
def test_the_end_of_text_comes_from_the_tokenizers_config(llama, tmp_path, eos):
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((llama / "tokenizer_config.json").read_bytes())
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(eos_token=eos))
    if eos in (None, "<nothing>"):
        with pytest.raises(UserError, match="eos_token"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).eos_id == 1


@pytest.mark.parametrize(
    "form", ["alone", "an object", "with an empty file beside", "the older file first", "the newer"]
)
def test_the_end_of_text_may_stand_in_special_tokens_map_alone(llama, tmp_path, form):
    shutil.copy(llama / "tokenizer.json", tmp_path)
    said = {"eos_token": {"content": EOS} if form == "an object" else EOS}
    config = {"with an empty file beside": {}, "the older file first": {"eos_token": BOS}}.get(form)
    if form == "the newer":
        config = {"eos_token": BOS, "added_tokens_decoder": {}}
    if config is not None:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(said))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos == theirs.eos_token == (BOS if form == "the newer" else EOS)
