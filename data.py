"""What a model is trained on: rows -> messages -> (ids, response mask) -> batches, and the paper's data pool.

Three steps, one section each: turn rows of any known schema into messages, encode messages in the template of Appendix
A.1 with a mask of the supervised tokens, group the samples into batches. Files and the hub: support/sources.py.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from support.files import UserError
from support.sources import best_rated, build_trees, load_rows
from support.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_rows", "load_tokenizer"]  # what others expect here too

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


# ------------------------------------------------------------------------------------------------------ messages

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def _turn(role, content) -> Message:
    role = ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role {role!r} is not system, user or assistant")
    if not isinstance(content, str):
        raise UserError(f"the {role}'s content is {type(content).__name__}, not text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise UserError(f"the {role}'s content holds half of a surrogate pair, which is no character") from None
    return {"role": role, "content": content}


def _exchange(prompt: str, extra: str | None, answer: str) -> list[Message]:
    """One question and its answer; `extra` (Alpaca's input, Dolly's context) follows the question on its own line."""
    question = _turn("user", prompt)
    if extra:
        question["content"] += "\n" + _turn("user", extra)["content"]
    return [question, _turn("assistant", answer)]


def _from_messages(row: dict) -> list[Message]:
    return [_turn(turn.get("role"), turn.get("content")) for turn in row["messages"]]


def _from_completion(row: dict) -> list[Message]:
    if isinstance(row["prompt"], list):  # the conversational form: two lists of messages
        return _from_messages({"messages": row["prompt"] + row["completion"]})
    return _exchange(row["prompt"], None, row["completion"])


def _from_sharegpt(row: dict) -> list[Message]:
    turns = row["conversations"]
    return [_turn(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]


# Columns that tell a schema -> its row as messages. The first whose columns are all there is taken.
SCHEMAS = {
    ("messages",): _from_messages,
    ("conversations",): _from_sharegpt,
    ("prompt", "completion"): _from_completion,
    # Alpaca, then Dolly
    ("instruction", "output"): lambda row: _exchange(row["instruction"], row.get("input"), row["output"]),
    ("instruction", "response"): lambda row: _exchange(row["instruction"], row.get("context"), row["response"]),
}
KNOWN = "; ".join("/".join(columns) for columns in SCHEMAS) + "; OpenAssistant's trees"
TREE = ("prompt",)  # OpenAssistant, a tree a row
TREE_COLUMNS = {"message_id", "parent_id", "text", "role"}  # OpenAssistant, one message a row


def tree_conversations(root: dict) -> Iterator[list[Message]]:
    """Every root-to-leaf path of an OpenAssistant tree along the best-ranked replies, each path one conversation.

    Of several assistant replies the one ranked best (lowest; unranked last) is followed, of several user replies each
    one. Deleted messages are left out; a question that nobody answered is cut off the end of its path.
    """
    found = []

    def walk(node, path):
        path = path + [_turn(node["role"], node["text"])]
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        if path[-1]["role"] == "user":  # so the replies are the assistant's
            replies.sort(key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
            replies = replies[:1]
        for reply in replies:
            walk(reply, path)
        if not replies:
            path = path[:-1] if path[-1]["role"] == "user" else path
            if path and path not in found:
                found.append(path)

    if not root.get("deleted"):
        walk(root, [])
    # an unanswered question leaves the head of a longer path behind
    return (path for path in found if not any(other[: len(path)] == path and other != path for other in found))


def conversations(rows: list[dict], source: str = "data") -> list[list[Message]]:
    """Rows of any known schema -> conversations, each a list of messages. A row is one conversation, a tree several.

    Schemas: messages; prompt/completion; Alpaca; Dolly; ShareGPT; OpenAssistant (whole trees, or a message a row).
    Raises UserError with the source, the row's number (from 1) and its columns when a row fits none of them, or
    another than the rows before it.
    """
    if all(isinstance(row, dict) and row.keys() >= TREE_COLUMNS for row in rows):
        try:
            rows = [{"prompt": root} for root in build_trees(rows)]
        except TypeError as reason:
            raise UserError(f"{source}: a message_id or parent_id is no text ({reason})") from None
    found, first = [], None
    for number, row in enumerate(rows, 1):
        try:
            schema = find_schema(row)
            if schema != (first := first or schema):
                found_columns = f"columns {', '.join(sorted(row))}, row 1 has {'/'.join(first)}"
                raise UserError(f"{found_columns}: a source is to hold one schema ({KNOWN})")
            found += tree_conversations(row["prompt"]) if schema == TREE else [SCHEMAS[schema](row)]
        except UserError as reason:
            raise UserError(f"{source}, row {number}: {reason}") from None
        except (AttributeError, TypeError, KeyError) as reason:
            what = f"{'/'.join(schema)} does not hold what this schema has there"
            raise UserError(f"{source}, row {number}: {what} ({type(reason).__name__}: {reason})") from None
    return found


def find_schema(row: dict) -> tuple[str, ...]:
    """The columns that tell which schema a row is of; UserError with its columns if it is of none."""
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__}, not an object with columns")
    if isinstance(row.get("prompt"), dict):
        return TREE
    for columns in SCHEMAS:
        if row.keys() >= set(columns):
            return columns
    raise UserError(f"columns {', '.join(sorted(row))} fit no schema ({KNOWN})")


def load_conversations(
    sources: str, limit: int | None = None, seed: int = 42, top: int | None = None, rating_field: str = "score"
) -> list[list[Message]]:
    """The conversations of comma-separated sources, one source after the other; `limit` holds for each source.

    The source `pool` draws POOL_SIZE conversations from the five sets of POOL, seeded, each in proportion to its size.
    With `top`, only the rows that are rated best are taken, `top` of all sources together, in the order they stand in.
    """
    found, names = [], [source.strip() for source in sources.split(",") if source.strip()]
    if not names:
        raise UserError(f"--data names no source: {sources!r}")
    if top:
        if "pool" in names:
            raise UserError("the rows of pool are not rated: name rated sources")
        rows = best_rated({source: load_rows(source, limit) for source in names}, top, rating_field)
        return [found for source in names if rows[source] for found in conversations(rows[source], source)]
    for source in names:
        if source != "pool":
            found += conversations(load_rows(source, limit), source)
            continue
        total, taken, drawn = sum(POOL.values()), 0, 0
        for name, size in POOL.items():
            taken, before = taken + size, drawn
            drawn = round(POOL_SIZE * taken / total)
            candidates = conversations(load_rows(name), name)
            if len(candidates) < drawn - before:
                raise UserError(f"{name} has {len(candidates)} conversations, the pool needs {drawn - before}")
            found += random.Random(f"{name} {seed}").sample(candidates, drawn - before)[:limit]
    return found


# ------------------------------------------------------------------------------------------------------ encoding


class Example(NamedTuple):
    """One sample: ids (L,) int64, and response (L,) bool, true where the token is supervised (I of Eq. 1)."""

    ids: Tensor
    response: Tensor


def prompt_text(messages: list[Message], eos: str) -> str:
    """The template's text up to where the last message, an answer, would begin: what a model is asked with."""
    text = ""
    for message in messages[:-1]:
        text += f"<|{message['role']}|>\n{message['content'].strip()}"
        text += (eos if message["role"] == "assistant" else "") + "\n"
    return text + "<|assistant|>\n"


def encode(messages: list[Message], tokenizer: Tokenizer, max_length: int) -> Example:
    """Messages in the template of Appendix A.1 as token ids, cut to `max_length`, with the mask of supervised tokens.

    `<|system|>\\n{}\\n`, `<|user|>\\n{}\\n` and `<|assistant|>\\n{}{eos}\\n`, contents stripped, the last newline
    dropped. Each stretch between end tokens is encoded whole; its end token is appended by its id. Supervised are
    the assistant's tokens and their end token; a token that straddles the boundary belongs to the prompt.
    """
    ids, response = list(tokenizer.prefix), [False] * len(tokenizer.prefix)
    reach = 2 * max_length * tokenizer.longest  # characters, twice what the tokens that are kept can cover

    def append(text, answer_start):
        stretch, starts = tokenizer.encode(text[:reach])
        ids.extend(stretch)
        response.extend(start >= answer_start for start in starts)

    text = ""
    for message in messages:
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant":
            append(text + message["content"].strip(), len(text))
            ids.append(tokenizer.eos_id)
            response.append(True)
            text = "\n"
        else:
            text += message["content"].strip() + "\n"
    if text := text.removesuffix("\n"):
        append(text, len(text))
    return Example(torch.tensor(ids[:max_length]), torch.tensor(response[:max_length], dtype=torch.bool))


def load_examples(
    sources: str,
    tokenizer: Tokenizer,
    max_length: int,
    limit: int | None = None,
    seed: int = 42,
    top: int | None = None,
    rating_field: str = "score",
) -> tuple[list[Example], int]:
    """Every sample of `sources` that keeps a response token within `max_length`, and how many did not.

    The last four arguments are `load_conversations`'.
    """
    found = load_conversations(sources, limit, seed, top, rating_field)
    examples = [encode(messages, tokenizer, max_length) for messages in found]
    kept = [example for example in examples if example.response.any()]
    if not kept:
        raise UserError(f"{sources}: no response token within {max_length} tokens in any of {len(examples)} samples")
    return kept, len(examples) - len(kept)


# ------------------------------------------------------------------------------------------------------- batches

# What a pass costs before its first token, in tokens: about what it is on a CPU, a guess for a GPU.
PASS_COST = {"cpu": 64, "cuda": 1024}


def plan_batches(
    lengths: list[int], batch_size: int, micro_batch_size: int, seed, pass_cost: int = PASS_COST["cpu"]
) -> Iterator[list[list[int]]]:
    """One epoch: global batches of sample indices, each a list of micro-batches of at most `micro_batch_size`.

    The order is drawn from `seed` (an int or a str). Which samples form a global batch does not depend on their
    lengths, so neither does the optimization; inside it similar lengths share a micro-batch, to save padding.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    for start in range(0, len(order), batch_size):
        # The longest first: the memory that it takes then serves all that follow.
        batch = sorted(order[start : start + batch_size], key=lambda i: (-lengths[i], i))
        cuts = cut_batch([lengths[i] for i in batch], micro_batch_size, pass_cost)
        yield [batch[first:end] for first, end in itertools.pairwise(cuts)]


def cut_batch(lengths: list[int], most: int, pass_cost: int) -> list[int]:
    """Where to cut `lengths`, the longest first, into groups of at most `most`: [0, ..., len(lengths)].

    A group costs its size times its longest length, which is what a padded batch computes, and `pass_cost` more. The
    cuts are the cheapest: the best way to cut the first n lengths is the best for some shorter head, and one group.
    """
    # Of the cheapest way to cut the first n lengths, for each n: what it costs, and where its last group starts.
    costs, firsts = [0], [0]
    for end in range(1, len(lengths) + 1):
        candidates = range(max(0, end - most), end)
        cost, first = min((costs[i] + (end - i) * lengths[i] + pass_cost, i) for i in candidates)
        costs.append(cost)
        firsts.append(first)
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(firsts[cuts[-1]])
    return cuts[::-1]


def collate(examples: list[Example], device="cpu") -> tuple[Tensor, Tensor]:
    """Samples as one batch, padded on the right: ids (B, L) int64 on `device`, and response (B, L) bool on the host.

    What is supervised is known before the device computes anything, so nobody ever has to wait for it to say. Of no
    samples: one row of one unsupervised token.
    """
    if not examples:
        examples = [Example(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))]
    ids = torch.nn.utils.rnn.pad_sequence([example.ids for example in examples], batch_first=True)
    response = torch.nn.utils.rnn.pad_sequence([example.response for example in examples], batch_first=True)
    return ids.to(device, non_blocking=True), response
