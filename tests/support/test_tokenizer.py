"""The tokenizer's own word on where a text ends."""

import copy
import json
import os
import shutil
import string
import tempfile
from pathlib import Path

import pytest
from conftest import BOS, EOS, TEXT, edit_json, make_tokenizer
from hub import run_python, serve
from hypothesis import given, settings, strategies
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import lora
from model import load_model
from support.decoding import generation_settings
from support.files import UserError
from support.handoff import write_tokenizer
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


# ------------------------------------------------------------------- as transformers loads it, and as a run leaves it

CLASSES = ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"]
CLASSES += ["GPT2TokenizerFast", None]
SCHEMES = ["first", "always", "never", "prepend", "bytes", "bytes after a space", "lower"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
MARKED = """\
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>' }}{{ '\\n' if not loop.last }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n<|assistant|>\\n' }}{%- endif -%}"""
PLAIN = """\
{{- bos_token -}}{%- for m in messages -%}
{{- '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' + eos_token -}}
{%- endfor -%}"""


def make(scheme: str, adds_bos: bool) -> Tokenizer:
    """A small tokenizer: SentencePiece-like with one of Metaspace's schemes or the older normalizer, or byte-level."""
    if scheme.startswith("bytes"):
        made = make_tokenizer(adds_bos)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=scheme != "bytes")
        return made
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    alphabet = sorted({*"".join(TEXT), *string.ascii_letters, "\u2581"})
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", BOS, EOS, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (scheme != "never"))
    value = json.loads(made.to_str())
    value["added_tokens"] = value["added_tokens"][:3]
    if scheme == "prepend":
        steps = [{"type": "Prepend", "prepend": "\u2581"}]
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
        value |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
    else:
        value["pre_tokenizer"]["prepend_scheme"] = scheme if scheme != "lower" else "first"
        value["normalizer"] = {"type": "Lowercase"} if scheme == "lower" else None
    made = Tokenizer.from_str(json.dumps(value))
    if adds_bos:
        bos = [(BOS, made.token_to_id(BOS))]
        made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=bos)
    return made


FLAGS = strategies.fixed_dictionaries({flag: strategies.booleans() for flag in ("lstrip", "rstrip", "normalized")})
SPELLED = [EOS, BOS, *ROLES, "<|end|>", "<|", "|>", "\n", " ", "a", "B", "the dog", "\u00e9\U0001f44d", EOS.upper()]
SAID = strategies.lists(strategies.sampled_from(SPELLED), max_size=5).map("".join)
MADE = {
    "scheme": strategies.sampled_from(SCHEMES),
    "kind": strategies.sampled_from(CLASSES),
    "adds_bos": strategies.booleans(),
    "where": strategies.sampled_from(["file", "decoder", "list", "dict", "map", "added"]),
    "special": strategies.booleans(),
    "flags": strategies.lists(FLAGS, min_size=3, max_size=3),
    "template": strategies.sampled_from([MARKED, PLAIN]),
    "legacy": strategies.sampled_from([True, False, None]),
}


def write(folder, scheme, kind, adds_bos, where, special, flags, template, legacy):
    """A folder with tokenizer.json and where else its tokens may be named: end of text, role markers, end of a turn."""
    made = make(scheme, adds_bos)
    later = [AddedToken(name, special=special, **flags[1]) for name in ROLES] + [AddedToken("<|end|>", **flags[2])]
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": template, "legacy": legacy}
    config |= {"tokenizer_class": kind} if kind else {}
    value = json.loads(made.to_str())
    for token in value["added_tokens"]:
        token |= flags[0] if token["content"] == EOS else {}
    made = Tokenizer.from_str(json.dumps(value))
    if where == "file":
        made.add_tokens(later)
    value, first = json.loads(made.to_str()), made.get_vocab_size()
    names = [token.content for token in later]
    if where == "decoder":
        listed = list(value["added_tokens"])
        for number, token in enumerate(later, first):
            listed.append(
                {flag: getattr(token, flag) for flag in ("content", "single_word", *flags[0], "special")}
                | {"id": number}
            )
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in copy.deepcopy(listed)}
    elif where == "list":
        config["additional_special_tokens"] = names
    elif where == "dict":
        config["extra_special_tokens"] = {f"role_{i}": name for i, name in enumerate(names)}
    elif where == "map":
        (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": names}))
    elif where == "added":
        (folder / "added_tokens.json").write_text(json.dumps({name: first + i for i, name in enumerate(names)}))
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@settings(max_examples=150, deadline=None)
@given(
    made=strategies.fixed_dictionaries(MADE),
    turns=strategies.lists(strategies.tuples(SAID, SAID), min_size=1, max_size=3),
)
def test_ids_are_transformers_and_no_row_spells_a_control_token(made, turns):
    changed = made["scheme"] in (
        "prepend",
        "lower",
    )  # whose normalizers meet tokens too
    changed &= made["where"] == "added" or any(of["normalized"] for of in made["flags"])
    said = [{"role": r, "content": text} for pair in turns for r, text in zip(("user", "assistant"), pair, strict=True)]
    sound = [{**turn, "content": "the dog a"} for turn in said]
    with tempfile.TemporaryDirectory() as place:
        base, run = Path(place, "base"), Path(place, "run")
        base.mkdir(), run.mkdir()
        write(base, **made)
        for template in ("paper", "model"):
            try:
                ours = load_tokenizer(base, template=template)
                data.encode(said, ours, 10_000)
            except UserError as reason:  # by name, where a normalizer changes a control token
                assert changed, reason
                continue
            write_tokenizer(ours, base, run)
            theirs = AutoTokenizer.from_pretrained(run)
            control = [ours.backend.token_to_id(token) for token in (BOS, EOS, *ROLES, "<|end|>")]
            if template == "paper":
                control.pop()
            if template == "model" and made["template"] is PLAIN:
                control = control[:2]
            for spoken in (sound, said):
                ids = data.encode(spoken, ours, 10_000).ids.tolist()
                applied = theirs.apply_chat_template(spoken)["input_ids"]
                if not any(
                    name.lower() in turn["content"].lower() for turn in spoken for name in (BOS, EOS, *ROLES, "<|end|>")
                ):
                    assert ids == applied
                    asked = theirs.apply_chat_template(spoken[:-1], add_generation_prompt=True)["input_ids"]
                    assert data.prompt_ids(spoken[:-1], ours) == asked
                    if template == "model" and (made["kind"] or "Fast")[:4] not in ("Qwen", "GPT2"):
                        assert ids == AutoTokenizer.from_pretrained(base).apply_chat_template(spoken)["input_ids"]
                counted = [ids.count(token) for token in control]
                if spoken is sound:
                    expected = counted
            if not changed:
                assert counted == expected  # elsewhere the template's own may be read in one place and not in another


def test_what_a_template_looks_for_in_an_answer_may_be_said_as_its_tokens(llama, tmp_path):
    """Thoughts, as in Qwen3: the template writes <think> itself, and takes apart an answer that has it."""
    folder = shutil.copytree(llama, tmp_path / "model")
    form = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if '</think>' in m.content %}"
    form += "{{ '<think>' + m.content.split('</think>')[0].split('<think>')[-1] }}"
    form += "{{ '</think>' + m.content.split('</think>')[-1] }}"
    form += "{% elif m.role == 'assistant' %}{{ '<think></think>' + m.content }}{% else %}{{ m.content }}{% endif %}"
    (folder / "chat_template.jinja").write_text(form + "{{ eos_token }}{% endfor %}")
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<|user|>")])
    made.save(str(folder / "tokenizer.json"))
    ours, theirs = load_tokenizer(folder, template="model"), AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}]
    assert data.encode(said, ours, 100).ids.tolist() == theirs.apply_chat_template(said)["input_ids"]
    said[0]["content"] = "<|user|>"
    user = ours.backend.token_to_id("<|user|>")
    assert data.encode(said, ours, 100).ids.tolist().count(user) == 1
    assert theirs.apply_chat_template(said)["input_ids"].count(user) == 2


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_what_a_template_writes_is_never_a_row_s_though_no_file_calls_it_special(llama, tmp_path, marks):
    folder = shutil.copytree(llama, tmp_path / "model")
    form = "{% for m in messages %}{{ '<|turn|>' + m.role }} BEGIN{{ m.content + eos_token }}END{% endfor %}"
    (folder / "chat_template.jinja").write_text(form.replace("BEGIN", marks[0]).replace("END", marks[1]))
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken("<|turn|>", normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder, template="model")
    said = [{"role": "user", "content": "a <|turn|> b"}, {"role": "assistant", "content": "c"}]
    assert data.encode(said, ours, 100).ids.tolist().count(ours.backend.token_to_id("<|turn|>")) == 2


def test_what_a_tokenizer_cannot_write_is_told_once(llama, tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, **{EOS: 2}}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = Tokenizer(models.BPE({"a": 0, EOS: 1}, []))  # which leaves out what it does not know
    for made, lost in ((words, "b"), (letters, "b c")):
        made.add_special_tokens([EOS])
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
        ours = load_tokenizer(tmp_path)
        ours.encode("a")
        assert ours.lost == ""
        rows = [{"instruction": f"a {lost}", "output": "a"}, {"instruction": "a", "output": "d e"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data.load_examples(str(tmp_path / "rows.jsonl"), ours, 100)
        assert capsys.readouterr().err.count("note: the tokenizer has no token for") == 1


DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LETTERS = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BOTH = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}
GROWS = {
    "normalizer": {"type": "Sequence", "normalizers": [DOUBLES] * 40},
    "normalizer ": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LETTERS] * 8}] * 5},
    "normalizer  ": {"type": "Prepend", "prepend": "a" * 10**6},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30},
    "decoder": {"type": "Sequence", "decoders": [DOUBLES] * 40},
    "post_processor": {"type": "Sequence", "processors": [BOTH | {"pair": BOTH["single"]}] * 40},
}


@pytest.mark.parametrize("part", GROWS)
def test_a_tokenizer_that_makes_a_text_grow_without_end_is_refused(llama, tmp_path, part):
    folder = shutil.copytree(llama, tmp_path / "model")
    edit_json(folder / "tokenizer.json", lambda value: value.update({part.strip(): GROWS[part]}))
    with pytest.raises(UserError, match="tokenizer.json makes of a text one of more than 64 times its length"):
        load_tokenizer(folder)


NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
NAMES += ("generation_config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_of_bytes_is_refused_by_name(llama, tmp_path, name, what):
    folder = shutil.copytree(llama, tmp_path / "model")
    lora.save_adapter(lora.add_lora(load_model(folder), rank=2), folder)
    (folder / name).unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(folder / name)
    elif what == "a device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(UserError, match=name):
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        generation_settings(model, tokenizer)
        lora.load_adapter(model, folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_half_a_surrogate_pair_is_refused_by_the_name_of_its_file(llama, tmp_path, name):
    folder = shutil.copytree(llama, tmp_path / "model")
    edit_json(folder / name, lambda value: value.update(id2label={"0": "\ud83d\udc4d"}))
    generation_settings(load_model(folder), load_tokenizer(folder))  # a whole pair is a character
    edit_json(folder / name, lambda value: value.update(id2label={"0": "\ud83d"}))
    with pytest.raises(UserError, match=f"{name} cannot be read as JSON: .*surrogates"):
        generation_settings(load_model(folder), load_tokenizer(folder))


OFFLINE = """
import sys, data, model
turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
print(data.encode(turns, data.load_tokenizer(sys.argv[1]), 50).ids.tolist())
print(len(list(model.load_model(sys.argv[1]).parameters())))
"""
HELD = {  # of a repository with much beside -> what a cache was filled with
    "all that is read": ["*.json", "model.safetensors"],
    "what cannot be missed": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"],
}


@pytest.mark.slow
def test_offline_wants_the_files_that_are_read_and_no_other(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    for more in (
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "model.fp16.safetensors",
        "model-00001-of-00001.safetensors",
    ):
        (folder / more).write_bytes(b"x" * 50)
    (folder / "chat_template.jinja").write_text("x")
    get = "import sys; from huggingface_hub import snapshot_download as get\n"
    get += "get('who/tiny', allow_patterns=sys.argv[1].split())"
    expected = run_python(OFFLINE, str(llama), dict(os.environ)).stdout
    for number, patterns in enumerate(HELD.values()):
        with serve({("model", "who/tiny", "main"): folder}, tmp_path / f"cache{number}") as (environment, _):
            assert run_python(get, " ".join(patterns), environment).returncode == 0
            found = run_python(OFFLINE, "who/tiny", environment | {"HF_HUB_OFFLINE": "1"})
            assert found.stdout == expected != "", found.stderr
            assert ("generation_config.json" in found.stderr) == (number == 1)  # and one line says what is not there
    with serve({("model", "who/tiny", "main"): folder}, tmp_path / "cache") as (environment, _):
        assert run_python(get, "config.json tokenizer*.json", environment).returncode == 0
        found = run_python(OFFLINE, "who/tiny", environment | {"HF_HUB_OFFLINE": "1"})
        assert "UserError" in found.stderr and "has no model.safetensors" in found.stderr


@pytest.mark.parametrize("scheme", ["first", "never", "bytes"])
def test_a_spelled_token_comes_back_as_it_was_written(tmp_path, scheme):
    flags = {"lstrip": False, "rstrip": False, "normalized": False}
    write(tmp_path, scheme, "PreTrainedTokenizerFast", True, "file", True, [flags] * 3, PLAIN, False)
    said = [{"role": "user", "content": f"a{BOS}b <|user|>"}, {"role": "assistant", "content": f"So it is{EOS}four."}]
    asked, answer = (message["content"] for message in said)
    written = {"paper": f"{BOS}{ROLES[1]}\n{asked}\n{ROLES[2]}\n{answer}{EOS}"}
    written["model"] = f"{BOS}[INST] {asked} [/INST] {answer} {EOS}"
    for template, text in written.items():
        ours = load_tokenizer(tmp_path, template=template)
        ids, response = data.encode(said, ours, 500)
        assert ours.decode(ids.tolist()) == text
        assert ours.decode(ids[response].tolist()).strip().startswith(answer)
        assert [ids.tolist().count(token) for token in (ours.eos_id, *ours.prefix)] == [1, 1]


def test_a_row_of_spaces_is_read_in_a_moment(tmp_path):
    flags = {"lstrip": True, "rstrip": True, "normalized": False}
    write(tmp_path, "first", "PreTrainedTokenizerFast", True, "file", True, [flags] * 3, MARKED, False)
    ours = load_tokenizer(tmp_path, template="model")
    assert (
        len(ours.written.split(f"a{' ' * 10**6}b {ROLES[1]}  {EOS} c{' ' * 10**6}d")) == 5
    )  # hours, if it were squared
