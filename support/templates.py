"""A checkpoint's own chat template (--template model): a conversation as its ids, and which of them are supervised.

The template is a program in Jinja that came with the checkpoint; it runs in jinja2's sandbox, as it does in
transformers. The template of Appendix A.1, which is the default, is data.encode's.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.adapters import find_adapter
from support.checkpoint import special_token
from support.files import UserError, read_json

TEMPLATES = ("paper", "model")
VARIABLES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
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

    But for strftime_now: one seed is to give one run on any day. Llama 3's templates, which look whether it is there,
    then write the date that they hold.
    """
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise UserError(f"jinja2 {jinja2.__version__}: its sandbox has holes that 3.1.6 closed; pip install -U jinja2")
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals = {"range": sandbox.globals["range"], "namespace": Notes, "raise_exception": raise_exception}
    sandbox.globals["dict"] = lambda **entries: entries
    sandbox.filters["tojson"] = to_json
    return sandbox.from_string(text)


# ------------------------------------------------------------------------------------------------------ a template


class ChatTemplate:
    """A checkpoint's template and tokenizer. text: the Jinja source; end: the control token that closes an answer."""

    def __init__(self, text: str, tokenizer, folder: Path):
        """tokenizer: support.tokenizer's. Raises UserError where this template is not one that can be trained in."""
        self.text, self.tokenizer, self.of = text, tokenizer, f"the chat template of {folder}"
        try:
            self.compiled = compile_template(text)
        except jinja2.TemplateError as reason:
            raise UserError(f"{self.of} cannot be read: {reason}") from None
        tokens = ((name, special_token(folder, name)) for name in VARIABLES)
        self.variables = {name: token for name, token in tokens if token is not None}
        control = tokenizer.control_tokens()
        self.control = re.compile("|".join(map(re.escape, control)))
        self.spelled = re.compile(f"({'|'.join(re.escape(guarded(token)) for token in control)})")
        ends = self.control.findall(self.render(PROBE).rpartition(PROBE[-1]["content"])[2])
        if not ends:
            raise UserError(f"{self.of} puts no control token behind an answer: a model would not learn to end it")
        self.end = ends[0]

    def render(self, messages: list[dict], ask: bool = False) -> str:
        """The text of a conversation, up to where an answer would begin if it is to `ask` for one."""
        return re.sub(f"[{GUARD}{OPEN}{CLOSE}]", "", self._render(messages, ask))

    def _render(self, messages: list[dict], ask: bool = False) -> str:
        turns = []
        for message in messages:
            content = message["content"]
            if any(character in content for character in (GUARD, OPEN, CLOSE)):
                raise UserError("a text holds U+FDD0, U+FDD1 or U+FDD2, which are no characters")
            turns.append({"role": message["role"], "content": self.control.sub(lambda m: guarded(m[0]), content)})
        try:
            return self.compiled.render(
                messages=turns, add_generation_prompt=ask, tools=None, documents=None, **self.variables
            )
        except Exception as reason:  # a program of the checkpoint's own: it may raise anything
            raise UserError(f"{self.of} cannot write this conversation: {reason}") from None

    def _tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, first character, the one after its last) of each token; what is GUARDed comes in as its characters."""
        place = 0
        for number, piece in enumerate(self.spelled.split(text)):
            for token, start, end in self.tokenizer.places(piece.replace(GUARD, ""), control=number % 2 == 0):
                yield token, place + start, place + end
            place += len(piece)

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids that ask for an answer to `messages`."""
        text, _ = unmarked(self._render(messages, ask=True))
        return [token for token, _, _ in self._tokens(text)]

    def encode(self, messages: list[dict], max_length: int) -> tuple[list[int], list[bool]]:
        """A conversation's ids, and whether each is supervised: what transformers' apply_chat_template gives.

        Supervised is what the template marks as generated, and where it marks nothing each answer, from where a prompt
        for it ends to the last control token behind it; but no message of weight 0. A token that straddles the boundary
        belongs to the prompt, and so does white space that an answer begins with.
        """
        text, marks = unmarked(self._render(messages))
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = unmarked(self._render(messages[:number], ask=True))
                after, _ = unmarked(self._render(messages[: number + 1]))
                if not (after.startswith(before) and text.startswith(after)):
                    raise UserError(
                        f"{self.of} writes what was said before otherwise once more is said, or an answer otherwise "
                        "than it asks for one: its prefixes do not grow, so no mask can be read from them"
                    )
                if message.get("weight", 1) != 0:
                    found = [(a, b) for a, b in marks if len(before) <= a and b <= len(after)]
                    spans += found if marks else [self._answer(text, len(before), len(after))]

        ids, response = [], []
        spans = [(a, a + len(text[a:b]) - len(text[a:b].lstrip()), b) for a, b in spans]
        for token, start, end in self._tokens(text[: 2 * max_length * self.tokenizer.longest]):
            ids.append(token)
            response.append(any(a <= start < b and end > visible for a, visible, b in spans))
        return ids[:max_length], response[:max_length]

    def _answer(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Where an answer ends that stands at start:end, without the white space behind its last control token."""
        closing = [match.end() for match in self.control.finditer(text, start, end)]
        return start, closing[-1] if closing and not text[closing[-1] : end].strip() else end


def guarded(token: str) -> str:
    """A control token as a text that is not it, for the template as for the tokenizer."""
    return token[0] + GUARD + token[1:]


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without OPEN and CLOSE, and the spans that they marked there."""
    marks, pieces, start, length = [], re.split(f"([{OPEN}{CLOSE}])", text), 0, 0
    for piece in pieces:
        if piece == OPEN:
            start = length
        elif piece == CLOSE:
            marks.append((start, length))
        else:
            length += len(piece)
    return "".join(piece for piece in pieces if piece not in (OPEN, CLOSE)), marks


def find_template(folder: Path) -> str:
    """The Jinja text of a checkpoint's default template, from where transformers reads it; UserError if it has none."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    held = read_json(config) if config.exists() else {}
    text = file.read_text(encoding="utf-8") if file.exists() else held.get("chat_template")
    if isinstance(text, list):  # several, each with its name
        named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = named.get("default")
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
