"""The tokenizer's own word on where a text ends."""

import pytest
from conftest import EOS, edit_json

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
