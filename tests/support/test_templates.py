"""--template model: a checkpoint's own chat template, its ids and its mask, beside transformers'."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback

import pytest
from conftest import BOS, EOS, edit_json, make_checkpoint
from hypothesis import assume, given, settings, strategies
from transformers import AutoTokenizer

import data
import evaluate
import train
from model import load_model
from paper import visualize
from support import templates
from support.decoding import generation_settings
from support.files import UserError
from support.runs import snapshots_in
from support.sources import Account

# Each marks what it has the assistant write, for transformers' mask; `unmarked` takes that away
CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """\
{%- if not date is defined -%}
{%- if strftime_now is defined -%}{%- set date = strftime_now('%d %b %Y') -%}
{%- else -%}{%- set date = '26 Jul 2024' -%}{%- endif -%}
{%- endif -%}
{%- set rest = messages -%}{%- set told = '' -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set told = messages[0]['content'] | trim -%}{%- set rest = messages[1:] -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '\\n\\n' + told + '<|eot_id|>' -}}
{%- for message in rest -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

MERGED = """\
{{- bos_token -}}
{%- set note = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}{{- raise_exception('a system message comes first') -}}{%- endif -%}
{%- set note.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<start_of_turn>user\\n' + note.system + message['content'] + '<end_of_turn>\\n' -}}
{%- set note.system = '' -%}
{%- else -%}
{{- '<start_of_turn>model\\n' -}}
{%- generation -%}{{- message['content'] + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# As Qwen3's: what was thought is left out of earlier answers, and stands, empty, in the last
FORGETS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

FORMS = {"chatml": CHATML, "llama3": LLAMA3, "merged": MERGED}
CONTROL = [f"<|{name}|>" for name in ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")]
CONTROL += ["<start_of_turn>", "<end_of_turn>"]
ALL = [*CONTROL, BOS, EOS]


def unmarked(template: str) -> str:
    """A template that says nothing of what is generated, as most do."""
    for tag in ("generation", "endgeneration"):
        for form in ("{% TAG %}", "{%- TAG -%}"):
            template = template.replace(form.replace("TAG", tag), "")
    return template


def with_template(folder, template: str, family: str = "llama"):
    """A tiny checkpoint whose tokenizer has the control tokens of the templates here, and this one as its own."""
    make_checkpoint(folder, family, adds_bos=True, vocab_size=420)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def set_template(folder, template):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    return folder


@pytest.fixture(scope="module", params=FORMS)
def both(request, tmp_path_factory):
    """transformers' tokenizer, whose template marks generation; and ours, marked so and not."""
    marked = with_template(tmp_path_factory.mktemp("marked"), FORMS[request.param])
    plain = shutil.copytree(marked, tmp_path_factory.mktemp("plain") / "model")
    set_template(plain, unmarked(FORMS[request.param]))
    ours = [data.load_tokenizer(folder, template="model") for folder in (marked, plain)]
    return AutoTokenizer.from_pretrained(marked), *ours


def asked_of(messages, theirs, **settings):
    return theirs.apply_chat_template(messages, return_dict=True, date="26 Jul 2024", **settings)


def spells_none(text: str) -> bool:
    return not any(token in text for token in [*ALL, templates.GUARD, templates.OPEN, templates.CLOSE])


QUESTION = strategies.text(max_size=30).filter(spells_none)
# White space that an answer begins with is a case of its own, below; trailing white space joins no control token
ANSWER = QUESTION.filter(lambda text: text.strip()).map(str.lstrip)
TURNS = strategies.lists(strategies.tuples(QUESTION, ANSWER), min_size=1, max_size=4)


def conversation(system: str | None, turns: list[tuple[str, str]]) -> list[dict]:
    said = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


@settings(max_examples=200, deadline=None)
@given(system=strategies.none() | QUESTION, turns=TURNS)
def test_ids_and_mask_are_transformers(both, system, turns):
    theirs, *ours = both
    messages = conversation(system, turns)
    expected = asked_of(messages, theirs, return_assistant_tokens_mask=True)
    for tokenizer in ours:
        example = data.encode(messages, tokenizer, 100_000)
        assert example.ids.tolist() == expected["input_ids"]
        assert example.response.int().tolist() == expected["assistant_masks"]
        prompt = asked_of(messages[:-1], theirs, add_generation_prompt=True)["input_ids"]
        assert data.prompt_ids(messages[:-1], tokenizer) == prompt
        cut = data.encode(messages, tokenizer, 17)
        assert cut.ids.tolist() == expected["input_ids"][:17] and len(cut.response) == len(cut.ids)


@settings(max_examples=100, deadline=None)
@given(parts=strategies.lists(strategies.sampled_from([*CONTROL, EOS, "a", " ", "<|im_", "end|>", "|>"]), min_size=1))
def test_a_text_that_spells_a_control_token_gets_its_characters(both, parts):
    text = "".join(parts)
    assume(text.strip())
    _, *ours = both
    for tokenizer in ours:
        sound = data.encode(conversation(None, [("Is it?", "Yes.")]), tokenizer, 1000)
        example = data.encode(conversation(None, [(text, text.strip())]), tokenizer, 1000)
        special = [tokenizer.backend.token_to_id(token) for token in ALL]
        counts = [[ids.tolist().count(token) for token in special] for ids in (sound.ids, example.ids)]
        assert counts[0] == counts[1]
        answer = example.ids[example.response].tolist()
        assert tokenizer.decode(answer) == text.strip() + tokenizer.template.end


@pytest.mark.parametrize("form", [CHATML, unmarked(CHATML)], ids=["marked", "unmarked"])
def test_the_mask_by_hand(tmp_path, form):
    tokenizer = data.load_tokenizer(with_template(tmp_path, form), template="model")
    messages = conversation(None, [("One?", "Two."), ("Three?", "\n Four. ")])
    messages[1]["weight"] = 0

    def text(messages):
        ids, response = data.encode(messages, tokenizer, 1000)
        return tokenizer.decode(ids[response].tolist())

    assert text(messages) == "Four. <|im_end|>"  # and neither the line break that a prompt ends with, nor the answer's
    assert text(messages[:2] + messages[3:]) == "Four. <|im_end|>"
    messages[1]["weight"] = 1
    assert text(messages) == "Two.<|im_end|>Four. <|im_end|>"
    messages[3]["weight"] = 0
    assert text(messages) == "Two.<|im_end|>"
    assert tokenizer.template.end == "<|im_end|>" and len(tokenizer.end_ids) == 2


def test_an_answer_closed_by_two_control_tokens_is_supervised_to_the_second_and_ends_at_the_first(tmp_path):
    two = unmarked(CHATML).replace("['content'] + '<|im_end|>'", "['content'] + '<|im_end|><|eot_id|>'")
    tokenizer = data.load_tokenizer(with_template(tmp_path, two), template="model")
    ids, response = data.encode(conversation(None, [("One?", "Two.")]), tokenizer, 1000)
    assert tokenizer.decode(ids[response].tolist()) == "Two.<|im_end|><|eot_id|>"
    assert tokenizer.template.end == "<|im_end|>"


def test_a_token_across_the_boundary_belongs_to_the_prompt(tmp_path):
    form = "{% for m in messages %}{{ m.content if m.role == 'user' else 'R' + m.content + eos_token }}{% endfor %}"
    form += "{% if add_generation_prompt %}R{% endif %}"
    tokenizer = data.load_tokenizer(with_template(tmp_path, form), template="model")
    ids, response = data.encode(conversation(None, [("One? ", "ed, yellow")]), tokenizer, 1000)
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    assert "Red" in tokens and not response[tokens.index("Red")] and response[tokens.index("Red") + 1 :].all()


def test_where_a_template_marks_less_than_an_answer_the_marks_count(tmp_path):
    less = CHATML.replace("{{ message['content'] + '<|im_end|>' }}{% endgen", "{{ message['content'] }}{% endgen")
    less = less.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    tokenizer = data.load_tokenizer(with_template(tmp_path, less), template="model")
    ids, response = data.encode(conversation(None, [("One?", "Two.")]), tokenizer, 1000)
    assert tokenizer.decode(ids[response].tolist()) == "Two."


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("opening", ["Halt!", "?!", "! \n"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_that_the_assistant_opens_has_transformers_ids_and_mask(both, opening, system):
    theirs, *ours = both
    messages = [said("assistant", opening), *conversation(None, [("One?", "Two.")])]
    messages = [said("system", system), *messages] if system else messages
    expected = asked_of(messages, theirs, return_assistant_tokens_mask=True)
    for tokenizer in ours:
        example = data.encode(messages, tokenizer, 1000)
        assert example.ids.tolist() == expected["input_ids"]
        assert example.response.int().tolist() == expected["assistant_masks"]


def test_an_opening_answer_is_read_where_a_template_asks_what_came_first(tmp_path):
    """As Qwen's does, which has nothing to write before the first message."""
    tokenizer = data.load_tokenizer(
        with_template(tmp_path, "{%- if messages[0]['role'] == 'system' -%}{%- endif -%}" + unmarked(CHATML)),
        template="model",
    )
    ids, response = data.encode([said("assistant", "Halt!"), said("user", "?")], tokenizer, 1000)
    assert tokenizer.decode(ids[response].tolist()) == "Halt!<|im_end|>"


def test_the_first_token_of_a_row_is_never_supervised(tmp_path):
    plain = "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    for name, template in {"marked": plain, "unmarked": unmarked(plain)}.items():
        tokenizer = data.load_tokenizer(with_template(tmp_path / name, template), template="model")
        ids, response = data.encode([said("assistant", "Halt!"), said("user", "?")], tokenizer, 1000)
        answer = tokenizer.encode("Halt!")[0]
        assert len(answer) > 1 and ids[response].tolist() == [*answer[1:], tokenizer.eos_id]


EACH = "{% for m in messages %}IF{{ m.role + ': ' + CONTENT + eos_token }}{% endif %}{% endfor %}"
THOUGHT = said("assistant", "<think>\nSo four.\n</think>\n\nFour.")
LEAVES_OUT = {  # a template's content and condition, a conversation, what is left out
    "thoughts": ("m.content.split('</think>')[-1]", "", [said("user", "2+2?"), THOUGHT], THOUGHT["content"]),
    "system": ("m.content", "m.role != 'system'", [said("system", "Be kind."), said("user", "Hi")], "Be kind."),
    "one of two": ("m.content", "not loop.first", [said("system", "Same."), said("user", "Same.")], "Same."),
    "a head of another": ("m.content", "m.role != 'system'", [said("system", "Hi"), said("user", "Hi you")], "Hi"),
    "an end": ("m.content[:4]", "", [said("user", "One"), said("assistant", "Three.")], "Three."),
    "white space": ("m.content | trim", "", [said("user", " One\n "), said("assistant", "Two  three\n")], ""),
    "nothing": ("m.content", "", [said("system", ""), said("user", "A"), said("assistant", f"A{EOS}")], ""),
}


@pytest.mark.parametrize("name", LEAVES_OUT)
def test_what_a_template_leaves_out_of_a_row_is_told(tmp_path, name):
    content, condition, messages, missing = LEAVES_OUT[name]
    tokenizer = data.load_tokenizer(with_template(tmp_path, CHATML), template="model")
    form = EACH.replace("CONTENT", content).replace("IF", "{% if CONDITION %}".replace("CONDITION", condition or "1"))
    tokenizer.template.compiled = templates.compile_template(form)
    assert tokenizer.template.left_out(messages) == missing


def test_samples_of_which_a_template_leaves_something_out_are_counted_and_the_first_is_shown(tmp_path):
    form = EACH.replace("CONTENT", "m.content").replace("IF", "{% if m.role != 'system' %}")
    form += "{% if add_generation_prompt %}assistant: {% endif %}"
    folder = with_template(tmp_path / "model", form)
    rows = [conversation(system, [("One?", "Two.")]) for system in (None, "Be kind.", "Be brief.")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    tokenizer = data.load_tokenizer(folder, template="model")
    data.load_examples(str(tmp_path / "r.jsonl"), tokenizer, 1000, account=(account := Account()))
    (line,) = account.lines()
    assert line.startswith("passed over by the chat template: part of 2 samples, the first ")
    assert line.endswith("r.jsonl, conversation 2: 'Be kind.'") and account.record()["left_out"] == 2
    data.load_examples(str(tmp_path / "r.jsonl"), data.load_tokenizer(folder), 1000, account=(paper := Account()))
    assert not paper.lines()


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast"])
def test_a_template_has_the_variables_that_transformers_gives(tmp_path, named):
    with_template(tmp_path, CHATML)

    def name(config):
        config |= {"tokenizer_class": named, "image_token": "<img>", "add_bos_token": False, "model_max_length": 9}
        config["extra_special_tokens"] = {"boi": "<boi>", "audio_token": "<audio>", "image_token": "<image>"}
        config["sep_token"] = {"__type": "AddedToken", "content": "<sep>", "lstrip": False, "rstrip": False}
        config["sep_token"] |= {"normalized": False, "single_word": False, "special": True}
        config.pop("unk_token", None)
        config.pop("pad_token", None)

    edit_json(tmp_path / "tokenizer_config.json", name)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert data.load_tokenizer(tmp_path, template="model").template.variables == theirs.special_tokens_map
    form = "{% set comma = joiner(',') %}{% for m in messages %}{{ comma() + m.content + eos_token }}{% endfor %}"
    form += "{% for name, n in dict([('image_token', 1)]).items() %}{{ name + image_token + boi }}{% endfor %}"
    theirs.chat_template = form
    set_template(tmp_path, form)
    messages = conversation(None, [("One?", "Two.")])
    ours = data.load_tokenizer(tmp_path, template="model")
    assert ours.template.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_a_template_is_run_with_what_transformers_gives_it(tmp_path):
    """Blocks on lines of their own, loop controls, JSON as it is, and what there is none of here: tools, documents."""
    form = "{% for m in messages %}\n    {% if loop.index > 2 %}\n        {% break %}\n    {% endif %}\n"
    form += "{{ m | tojson }}{{ eos_token }}\n{% endfor %}\n"
    form += "{{ 'tools' if tools is not none }}{{ 'documents' if documents is not none }}"
    folder = with_template(tmp_path, form)
    messages = conversation(None, [("Un été?", "<Oui>"), ("Three?", "Four.")])
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert data.load_tokenizer(folder, template="model").template.render(messages) == expected
    assert "été" in expected and "Three" not in expected and "tools" not in expected


def test_a_row_of_8_000_turns_takes_no_square_of_them(tmp_path):
    tokenizer = data.load_tokenizer(with_template(tmp_path, unmarked(CHATML)), template="model")
    messages = conversation(None, [(f"What is {i}?", f"It is {i}.") for i in range(4000)])
    start = time.process_time()
    ids, response = data.encode(messages, tokenizer, 2048)
    assert not tokenizer.template.left_out(messages) and time.process_time() - start < 5  # 60 s and more, where it did
    few, of_few = data.encode(messages[:400], tokenizer, 2048)
    assert ids.tolist() == few.tolist() and response.tolist() == of_few.tolist() and len(ids) == 2048


@pytest.mark.parametrize("body", ["", "{{ 'x' * 99 }}"])
def test_a_template_that_never_ends_ends_by_ctrl_c_with_its_name(tmp_path, body):
    folder = with_template(tmp_path, CHATML)
    set_template(
        folder,
        "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}".replace("BODY", body),
    )

    def interrupt():
        while not any(f.filename == "<template>" for f in traceback.extract_stack(sys._current_frames()[here])):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    here = threading.get_ident()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where Ctrl-C is ignored
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            data.load_tokenizer(folder, template="model")
    finally:
        signal.signal(signal.SIGINT, handler)


# --------------------------------------------------------------------------------------------- what is refused


def test_a_template_that_forgets_is_refused_where_it_does(tmp_path, rows):
    folder = with_template(tmp_path / "model", FORGETS)
    tokenizer = data.load_tokenizer(folder, template="model")
    one = conversation(None, [("One?", "Two.")])
    ids, response = data.encode(one, tokenizer, 1000)
    assert tokenizer.decode(ids[response].tolist()) == "<think>\n\n</think>\n\nTwo.<|im_end|>"
    two = conversation(None, [("One?", "Two."), ("Three?", "Four.")])
    with pytest.raises(UserError, match="prefixes do not grow"):
        data.encode(two, tokenizer, 1000)
    source = tmp_path / "turns.jsonl"
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (one, two, two)))
    argv = ["--model", str(folder), "--data", str(source), "--template", "model", "--device", "cpu"]
    with pytest.raises(UserError, match="turns.jsonl, conversation 2: the chat template of .*; --skip-bad-rows"):
        train.main([*argv, "--out", str(tmp_path / "run")])
    train.main([*argv, "--out", str(tmp_path / "run"), "--skip-bad-rows", "--lora-rank", "4"])
    (count,) = json.loads((tmp_path / "run" / "run.json").read_text())["skipped"].values()
    assert count == 2


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: leave --template out"),
        ([{"name": "tool_use", "template": CHATML}], "has no chat template"),
        ("{% for message in", "cannot be read"),
        ("{{ messages[0].nothing.more }}", "cannot write this conversation"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "no control token behind an answer"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "cannot write this conversation"),  # nothing that it is given can be changed
        ("{% set note = namespace(__class__=1) %}{% set note.__init__ = 2 %}", "cannot write this conversation"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),  # random words: transformers has them, no run could be repeated
        ("{{ 'x' | center(10 ** 18) }}", "cannot write this conversation: (MemoryError|OverflowError)"),
        ("{{ " + "(" * 5000, "cannot be read: maximum recursion"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot write this conversation: maximum recursion"),
        ([5, {"name": ["default"]}, {"name": "default", "template": 5}], "has no chat template"),
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
    ],
)
def test_templates_that_cannot_be_used_are_named(tmp_path, template, words):
    folder = with_template(tmp_path, CHATML)
    set_template(folder, template)
    with pytest.raises(UserError, match=words) as caught:
        data.load_tokenizer(folder, template="model")
    assert str(folder) in str(caught.value)
    data.load_tokenizer(folder)  # nothing of it matters where Appendix A.1's is asked for


def test_where_a_template_is_found(tmp_path):
    folder = set_template(with_template(tmp_path, CHATML), [{"name": "default", "template": LLAMA3}])
    assert templates.find_template(folder) == LLAMA3
    (folder / "chat_template.jinja").write_text(MERGED)  # counts first, as in transformers
    assert templates.find_template(folder) == MERGED == AutoTokenizer.from_pretrained(folder).chat_template


def test_a_template_file_that_cannot_be_read_to_its_end_is_named(tmp_path):
    file = with_template(tmp_path, CHATML) / "chat_template.jinja"
    for make, words in ((os.mkfifo, "no regular file"), (lambda file: file.write_bytes(b"\xff"), "codec can't decode")):
        file.unlink(missing_ok=True)
        make(file)
        with pytest.raises(UserError, match=f"chat_template.jinja cannot be read: .*{words}"):
            data.load_tokenizer(tmp_path, template="model")


def test_a_text_with_our_own_marks_is_refused(tmp_path):
    tokenizer = data.load_tokenizer(with_template(tmp_path, CHATML), template="model")
    for character in (templates.GUARD, templates.OPEN, templates.CLOSE):
        with pytest.raises(UserError, match="U.FDD0"):
            data.encode(conversation(None, [("One?", f"T{character}wo.")]), tokenizer, 1000)


# ------------------------------------------------------------------------------------- a run from its start to its end


def test_a_run_is_asked_and_shown_in_the_template_it_was_trained_in(tmp_path, rows, monkeypatch, capsys):
    model = with_template(tmp_path / "model", LLAMA3)
    argv = ["--model", str(model), "--data", str(rows), "--lora-rank", "4", "--max-steps", "2", "--dtype", "float32"]
    argv += ["--device", "cpu", "--batch-size", "8"]
    run, other = tmp_path / "run", tmp_path / "other"
    train.main([*argv, "--out", str(run), "--template", "model", "--merge", "--snapshot-every", "1"])
    train.main([*argv, "--out", str(other)])
    (snapshot, _) = snapshots_in(run).values()
    for adapters, expected in {(): "paper", (run,): "model", (snapshot,): "model", (other,): "paper"}.items():
        assert templates.trained_in([str(adapter) for adapter in adapters]) == expected

    messages = [{"role": "user", "content": "What is two plus two?"}]
    theirs = AutoTokenizer.from_pretrained(model)
    prompt = asked_of(messages, theirs, add_generation_prompt=True)["input_ids"]
    asked = []
    monkeypatch.setattr("support.chat.answer", lambda model, tokenizer, ids, write: asked.append(ids) or "4")
    evaluate.main(["--model", str(model), "--adapter", str(run), "--device", "cpu", "--ask", messages[0]["content"]])
    assert asked == [prompt, prompt]
    evaluate.main(["--model", str(model), "--template", "model", "--device", "cpu", "--ask", messages[0]["content"]])
    assert asked[2:] == [prompt]
    evaluate.main(["--model", str(model), "--adapter", str(other), "--device", "cpu", "--ask", "?"])
    assert theirs.decode(asked[3]) == BOS + "<|user|>\n?\n<|assistant|>\n"

    tokenizer = data.load_tokenizer(model, template="model")
    stops = generation_settings(load_model(model), tokenizer)["stop_ids"]
    assert stops == {theirs.convert_tokens_to_ids(token) for token in (EOS, "<|eot_id|>")}
    for folder in (run, run / "merged"):  # whoever loads them asks in the same form, and is told where an answer ends
        assert (
            asked_of(messages, AutoTokenizer.from_pretrained(folder), add_generation_prompt=True)["input_ids"] == prompt
        )
    ends = json.loads((run / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == stops

    common = ["--model", str(model), "--device", "cpu", "--dtype", "float32"]
    visualize.main([*common, "--adapter", str(run), "--data", str(rows), "--out", str(tmp_path / "page.html")])
    assert "<|start_header_id|>assistant" in (tmp_path / "page.html").read_text(encoding="utf-8").replace(
        "\\u003c", "<"
    )
    for program in (evaluate, visualize):
        with pytest.raises(UserError, match="different templates"):
            program.main([*common, "--adapter", str(run), "--adapter", str(other), "--data", str(tmp_path)])


def test_rows_of_ones_own_are_asked_in_the_template_without_a_second_bos(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluate, "generate", lambda model, ids, *rest, **settings: asked.extend(ids) or [[] for _ in ids]
    )
    row = {"instruction": "One <|eot_id|>?", "output": "Two."}
    (tmp_path / "instructions.test.jsonl").write_text(json.dumps(row))
    for name, template in {"with": LLAMA3, "without": CHATML}.items():
        folder = with_template(tmp_path / name, template)
        argv = ["--model", str(folder), "--device", "cpu", "--tasks", "instructions", "--data", str(tmp_path)]
        evaluate.main([*argv, "--template", "model"])
        messages = [{"role": "user", "content": "One <|eot_id|>?"}]
        theirs = AutoTokenizer.from_pretrained(folder)
        assert asked.pop() == asked_of(messages, theirs, add_generation_prompt=True)["input_ids"]
    evaluate.main(argv)
    assert theirs.decode(asked.pop()) == BOS + "<|user|>\nOne <|eot_id|>?\n<|assistant|>\n"
