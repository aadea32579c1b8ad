"""A checkpoint's tokenizer. A UserError tells whatever its file or a text makes its library do."""

import json
import math
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import tokenizers
from jinja2.nodes import Call, Compare, Const
from tokenizers import AddedToken

from support.checkpoint import TOKENIZER_FILES, find_checkpoint, special_token, tokenizer_settings
from support.files import UserError, check, read_json, told
from support.templates import GUARD, PROBE, ChatTemplate, compile_template, find_template

SAID = re.compile(f"{GUARD}?(.)", re.DOTALL)  # a character that a row says, without what keeps it from being control
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


@contextmanager
def quiet():
    """A context in which a library's own words on stderr are lost, such as Rust's where it panics."""
    with open(os.devnull, "wb") as nowhere, open(os.dup(2), "wb") as kept:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)


class Tokenizer:
    """A checkpoint's tokenizer. Control tokens come from a template, never from a row.

    eos_id: its end of text. bos: what its config calls its beginning, added or not. prefix: the ids that it puts in
    front (BOS, or nothing), start: their text. lost: what it could not write so far, in words. longest: the characters
    of its longest token. end_ids: where an answer ends. template: the checkpoint's own, if that is to be written.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str, bos: str | None = None):
        self.eos, self.eos_id, self.bos = eos, backend.token_to_id(eos), bos
        backend.no_truncation()
        backend.no_padding()
        some = backend.encode("a")
        self.prefix = some.ids[: [*some.special_tokens_mask, 0].index(0)]
        self.start = "".join(map(backend.id_to_token, self.prefix))
        self.backend, vocabulary, self.lost = backend, backend.get_vocab(), ""
        self.unknown = vocabulary.get(getattr(backend.model, "unk_token", None), -1)
        self.vocab_size, self.longest = max(vocabulary.values()) + 1, max(map(len, vocabulary))
        self.template, self.end_ids, self.control, step = None, {self.eos_id}, {}, backend.pre_tokenizer
        # what puts a space in front of a text has none to put behind a control token in it
        steps = step if isinstance(step, tokenizers.pre_tokenizers.Sequence) else [step]
        self.first = [step for step in steps if getattr(step, "prepend_scheme", None) == "first"]
        added = backend.get_added_tokens_decoder()
        named = {eos, bos} - {token.content for token in added.values()}
        backend.add_special_tokens([token for token in named if token and backend.token_to_id(token) is not None])
        special = {number: token.content for number, token in added.items() if token.special}
        self.skipped = {*special, self.eos_id}
        self.guard_tokens({eos, bos, "<|system|>", "<|user|>", "<|assistant|>", *special.values()})

    def guard_tokens(self, names: set[str]):
        """Let these tokens come from a template alone: what a row spells is characters."""
        added = self.backend.get_added_tokens_decoder().items()
        self.control |= {t.content: number for number, t in added if t.content in names and t.content.strip()}
        tokens = sorted((token for _, token in added if token.content in self.control), key=lambda t: -len(t.content))
        self.backend.add_special_tokens(tokens)
        self.spelled = re.compile("|".join(re.escape(token.content) for token in tokens))
        left, right = r"(?:(?<!\s)\s+)?", r"\s*"  # each run of spaces is tried once
        forms = [left * token.lstrip + re.escape(token.content) + right * token.rstrip for token in tokens]
        self.written = re.compile(f"({'|'.join(forms)})")
        changed = self.backend.normalizer.normalize_str if self.backend.normalizer else str
        odd = (t for t in tokens if t.single_word or t.normalized and changed(t.content) != t.content)
        self.unsteady = {token.content for token in odd}

    def guard(self, text: str) -> str:
        """A row's text for a template, with a GUARD inside each control token that it spells."""
        return self.spelled.sub(lambda found: found[0][0] + GUARD + found[0][1:], text.replace(GUARD, GUARD * 2))

    def read(self, text: str) -> list[tuple[int, int, int]]:
        """`places` of what a template wrote, control tokens too, as transformers reads it: whole.

        Where a row spells a control token, each stretch between two of the template's is read by itself, as characters.
        """
        pieces, control = self.written.split(text), set(self.control.values())
        if GUARD not in text:
            found = self.places(text, plain=False)
            if sum(token in control for token, _, _ in found) <= len(pieces) // 2:
                return found
        found, place = [], 0
        for number, piece in enumerate(pieces):
            said = list(SAID.finditer(piece))
            at = [place + one.end() - 1 for one in said] + [place + len(piece)]
            if number % 2 == 0:
                spans = self.places("".join(one[1] for one in said), behind=number > 0)
                found += [(token, at[start], at[end]) for token, start, end in spans]
            elif (token := self.spelled.search(piece)[0]) in self.unsteady:
                raise UserError(f"the tokenizer reads {token!r} in some places only: its flags single_word, normalized")
            else:
                found.append((self.control[token], place, place + len(piece)))
            place += len(piece)
        return found

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text`, without BOS or EOS, and the character at which each token starts."""
        found = self.places(text)
        return [token for token, _, _ in found], [start for _, start, _ in found]

    def places(self, text: str, plain: bool = True, behind: bool = False) -> list[tuple[int, int, int]]:
        """(id, first character, the one after its last) of each token, without BOS or EOS.

        plain: control tokens that `text` spells are its characters. behind: whether it stands behind a control token.
        """
        self.backend.encode_special_tokens = plain
        for step in self.first:
            step.prepend_scheme = "never" if behind else "first"
        with told(f"the tokenizer cannot encode {text[:60]!r}"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        found, last = [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)], 0
        ids = set(encoding.ids) if plain else ()
        wrong = [token for token, number in self.control.items() if number in ids]  # in a vocabulary of whole words
        check(not wrong, f"this tokenizer reads {wrong} in a text as control tokens")
        for token, start, end in [*found, (None, len(text), len(text))]:
            lost = text[last:start].strip() or (text[start:end] if token == self.unknown else "")
            if lost and not self.lost:
                self.lost = f"the tokenizer has no token for {lost[:9]!r}, as in {text[:40]!r}: unknown, or left out"
            last = max(last, end)
        return found

    def encode_prompts(self, texts: list[str], with_prefix: bool = True) -> list[list[int]]:
        """Token ids of a benchmark's texts, as transformers encodes them: spelled special tokens are special."""
        self.backend.encode_special_tokens = False
        with told("the tokenizer cannot encode a benchmark's texts"):
            return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=with_prefix)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens included unless they are to be skipped."""
        with told(f"the tokenizer cannot decode {ids[:10]}"):
            kept = [token for token in ids if token not in self.skipped] if skip_special_tokens else ids
            return self.backend.decode(kept, skip_special_tokens=False)


def special_tokens(settings: dict) -> dict[str, AddedToken]:
    """The special tokens of a tokenizer's settings by name, in transformers' order. Those of a list get numbers."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or {}
    found = {name: settings.get(name) for name in [*NAMED, *settings] if name.endswith("_token")}
    found |= extra if isinstance(extra, dict) else dict(enumerate(extra))
    return {name: added_token(said) for name, said in found.items() if isinstance(said, str | dict)}


def added_token(said: str | dict) -> AddedToken:
    """A token as a file describes it, by its text or with its flags."""
    flags = said if isinstance(said, dict) else {"content": said, "special": True}
    flags = {"normalized": not flags.get("special"), **flags}
    return AddedToken(**{flag: flags[flag] for flag in FLAGS if flag in flags})


def as_llama(settings: dict, model: dict) -> dict:
    """The parts that the class LlamaTokenizer makes itself: of a tokenizer.json it keeps only vocabulary and merges."""
    kind = model.get("type", "BPE")
    check(kind == "BPE", f"tokenizer_class LlamaTokenizer of a model of type {kind} is not implemented")
    spaced, held = settings.get("add_prefix_space") is not False, {key: model[key] for key in ("vocab", "merges")}
    scheme = ("always" if settings.get("legacy") else "first") if spaced else "never"
    words = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}, *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * spaced]
    parts = {"pre_tokenizer": words, "decoder": {"type": "Sequence", "decoders": steps}, "normalizer": None}
    return parts | {"model": held | {"type": "BPE", "fuse_unk": True, "byte_fallback": True}, "added_tokens": []}


def growth(part: dict) -> float:
    """How many times as long as a text a part of a tokenizer.json, or one of its steps, may make it, at most."""
    steps = [step for key, some in part.items() if key.endswith(("ers", "ors")) for step in some]
    if part.get("type") == "Replace":
        sought = len(part["pattern"].get("String", ""))  # a pattern may match the empty text before each character
        return max(1, len(part["content"]) / sought) if sought else 1 + len(part["content"])
    if part.get("type") == "TemplateProcessing":
        return sum("Sequence" in piece for piece in part["single"])
    once = 4 if part.get("type") == "ByteLevel" else max(1, len(part.get("prepend", "")))
    return math.prod(map(growth, steps), start=once)


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """A checkpoint's tokenizer as transformers loads it: tokenizer.json, its class's pipeline, tokens added later."""
    path, config, later = (folder / f"{name}.json" for name in ("tokenizer", "tokenizer_config", "added_tokens"))
    with told(f"{path} cannot be read"), quiet():
        value = read_json(path)
        parts = (value.get(part) or {} for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        check(max(map(growth, parts)) <= 64, f"{path} makes of a text one of more than 64 times its length")
        settings, older = tokenizer_settings(folder), read_json(later) if later.exists() else {}
        odd = settings.get("split_special_tokens") or value["model"].get("dropout")  # which is random
        check(not odd, f"{config} or {path.name}: split_special_tokens or dropout is not implemented")
        named = list(special_tokens(settings).values())
        special, listed = {token.content for token in named}, settings.get("added_tokens_decoder")
        if listed is None:
            listed = {number: {"content": name, "special": name in special} for name, number in older.items()}
            listed |= {token["id"]: token for token in value.get("added_tokens") or ()}
        if settings["tokenizer_class"] == "LlamaTokenizer":
            value |= as_llama(settings, value["model"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(value))
        held = {repr(token): token.content for token in backend.get_added_tokens_decoder().values()}
        listed = [added_token(token) for _, token in sorted(listed.items(), key=lambda entry: int(entry[0]))]
        adding = [token for token in listed if repr(token) not in held]
        known, eos = {*held.values(), *(token.content for token in adding)}, special_token(folder, "eos_token")
        there = eos in known or eos is not None and backend.token_to_id(eos) is not None
        check(there, f"{config}: eos_token {eos!r} is no token of the vocabulary")
        adding += {token.content: token for token in named if token.content not in known}.values()
        for token in adding:
            token.special |= token.content in special
        backend.add_tokens(adding)
        return backend


def load_tokenizer(name_or_path, revision: str | None = None, template: str = "paper") -> Tokenizer:
    """The tokenizer of a checkpoint, from a local folder or the hub. UserError if it names no end of text.

    template: the "paper"'s (Appendix A.1), or the "model"'s own chat template, for conversations.
    """
    more = ["chat_template.jinja"] if template == "model" else []
    folder = find_checkpoint(name_or_path, revision, TOKENIZER_FILES + more)
    load = f"from transformers import AutoTokenizer as T; T.from_pretrained('{name_or_path}')"
    how = f"transformers may make it: python -c \"{load}.save_pretrained('{folder}')\""
    check((folder / "tokenizer.json").exists(), f"{folder} has no tokenizer.json; {how}")
    backend = load_backend(folder)
    eos, bos = special_token(folder, "eos_token"), special_token(folder, "bos_token")
    with told(f"{folder}: the tokenizer does not work"), quiet():
        ids = backend.get_vocab().values()
        check(len(ids) == len(set(ids)), f"{folder / 'tokenizer.json'}: two tokens have one id")
        tokenizer = Tokenizer(backend, eos, bos)
        try:
            tokenizer.encode(eos)
        except UserError as reason:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {reason}") from None
        whole = tokenizer.read(f"a{eos}")[-1][0] == tokenizer.eos_id
        check(whole, f"{folder}: the tokenizer does not read {eos!r} behind a word: the flags of that token")
        if template == "model":
            text, known = find_template(folder), {t.content for t in backend.get_added_tokens_decoder().values()}
            named = special_tokens(tokenizer_settings(folder)).items()
            given = {name: token.content for name, token in named if isinstance(name, str)}
            tokenizer.guard_tokens(written_tokens(text, given, known))
            tokenizer.template = ChatTemplate(text, tokenizer, given, folder)
            tokenizer.end_ids.add(backend.token_to_id(tokenizer.template.end))
        tokenizer.lost = ""
        return tokenizer


def written_tokens(template: str, variables: dict, known: set[str]) -> set[str]:
    """The added tokens that a template writes, without those that it looks for in what is said (thoughts)."""
    written, sought, more = "", "", [{"role": "system", "content": "?"}, *PROBE, *PROBE]
    with suppress(Exception):  # a program of the checkpoint's own, of which ChatTemplate tells what is wrong with it
        compiled = compile_template(template)
        nodes = compiled.environment.parse(template).find_all((Call, Compare))
        sought = " ".join(str(text.value) for node in nodes for text in node.find_all(Const))
        for messages in (PROBE, more):
            written += compiled.render(messages=messages, add_generation_prompt=True, **variables)
    return {token for token in known if token.strip() and token in written and token not in sought}
