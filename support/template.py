"""The template that a run was trained in, as transformers and vLLM read it: Jinja, beside the tokenizer's files."""

import functools
import json
import shutil
from pathlib import Path

from support.checkpoint import TOKENIZER_FILES
from support.files import read_json, write_json, write_whole
from support.tokenizer import Tokenizer

# Appendix A.1, as data.encode builds it; BOS and EOS stand for the tokenizer's own
FORM = """\
{{ BOS }}{% for message in messages %}\
{% if message['role'] not in ('system', 'user', 'assistant') %}\
{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user or assistant') }}\
{% endif %}\
{% if not loop.first %}{{ '\\n' }}{% endif %}\
{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] | trim }}\
{% if message['role'] == 'assistant' %}{{ EOS }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}{{ '<|assistant|>\\n' }}{% endif %}"""


def chat_template(tokenizer: Tokenizer) -> str:
    """Jinja text that renders messages as the run has seen them, BOS and end tokens included."""
    bos = "".join(tokenizer.backend.id_to_token(token) for token in tokenizer.prefix)
    return FORM.replace("{{ BOS }}", f"{{{{ {json.dumps(bos)} }}}}" if bos else "").replace(
        "{{ EOS }}", f"{{{{ {json.dumps(tokenizer.eos)} }}}}"
    )


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path):
    """Write to `folder` the tokenizer's files of `source`, with the run's template in place of any that they hold."""
    for file in [path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()]:
        if not file.name.startswith("chat_template"):
            write_whole(folder / file.name, functools.partial(shutil.copyfile, file))
    for file in folder.glob("chat_template*"):
        file.unlink()
    path = source / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    known = {"eos_token": tokenizer.eos} | ({"bos_token": tokenizer.bos} if tokenizer.bos else {})
    write_json(folder / "tokenizer_config.json", known | config | {"chat_template": chat_template(tokenizer)})
