"""What was selected: the token explorer, one HTML page that makes the case studies of Appendix D move.

    python -m paper.visualize --model NAME|DIR [--adapter DIR ...] --data SOURCE --out page.html
    python -m paper.visualize --run DIR [--run DIR ...]

The reader moves gamma and rho. The page selects as sstoken.py does. Its second view has the curves of runs (curves.py).
"""

import argparse
import base64
import bisect
import hashlib
import html
import itertools
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import lora
from model import load_model
from paper import auto, baselines, curves
from paper.frozen import response_losses, signals
from support import checkpoint, command, machine, templates
from support.files import check, check_writable, write_whole
from support.sources import Account, add_flags, load_rows, source_names
from support.start import run_script

TEMPLATE = Path(__file__).with_name("visualize.html")
NATS, SHARE = 2000, 65535  # what the page stores: losses in 1 / NATS nats up to 32.8, attention in 1 / SHARE, two bytes
TOP, SIGMA = 80, 40  # and in one byte entropies of 20 tokens in 1 / TOP nats up to 3.1, surprise in 1 / SIGMA up to 6.3
DESCRIBED = ("entropy", "spread", "top_entropy")
JOINER = "\u200d"  # makes one emoji of two


class Sample(NamedTuple):
    """One sample as the page holds it: whole numbers in units of NATS, SHARE, TOP and SIGMA, for its L_resp tokens."""

    parts: list  # its text in order: a str of prompt, a list of pieces (text, number of tokens) of response
    history: Tensor  # L_his (L_resp,)
    losses: Tensor  # L_theta (states, L_resp)
    attention: Tensor  # AttnScore (states, layers, L_resp)
    reference: Tensor | None  # L_ref (L_resp,)
    top_entropy: Tensor | None = None  # of the 20 likeliest tokens, (states, L_resp)
    surprise: Tensor | None = None  # (L_theta - H) / sigma of what is predicted, (states, L_resp)
    answer_mask: Tensor | None = None  # which tokens are of an answer that --rho auto keeps, (L_resp,)
    noise: Tensor | None = None  # which tokens the data itself marks, (L_resp,) bool


def in_steps(values: Tensor, steps: int, largest: int = 65535) -> Tensor:
    """Values as whole numbers of 1 / steps, as two bytes hold them, or one: 0 to `largest`."""
    return (values.double() * steps).round().clamp(0, largest).to(torch.int64)


def pieces(tokenizer: data.Tokenizer, ids: list[int], before: int | None) -> list[tuple[str, int]]:
    """The text of `ids` in pieces (text, number of tokens); `before`: the id before them.

    A piece is one token, or the tokens of one visible character: bytes, accents, parts of an emoji.
    """
    found, group, start = [], [], [] if before is None else [before]
    for place, token in enumerate(ids):
        group.append(token)
        text = tokenizer.decode(start + group)[len(tokenizer.decode(start)) :]
        if text.endswith("\ufffd") and len(group) < 4 and place < len(ids) - 1:  # a character has four bytes at most
            continue
        text, tokens = text.translate(command.SHOWN), len(group)
        first = text[:1] or " "  # an accent, a vowel sign, a joiner and an emoji's skin colour are drawn into another
        drawn = unicodedata.category(first)[0] == "M" or first == JOINER or "\U0001f3fb" <= first <= "\U0001f3ff"
        if found and (drawn or found[-1][0].endswith(JOINER)):
            text, tokens = found[-1][0] + text, found.pop()[1] + tokens
        found.append((text, tokens))
        start, group = [token], []
    return found


def split_parts(example: data.Example, tokenizer: data.Tokenizer) -> list:
    """A sample's text in its order, as `Sample.parts`."""
    ids, response, parts = example.ids.tolist(), example.response.tolist(), []
    for is_response, group in itertools.groupby(range(len(ids)), key=response.__getitem__):
        start, *more = group
        stretch = pieces(tokenizer, ids[start : start + 1 + len(more)], ids[start - 1] if start else None)
        parts.append(stretch if is_response else "".join(text for text, _ in stretch))
    return parts


def marked(rows: list[dict], examples: list[data.Example], tokenizer: data.Tokenizer) -> list[Tensor | None]:
    """Which response tokens the column "noise" of the rows marks: (L_resp,) bool for each sample, or None.

    The column has pairs [start, end] of characters of the output; the end token is one character after it. None also if
    a row is not one sample, or its output is not encoded as it stands.
    """
    if len(rows) != len(examples):
        return [None] * len(examples)
    found = []
    for row, (ids, response) in zip(rows, examples, strict=True):
        ids, text = ids[response].tolist(), str(row.get("output", ""))
        places = [*tokenizer.places(text), (tokenizer.eos_id, len(text), len(text) + 1)][: len(ids)]
        found.append(None)
        try:
            wrong = sorted((int(start), int(end)) for start, end in row["noise"])
        except (KeyError, TypeError, ValueError, OverflowError):  # no such column, or one of anything else
            continue
        if [token for token, _, _ in places] != ids:
            continue
        spans = [(end - len(text[start:end].lstrip() or text[start:end] or " "), end) for _, start, end in places]
        reach = [0, *itertools.accumulate((b for _, b in wrong), max)]  # how far those go that start before another
        found[-1] = torch.tensor([reach[bisect.bisect_left(wrong, (end,))] > start for start, end in spans])
    return found


def pack(values: Tensor, size: int = 2) -> str | list:
    """Whole numbers as base64 of `size` bytes each, the low one first; lists of these for the other dimensions."""
    if values.dim() > 1:
        return [pack(part, size) for part in values]
    return base64.b64encode(values.numpy().astype(f"<u{size}").tobytes()).decode()


def content(samples: list[Sample], head: dict) -> str:
    """All that the page's script reads, as JSON in which no text can end the element that holds it."""

    def flat(part):  # a piece is its text, and behind it how many tokens it has, if it has several
        return part if isinstance(part, str) else [x for text, n in part for x in ([text, n] if n > 1 else [text])]

    rows = []
    for sample in samples:
        row = {"parts": [flat(part) for part in sample.parts]}
        two = {"losses": sample.losses, "attention": sample.attention, "reference": sample.reference}
        one = {"topEntropy": sample.top_entropy, "surprise": sample.surprise, "answerMask": sample.answer_mask}
        row |= {name: pack(x, 2 if name in two else 1) for name, x in (two | one).items() if x is not None}
        if sample.noise is not None:
            row["noise"] = sample.noise.nonzero().flatten().tolist()
        rows.append(row)
    text = json.dumps(head | {"samples": rows}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def build_page(samples: list[Sample], head: dict) -> str:
    """The page: the template with digests of its style and script in the security policy, and the samples.

    head: about (the line under the title), states (labels), layers (numbers), vocabulary (its size), gamma and rho in
    hundredths, NATS, SHARE, and runs, as curves.py reads them.
    """
    template = TEMPLATE.read_text(encoding="utf-8")

    def allow(element):
        (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    filled = {
        "policy": f"default-src 'none'; style-src {allow('style')}; script-src {allow('script')}; base-uri 'none'",
        "title": "Which tokens are selected" if samples else "How it went",
        "about": html.escape(head["about"]),
        "content": content(samples, head),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], template)


def layer_numbers(asked: str, count: int) -> list[int]:
    """The decoder layers that a comma-separated list means, from 0; shallow, medium, deep are Table 2's."""
    known = {str(number): number % count for number in range(-count, count)}
    known |= {"shallow": 0, "medium": count // 2, "deep": count - 1}
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        check(name in known, f"--layers {name!r}: layers are 0 to {count - 1}, -1 the last, shallow, medium or deep")
    return list(dict.fromkeys(known[name] for name in names))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = command.ArgumentParser("Write the token explorer: one page that shows which tokens are selected, and why.")
    # fmt: off
    add = parser.group("models")
    add("--run", action="append", default=[], metavar="DIR", help="a run's folder: show its curves")
    add("--model", help="a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of --model on the hub")
    add("--adapter", action="append", default=[], metavar="NAME|DIR",
        help="a run's folder; its snapshots (train.py --snapshot-every) are steps of the page")
    add("--reference", metavar="NAME|DIR", help="a reference for excess loss (Eq. 2): an adapter, or a whole model")
    add("--layers", default="deep",
        help="decoder layers to show the attention of, comma-separated: shallow, medium, deep (Table 2) or numbers")
    add = parser.group("data")
    add("--data", metavar="SOURCE[,SOURCE...]", help="rows to show, as train.py's --data")
    add("--limit", type=int, default=50, bound="at least 1", metavar="N", help="show the first N rows of each source")
    add("--max-length", type=int, default=2048, bound="at least 2", help="tokens of a sample; the rest is cut")
    add = parser.group("output")
    add("--out", default="explorer.html", metavar="FILE", help="the page to write")
    add("--gamma", type=float, default=0.5, bound="in [0, 1]", help="gamma at first, in hundredths")
    add("--rho", type=float, default=0.6, bound="in (0, 1]", help="rho at first, in hundredths")
    # fmt: on
    add_flags(parser, "data")
    templates.add_flags(parser, "models", default=None)
    command.add_flags(parser)
    args = parser.parse_args(argv)
    for flag, value in (("gamma", args.gamma), ("rho", args.rho)):
        check(round(100 * value) == round(100 * value, 9), f"--{flag} is {value}; it must be in whole hundredths")
    tokens_asked = args.model or args.data or args.adapter or not args.run
    check(args.model and args.data or not tokens_asked, "--model and --data are needed for tokens; curves need --run")
    return args


def look(args: argparse.Namespace) -> tuple[list[Sample], dict, list[curves.State]]:
    """What the page shows of the tokens: samples, what its head says of them, and the models."""
    device = machine.find_device(args.device)
    tokenizer = data.load_tokenizer(args.model, args.revision, args.template or templates.trained_in(args.adapter))
    if args.reference:
        baselines.check_tokenizer(args, tokenizer)
    account = Account(args.skip_bad_rows)
    examples, _ = data.load_examples(args.data, tokenizer, args.max_length, args.limit, account=account)
    for line in account.lines():
        print(line, file=sys.stderr)
    model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)
    checkpoint.check_fits(model, args.model, examples)
    states = curves.find_states(args.adapter, model)
    if args.reference:
        baselines.check_reference_model(model, args.reference, examples)
    layers = layer_numbers(args.layers, model.config.num_hidden_layers)

    elsewhere, found = response_losses(model, auto.behind_other_prompts(examples, seed=42)), []
    for state in states:
        if state.adapter:
            lora.load_adapter(model, state.adapter)
        found.append(signals(model, examples, layers, DESCRIBED))
        lora.remove_lora(model)
    if args.reference and baselines.is_adapter(args.reference):
        lora.load_adapter(model, args.reference)
    elif args.reference:
        model = load_model(args.reference, getattr(torch, args.dtype), device)
    reference = response_losses(model, examples) if args.reference else []
    reference = [in_steps(nll, NATS) for nll in reference] or [None] * len(examples)

    masks = auto.filter_answers(examples, [known[0] for known in found[0]], elsewhere).tokens(examples)
    rows = [row for source in source_names(args.data) if source != "pool" for row in load_rows(source, args.limit)]
    samples, noise = [], marked(rows, examples, tokenizer)
    for i, example in enumerate(examples):
        known = torch.stack([state[i] for state in found])  # (states, 1 + layers + 3, L_resp)
        nll, attention, (entropy, spread, top_entropy) = known[:, 0], known[:, 1:-3], known[:, -3:].unbind(1)
        losses, surprise = in_steps(nll, NATS), (nll - entropy) / spread.clamp(min=1e-6)
        shown = losses[0], losses, in_steps(attention, SHARE), reference[i]
        more = in_steps(top_entropy, TOP, 255), in_steps(surprise, SIGMA, 255), masks[i], noise[i]
        samples.append(Sample(split_parts(example, tokenizer), *shown, *more))
    name = Path(args.model).name if Path(args.model).is_absolute() else args.model
    about = command.one_line(f"{name} on {', '.join(Path(source).name for source in source_names(args.data))}")
    head = {"about": about, "states": [state.label for state in states], "layers": layers}
    return samples, head | {"vocabulary": model.config.vocab_size}, states


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    path = Path(args.out)
    check_writable(path)
    logs = [curves.read_run(Path(run)) for run in args.run]
    samples, head, states = look(args) if args.model else ([], {"states": [], "layers": []}, [])
    shown = [run | {"name": command.one_line(run["name"])} for run in curves.with_states(logs, states)]
    head = {"about": ", ".join(run["name"] for run in shown)} | head | {"nats": NATS, "share": SHARE, "runs": shown}
    head |= {"sigma": SIGMA, "top": TOP, "gamma": round(100 * args.gamma), "rho": round(100 * args.rho)}
    page = build_page(samples, head)
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(f"wrote {path}: {len(samples)} samples, {len(shown)} runs, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
