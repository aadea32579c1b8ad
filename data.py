"""What a model is trained on: rows -> messages -> (ids, response mask) -> batches, and the paper's data pool.

Below it: support/sources.py (files and the hub) and support/schemas.py (a row's columns).
"""

import bisect
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from support.files import check, note
from support.packing import PASS_COST, cut_batch
from support.schemas import Message, conversations
from support.sources import Account, best_rated, load_rows, source_names
from support.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "conversations", "load_rows", "load_tokenizer"]  # what others expect here too

# ------------------------------------------------------------------------------------------------------- sources

RELEASED_POOL = "jlpang888/DS2_50k"  # the 50k samples that the authors trained on
POOL_SIZE = 50_000
# Sec. 4.1 samples 50k from five sets, 300k together. Per set: its id on the hub and its size in that collection (as
# the data-selection papers it follows give it), so that each contributes in proportion.
POOL = {
    "ai2-adapt-dev/flan_v2_converted": 100_000,  # Flan v2
    "OpenAssistant/oasst1": 33_000,
    "tatsu-lab/alpaca": 52_000,
    "databricks/databricks-dolly-15k": 15_000,
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": 100_000,
}


def load_conversations(
    sources: str,
    limit: int | None = None,
    seed: int = 42,
    top: int | None = None,
    rating_field: str = "score",
    account: Account | None = None,
) -> list[list[Message]]:
    """The conversations of comma-separated sources, one source after the other. `limit` is for each source.

    The source `pool` draws POOL_SIZE conversations from the sets of POOL, each in proportion to its size.
    With `top`, only the best rated rows are taken, `top` of all sources together, in their order.
    """
    found, names, account = [], source_names(sources), account or Account()
    if top:
        check("pool" not in names, "the rows of pool are not rated: name rated sources")
        rows = {source: load_rows(source, limit, account) for source in names}
        rows = best_rated(rows, top, rating_field, account)
        return [turns for source in names if rows[source] for turns in conversations(rows[source], source, account)]
    for source in names:
        if source != "pool":
            found += conversations(load_rows(source, limit, account), source, account)
            continue
        total, taken, drawn = sum(POOL.values()), 0, 0
        for name, size in POOL.items():
            taken, before = taken + size, drawn
            drawn = round(POOL_SIZE * taken / total)
            candidates = conversations(load_rows(name), name, account)
            needs = drawn - before
            check(needs <= len(candidates), f"{name} has {len(candidates)} conversations, the pool needs {needs}")
            found += random.Random(f"{name} {seed}").sample(candidates, needs)[:limit]
    return found


# ------------------------------------------------------------------------------------------------------ encoding


class Example(NamedTuple):
    """One sample: ids (L,) int64, and response (L,) bool, true where the token is supervised (I of Eq. 1)."""

    ids: Tensor
    response: Tensor


def prompt_text(messages: list[Message], tokenizer: Tokenizer) -> str:
    """The text that asks for an answer to `messages`: the template up to where the answer begins."""
    if tokenizer.template:
        return tokenizer.template.render(messages, ask=True)
    end = {"assistant": tokenizer.eos}
    said = (f"<|{m['role']}|>\n{m['content'].strip()}{end.get(m['role'], '')}\n" for m in messages)
    return "".join(said) + "<|assistant|>\n"


def prompt_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """The same as ids (L,). A control token that a message spells stays text."""
    if tokenizer.template:
        return tokenizer.template.prompt(messages)
    said = [message | {"content": tokenizer.guard(message["content"].strip())} for message in messages]
    return [token for token, _, _ in tokenizer.read(tokenizer.start + prompt_text(said, tokenizer))]


def encode(messages: list[Message], tokenizer: Tokenizer, max_length: int) -> Example:
    """Messages in the template of Appendix A.1 as token ids, cut to `max_length`, with the mask of supervised tokens.

    `<|system|>\\n{}\\n`, `<|user|>\\n{}\\n` and `<|assistant|>\\n{}{eos}\\n`, contents stripped, without the last
    newline. The assistant's tokens and their end token are supervised, unless the message has weight 0. A token across
    the boundary belongs to the prompt. A control token that a row spells stays text. With --template model, the
    checkpoint's own template takes this one's place (support/templates.py).
    """
    if tokenizer.template:
        return Example(*map(torch.tensor, tokenizer.template.encode(messages, max_length)))
    text, spans = tokenizer.start, []
    for number, message in enumerate(messages):
        if number:
            text += "\n"
        text += f"<|{message['role']}|>\n"
        start = len(text)
        text += tokenizer.guard(message["content"].strip())
        if message["role"] == "assistant":
            text += tokenizer.eos
            if message.get("weight", 1) != 0:
                spans.append((start, len(text)))
    found = tokenizer.read(text[: 2 * max_length * tokenizer.longest])[:max_length]  # twice what they cover
    response = torch.zeros(len(found), dtype=torch.bool)
    starts = [start for _, start, _ in found]
    for start, end in spans:
        response[bisect.bisect_left(starts, start) : bisect.bisect_left(starts, end)] = True
    response[:1] = False  # nothing predicts it
    return Example(torch.tensor([token for token, _, _ in found], dtype=torch.int64), response)


class Dataset(NamedTuple):
    """Samples, and the account of what was not used of their rows."""

    examples: list[Example]
    account: Account


def load_examples(
    sources: str | None, tokenizer: Tokenizer, max_length: int, *choice, account: Account | None = None
) -> Dataset:
    """Every sample of `sources` with a response token within `max_length`; sources None: no samples.

    choice: limit, seed, top, rating_field of `load_conversations`. The account also counts what is cut or dropped.
    """
    account = account or Account()
    if sources is None:
        return Dataset([], account)
    found = load_conversations(sources, *choice, account=account)
    left_out = tokenizer.template and tokenizer.template.left_out  # + 1: is it cut?
    examples = account.each(sources, found, lambda turns: encode(turns, tokenizer, max_length + 1), left_out)
    if tokenizer.lost:
        note(tokenizer.lost)
    kept = [e for e in examples if e.response[:max_length].any()]
    check(kept, f"{sources}: no response token within {max_length} tokens in any of {len(examples)} samples")
    account.dropped += len(examples) - len(kept)
    account.cut += sum(len(e.ids) > max_length for e in kept)
    return Dataset([Example(e.ids[:max_length], e.response[:max_length]) for e in kept], account)


# ------------------------------------------------------------------------------------------------------- batches


def plan_batches(
    lengths: list[int],
    batch_size: int,
    micro_batch_size: int,
    seed,
    pass_cost: int = PASS_COST["cpu"],
    pass_tokens: int | None = None,
    padded: bool = True,
) -> Iterator[list[list[int]]]:
    """One epoch: global batches of sample indices, each a list of micro-batches of at most `micro_batch_size`.

    pass_tokens: the most tokens of several samples in one; padded: padding counts.

    The order is drawn from `seed` (an int or a str) and does not depend on the lengths. Inside a batch, samples of
    similar length share a micro-batch, to save padding.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    for start in range(0, len(order), batch_size):
        # The longest first: the memory that it takes then serves all that follow.
        batch = sorted(order[start : start + batch_size], key=lambda i: (-lengths[i], i))
        cuts = cut_batch([lengths[i] for i in batch], micro_batch_size, pass_cost, pass_tokens, padded)
        yield [batch[first:end] for first, end in itertools.pairwise(cuts)]


def collate(examples: list[Example], device="cpu") -> tuple[Tensor, Tensor]:
    """Samples as one batch, padded on the right: ids (B, L) int64 on `device`, and response (B, L) bool on the host.

    The mask stays on the host, so nothing waits for a GPU. No samples give one token that is not supervised.
    """
    if not examples:
        examples = [Example(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))]
    ids = torch.nn.utils.rnn.pad_sequence([example.ids for example in examples], batch_first=True)
    response = torch.nn.utils.rnn.pad_sequence([example.response for example in examples], batch_first=True)
    return ids.to(device, non_blocking=True), response
