"""Noise planted in the answers: other tokens, typos, and faults as real rows have them."""

import random
import re

import torch
from torch import Tensor

import data

SHARE = 0.2  # of the response tokens, of the words that can have a typo
KINDS = {
    "clean": "clean rows",
    "vocabulary": f"{SHARE:.0%} random entries of the vocabulary",
    "words": f"{SHARE:.0%} words of other responses",
    "faults": "wrong answers, cut ends, boilerplate",
    "typos": "typos in a fifth of the longer words",
    "half": "half of all answers swapped",
}
TOKENS = ("vocabulary", "words")  # the kinds that replace single tokens
FAULTS = {"clean": (0, 0, 0), "faults": (0.2, 0.1, 0.2), "half": (0.5, 0, 0)}
BOILERPLATE = ["As an AI language model, I am happy to help with that. ", "Sure! Here is the answer to your question: "]


def plant(kind: str, examples: list[data.Example], tokenizer, seed: int) -> tuple[list[data.Example], list[Tensor]]:
    """Samples of one prompt and one answer with noise of a kind, and masks (L_resp,) of the noise."""
    rng, answers = random.Random(f"{kind} {seed}"), [e.ids[e.response].tolist() for e in examples]
    if kind in TOKENS:
        changed = with_other_tokens(answers, tokenizer, rng, kind)
    elif kind == "typos":
        changed = [with_typos(answer, tokenizer, rng) for answer in answers]
    else:
        changed = with_faults(answers, tokenizer, rng, FAULTS[kind])
    samples = []
    for (ids, response), (answer, _) in zip(examples, changed, strict=True):
        prompt = ids[~response].tolist()
        new = torch.tensor(prompt + answer)
        samples.append(data.Example(new, torch.arange(len(new)) >= len(prompt)))
    return samples, [torch.tensor(noise) for _, noise in changed]


def with_other_tokens(answers: list[list[int]], tokenizer, rng: random.Random, kind: str) -> list[tuple]:
    """A share SHARE of the tokens replaced, but no end token: each answer's ids, and its noise."""
    found, backend = [], tokenizer.backend
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    vocabulary = sorted(set(range(tokenizer.vocab_size)) - special)
    whole_words = {i for i in vocabulary if (text := backend.decode([i]))[:1] == " " and text[1:].isalpha()}
    words = [[i for i in answer if i in whole_words] for answer in answers]
    for number, answer in enumerate(answers):
        places = [i for i, token in enumerate(answer) if token not in special]
        others = vocabulary if kind == "vocabulary" else sum(words[:number] + words[number + 1 :], [])
        new = list(answer)
        for place in rng.sample(places, round(SHARE * len(places))):
            while new[place] == answer[place]:
                new[place] = rng.choice(others)
        found.append((new, [token != old for token, old in zip(new, answer, strict=True)]))
    return found


def with_faults(answers: list[list[int]], tokenizer, rng: random.Random, shares: tuple) -> list[tuple]:
    """Answers swapped, cut, or with an empty phrase in front, in these shares of the rows."""
    order = rng.sample(range(len(answers)), len(answers))
    counts = [round(share * len(order)) for share in shares]
    swapped, cut, wrapped = (order[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(3))
    found = []
    for number, answer in enumerate(answers):
        if number in swapped:
            other = answers[swapped[(swapped.index(number) + 1) % len(swapped)]]
            found.append((other, [True] * len(other)))
        elif number in cut:
            half = answer[: max(1, len(answer) // 2)]
            found.append(([*half, tokenizer.eos_id], [False] * len(half) + [True]))
        else:
            phrase = tokenizer.encode(rng.choice(BOILERPLATE).rstrip())[0] if number in wrapped else []
            found.append((phrase + answer, [True] * len(phrase) + [False] * len(answer)))
    return found


def with_typos(answer: list[int], tokenizer: data.Tokenizer, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Two letters inside a word swapped, in a share SHARE of the words of five letters and more."""
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
