"""`--rho auto`: which answers are kept. An extension of this project, beside `objectives.surprise`.

A right answer is more likely after its own prompt than after another prompt. A wrong answer is about equally likely
after both. So the base model reads the first tokens of each answer after its own prompt (all that stands before it) and
after two others. How much more likely the answer is after its own prompt is its gain. How much the two others differ is
chance: so do the gains of wrong answers scatter.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data

FIRST = 32  # tokens of an answer that are compared; later tokens depend on these more than on the prompt
DAMPING = 3.0  # nats, see `paired`
LEAST = 48  # answers; of fewer, all are kept
DRIFT = 0.3  # the mean gain of wrong answers is 0, give or take so many standard deviations
ODDS = 20  # two groups must be so many times as likely as one
APART = 1.0  # the bar must be so many standard deviations from the mean of each group


class Answer(NamedTuple):
    """Supervised tokens without a gap: the sample, the first place in it, and the place after the last."""

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


def first_tokens(examples: list[data.Example]) -> list[data.Example]:
    """Each sample up to the first tokens of its last answer. The first tokens of its answers are supervised alone."""
    masks = [torch.zeros_like(response) for _, response in examples]
    for sample, start, end in find_answers(examples):
        masks[sample][start : min(end, start + FIRST)] = True
    ends = [int(mask.nonzero().max()) + 1 for mask in masks]
    return [data.Example(ids[:end], mask[:end]) for (ids, _), mask, end in zip(examples, masks, ends, strict=True)]


def behind_other_prompts(examples: list[data.Example], seed: int) -> list[data.Example]:
    """The first tokens of each answer after another answer's prompt, then all of them after a second other prompt.

    Prompts with the same tokens before a sample's first answer count as one. If more than a third of the answers have
    one prompt, the list is empty. A prompt that exceeds the longest sample loses its beginning.
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
    """A paired t of a difference of losses (tokens,): its sum over the root of the sum of its squares.

    DAMPING ** 2 is added under the root, since few tokens prove little.
    """
    return difference.sum() / (difference.square().sum() + DAMPING**2).sqrt()


def gains(examples: list[data.Example], base: list[Tensor], elsewhere: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gains of N answers, and the differences by chance: (N,) each.

    base: the losses of each sample's response tokens. elsewhere: those of `behind_other_prompts`.
    """
    answers, at, found = find_answers(examples), [0] * len(examples), []
    n = len(answers)
    for (sample, start, end), first, second in zip(answers, elsewhere[:n], elsewhere[n:], strict=True):
        own = base[sample][at[sample] :][: min(FIRST, end - start)]
        at[sample] += end - start
        # The mean of two and a third differ with 3/4 of the variance with which two differ
        found.append(torch.stack([paired((first + second) / 2 - own), paired(math.sqrt(3 / 4) * (first - second))]))
    return tuple(torch.stack(found).T)


def log_likelihood(x: Tensor, mean, deviation) -> Tensor:
    """log N(x; mean, deviation)."""
    return torch.distributions.Normal(mean, deviation, validate_args=False).log_prob(x)


def two_groups(x: Tensor, chance: Tensor, start: float) -> tuple[float, float, float, float, float]:
    """Fit two normal groups to gains (N,); the lower one scatters as `chance` (N,) does and has a mean near 0 (DRIFT).

    Expectation-maximization: `upper` is each gain's probability to be of the upper group, at first by a cut at the
    quantile `start`. Returns the log-likelihood, then mean and standard deviation of the lower and of the upper group.
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
    """Which answers are kept, (N,) bool, and why, if all are kept."""

    mask: Tensor
    reason: str = ""

    def tokens(self, examples: list[data.Example]) -> list[Tensor]:
        """For each sample, which response tokens are of an answer that is kept: (L_resp,) bool."""
        found = [torch.zeros(len(ids), dtype=torch.bool) for ids, _ in examples]
        for (sample, start, end), belongs in zip(find_answers(examples), self.mask.tolist(), strict=True):
            found[sample][start:end] = belongs
        return [mask[response] for mask, (_, response) in zip(found, examples, strict=True)]


def separate_answers(gains: Tensor, chance: Tensor) -> AnswerFilter:
    """Which answers to keep, by their gains (N,) and the differences by chance (N,).

    Two normal groups are fitted. The bar between them has the same distance to both means, in standard deviations.
    Answers below the bar are dropped. All are kept if two groups are not ODDS times as likely as one, or if the bar is
    not APART deviations from both. results/noise/answers.md shows how often this is right.
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
    """`separate_answers` of a data set. base: each sample's losses; elsewhere: those of `behind_other_prompts`."""
    if not elsewhere:
        everything = torch.ones(len(find_answers(examples)), dtype=torch.bool)
        return AnswerFilter(everything, "more than a third of them have the same prompt")
    return separate_answers(*gains(examples, base, elsewhere))
