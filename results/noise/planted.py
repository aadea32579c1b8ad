"""Noise planted in the responses: random tokens, words from elsewhere, faults of real rows, typos, swapped answers."""

import random
import re
from collections.abc import Callable

import torch
from torch import Tensor

import data

SHARE = 0.2  # of the response tokens, of the words that can have a typo
KINDS = {"vocabulary": "random entries of the vocabulary", "words": "words of other responses"}
FAULTS = {
    "faults": "wrong answers, cut ends, boilerplate",
    "typos": "typos in a fifth of the longer words",
    "half": "half of all answers swapped",
}
Planted = tuple[list[data.Example], list[Tensor]]  # samples, and for each a (L_resp,) bool: which tokens are noise


def plant(kind: str, examples: list[data.Example], tokenizer: data.Tokenizer, seed: int) -> Planted:
    """The samples with noise of a kind, one of KINDS or FAULTS, or "clean"."""
    if kind in KINDS:
        return plant_noise(examples, kind, tokenizer, seed)
    if kind == "clean":
        return examples, [torch.zeros(int(e.response.sum()), dtype=torch.bool) for e in examples]
    rng = random.Random(f"{kind} {seed}")
    if kind == "typos":
        return answer_anew(examples, lambda number, answer: with_typos(answer, tokenizer, rng))
    return plant_faults(examples, tokenizer, rng, (0.5, 0, 0) if kind == "half" else (0.2, 0.1, 0.2))


def plant_noise(examples: list[data.Example], kind: str, tokenizer: data.Tokenizer, seed: int) -> Planted:
    """A share SHARE of the response tokens replaced; an end token is never replaced, and none is planted."""
    rng, backend = random.Random(f"{kind} {seed}"), tokenizer.backend
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    vocabulary = sorted(set(range(tokenizer.vocab_size)) - special)
    texts = {i: backend.decode([i]) for i in vocabulary}
    whole_words = {i for i, text in texts.items() if text[:1] == " " and text[1:].isalpha()}
    words = [[i for i in e.ids[e.response].tolist() if i in whole_words] for e in examples]
    noisy, masks = [], []
    for number, (ids, response) in enumerate(examples):
        ids = ids.clone()
        places = [i for i in response.nonzero().squeeze(1).tolist() if int(ids[i]) not in special]
        chosen = rng.sample(places, round(SHARE * len(places)))
        others = vocabulary if kind == "vocabulary" else [i for n, w in enumerate(words) if n != number for i in w]
        for place in chosen:
            old = int(ids[place])
            while int(ids[place]) == old:
                ids[place] = rng.choice(others)
        noise = torch.zeros(len(ids), dtype=torch.bool)
        noise[chosen] = True
        noisy.append(data.Example(ids, response))
        masks.append(noise[response])
    return noisy, masks


BOILERPLATE = ["As an AI language model, I am happy to help with that. ", "Sure! Here is the answer to your question: "]


def plant_faults(examples: list[data.Example], tokenizer, rng: random.Random, shares: tuple) -> Planted:
    """Noise as real data has it: answers to another row, answers cut in the middle, phrases in front that say nothing.

    shares: of the rows that get each. Noise is all of a swapped answer, the end token that comes too early, the phrase.
    """
    order = rng.sample(range(len(examples)), len(examples))
    counts = [round(share * len(order)) for share in shares]
    swapped, cut, wrapped = (order[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(3))

    def faulty(number: int, answer: list[int]) -> tuple[list[int], list[bool]]:
        if number in swapped:
            other = examples[swapped[(swapped.index(number) + 1) % len(swapped)]]
            answer = other.ids[other.response].tolist()
            return answer, [True] * len(answer)
        if number in cut:
            answer = [*answer[: max(1, len(answer) // 2)], tokenizer.eos_id]
            return answer, [False] * (len(answer) - 1) + [True]
        phrase = tokenizer.encode(rng.choice(BOILERPLATE).rstrip())[0] if number in wrapped else []
        return [*phrase, *answer], [True] * len(phrase) + [False] * len(answer)

    return answer_anew(examples, faulty)


def with_typos(answer: list[int], tokenizer: data.Tokenizer, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Two neighbouring letters inside a word swapped, in a share SHARE of the words of five letters and more."""
    ended = answer[-1:] == [tokenizer.eos_id]
    text = tokenizer.decode(answer[: len(answer) - ended])
    words = [m for m in re.finditer(r"[^\W\d_]{5,}", text) if len(set(m[0][1:-1])) > 1]
    chosen, letters = rng.sample(words, round(SHARE * len(words))), list(text)
    for word in chosen:
        inside = range(word.start() + 1, word.end() - 2)
        i = rng.choice([i for i in inside if text[i] != text[i + 1]])
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    found = tokenizer.places("".join(letters))
    noise = [any(first < word.end() and word.start() < end for word in chosen) for _, first, end in found]
    return [token for token, _, _ in found] + [tokenizer.eos_id] * ended, noise + [False] * ended


def answer_anew(examples: list[data.Example], change: Callable) -> Planted:
    """The samples with other answers. change: (number, ids of the answer) -> ids, and a bool each: is it noise?"""
    samples, masks = [], []
    for number, (ids, response) in enumerate(examples):
        prompt = ids[~response].tolist()
        answer, noise = change(number, ids[response].tolist())
        supervised = torch.tensor([False] * len(prompt) + [True] * len(answer))
        samples.append(data.Example(torch.tensor(prompt + answer), supervised))
        masks.append(torch.tensor(noise))
    return samples, masks
