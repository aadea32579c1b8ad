"""What the loss of a token is multiplied with: the field's objectives as functions, side by side.

A function gets what it names of one sample's response tokens, (L_resp,) float32 each, and returns a weight for each:
bool where it keeps or drops a token, else float32. A sample's loss is then the mean of weight * nll over the tokens
with a weight (`sstoken.selected_loss`). No weight carries a gradient. What can be asked for:

    nll, entropy, spread, top_entropy               of the current model: the loss, and of the predicted distribution
                                                    H, sigma (`support.kernels`) and the H of the 20 likeliest tokens
    history_nll, history_entropy, history_spread    the same of the base model
    rho, vocabulary                                 --rho, the vocabulary's size V
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sstoken import retrospective_excess_loss, select
from support.kernels import TOP


def probability_gain(nll: Tensor, history_nll: Tensor) -> Tensor:
    """An extension, not in the paper, in REL's place: the gain in probability, P_theta - P_his."""
    return torch.exp(-nll) - torch.exp(-history_nll)


# How much a token has gained over the history model: Eq. 3, or the extension in its place
GAINS = {"log": retrospective_excess_loss, "probability": probability_gain}


def dft(nll: Tensor) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): the weight is p, so the gradient is that of p instead of log p."""
    return torch.exp(-nll)


def eaft(top_entropy: Tensor) -> Tensor:
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): the entropy of the 20 likeliest tokens, over its maximum."""
    return top_entropy / math.log(TOP)


def stm(history_nll: Tensor) -> Tensor:
    """Selective token masking (arXiv 2501.14315): keep a token whose perplexity under the base model is at most 2.5."""
    return torch.exp(history_nll) <= 2.5


def profit(nll: Tensor) -> Tensor:
    """ProFit (arXiv 2601.09195): keep a token that the current model gives a probability of at least 0.1.

    Its release divides by all response tokens. So the weight is the share that is kept, and the mean is over all.
    """
    kept = torch.exp(-nll) >= 0.1
    return kept * kept.float().mean()


def rel_reversed(nll: Tensor, history_nll: Tensor, rho: float) -> Tensor:
    """REL (Eq. 3) the other way round: the share rho that has gained least."""
    return select(-retrospective_excess_loss(nll, history_nll), rho)


def low_loss(nll: Tensor, rho: float) -> Tensor:
    """The share rho that the current model predicts best: small-loss selection, the oldest cure for wrong labels."""
    return select(-nll, rho)


def surprise(nll: Tensor, entropy: Tensor, spread: Tensor, vocabulary: int) -> Tensor:
    """Keep what the current model can account for: nll <= H + 3 sigma or p >= 20 / V. Of this project.

    The loss of a token that the model draws itself is H on average, and deviates from it by sigma. Three sigma is the
    usual bound for outliers. p >= 20 / V: 20 times as likely as one drawn blindly from the vocabulary.
    """
    return (nll <= entropy + 3 * spread) | (torch.exp(-nll) >= 20 / vocabulary)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "dft": dft,
    "eaft": eaft,
    "stm": stm,
    "profit": profit,
    "rel-reversed": rel_reversed,
    "low-loss": low_loss,
    "surprise": surprise,
}


def inputs_of(method: str) -> set[str]:
    """What an objective asks for, by its parameters' names; nothing, where the method is no objective."""
    return set(inspect.signature(OBJECTIVES[method]).parameters) if method in OBJECTIVES else set()


def token_weights(method: str, known: dict) -> Tensor:
    """The objective's weights, 0 outside known["answers"]. All are 0 where only the last, the end token, has one."""
    weights = OBJECTIVES[method](**{name: known[name] for name in inputs_of(method)}) * known.get("answers", True)
    return weights * (weights[:-1] != 0).any()
