"""What `--rho auto` asks beside `surprise`: does an answer belong to its prompt? An extension, of this project.

An answer is likelier behind its own prompt than behind others, if the base model heeds prompts at all. An answer to
something else is as likely behind all of them. So the base model reads the first tokens of each answer behind two other
prompts too. How much likelier the answer is behind its own is its gain. How the two others differ is chance, and shows
how gains of wrong answers scatter. `separate_answers` tells the two groups apart, or says why it cannot.

Every answer of a conversation is asked about. Its prompt is all that stands before it.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data

FIRST = 32  # tokens of an answer that are compared; those behind follow from these, and add little but chance
DAMPING = 3.0  # nats, see `paired`
LEAST = 48  # answers; of fewer nothing is told
DRIFT = 0.3  # deviations by which the mean gain of wrong answers may lie off 0
ODDS = 20  # how much likelier two groups must be than one
APART = 1.0  # standard deviations that the bar must lie from the mean of either group


class Answer(NamedTuple):
    """A stretch of supervised tokens: of which sample, and its first place there and the one behind its last."""

    sample: int
    start: int
    end: int


def find_answers(examples: list[data.Example]) -> list[Answer]:
    """The answers of all samples, in order."""
    found = []
    for sample, (_, response) in enumerate(examples):
        places = F.pad(response.byte(), (1, 1)).diff().nonzero().squeeze(1).tolist()
        found += [Answer(sample, *place) for place in zip(places[::2], places[1::2], strict=True)]
    return found


def behind_other_prompts(examples: list[data.Example], seed: int) -> list[data.Example]:
    """The first tokens of each answer behind another answer's prompt; then all of them again, behind a second one.

    The three prompts differ in their beginning, the tokens before a sample's first answer. Empty, where more than a
    third of the answers share that. A prompt too long for the longest sample's length loses its beginning.
    """
    answers, alike = find_answers(examples), {}
    for number, (sample, _, _) in enumerate(answers):
        ids, response = examples[sample]
        alike.setdefault(tuple(ids[: int(response.int().argmax())].tolist()), []).append(number)
    groups = random.Random(f"own {seed}").sample(list(alike.values()), len(alike))
    order, shift = [number for group in groups for number in group], max(map(len, groups))
    if 3 * shift > len(order):
        return []
    longest, found = max(len(ids) for ids, _ in examples), {}
    for turn in (0, 1):
        others = order[(turn + 1) * shift :] + order[: (turn + 1) * shift]
        for number, other in zip(order, others, strict=True):
            (sample, start, end), (theirs, before, _) = answers[number], answers[other]
            answer = examples[sample].ids[start : min(end, start + FIRST)]
            prompt = examples[theirs].ids[:before][-(longest - len(answer)) :]
            response = torch.arange(len(prompt) + len(answer)) >= len(prompt)
            found[turn, number] = data.Example(torch.cat([prompt, answer]), response)
    return [found[key] for key in sorted(found)]


def paired(difference: Tensor) -> Tensor:
    """How much of the losses' difference (tokens,) goes one way: its sum, by what it would be if signs were chance.

    That is the root of the sum of squares, as in a paired t. DAMPING nats are added to it: few tokens prove little.
    """
    return difference.sum() / (difference.square().sum() + DAMPING**2).sqrt()


def gains(examples: list[data.Example], base: list[Tensor], elsewhere: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of N answers, how much likelier each is behind its own prompt than behind two others, and chance: (N,) each.

    base: the losses of each sample's response tokens. elsewhere: those of `behind_other_prompts`.
    """
    answers, at, found = find_answers(examples), [0] * len(examples), []
    n = len(answers)
    for (sample, start, end), first, second in zip(answers, elsewhere[:n], elsewhere[n:], strict=True):
        own = base[sample][at[sample] :][: min(FIRST, end - start)]
        at[sample] += end - start
        # of three alike, one differs from the mean of two with 3/4 of the variance with which two differ
        found.append(torch.stack([paired((first + second) / 2 - own), paired(math.sqrt(3 / 4) * (first - second))]))
    return tuple(torch.stack(found).T)


def log_likelihood(x: Tensor, mean, deviation) -> Tensor:
    """Of a normal distribution."""
    return torch.distributions.Normal(mean, deviation, validate_args=False).log_prob(x)


def two_groups(x: Tensor, chance: Tensor, start: float) -> tuple[float, float, float, float, float]:
    """The likeliest two normal groups of gains (N,), of which the lower one scatters as `chance` (N,) does.

    By expectation and maximization, from a cut at the quantile `start`. That the lower group's mean lies at 0, give or
    take DRIFT of its deviations, is a prior. Returns the log-likelihood, and mean and deviation of either group.
    """
    upper = 0.01 + 0.98 * (x > x.quantile(start))
    alone = log_likelihood(chance, 0.0, chance.square().mean().sqrt()).sum()
    for _ in range(80):
        lower = 1 - upper
        high = (upper * x).sum() / upper.sum()
        spread = ((upper * (x - high).square()).sum() / upper.sum()).sqrt().clamp(min=x.std() / 5)
        low = (lower * x).sum() / (lower.sum() + DRIFT**-2)
        squares = (lower * (x - low).square()).sum() + chance.square().sum() + (low / DRIFT).square()
        chance_spread = (squares / (lower.sum() + len(chance))).sqrt()
        share = (upper.sum() + 1) / (len(x) + 2)
        in_upper = share.log() + log_likelihood(x, high, spread)
        both = torch.logaddexp(in_upper, (1 - share).log() + log_likelihood(x, low, chance_spread))
        upper = (in_upper - both).exp()
    prior = (low / chance_spread / DRIFT).square() / 2
    found = both.sum() - prior + log_likelihood(chance, 0.0, chance_spread).sum() - alone
    return tuple(value.item() for value in (found, low, chance_spread, high, spread))


class AnswerFilter(NamedTuple):
    """Which answers belong to their prompt, (N,) bool, and, where all are kept, why."""

    mask: Tensor
    reason: str = ""

    def tokens(self, examples: list[data.Example]) -> list[Tensor]:
        """Of each sample, which response tokens are of an answer that belongs to its prompt: (L_resp,) bool."""
        found = [torch.zeros(len(ids), dtype=torch.bool) for ids, _ in examples]
        for (sample, start, end), belongs in zip(find_answers(examples), self.mask.tolist(), strict=True):
            found[sample][start:end] = belongs
        return [mask[response] for mask, (_, response) in zip(found, examples, strict=True)]


def separate_answers(gains: Tensor, chance: Tensor) -> AnswerFilter:
    """Which answers belong to their prompt, by their gains (N,); chance (N,): gains that mean nothing.

    Two normal groups are fitted, the lower one of wrong answers. The bar between them lies as many deviations above the
    lower mean as below the upper one. Answers below it are dropped. All are kept where two groups are not ODDS times
    as likely as one, or where the bar does not lie APART deviations from both: a filter that cannot tell costs clean
    answers. results/objectives/answers.md has how often it is right.
    """
    everything, x, chance = torch.ones_like(gains, dtype=torch.bool), gains.double(), chance.double()
    if len(x) < LEAST:
        return AnswerFilter(everything, f"fewer than {LEAST} are too few to tell")
    if min(x.std(), chance.std()) < 1e-6:
        return AnswerFilter(everything, "the base model does not heed the prompt")
    one = log_likelihood(x, x.mean(), x.std(correction=0)).sum().item()
    found, low, low_spread, high, high_spread = max(two_groups(x, chance, start) for start in (0.15, 0.5, 0.8))
    apart = (high - low) / (low_spread + high_spread)
    if found - one <= math.log(ODDS) or apart < APART:
        return AnswerFilter(everything, "no group of answers stands apart")
    return AnswerFilter(x >= low + apart * low_spread)


def filter_answers(examples: list[data.Example], base: list[Tensor], elsewhere: list[Tensor]) -> AnswerFilter:
    """`separate_answers` of all answers. base: each sample's losses; elsewhere: those of `behind_other_prompts`."""
    if not elsewhere:
        everything = torch.ones(len(find_answers(examples)), dtype=torch.bool)
        return AnswerFilter(everything, "more than a third of them have the same prompt")
    return separate_answers(*gains(examples, base, elsewhere))
