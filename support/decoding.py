"""Greedy decoding: a KV cache in blocks of rows, several tokens a step, prompts that begin alike read once."""

import json
import math
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from support.files import check, is_number, read_json
from support.kernels import attention

GUESS = 8  # tokens of a guess, at most
STEP_TOKENS = 96  # a step of decoding that computes fewer costs hardly more: most of it is reading weights and cache
SIMILAR = 0.7  # prompts share a block if the shortest is at least this share of the longest: the rest is padding


class SharedPrefix:
    """Keys and values of one layer for tokens that stand before every row of a batch, (1, H_kv, P, d) each."""

    k = v = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The first call keeps the prefix's own k and v; later ones put them before theirs, (B, H_kv, L, d)."""
        if self.k is None:
            self.k, self.v = k, v
        else:
            k, v = (torch.cat((own.expand(len(x), -1, -1, -1), x), dim=2) for own, x in ((self.k, k), (self.v, v)))
        return attention(q, k, v, mask)


class Row:
    """A prompt and what is written after it, in `ids`; `guess`: the tokens that may come next.

    A guess is what came next where the last tokens stood before ("prompt lookup decoding", Saxena 2023). The model
    checks it: only what it would have written is kept.
    """

    def __init__(self, number: int, prompt: list[int]):
        self.number, self.start, self.ended = number, len(prompt), False
        self.ids, self.guess, self.after = [], [], {}  # after: n-gram -> the place after it, where it was seen last
        for token in prompt:
            self.append(token)

    def new(self) -> list[int]:
        return self.ids[self.start :]

    def ends(self) -> list[tuple[int, ...]]:
        """The n-grams at the end, the longest first."""
        return [tuple(self.ids[-n:]) for n in (3, 2, 1) if n <= len(self.ids)]

    def append(self, token: int):
        self.after |= dict.fromkeys(self.ends(), len(self.ids))
        self.ids.append(token)

    def look_up(self, most: int):
        """Set `guess`, of at most `most` tokens; a repetition goes on in the guess itself."""
        place = next((self.after[end] for end in self.ends() if end in self.after), None)
        going_on = list(self.ids)
        while place is not None and len(going_on) < len(self.ids) + most:
            going_on.append(going_on[place])
            place += 1
        self.guess = going_on[len(self.ids) :]


class Block:
    """Rows of similar length that are decoded side by side, and their cache.

    keys, values: for each layer (rows, H_kv, capacity, d), of all tokens of a row but the last.
    """

    def __init__(self, config, rows: list[Row], capacity: int, like: Tensor):
        shape, layers = (len(rows), config.num_key_value_heads, capacity, config.head_dim), config.num_hidden_layers
        self.keys, self.values = ([like.new_zeros(shape) for _ in range(layers)] for _ in range(2))
        self.rows, self.device = rows, like.device

    def drop_ended(self):
        going = [n for n, row in enumerate(self.rows) if not row.ended]
        if len(going) < len(self.rows):
            self.rows = [self.rows[n] for n in going]
            for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
                self.keys[layer], self.values[layer] = k[going], v[going]

    def extend(self, width: int) -> Tensor:
        """The positions that are computed next, (rows, width): of each row's last token and of those after it."""
        last = torch.tensor([[len(row.ids) - 1] for row in self.rows], device=self.device)
        self.positions = last + torch.arange(width, device=self.device)
        places = torch.arange(int(last.max()) + width, device=self.device)
        self.mask = (places <= self.positions[:, :, None])[:, None]  # (rows, 1, width, places)
        return self.positions

    def read(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        """Attention in prompts, padded on the right, of the rows from `first` on. Stores their k and v."""
        at = slice(first, first + len(k)), slice(None), slice(k.shape[2])
        self.keys[layer][at], self.values[layer][at] = k, v
        return attention(q, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the tokens at `positions`, (rows, heads, width, d), to all before them. Stores their k and v."""
        at, end = (torch.arange(len(k), device=k.device)[:, None], slice(None), self.positions), self.mask.shape[-1]
        self.keys[layer][at], self.values[layer][at] = k.transpose(1, 2), v.transpose(1, 2)
        return attention(q, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], self.mask)


def attend_all(blocks: list[Block], layer: int, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    """`Block.attend` of all blocks, whose rows stand one after the other: (rows, heads, width, d)."""
    sizes = [len(block.rows) for block in blocks]
    parts = zip(blocks, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([block.attend(layer, q, k, v) for block, q, k, v in parts])


def pad_right(lists: list[list[int]], device) -> Tensor:
    """ids (B, longest), zeros after the end of each list."""
    tensors = [torch.tensor(ids, dtype=torch.long) for ids in lists]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def read_prompts(model: nn.Module, rows: list[Row], capacity: int, batch_tokens: float) -> tuple[Block, list[Tensor]]:
    """A block of rows, the longest first, of `capacity` tokens each, and the hidden states of their last tokens."""
    layers, weight, hidden = range(model.config.num_hidden_layers), model.lm_head.weight, []
    block = Block(model.config, rows, capacity, weight)
    size = int(max(1, min(batch_tokens / len(rows[0].ids), len(rows))))
    for first in range(0, len(rows), size):
        some = [row.ids for row in rows[first : first + size]]
        cache = [SimpleNamespace(attend=partial(block.read, layer, first)) for layer in layers]
        read = model(pad_right(some, weight.device), cache=cache)
        hidden += read[torch.arange(len(some)), [len(ids) - 1 for ids in some]].split(1)
    return block, hidden


def check_numbers(values: Tensor, model: nn.Module):
    """UserError if a model gives NaN or an infinite value: then none of its answers means anything."""
    finite = bool(values.isfinite().all())
    check(finite, f"{model.name_or_path}: a prediction is no finite number: look at the weights and the adapter")


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Container[int] = (),
    stop: Callable[[list[int]], bool] = lambda ids: False,
    batch_tokens: float = math.inf,
    cache_tokens: float = math.inf,
    ended: Callable[[int], None] = lambda i: None,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """Greedy continuation of each prompt: at most `max_new_tokens` ids, up to the first stop id, which is left out.

    stop(new ids) is called after each token of a row; true ends the row. batch_tokens: tokens of prompts that are read
    at once. cache_tokens: tokens that the cache may hold, prompts and answers (one prompt at least, in both cases).
    ended(number) is called for each prompt that is done. repetition_penalty: Keskar et al., 2019.
    """
    produced = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest last, to be popped first
    blocks, hidden = [], []  # hidden: of each row of all blocks, its last token's state and those of its guess, (n, D)
    layers, device = range(model.config.num_hidden_layers), model.lm_head.weight.device
    sizes = [len(prompt) + max_new_tokens + GUESS for prompt in prompts]  # what the cache of each row must hold

    while blocks or waiting:
        free = cache_tokens - sum(len(block.rows) * block.keys[0].shape[2] for block in blocks)
        if free >= 0.25 * cache_tokens:  # so that prompts are read several at a time
            while waiting and (not blocks or free >= sizes[waiting[-1]]):
                largest = sizes[waiting[-1]]
                alike = sum(sizes[i] >= SIMILAR * largest for i in waiting)
                numbers = [waiting.pop() for _ in range(int(max(1, min(free / largest, alike))))]
                rows = [Row(i, prompts[i]) for i in numbers]
                block, read = read_prompts(model, rows, largest, batch_tokens)
                blocks, hidden, free = [*blocks, block], [*hidden, *read], free - len(rows) * largest

        logits, at = model.lm_head(torch.cat(hidden)), 0
        check_numbers(logits.amax(dim=-1), model)
        likeliest = logits.argmax(dim=-1).tolist()
        for row in (row for block in blocks for row in block.rows):
            for n, guessed in enumerate([*row.guess, None], start=at):
                token = likeliest[n]
                if repetition_penalty != 1:
                    seen = torch.tensor(row.ids, device=device).unique()
                    old = logits[n, seen]
                    logits[n, seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
                    token = int(logits[n].argmax())
                row.ended = token in stop_ids
                if not row.ended:
                    row.append(token)
                    row.ended = len(row.new()) == max_new_tokens or stop(row.new())
                if row.ended or token != guessed:
                    break
            at += 1 + len(row.guess)
            if row.ended:
                produced[row.number] = row.new()
                ended(row.number)
        for block in blocks:
            block.drop_ended()
        blocks, hidden = [block for block in blocks if block.rows], []
        rows = [row for block in blocks for row in block.rows]
        for row in rows:
            row.look_up(min(GUESS, STEP_TOKENS // len(rows) - 1, max_new_tokens - len(row.new()) - 1))
        if rows:
            ids = pad_right([row.ids[-1:] + row.guess for row in rows], device)
            positions = torch.cat([block.extend(ids.shape[1]) for block in blocks])
            cache = [SimpleNamespace(attend=partial(attend_all, blocks, layer)) for layer in layers]
            read = model(ids, positions, cache=cache)
            hidden = [states[: 1 + len(row.guess)] for row, states in zip(rows, read, strict=True)]
    return produced


# Settings that change what greedy decoding writes -> the values that do not, beside those that are off
NEUTRAL = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def generation_settings(model: nn.Module, tokenizer) -> dict:
    """stop_ids and repetition_penalty of the checkpoint's generation_config.json, or config.json if there is none.

    stop_ids also has the tokenizer's ends of an answer. UserError for a setting that changes what is written and is
    not implemented.
    """
    path = model.folder / "generation_config.json"
    settings = read_json(path) if path.exists() else model.config.raw
    where = path if path.exists() else model.folder / "config.json"
    for key, neutral in NEUTRAL.items():
        fits = (value := settings.get(key)) in (None, False, "", [], {}, *neutral)
        check(fits, f"{where}: {key} {value!r} is not implemented; take it out to have plain greedy decoding")
    penalty = 1.0 if settings.get("repetition_penalty") is None else settings["repetition_penalty"]
    fits = is_number(penalty) and penalty > 0
    check(fits, f"{where}: repetition_penalty is {penalty!r}, not a number above 0")
    return {"stop_ids": {*tokenizer.end_ids, *named_ends(settings, where)}, "repetition_penalty": penalty}


def named_ends(settings: dict, where) -> list[int]:
    """eos_token_id of the configuration in the file `where`, as a list."""
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    check(all(type(token) is int for token in named), f"{where}: eos_token_id is {named!r}, not numbers of tokens")
    return named
