"""Questions in words and answers as they are written, of a base model and of adapters beside it."""

import sys
from collections.abc import Callable, Iterator

from support.command import SHOWN
from support.decoding import generate, generation_settings
from support.files import note

LONGEST = 512  # tokens of an answer


def answer(model, tokenizer, prompt: list[int], write: Callable[[str], None]) -> str:
    """What greedy decoding writes after `prompt`; write() is given the pieces of it as they come."""
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


def questions(text: str) -> Iterator[str | None]:
    """The one question, or lines of the terminal or of a pipe; None where an empty line ends a conversation."""
    if text:
        yield text
    while not text:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line.strip() or None


def converse(model, tokenizer, text: str, who: list[str], become: list[Callable], encode: Callable[[list], list[int]]):
    """Print everyone's answers to `text`, or to the questions on stdin, of which each sees those before it.

    who, become: each one's name, and what makes `model` that one. encode: messages -> the ids that ask for an answer.
    """
    context, talks = model.config.max_position_embeddings, [[] for _ in who]
    room = context - min(LONGEST, context // 4)  # the rest is the answer's; older turns than fit are left out

    def write(piece: str):
        print(piece.translate(SHOWN), end="", flush=True)

    for question in questions(text):
        for name, change, talk in zip(who, become, talks, strict=True):
            if question is None:
                talk.clear()
                continue
            change()
            talk.append({"role": "user", "content": question})
            while len(prompt := encode(talk)) > room and len(talk) > 1:
                note(f"a conversation of more than {room} tokens loses its oldest turns: the model reads {context}")
                del talk[:2]
            if len(prompt) > room:
                note(f"a question of {len(prompt)} tokens loses its beginning: the model reads {context}")
            write(f"{name}: " if len(who) > 1 else "")
            talk.append({"role": "assistant", "content": answer(model, tokenizer, prompt[-room:], write)})
            print(flush=True)


def add_flags(parser):
    """A question instead of tasks."""
    say = "no tasks: ask this in the run's template, and print what the base and each adapter answer; without a text: "
    say += "lines of the terminal or a pipe, one conversation until an empty line"
    parser.group("model")("--ask", nargs="?", const="", metavar="TEXT", help=say)
