"""What the loss of a token is multiplied with: the field's objectives as functions, side by side.

A function gets what it names of one sample's response tokens, (L_resp,) float32 each, and returns a weight for each:
bool where it keeps or drops a token, else float32. A sample's loss is then the mean of weight * nll over the tokens
with a weight (`sstoken.selected_loss`). No weight carries a gradient. What can be asked for:

    nll, entropy, spread, top_entropy               of the current model: the token's loss, and of the distribution p
                                                    that it predicts H = -sum p log p, sigma = sqrt(sum p (log p)^2 -
                                                    H^2), and the H of the 20 likeliest tokens alone
    history_nll, history_entropy, history_spread    the same of the base model
    rho                                             --rho

What asks for the base model alone is the same in every step, and made once. Last, what `--rho auto` asks beside
`surprise`: whether an answer belongs to its prompt.
"""

import inspect
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

import data
from sstoken import retrospective_excess_loss, select
from support.kernels import TOP


def dft(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): the weight is p, so the gradient is that of p instead of log p."""
    return torch.exp(-nll)


def eaft(top_entropy: Tensor) -> Tensor:
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): the entropy of the 20 likeliest tokens over its maximum, ln 20.

    Tools differ by that factor: LLaMA-Factory divides by 3, axolotl once did by nothing. Ours is the paper's.
    """
    return top_entropy / math.log(TOP)


def stm(history_nll: Tensor) -> Tensor:
    """Selective token masking (arXiv 2501.14315): keep a token whose perplexity under the base model is at most 2.5."""
    return torch.exp(history_nll) <= 2.5


def profit(nll: Tensor) -> Tensor:
    """ProFit (arXiv 2601.09195): keep a token that the current model gives a probability of at least 0.1."""
    return torch.exp(-nll) >= 0.1


def rel_reversed(nll: Tensor, history_nll: Tensor, rho: float) -> Tensor:
    """REL (Eq. 3) the other way round: the share rho that has gained least, as those hold who drop what is learned."""
    return select(-retrospective_excess_loss(nll, history_nll), rho)


def low_loss(nll: Tensor, rho: float) -> Tensor:
    """The share rho that the current model predicts best: small-loss selection, the oldest cure for wrong labels."""
    return select(-nll, rho)


def surprise(nll: Tensor, entropy: Tensor, spread: Tensor) -> Tensor:
    """Keep what the current model can account for: nll - H <= 3 sigma. An extension, of this project.

    A token drawn from the model's own distribution has loss H on average and deviates from that by sigma; whoever knows
    both needs no rho. Three sigma is the usual bound for outliers; what is left is the share that the run finds itself.
    The base model's H and sigma do where it knows the task; one that is sure of something else drops what is to learn.
    """
    return nll - entropy <= 3 * spread


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "dft": dft,
    "eaft": eaft,
    "stm": stm,
    "profit": profit,
    "rel-reversed": rel_reversed,
    "low-loss": low_loss,
    "surprise": surprise,
}


def asks(method: str) -> set[str]:
    """What an objective asks for, by its parameters' names; nothing, where the method is no objective."""
    return set(inspect.signature(OBJECTIVES[method]).parameters) if method in OBJECTIVES else set()


def weigh(method: str, known: dict) -> Tensor:
    """The objective's weights; where it would drop all of a sample's tokens, it keeps the first."""
    weights = OBJECTIVES[method](**{name: known[name] for name in asks(method)})
    return (
        weights if weights.any() else weights.index_fill(0, torch.zeros(1, dtype=torch.int64, device=weights.device), 1)
    )


# --------------------------------------------------------------------------------- does an answer belong to its prompt?


def under_other_prompts(examples: list[data.Example], seed: int) -> list[data.Example]:
    """Each sample with what another one has in front of its first response token; none, where most have the same there.

    A prompt that is too long for the longest sample's length loses its beginning.
    """
    starts = [int(response.int().argmax()) for _, response in examples]
    prompts = [ids[:start] for (ids, _), start in zip(examples, starts, strict=True)]
    alike = {}
    for i, prompt in enumerate(prompts):
        alike.setdefault(tuple(prompt.tolist()), []).append(i)
    groups = random.Random(f"own {seed}").sample(list(alike.values()), len(alike))
    order, largest = [i for group in groups for i in group], max(map(len, groups))
    if 2 * largest > len(order):
        return []
    longest, found = max(len(ids) for ids, _ in examples), {}
    for i, other in zip(order, order[largest:] + order[:largest], strict=True):
        rest, response = (values[starts[i] :] for values in examples[i])
        prompt = prompts[other][-(longest - len(rest)) :]
        found[i] = data.Example(torch.cat([prompt, rest]), torch.cat([response.new_zeros(len(prompt)), response]))
    return [found[i] for i in range(len(examples))]


def own_prompt(gains: Tensor, level: float = 0.05) -> Tensor:
    """Which answers belong to their prompt: (N,) bool. gains: (N,) nats by which each is likelier than under another.

    For an answer to something else, the two prompts are as good as each other: a gain of +t is as likely as one of -t.
    So the gains below -t count those above t that mean nothing, and the least t is taken at which they are at most a
    share `level` of what is kept (knockoff+, Barber and Candes 2015, arXiv 1404.5609). Where no t is, the gains tell
    nothing, of a handful of answers or by a model that does not heed its prompt, and all are kept.
    """
    bars, in_order = gains.abs().sort().values, gains.sort().values
    below, above = torch.searchsorted(in_order, -bars, right=True), len(bars) - torch.searchsorted(in_order, bars)
    fits = 1 + below <= level * above
    return gains >= bars[fits.int().argmax()] if fits.any() else torch.ones_like(gains, dtype=torch.bool)
