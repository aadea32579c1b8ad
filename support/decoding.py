"""Greedy decoding: a KV cache in blocks of rows, and several tokens a step."""

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
STEP_TOKENS = 96  # tokens of a step; fewer save little time, which goes into reading weights and cache
SIMILAR = 0.7  # prompts share a block if the shortest is at least this share of the longest; the rest is padding


class SharedPrefix:
    """Keys and values of one layer for tokens that stand before every row of a batch, (1, H_kv, P, d) each."""

    kept = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The first call keeps its k and v. Later calls put these before their own, (B, H_kv, L, d)."""
        if self.kept is None:
            self.kept = k, v
        else:
            pairs = zip(self.kept, (k, v), strict=True)
            k, v = (torch.cat((own.expand(len(x), -1, -1, -1), x), dim=2) for own, x in pairs)
        return attention(q, k, v, mask)


class Row:
    """The `number`-th prompt and the `new` tokens that are written after it, both in `ids`.

    guess: what followed the last tokens where they stood before ("prompt lookup decoding", Saxena 2023).
    states: hidden states of the last token and of the guess, (1 + len(guess), D).
    """

    def __init__(self, number: int, prompt: list[int]):
        self.number, self.new, self.ended = number, [], False
        self.ids, self.guess, self.after = [], [], {}  # after: n-gram -> the place after its last occurrence
        for token in prompt:
            self.append(token)

    def append(self, token: int):
        for n in (1, 2, 3):
            self.after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def look_up(self, most: int):
        """Set `guess`, at most `most` tokens. A repetition at the end of `ids` goes on."""
        ends = [tuple(self.ids[-n:]) for n in (3, 2, 1)]
        place = next((self.after[end] for end in ends if end in self.after), len(self.ids))
        self.guess = (self.ids[place : place + most] * most)[:most]


class Block:
    """Rows of similar length that are decoded side by side, and the cache of their keys and values.

    rows: the longest first; their prompts are read at once. cache: keys and values of each layer, (2, rows, H_kv,
    capacity, d), of all tokens of a row but the last.
    """

    def __init__(self, model: nn.Module, rows: list[Row], capacity: int, batch_tokens: float):
        config, weight = model.config, model.lm_head.weight
        shape = 2, len(rows), config.num_key_value_heads, capacity, config.head_dim
        self.rows, self.cache = rows, [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        size = int(max(1, min(batch_tokens / len(rows[0].ids), len(rows))))
        for first in range(0, len(rows), size):
            some, read = rows[first : first + size], [SharedPrefix() for _ in self.cache]
            ids = pad_right([row.ids for row in some], weight.device)
            for row, states in zip(some, model(ids, cache=read), strict=True):
                row.states = states[len(row.ids) - 1 : len(row.ids)].clone()
            for cache, layer in zip(self.cache, read, strict=True):
                cache[:, first : first + size, :, : ids.shape[1]] = torch.stack(layer.kept)

    def drop_ended(self):
        going = [n for n, row in enumerate(self.rows) if not row.ended]
        if len(going) < len(self.rows):
            self.rows = [self.rows[n] for n in going]
            for layer, cache in enumerate(self.cache):
                self.cache[layer] = cache[:, going]

    def extend(self, width: int) -> Tensor:
        """The positions (rows, width) of the next step: each row's last token and those after it."""
        last = torch.tensor([[len(row.ids) - 1] for row in self.rows], device=self.cache[0].device)
        positions = last + torch.arange(width, device=last.device)
        places = torch.arange(int(positions.max()) + 1, device=last.device)
        self.mask = (places <= positions[:, :, None])[:, None]  # (rows, 1, width, places)
        self.at = torch.arange(len(last), device=last.device)[:, None], slice(None), positions
        return positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a step's tokens, (rows, heads, width, d), to all up to themselves. Stores k and v."""
        (keys, values), end = self.cache[layer], self.mask.shape[-1]
        keys[self.at], values[self.at] = k.transpose(1, 2), v.transpose(1, 2)
        return attention(q, keys[:, :, :end], values[:, :, :end], self.mask)


def pad_right(lists: list[list[int]], device) -> Tensor:
    """ids (B, longest), zeros after the end of each list."""
    tensors = [torch.tensor(ids, dtype=torch.long) for ids in lists]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def check_numbers(values: Tensor, model: nn.Module):
    """UserError if a value that the model gives is NaN or infinite."""
    words = "a prediction is no finite number, by its weights or its adapter's"
    check(values.isfinite().all(), f"{model.name_or_path}: {words}")


def step(model: nn.Module, blocks: list[Block], max_new_tokens: int):
    """Guess what comes next in each row. Then compute the states of last tokens and guesses, all in one pass."""
    rows, sizes = [row for block in blocks for row in block.rows], [len(block.rows) for block in blocks]
    for row in rows:
        row.look_up(min(GUESS, STEP_TOKENS // len(rows) - 1, max_new_tokens - len(row.new) - 1))
    ids = pad_right([row.ids[-1:] + row.guess for row in rows], model.lm_head.weight.device)
    positions = torch.cat([block.extend(ids.shape[1]) for block in blocks])

    def attend(layer, q, k, v, mask):
        parts = zip(blocks, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([block.attend(layer, *part) for block, *part in parts])

    cache = [SimpleNamespace(attend=partial(attend, layer)) for layer in range(model.config.num_hidden_layers)]
    for row, states in zip(rows, model(ids, positions, cache=cache), strict=True):
        row.states = states[: 1 + len(row.guess)]


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

    stop: called after each token with the row's new ids; true ends the row, whose last token stays. batch_tokens: of
    prompts, read at once. cache_tokens: that the cache may hold, prompts and answers; at least one prompt in either
    case. ended: called with the number of each finished prompt. repetition_penalty: Keskar et al., 2019.
    """
    produced, blocks = [[] for _ in prompts], []
    # Each prompt's tokens in the cache and its number, the longest last
    waiting = sorted((len(prompt) + max_new_tokens + GUESS, number) for number, prompt in enumerate(prompts))

    while blocks or waiting:
        # Fill the cache, once there is room for several prompts
        free = cache_tokens - sum(len(block.rows) * block.cache[0].shape[3] for block in blocks)
        if free >= 0.25 * cache_tokens:
            while waiting and (not blocks or free >= waiting[-1][0]):
                largest, _ = waiting[-1]
                alike = sum(size >= SIMILAR * largest for size, _ in waiting)
                numbers = [waiting.pop()[1] for _ in range(int(max(1, min(free / largest, alike))))]
                blocks.append(Block(model, [Row(i, prompts[i]) for i in numbers], largest, batch_tokens))
                free -= len(numbers) * largest

        # Each row takes its next token, and of its guess what the model agrees with
        rows = [row for block in blocks for row in block.rows]
        logits = model.lm_head(torch.cat([row.states for row in rows]))
        check_numbers(logits.amax(dim=-1), model)
        if repetition_penalty != 1:
            before = [row.ids + row.guess[:n] for row in rows for n in range(len(row.states))]
            for scores, ids in zip(logits, before, strict=True):
                seen = torch.tensor(ids, device=scores.device)
                old = scores[seen]
                scores[seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
        likeliest = logits.argmax(dim=-1).cpu().split([len(row.states) for row in rows])
        for row, tokens in zip(rows, likeliest, strict=True):
            for token, guessed in zip(tokens.tolist(), [*row.guess, None], strict=True):
                row.ended = token in stop_ids
                if not row.ended:
                    row.append(token)
                    row.new.append(token)
                    row.ended = len(row.new) == max_new_tokens or stop(row.new)
                if row.ended or token != guessed:
                    break
            if row.ended:
                produced[row.number] = row.new
                ended(row.number)

        for block in blocks:
            block.drop_ended()
        blocks = [block for block in blocks if block.rows]
        if blocks:
            step(model, blocks, max_new_tokens)
    return produced


# Settings that change what is written -> the values that do not, beside none, false, zero and empty
NEUTRAL = read_json(Path(__file__).with_name("decoding.json"))


def generation_settings(model: nn.Module, tokenizer) -> dict:
    """stop_ids and repetition_penalty for `generate`: from generation_config.json, or config.json if there is none.

    stop_ids: the tokenizer's ends of an answer, and those that the file names. UserError for a setting that would
    change what is written and is not implemented.
    """
    own = (model.folder / "generation_config.json").exists()
    where = model.folder / ("generation_config.json" if own else "config.json")
    settings = read_json(where) if own else model.config.raw
    for key, neutral in NEUTRAL.items():
        words = f"{where}: {key} {settings.get(key)!r} is not implemented; take it out to have plain greedy decoding"
        check(settings.get(key) in (None, False, "", [], {}, *neutral), words)
    penalty = settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    check(is_number(penalty) and penalty > 0, f"{where}: repetition_penalty is {penalty!r}, not a number above 0")
    return {"stop_ids": {*tokenizer.end_ids, *named_ends(settings, where)}, "repetition_penalty": penalty}


def named_ends(settings: dict, where) -> list[int]:
    """The tokens that end an answer, by the settings in the file `where`: none, one or some."""
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    check(all(type(token) is int for token in named), f"{where}: eos_token_id is {named!r}, not tokens' numbers")
    return named
