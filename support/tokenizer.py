"""A checkpoint's tokenizer, guarded: whatever its file or a text makes its library do, a UserError says so."""

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
from support.files import UserError, read_json
from support.templates import GUARD, PROBE, ChatTemplate, compile_template, find_template, guarded, running


@contextmanager
def told(what: str):
    """A context in which whatever the tokenizers library raises becomes a UserError: `what` and its reason.

    Where its Rust code panics, that is a BaseException, which nothing else would catch.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as reason:
        if not isinstance(reason, Exception) and type(reason).__name__ != "PanicException":
            raise  # Ctrl-C
        raise UserError(f"{what}: {reason}") from None


@contextmanager
def quiet():
    """A context in which a library's own words on stderr are lost, such as Rust's where it panics."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


SAID = re.compile(f"{GUARD}?(.)", re.DOTALL)  # a character that a row says, without what keeps it from being control


class Tokenizer:
    """A checkpoint's tokenizer.json, as SFT needs it: control tokens come in where a template writes them, never a row.

    eos_id: the tokenizer's end of text. prefix: the ids that its own post-processor puts in front (BOS, or nothing),
    start: their text. lost: what it could not write of the texts so far, in words, if anything.
    bos: what tokenizer_config.json calls its beginning of text, if anything; many a tokenizer names one it never adds.
    longest: the characters of its longest token. end_ids: the tokens at which an answer ends. template: the
    checkpoint's own, where conversations are written in that (--template model).
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str, bos: str | None = None):
        self.eos, self.eos_id, self.bos = eos, backend.token_to_id(eos), bos
        backend.no_truncation()
        backend.no_padding()
        with_prefix, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
        starts = (i for i in range(len(with_prefix)) if with_prefix[i : i + len(plain)] == plain)
        self.prefix = with_prefix[: next(starts, 0)]
        self.start = "".join(map(backend.id_to_token, self.prefix))
        self.backend, vocabulary, self.lost = backend, backend.get_vocab(), ""
        self.unknown = vocabulary.get(getattr(backend.model, "unk_token", None), -1)
        self.vocab_size, self.longest = max(vocabulary.values()) + 1, max(map(len, vocabulary))
        self.template, self.end_ids, self.control, step = None, {self.eos_id}, {}, backend.pre_tokenizer
        # what puts a space in front of a text has none to put behind a control token in it
        steps = step if isinstance(step, tokenizers.pre_tokenizers.Sequence) else [step]
        self.first = [step for step in steps if getattr(step, "prepend_scheme", None) == "first"]
        added = backend.get_added_tokens_decoder()
        self.skipped = {number for number, token in added.items() if token.special} | {self.eos_id}
        named = {eos, bos} - {token.content for token in added.values()}
        backend.add_special_tokens([token for token in named if token and backend.token_to_id(token) is not None])
        special = (token.content for token in added.values() if token.special)
        self.guard_tokens({eos, bos, "<|system|>", "<|user|>", "<|assistant|>", *special})

    def guard_tokens(self, names: set[str]):
        """Have these tokens, where there are such, come in from a template alone: what a row spells is characters."""
        added = self.backend.get_added_tokens_decoder().items()
        self.control |= {t.content: number for number, t in added if t.content in names and t.content.strip()}
        tokens = sorted((token for _, token in added if token.content in self.control), key=lambda t: -len(t.content))
        self.backend.add_special_tokens([added_token(token, special=True) for token in tokens])
        self.spelled = re.compile("|".join(re.escape(token.content) for token in tokens))
        left, right = r"(?:(?<!\s)\s+)?", r"\s*"  # each run of spaces is tried once
        forms = [left * token.lstrip + re.escape(token.content) + right * token.rstrip for token in tokens]
        self.written = re.compile(f"({'|'.join(forms)})")
        changed = self.backend.normalizer.normalize_str if self.backend.normalizer else str
        odd = (token for token in tokens if token.single_word or token.normalized)
        self.unsteady = {token.content for token in odd if token.single_word or changed(token.content) != token.content}

    def guard(self, text: str) -> str:
        """What a row says, for a template: each control token that it spells is kept from being one."""
        return self.spelled.sub(lambda found: guarded(found[0]), text.replace(GUARD, GUARD * 2))

    def read(self, text: str) -> list[tuple[int, int, int]]:
        """(id, first character, the one after its last) of each token of what a template wrote, control tokens too.

        As transformers reads it, whole. Where a row spells a control token, each stretch between two of the template's
        is read by itself, as characters.
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
        ids, last = encoding.ids, 0
        if plain and (token := next(filter(set(ids).__contains__, self.control.values()), None)) is not None:
            kind = "end-of-text" if token == self.eos_id else "control"  # in a vocabulary looked up word by word
            raise UserError(f"this tokenizer reads {self.backend.id_to_token(token)!r} in a text as its {kind} token")
        for token, (start, end) in zip([*ids, None], [*encoding.offsets, (len(text), len(text))], strict=True):
            lost = text[last:start].strip() or (text[start:end] if token == self.unknown else "")
            if lost and not self.lost:
                self.lost = f"the tokenizer has no token for {lost[:9]!r}, as in {text[:40]!r}: unknown, or left out"
            last = max(last, end)
        return [(token, *span) for token, span in zip(ids, encoding.offsets, strict=True)]

    def control_tokens(self) -> list[str]:
        """The texts of the control tokens, the longest first."""
        return sorted(self.control, key=len, reverse=True)

    def encode_prompts(self, texts: list[str], with_prefix: bool = True) -> list[list[int]]:
        """Token ids of texts from a benchmark, as transformers encodes them: spelled-out special tokens are special."""
        self.backend.encode_special_tokens = False
        with told("the tokenizer cannot encode a benchmark's texts"):
            return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=with_prefix)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, special tokens included unless they are to be skipped."""
        with told(f"the tokenizer cannot decode {ids[:10]}"):
            kept = [token for token in ids if token not in self.skipped] if skip_special_tokens else ids
            return self.backend.decode(kept, skip_special_tokens=False)


# ------------------------------------------------------------------------------------------------------- loading

FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def added_token(told, **flags) -> AddedToken:
    """A token as a file tells of it, a text or an object, or one that is there already; `flags` count first."""
    known = told if isinstance(told, dict) else {"content": told, "special": True}
    if isinstance(told, AddedToken):
        known = {flag: getattr(told, flag) for flag in FLAGS}
    return AddedToken(**{flag: held for flag, held in (known | flags).items() if flag in FLAGS})


def as_llama(settings: dict, model: dict) -> dict:
    """What the class LlamaTokenizer puts in the place of a tokenizer.json's parts: it keeps the words and merges."""
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"tokenizer_class LlamaTokenizer of a model of type {model['type']} is not implemented")
    spaced = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if spaced else "never"
    words = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}, *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * spaced]
    model = {"type": "BPE", "fuse_unk": True, "byte_fallback": True} | {key: model[key] for key in ("vocab", "merges")}
    decoder = {"type": "Sequence", "decoders": steps}
    return {"model": model, "normalizer": None, "pre_tokenizer": words, "decoder": decoder, "added_tokens": []}


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
    """A checkpoint's tokenizer as transformers loads it: tokenizer.json, its class's own pipeline, tokens added later.

    Those are of added_tokens_decoder or added_tokens.json, and whatever tokenizer_config.json calls a special token.
    """
    path, config, later = (folder / f"{name}.json" for name in ("tokenizer", "tokenizer_config", "added_tokens"))
    with told(f"{path} cannot be read"), quiet():
        value = read_json(path)
        if any(
            growth(value.get(part) or {}) > 64 for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        ):
            raise UserError(f"{path} makes of a text one of more than 64 times its length")
        settings, older = tokenizer_settings(folder), read_json(later) if later.exists() else {}
        if settings.get("split_special_tokens") or value["model"].get("dropout"):  # the latter is drawn at random
            raise UserError(f"{config} or {path.name}: split_special_tokens or dropout is not implemented")
        named, listed = special_tokens(settings), settings.get("added_tokens_decoder")
        special = {token.content for token in named}
        if listed is not None:
            listed = {int(number): added_token(token) for number, token in listed.items()}
        else:
            flags = {name: {"special": name in special, "normalized": name not in special} for name in older}
            listed = {number: added_token(name, **flags[name]) for name, number in older.items()}
            listed |= {token["id"]: added_token(token) for token in value.get("added_tokens") or ()}
        if settings["tokenizer_class"] == "LlamaTokenizer":
            value |= as_llama(settings, value["model"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(value))
        held = {repr(token): token.content for token in backend.get_added_tokens_decoder().values()}
        adding = [token for _, token in sorted(listed.items()) if repr(token) not in held]
        known = {*held.values(), *(token.content for token in adding)}
        eos = special_token(folder, "eos_token")
        if eos is None or (backend.token_to_id(eos) is None and eos not in known):
            raise UserError(f"{config}: eos_token {eos!r} is no token of the vocabulary")
        adding += {token.content: token for token in named if token.content not in known}.values()
        backend.add_tokens([added_token(t, special=t.special or t.content in special) for t in adding])
        return backend


def special_tokens(settings: dict) -> list[AddedToken]:
    """What tokenizer_config.json calls a special token: by a name that ends in _token, or in a list."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    names = [*NAMED, *(name for name in settings if name.endswith("_token") and name not in NAMED)]
    found = [settings[name] for name in names if isinstance(settings.get(name), str | dict)]
    return [added_token(token) for token in [*found, *(extra.values() if isinstance(extra, dict) else extra)]]


def load_tokenizer(name_or_path, revision: str | None = None, template: str = "paper") -> Tokenizer:
    """The tokenizer of a checkpoint, from a local folder or the hub. Raises UserError when it names no end of text.

    template: the "paper"'s (Appendix A.1), or the "model"'s own chat template, for conversations.
    """
    more = ["chat_template.jinja"] if template == "model" else []
    folder = find_checkpoint(name_or_path, revision, TOKENIZER_FILES + more)
    if not (folder / "tokenizer.json").exists():
        parts = [f"only {name}, " for name in ("vocab.json", "tokenizer.model") if (folder / name).exists()]
        load = f"from transformers import AutoTokenizer as T; T.from_pretrained('{name_or_path}')"
        how = f"which transformers may make: python -c \"{load}.save_pretrained('{folder}')\""
        raise UserError(f"{folder} has no tokenizer.json, {''.join(parts[:1])}{how}")
    backend = load_backend(folder)
    eos, bos = special_token(folder, "eos_token"), special_token(folder, "bos_token")
    with told(f"{folder}: the tokenizer does not work"), quiet():
        if len(ids := backend.get_vocab().values()) != len(set(ids)):  # which is decoded would be left to chance
            raise UserError(f"{folder / 'tokenizer.json'}: two tokens have one id")
        tokenizer = Tokenizer(backend, eos, bos)
        try:
            tokenizer.encode(eos)
        except UserError as reason:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {reason}") from None
        if tokenizer.read(f"a{eos}")[-1][0] != tokenizer.eos_id:
            raise UserError(f"{folder}: the tokenizer does not read {eos!r} behind a word: the flags of that token")
        if template == "model":
            text, known = find_template(folder), {t.content for t in backend.get_added_tokens_decoder().values()}
            variables = {name: special_token(folder, name) for name in NAMED}
            with running(f"the chat template of {folder}", "cannot be read"):
                tokenizer.guard_tokens(written_tokens(text, variables, known))
            tokenizer.template = ChatTemplate(text, tokenizer, folder)
            tokenizer.end_ids.add(backend.token_to_id(tokenizer.template.end))
        tokenizer.lost = ""
        return tokenizer


def written_tokens(template: str, variables: dict, known: set[str]) -> set[str]:
    """Those of the added tokens that a template writes, but for those that it looks for in what is said (thoughts')."""
    written, sought, more = "", "", [{"role": "system", "content": "?"}, *PROBE, *PROBE]
    with suppress(Exception):  # a program of the checkpoint's own, of which ChatTemplate tells what is wrong with it
        compiled = compile_template(template)
        nodes = compiled.environment.parse(template).find_all((Call, Compare))
        sought = " ".join(str(text.value) for node in nodes for text in node.find_all(Const))
        for messages in (PROBE, more):
            written += compiled.render(messages=messages, add_generation_prompt=True, **variables)
    return {token for token in known if token.strip() and token in written and token not in sought}
