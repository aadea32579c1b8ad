"""A checkpoint's tokenizer, guarded: whatever its file or a text makes its library do, a UserError says so."""

import os
from contextlib import contextmanager

import tokenizers

from support.checkpoint import TOKENIZER_FILES, find_checkpoint, special_token
from support.files import UserError
from support.templates import ChatTemplate, find_template


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


class Tokenizer:
    """A checkpoint's tokenizer.json, as SFT needs it: special tokens come in by their ids, never from spelled-out text.

    eos_id: the tokenizer's end of text. prefix: the ids that its own post-processor puts in front (BOS, or nothing).
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
        # "<|end_of_text|>" in a text is spelled out, never a control token, whatever the file itself calls special
        backend.add_special_tokens([token for token in (eos, bos) if token and backend.token_to_id(token) is not None])
        backend.encode_special_tokens = True
        self.backend, vocabulary = backend, backend.get_vocab()
        self.vocab_size, self.longest = max(vocabulary.values()) + 1, max(map(len, vocabulary))
        self.template, self.end_ids = None, {self.eos_id}

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text`, without BOS or EOS, and the character at which each token starts."""
        found = self.places(text)
        return [token for token, _, _ in found], [start for _, start, _ in found]

    def places(self, text: str, control: bool = False) -> list[tuple[int, int, int]]:
        """(id, first character, the one after its last) of each token, without BOS or EOS.

        control: whether special tokens that `text` spells are those, as in a text that a program has written.
        """
        with told(f"the tokenizer cannot encode {text[:60]!r}"), self.reading(control):
            encoding = self.backend.encode(text, add_special_tokens=False)
        if not control and self.eos_id in encoding.ids:  # a vocabulary looked up word by word, as no Llama's or Qwen's
            raise UserError(f"this tokenizer reads {self.eos!r} in a text as its end-of-text token")
        return [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]

    @contextmanager
    def reading(self, control: bool):
        """A context in which special tokens that a text spells are special, or are not."""
        self.backend.encode_special_tokens = not control
        try:
            yield
        finally:
            self.backend.encode_special_tokens = True

    def control_tokens(self) -> list[str]:
        """The texts of the special tokens, the longest first."""
        added = self.backend.get_added_tokens_decoder().values()
        return sorted((token.content for token in added if token.special), key=len, reverse=True)

    def encode_prompts(self, texts: list[str], with_prefix: bool = True) -> list[list[int]]:
        """Token ids of texts from a benchmark, as transformers encodes them: spelled-out special tokens are special."""
        with told("the tokenizer cannot encode a benchmark's texts"), self.reading(control=True):
            return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=with_prefix)]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, control tokens included unless they are to be skipped."""
        with told(f"the tokenizer cannot decode {ids[:10]}"):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)


def load_tokenizer(name_or_path, revision: str | None = None, template: str = "paper") -> Tokenizer:
    """The tokenizer of a checkpoint, from a local folder or the hub. Raises UserError when it names no end of text.

    template: the "paper"'s (Appendix A.1), or the "model"'s own chat template, for conversations.
    """
    folder = find_checkpoint(name_or_path, revision, TOKENIZER_FILES)
    if not (folder / "tokenizer.json").exists():
        parts = [name for name in ("vocab.json", "tokenizer.model") if (folder / name).exists()]
        convert = (
            f"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')"
        )
        how = f', only {parts[0]}, which transformers makes one of: python -c "{convert}"' if parts else ""
        raise UserError(f"{folder} has no tokenizer.json{how}")
    with told(f"{folder / 'tokenizer.json'} cannot be read"), quiet():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos, bos = special_token(folder, "eos_token"), special_token(folder, "bos_token")
    with told(f"{folder}: the tokenizer does not work"), quiet():
        if eos is None or backend.token_to_id(eos) is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token {eos!r} is no token of the vocabulary")
        if len(ids := backend.get_vocab().values()) != len(set(ids)):  # which is decoded would be left to chance
            raise UserError(f"{folder / 'tokenizer.json'}: two tokens have one id")
        tokenizer = Tokenizer(backend, eos, bos)
        try:
            tokenizer.encode(eos)
        except UserError as reason:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {reason}") from None
        if template == "model":
            tokenizer.template = ChatTemplate(find_template(folder), tokenizer, folder)
            tokenizer.end_ids.add(backend.token_to_id(tokenizer.template.end))
        return tokenizer
