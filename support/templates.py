"""--template model: a conversation in the checkpoint's chat template, as ids and mask."""

import bisect
import itertools
import json
import os
import re
from pathlib import Path

import jinja2.ext
import jinja2.sandbox

from support.adapters import find_adapter
from support.files import UserError, check, read_json, readable, told
from support.runs import read_record

# Characters of no text: within a control token that a text spells, around what a template generates
GUARD, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!?!"}]


class Notes(jinja2.utils.Namespace):
    """Jinja's namespace(), without the names that Python itself would read."""

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no name such as {name}")
        super().__setitem__(name, value)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, what the assistant writes: a filter puts it between two marks."""

    def preprocess(self, source, name, filename=None):
        source = re.sub(r"({%[-+]?\s*)generation\b", r"\1filter generated", source)
        return re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endfilter", source)


def raise_exception(message: str):
    """What a template calls where it cannot write a conversation."""
    raise jinja2.TemplateError(message)


def compile_template(text: str) -> jinja2.Template:
    """A chat template, to be rendered in a sandbox as transformers' is, with the same names.

    Without strftime_now and lipsum: one seed gives one run on any day. Llama 3's template then writes a fixed date.
    """
    extensions = ["jinja2.ext.loopcontrols", Generation]
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.globals |= {"namespace": Notes, "raise_exception": raise_exception}
    sandbox.globals["dict"] = lambda *entries, **named: dict(*entries, **named)
    del sandbox.globals["lipsum"]
    # Jinja's own escapes for HTML
    sandbox.filters["tojson"] = lambda it, ensure_ascii=False, **how: json.dumps(it, ensure_ascii=ensure_ascii, **how)
    sandbox.filters["generated"] = lambda written: OPEN + written + CLOSE
    return sandbox.from_string(text)


class ChatTemplate:
    """A checkpoint's template and tokenizer. text: the Jinja source; end: the control token that closes an answer."""

    def __init__(self, text: str, tokenizer, variables: dict[str, str], folder: Path):
        """variables: what a template is given besides. UserError for a template that cannot be used for training."""
        self.text, self.tokenizer, self.variables = text, tokenizer, variables
        self.of = f"the chat template of {folder}"
        with told(f"{self.of} cannot be read"):
            self.compiled = compile_template(text)
        ends = tokenizer.spelled.findall(self.render(PROBE).rpartition(PROBE[-1]["content"])[2])
        check(ends, f"{self.of} puts no control token behind an answer: a model would not learn to end it")
        self.end = ends[0]

    def render(self, messages: list[dict], ask: bool = False) -> str:
        """The text of a conversation, up to where an answer would begin if it is to `ask` for one."""
        return self._write(self._turns(messages), ask)[0].replace(GUARD, "")

    def _turns(self, messages: list[dict]) -> list[dict]:
        """What a template is given of messages."""
        if any({GUARD, OPEN, CLOSE} & {*message["content"]} for message in messages):
            raise UserError("a text holds U+FDD0, U+FDD1 or U+FDD2, which are no characters")
        return [{"role": message["role"], "content": self.tokenizer.guard(message["content"])} for message in messages]

    def _write(self, turns: list[dict], ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the spans of it that it marks as generated."""
        given = {"messages": turns, "add_generation_prompt": ask, "tools": None, "documents": None}
        with told(f"{self.of} cannot write this conversation"):
            text = self.compiled.render(self.variables | given)
        pieces = re.split(f"[{OPEN}{CLOSE}]", text)  # outside, between the two, outside, ...
        ends = list(itertools.accumulate(map(len, pieces)))
        return "".join(pieces), list(zip(ends[::2], ends[1::2], strict=False))

    def left_out(self, messages: list[dict]) -> str:
        """The longest text in `messages` that the template does not write whole, white space aside; "" if none."""
        text = "".join(self.render(messages).split())
        for said in sorted((message["content"] for message in messages), key=len, reverse=True):
            if (bare := "".join(said.split())) not in text:
                return said
            text = text.replace(bare, GUARD, bool(bare))  # what it writes once stands for one of two
        return ""

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids that ask for an answer to `messages`."""
        return [token for token, _, _ in self.tokenizer.read(self._write(self._turns(messages), ask=True)[0])]

    def encode(self, messages: list[dict], max_length: int) -> tuple[list[int], list[bool]]:
        """A conversation's ids, and whether each is supervised: what transformers' apply_chat_template gives.

        Supervised is what the template marks as generated, and where it marks nothing each answer, from where a prompt
        for it ends to the last control token behind it; but no message of weight 0, and never the first token. A token
        across the boundary belongs to the prompt, and so does white space that an answer begins with.
        """
        turns = self._turns(messages)
        text, marks = self._write(turns)
        tokens = self.tokenizer.read(text[: 2 * max_length * self.tokenizer.longest])[:max_length]
        spans, end, reach = [], 0, tokens[-1][2] if tokens else 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or end >= reach:  # what stands behind the last token is not asked
                continue
            before, after = self._bounds(turns, number)
            if not (after.startswith(before) and text.startswith(after)):
                why = "its prefixes do not grow as more is said, so no mask can be read from them"
                raise UserError(f"{self.of} writes what stands before an answer in several ways: {why}")
            start, end = len(before), len(after)
            if message.get("weight", 1) != 0:
                last = max((found.end() for found in self.tokenizer.spelled.finditer(text, start, end)), default=end)
                answer = (start, end if text[last:end].strip() else last)  # no white space behind its end
                spans += [(a, b) for a, b in marks if start <= a and b <= end] if marks else [answer]
        supervised = [False] * len(tokens)
        for a, b in spans:
            visible = b - len(text[a:b].lstrip())
            first = bisect.bisect_left(tokens, a, key=lambda token: token[1])
            for place in range(max(first, 1), bisect.bisect_left(tokens, b, key=lambda token: token[1])):
                supervised[place] |= tokens[place][2] > visible
        return [token for token, _, _ in tokens], supervised

    def _bounds(self, turns: list[dict], number: int) -> tuple[str, str]:
        """The text up to where answer `number` begins, and up to where it ends."""
        after, _ = self._write(turns[: number + 1])
        if number:
            return self._write(turns[:number], ask=True)[0], after
        # Nothing stands before it that a template could ask an answer to: what is the same before another answer
        another, _ = self._write([turns[0] | {"content": "!" if turns[0]["content"].lstrip()[:1] == "?" else "?"}])
        return os.path.commonprefix([after, another]), after


def find_template(folder: Path) -> str:
    """The Jinja text of a checkpoint's default template. UserError if it has none."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(text, list):  # several, each with its name
        text = next((it.get("template") for it in text if isinstance(it, dict) and it.get("name") == "default"), None)
    if file.exists():
        with told(f"{file} cannot be read"):
            text = readable(file).read_text(encoding="utf-8")
    check(isinstance(text, str), f"{folder} has no chat template: leave --template out, for that of Appendix A.1")
    return text


def trained_in(adapters: list[str]) -> str:
    """The --template that the runs of these adapters were trained in; the paper's where no run says."""
    found = {}
    for adapter in adapters:
        folder = Path(adapter) if (Path(adapter) / "run.json").exists() else find_adapter(adapter)
        record = read_record(folder) or read_record(folder.parent)  # a snapshot lies in its run
        found[adapter] = record.get("arguments", {}).get("template", "paper")
    if len(set(found.values())) > 1:
        which = ", ".join(f"{adapter} in the {template}'s" for adapter, template in found.items())
        raise UserError(f"--adapter: these were trained in different templates: {which}; take them one by one")
    return next(iter(found.values()), "paper")


def add_flags(parser, group: str = "model and data", default: str | None = "paper"):
    """Which template a conversation is written in."""
    add = parser.group(group)
    say = "paper: Appendix A.1's template. model: the checkpoint's chat template"
    say += "" if default else " (default: the adapter's)"
    add("--template", choices=("paper", "model"), default=default, help=say)
