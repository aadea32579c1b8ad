"""Questions in words, and the answers of a base model and of adapters beside it, as they are written."""

import sys
from collections.abc import Callable

from support.command import SHOWN
from support.decoding import generate, generation_settings
from support.files import note

LONGEST = 512  # tokens of an answer


def answer(model, tokenizer, prompt: list[int], write: Callable[[str], None]) -> str:
    """What greedy decoding writes after the ids `prompt`. write(piece) gets each new piece of it as it comes."""
    longest, said = min(LONGEST, max(1, model.config.max_position_embeddings - len(prompt))), ""

    def show(tokens: list[int], ended: bool = False) -> bool:
        nonlocal said
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if ended or not text.endswith("\ufffd"):  # the first bytes of a character
            write(text[len(said) :])
            said = text
        return False

    (tokens,) = generate(model, [prompt], longest, stop=show, **generation_settings(model, tokenizer))
    show(tokens, ended=True)
    return said


def converse(model, tokenizer, text: str, who: list[str], become: list[Callable], encode: Callable[[list], list[int]]):
    """Print everyone's answers to `text`, or to the lines on stdin: one conversation until an empty line.

    who, become: each one's name, and what makes `model` that one. encode: messages -> the ids that ask for an answer.
    """
    context, talks = model.config.max_position_embeddings, [[] for _ in who]
    room = context - min(LONGEST, context // 4)  # the rest is the answer's

    def write(piece: str):
        print(piece.translate(SHOWN), end="", flush=True)

    if not text and sys.stdin.isatty():
        note("ask on one line; an empty line begins a new conversation; Ctrl-D ends")
    for question in map(str.strip, [text] if text else sys.stdin):
        if not question:
            talks = [[] for _ in who]
            continue
        for name, change, talk in zip(who, become, talks, strict=True):
            change()
            talk.append({"role": "user", "content": question})
            if len(encode(talk)) > room:
                note(f"the model reads {context} tokens: a conversation of more than {room} loses its beginning")
            while len(prompt := encode(talk)) > room and len(talk) > 1:
                del talk[:2]  # the oldest question and answer
            write(f"{name}: " if len(who) > 1 else "")
            talk.append({"role": "assistant", "content": answer(model, tokenizer, prompt[-room:], write)})
            print(flush=True)


def add_flags(parser):
    """A question instead of tasks."""
    say = "ask this question instead of tasks; without it: each line of stdin. An empty line starts a new conversation"
    parser.group("model")("--ask", nargs="?", const="", metavar="TEXT", help=say)
