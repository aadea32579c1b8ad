"""Questions in words and answers as they are written, of a base model and of adapters beside it."""

import sys
from collections.abc import Callable, Iterator

from support.decoding import generate, generation_settings

LONGEST = 512  # tokens of an answer


def answer(model, tokenizer, prompt: list[int], write: Callable[[str], None]) -> str:
    """What greedy decoding writes after `prompt`; write() is given the pieces of it as they come."""
    room, said = model.config.max_position_embeddings, ""
    longest = min(LONGEST, max(1, room - len(prompt)))

    def show(tokens: list[int]) -> bool:
        nonlocal said
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            write(text[len(said) :])
            said = text
        return False

    (tokens,) = generate(
        model, [prompt[-(room - longest) :]], longest, stop=show, **generation_settings(model, tokenizer)
    )
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    write(text[len(said) :])
    return text


def questions(text: str) -> Iterator[str | None]:
    """The one question, or lines of the terminal or of a pipe; None where an empty line ends a conversation."""
    if text:
        yield text
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip() or None


def converse(
    model, tokenizer, text: str, who: dict[str, Callable[[], None]], encode: Callable[[list[dict]], list[int]]
):
    """Print everyone's answers to `text`, or to the questions on stdin, of which each sees those before it.

    who: a name for each model, and what makes `model` that one. encode: messages -> the ids that ask for an answer.
    """

    def write(piece: str):
        print(piece, end="", flush=True)

    talks = {name: [] for name in who}
    for question in questions(text):
        for name, become in who.items():
            if question is None:
                talks[name] = []
                continue
            become()
            talks[name].append({"role": "user", "content": question})
            if len(who) > 1:
                print(f"{name}: ", end="", flush=True)
            said = answer(model, tokenizer, encode(talks[name]), write)
            talks[name].append({"role": "assistant", "content": said})
            print(flush=True)


def add_flags(parser):
    """A question instead of tasks."""
    add = parser.group("model")
    # fmt: off
    add("--ask", nargs="?", const="", metavar="TEXT",
        help="no tasks: ask this in the run's template, and print what the base and each adapter answer; without a "
        "text: lines of the terminal or a pipe, one conversation until an empty line")
    # fmt: on
