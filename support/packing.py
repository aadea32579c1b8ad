"""Many sequences in few passes: where to cut a batch, and requests that begin alike as one tree."""

from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.decoding import pad_right
from support.files import check
from support.kernels import Sequences

# What a pass costs before its first token, in tokens: estimated on a CPU, the best of four on an H200
PASS_COST = {"cpu": 192, "cuda": 1024}
ROWS = 64  # of a batch of trees, at most


def pass_cost(device: torch.device) -> int:
    """PASS_COST of the kind that `device` is."""
    return PASS_COST["cpu" if device.type == "cpu" else "cuda"]


def cut_batch(lengths: list[int], most: int, pass_cost: int, tokens: int | None = None, padded=True) -> list[int]:
    """Where to cut `lengths`, the longest first, into groups of at most `most`, and of at most `tokens`.

    A group has as many tokens as its size times its longest length, or, not `padded`, as the sum of its lengths. It
    costs that, plus `pass_cost`. The cuts have the least total cost.
    """
    before = [0, *accumulate(lengths)]

    def size(i: int, end: int) -> int:
        return (end - i) * lengths[i] if padded else before[end] - before[i]

    best = [(0, 0)]  # for the first n lengths: the least cost, and where its last group starts
    for end in range(1, len(lengths) + 1):
        sizes = {i: size(i, end) for i in range(max(0, end - most), end)}
        candidates = [i for i in sizes if i == end - 1 or not tokens or sizes[i] <= tokens]
        best.append(min((best[i][0] + sizes[i] + pass_cost, i) for i in candidates))
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]


def in_one_row(ids: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor, Sequences]:
    """The rows of a batch behind one another, each up to its last response token: what follows it changes no loss.

    ids, response (B, L) -> ids, response (1, N), positions (N,), and the rows' lengths. `response` is on the host.
    """
    columns = torch.arange(ids.shape[1])
    lengths = (response * (columns + 1)).amax(dim=1).clamp(min=1)
    places = (columns < lengths[:, None]).flatten().nonzero().squeeze(1)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    here, positions, bounds = (x.to(ids.device, non_blocking=True) for x in (places, places % len(columns), bounds))
    return ids.flatten()[here][None], response.flatten()[places][None], positions, Sequences(lengths.tolist(), bounds)


class Scored(NamedTuple):
    """A request in tokens: the model's inputs, and the targets of the last len(targets) of them."""

    inputs: list[int]
    targets: list[int]


def encode_texts(tokenizer, texts: list[str], vocab_size: int | None = None, whole=()) -> dict[str, list[int]]:
    """Each text's token ids. BOS comes first if the tokenizer adds it, unless the text spells it or is in `whole`.

    UserError for a token outside an embedding of `vocab_size` rows, such as a padding token added later.
    """
    bos, ids = tokenizer.bos or tokenizer.eos, {}
    for with_prefix in (True, False):
        some = [text for text in dict.fromkeys(texts) if with_prefix != (text in whole or text.startswith(bos))]
        ids |= zip(some, tokenizer.encode_prompts(some, with_prefix=with_prefix), strict=True)
    largest = max(max(tokens, default=0) for tokens in [[], *ids.values()])
    words = f"token {tokenizer.decode([largest])!r}, id {largest}, is outside the embedding of {vocab_size} rows"
    check(vocab_size is None or largest < vocab_size, words)
    return ids


def encode_contexts(tokenizer, requests: list[tuple[str, dict]], vocab_size: int) -> list[list[int]]:
    """The ids of each request's context; no BOS is added to one whose settings say "whole"."""
    whole = {context for context, settings in requests if settings.get("whole")}
    ids = encode_texts(tokenizer, [context for context, _ in requests], vocab_size, whole)
    return [ids[context] for context, _ in requests]


def encode_pairs(tokenizer, pairs: list[tuple[str, str]], context_length: int, vocab_size=None) -> list[Scored]:
    """(context, continuation) in tokens, cut on the left to `context_length`.

    Spaces at a context's end belong to the continuation. The pair is split where the context, encoded alone, ends.
    """
    pairs = [(context.rstrip(), context + continuation) for context, continuation in pairs]
    ids = encode_texts(tokenizer, [text for pair in pairs for text in pair], vocab_size)
    (first,) = tokenizer.encode_prompts([tokenizer.bos or tokenizer.eos], with_prefix=False)
    found = []
    for context, text in pairs:
        targets = ids[text][len(ids[context]) :]
        words = f"a continuation of {len(targets)} tokens cannot be scored: {text[len(context) :]!r}"
        check(0 < len(targets) <= context_length, words)
        whole = ((ids[context] or first) + targets)[-context_length - 1 :]
        found.append(Scored(whole[:-1], targets))
    return found


def shared_prefix(requests: list[Scored]) -> list[int]:
    """The tokens that all requests begin with, before any position that is scored."""
    common = commonprefix([request.inputs for request in requests])
    return common[: min(len(request.inputs) - len(request.targets) for request in requests)]


class Tree:
    """Requests that begin alike, as one sequence: shared tokens stand once, and each token sees its ancestors.

    ids: the tokens. parents: for each, the place of the one before it in its request, or -1. path: the places of the
    request that came last. scored: request -> the places that predict its targets.
    """

    def __init__(self):
        self.ids, self.parents, self.path, self.scored = [], [], [], {}

    def common(self, inputs: list[int]) -> int:
        """How many tokens a request shares with the one before it."""
        return len(commonprefix([[self.ids[place] for place in self.path], inputs]))

    def add(self, i: int, inputs: list[int], targets: int):
        """Grow the branch of request i, whose last `targets` inputs are to predict something."""
        shared = self.common(inputs)
        self.path = self.path[:shared]
        for token in inputs[shared:]:
            self.parents.append(self.path[-1] if self.path else -1)
            self.path.append(len(self.ids))
            self.ids.append(token)
        self.scored[i] = self.path[len(self.path) - targets :]


def plant(requests: list[Scored], prefix: int, ratio: float) -> list[Tree]:
    """Trees of neighbouring requests, without the first `prefix` tokens that all share.

    A request joins the tree before it if that is cheaper. n tokens cost n * (ratio + n).
    """

    def price(n):
        return n * (ratio + n)

    trees = [Tree()]
    for i, (inputs, targets) in enumerate(requests):
        own, size = inputs[prefix:], len(trees[-1].ids)
        if price(size + len(own) - trees[-1].common(own)) > price(size) + price(len(own)):
            trees.append(Tree())
        trees[-1].add(i, own, len(targets))
    return trees


def price_ratio(config) -> float:
    """What a layer's weights cost per token, as a multiple of attention to one other token (multiply-adds)."""
    heads, key_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * heads + 2 * key_heads + 3 * config.intermediate_size)
    return weights / (2 * heads)


def pack(trees: list[Tree], batch_tokens: int, device: torch.device) -> list[list[Tree]]:
    """Batches of one tree, or of at most `batch_tokens` tokens with padding; the longest trees first."""
    trees = sorted(trees, key=lambda tree: -len(tree.ids))
    cuts = cut_batch([len(tree.ids) for tree in trees], ROWS, pass_cost(device), batch_tokens)
    return [trees[first:end] for first, end in pairwise(cuts)]


def tree_tensors(batch: list[Tree], prefix: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and positions (B, L), and the mask (B, 1, n, prefix + L): where the last n tokens may look.

    The tokens before those are causal: no tree branches there. With a prefix, n is L.
    """
    longest = len(batch[0].ids)
    branches = [place for tree in batch for place, parent in enumerate(tree.parents) if parent != place - 1]
    causal = 0 if prefix else min([longest - 1, *branches])
    mask = np.ones((len(batch), 1, longest, prefix + longest), dtype=bool)
    mask[..., prefix:] = np.eye(longest, dtype=bool)
    for seen, tree in zip(mask[:, 0, :, prefix:], batch, strict=True):
        for place, parent in enumerate(tree.parents):
            if parent >= 0:
                seen[place] |= seen[parent]
    positions = torch.from_numpy(mask[:, 0].sum(axis=-1) - 1)  # how many tokens come before
    mask = torch.from_numpy(mask[:, :, causal:].copy())
    return pad_right([tree.ids for tree in batch], device), positions.to(device), mask.to(device)
