"""A checkpoint's own chat template (--template model): a conversation as its ids, and which of them are supervised.

The template is a program in Jinja that came with the checkpoint; it runs in jinja2's sandbox, as it does in
transformers. The template of Appendix A.1, which is the default, is data.encode's.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import re
import signal
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.adapters import find_adapter
from support.checkpoint import special_token
from support.files import UserError, read_json, readable

TEMPLATES = ("paper", "model")
# The special tokens that transformers' classes have where a checkpoint names none
DEFAULTS = dict.fromkeys(("Qwen2Tokenizer", "Qwen2TokenizerFast"), ("unk_token", "pad_token"))
DEFAULTS |= dict.fromkeys(("GPT2Tokenizer", "GPT2TokenizerFast"), ("bos_token", "unk_token"))
DEFAULTS = {of: dict.fromkeys(names, "<|endoftext|>") for of, names in DEFAULTS.items()}
# Three of those that Unicode keeps out of every text: before the rest of a control token that a text only spells, and
# around what a template marks as written by the assistant
GUARD, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!?!"}]

# ---------------------------------------------------------------------------------------------------------- Jinja


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what stands there is put between OPEN and CLOSE."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller) -> str:
        return OPEN + caller() + CLOSE


class Notes(jinja2.utils.Namespace):
    """Jinja's namespace(), without the names that Python itself would read."""

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no name such as {name}")
        super().__setitem__(name, value)


def raise_exception(message: str):
    """What a template calls where it cannot write a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, **layout) -> str:
    """The filter tojson, which in Jinja itself escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def compile_template(text: str) -> jinja2.Template:
    """A chat template, to be rendered in a sandbox as transformers' is, and with the same names.

    But for strftime_now and lipsum: one seed is to give one run on any day. Llama 3's templates, which look whether it
    is there, then write the date that they hold.
    """
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__}: its sandbox has holes that 3.1.6 closed; pip install -U jinja2")
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals |= {"namespace": Notes, "raise_exception": raise_exception}
    sandbox.globals["dict"] = lambda *entries, **named: dict(*entries, **named)
    del sandbox.globals["lipsum"]
    sandbox.filters["tojson"] = to_json
    return sandbox.from_string(text)


# ------------------------------------------------------------------------------------------------------ a template


@contextlib.contextmanager
def running(template: str, fails: str):
    """A context in which a program of the checkpoint's own runs: it may raise anything, or never end."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(signal.SIGINT, f"stopped while {template} ran") from None
    except Exception as reason:
        raise UserError(f"{template} {fails}: {str(reason) or type(reason).__name__}") from None


class ChatTemplate:
    """A checkpoint's template and tokenizer. text: the Jinja source; end: the control token that closes an answer."""

    def __init__(self, text: str, tokenizer, folder: Path):
        """tokenizer: support.tokenizer's. Raises UserError where this template is not one that can be trained in."""
        self.text, self.tokenizer, self.of = text, tokenizer, f"the chat template of {folder}"
        with running(self.of, "cannot be read"):
            self.compiled = compile_template(text)
        self.variables = variables(folder)
        control = tokenizer.control_tokens()
        self.control = re.compile("|".join(map(re.escape, control)))
        ends = self.control.findall(self.render(PROBE).rpartition(PROBE[-1]["content"])[2])
        if not ends:
            raise UserError(f"{self.of} puts no control token behind an answer: a model would not learn to end it")
        self.end = ends[0]

    def render(self, messages: list[dict], ask: bool = False) -> str:
        """The text of a conversation, up to where an answer would begin if it is to `ask` for one."""
        return re.sub(f"[{GUARD}{OPEN}{CLOSE}]", "", self._write(self._turns(messages), ask))

    def _turns(self, messages: list[dict]) -> list[dict]:
        """What a template is given of messages, each control token in them GUARDed."""
        for character in (GUARD, OPEN, CLOSE):
            if any(character in message["content"] for message in messages):
                raise UserError("a text holds U+FDD0, U+FDD1 or U+FDD2, which are no characters")
        guard = functools.partial(self.control.sub, lambda found: guarded(found[0]))
        return [{"role": message["role"], "content": guard(message["content"])} for message in messages]

    def _write(self, turns: list[dict], ask: bool = False) -> str:
        with running(self.of, "cannot write this conversation"):
            told = {"messages": turns, "add_generation_prompt": ask, "tools": None, "documents": None}
            return self.compiled.render(self.variables | told)

    def left_out(self, messages: list[dict]) -> str:
        """The first of the longest texts in `messages` that the template does not write whole; "" if there is none.

        White space does not count: many a template strips what it writes.
        """
        text = "".join(self.render(messages).split())
        for said in sorted((message["content"] for message in messages), key=len, reverse=True):
            before, found, after = text.partition("".join(said.split()) or GUARD)
            if said.strip() and not found:
                return said
            text = before + GUARD + after if found else text  # what it writes once stands for one of two
        return ""

    def _tokens(self, text: str) -> list[tuple[int, int, int]]:
        """(id, first character, the one after its last) of each token; what is GUARDed comes in as its characters."""
        return self.tokenizer.read(text)

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids that ask for an answer to `messages`."""
        text, _ = unmarked(self._write(self._turns(messages), ask=True))
        return [token for token, _, _ in self._tokens(text)]

    def encode(self, messages: list[dict], max_length: int) -> tuple[list[int], list[bool]]:
        """A conversation's ids, and whether each is supervised: what transformers' apply_chat_template gives.

        Supervised is what the template marks as generated, and where it marks nothing each answer, from where a prompt
        for it ends to the last control token behind it; but no message of weight 0, and never the first token, which
        nothing predicts. A token that straddles the boundary belongs to the prompt, and so does white space that an
        answer begins with.
        """
        turns = self._turns(messages)
        text, marks = unmarked(self._write(turns))
        tokens = list(self._tokens(text[: 2 * max_length * self.tokenizer.longest]))[:max_length]
        spans, after, reach = [], "", tokens[-1][2] if tokens else 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and len(after) < reach:  # what stands behind the last token is not asked
                before, after = self._bounds(turns, number)
                if not (after.startswith(before) and text.startswith(after)):
                    raise UserError(
                        f"{self.of} writes what was said before otherwise once more is said, or an answer otherwise "
                        "than it asks for one: its prefixes do not grow, so no mask can be read from them"
                    )
                if message.get("weight", 1) != 0:
                    found = [(a, b) for a, b in marks if len(before) <= a and b <= len(after)]
                    spans += found if marks else [self._answer(text, len(before), len(after))]

        supervised = [False] * len(tokens)
        for a, b in spans:
            visible = b - len(text[a:b].lstrip())
            first = bisect.bisect_left(tokens, a, key=lambda token: token[1])
            for place in range(max(first, 1), bisect.bisect_left(tokens, b, key=lambda token: token[1])):
                supervised[place] |= tokens[place][2] > visible
        return [token for token, _, _ in tokens], supervised

    def _bounds(self, turns: list[dict], number: int) -> tuple[str, str]:
        """The text up to where answer `number` begins, and up to where it ends."""
        after, _ = unmarked(self._write(turns[: number + 1]))
        if number:
            return unmarked(self._write(turns[:number], ask=True))[0], after
        # Nothing stands before it that a template could ask an answer to: what is the same before another answer
        other = "!" if turns[0]["content"].lstrip()[:1] == "?" else "?"
        another, _ = unmarked(self._write([turns[0] | {"content": other}]))
        return os.path.commonprefix([after, another]), after

    def _answer(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Where an answer ends that stands at start:end, without the white space behind its last control token."""
        closing = [match.end() for match in self.control.finditer(text, start, end)]
        return start, closing[-1] if closing and not text[closing[-1] : end].strip() else end


def guarded(token: str) -> str:
    """A control token as a text that is not it, for the template as for the tokenizer."""
    return token[0] + GUARD + token[1:]


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without OPEN and CLOSE, and the spans that they marked there."""
    pieces = re.split(f"[{OPEN}{CLOSE}]", text)  # outside, between the two, outside, ...
    ends = list(itertools.accumulate(map(len, pieces)))
    return "".join(pieces), list(zip(ends[::2], ends[1::2], strict=False))


def variables(folder: Path) -> dict[str, str]:
    """What transformers gives a template besides the conversation: each special token that has a name of its own."""
    held = {}
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        held |= read_json(path) if path.exists() else {}
    extra = held.get("extra_special_tokens")
    found = {name: token for name, token in DEFAULTS.get(held.get("tokenizer_class"), {}).items() if name not in held}
    found |= extra if isinstance(extra, dict) else {}
    named = [name for name, token in held.items() if name.endswith("_token") and isinstance(token, str | dict)]
    found |= {name: special_token(folder, name) for name in named}
    return {name: token for name, token in found.items() if isinstance(token, str)}


def find_template(folder: Path) -> str:
    """The Jinja text of a checkpoint's default template, from where transformers reads it; UserError if it has none."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = read_json(config).get("chat_template") if config.exists() else None
    if file.exists():
        try:
            text = readable(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as reason:
            raise UserError(f"{file} cannot be read: {reason}") from None
    if isinstance(text, list):  # several, each with its name
        named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
        text = named[0].get("template") if named else None
    if not isinstance(text, str):
        raise UserError(f"{folder} has no chat template: leave --template out, for that of Appendix A.1")
    return text


# --------------------------------------------------------------------------------------------- which template it is


def trained_in(adapters: list[str]) -> str:
    """One of TEMPLATES: what the runs that these adapters are of were trained in; the paper's where no run says."""
    found = {}
    for adapter in adapters:
        folder = Path(adapter) if (Path(adapter) / "run.json").exists() else find_adapter(adapter)
        records = [place / "run.json" for place in (folder, folder.parent)]  # a snapshot lies in its run
        held = next((read_json(record) for record in records if record.exists()), {}).get("arguments")
        found[adapter] = held.get("template", "paper") if isinstance(held, dict) else "paper"
    if len(set(found.values())) > 1:
        which = ", ".join(f"{adapter} in the {template}'s" for adapter, template in found.items())
        raise UserError(f"--adapter: these were trained in different templates: {which}; take them one by one")
    return next(iter(found.values()), "paper")


def add_flags(parser, group: str = "model and data", default: str | None = "paper"):
    """Which template a conversation is written in."""
    add = parser.group(group)
    of = "" if default else "; default: what the adapters were trained in"
    add("--template", choices=TEMPLATES, default=default, help=f"Appendix A.1's, or the checkpoint's own{of}")
