"""ssToken: self-modulated and semantic-aware token selection. Every equation of the paper is one function here.

All functions take one sample's response tokens as 1-D tensors of length L_resp, unless they say otherwise. Losses
are per-token negative log-likelihoods in nats; everything that ranks tokens is float32.
"""

import functools
import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

import lora
from model import Transformer, response_nll, rope_table
from support.files import UserError

# --------------------------------------------------------------------------------- losses and loss differences


def sft_loss(nll: Tensor) -> Tensor:
    """Loss of supervised fine-tuning, Eq. 1: the mean over the supervised tokens, (L_resp,) -> scalar."""
    return nll.mean()


def excess_loss(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """EL, Eq. 2: L_theta - L_ref, how much better a reference model predicts each token, (L_resp,)."""
    return nll - reference_nll


def retrospective_excess_loss(nll: Tensor, history_nll: Tensor) -> Tensor:
    """REL, Eq. 3: L_his - L_theta, how much better the model predicts each token than its own history, (L_resp,)."""
    return history_nll - nll


def probability_gain(nll: Tensor, history_nll: Tensor) -> Tensor:
    """An extension, not in the paper, in REL's place: P_theta - P_his, the gain in probability, not in its logarithm.

    Of a token that both models find impossible REL can be large: 1e-6 to 1e-3 is 6.9 nats, as much as any learnable
    token has to gain. In probability it is nothing.
    """
    return torch.exp(-nll) - torch.exp(-history_nll)


@torch.no_grad()
def ema_update(history: Iterable[Tensor], current: Iterable[Tensor], alpha: float):
    """Exponential moving average of the history model, Eq. 4: history <- alpha * history + (1 - alpha) * current.

    In place, tensor by tensor. Keep `history` in float32: in bfloat16 a step of 1 - alpha = 0.001 rounds to nothing.
    """
    for old, new in zip(history, current, strict=True):
        old.mul_(alpha).add_(new, alpha=1 - alpha)


# How much a token has gained over the history model: Eq. 3, or the extension in its place
GAINS = {"log": retrospective_excess_loss, "probability": probability_gain}


class History:
    """theta_his of Eq. 3: the base model, an average of past models (Eq. 4), or the model of some steps ago.

    All three share the frozen base weights and differ in what is added to them: nothing, one averaged matrix a
    layer, or an old adapter. Since theta^t = W + (alpha / rank) B A with W fixed, averaging the products B A averages
    the merged weights exactly. At step 0 each of them is the base model.
    """

    def __init__(self, model: Transformer, kind: str, ema_alpha: float, every: int, kept: list[Tensor] | None = None):
        """kept: the base model's losses, a tensor a sample, if they are known already."""
        self.model, self.kind, self.ema_alpha, self.every = model, kind, ema_alpha, every
        self.kept = kept if kind == "base" else None
        self.factors = None  # nothing: the base model
        if kind == "ema":
            self.factors = [(torch.zeros_like(layer.product()),) for layer in self._layers()]

    def _layers(self):
        return lora.lora_layers(self.model).values()

    @torch.no_grad()
    def nll(self, input_ids: Tensor, response: Tensor, samples: list[int] = ()) -> Tensor:
        """L_his of the response tokens of a batch: input_ids, response (B, L) -> (response.sum(),), as response_nll.

        samples: the rows' numbers, by which kept losses are found.
        """
        if self.kept:
            kept = torch.cat([torch.zeros(0), *(self.kept[i] for i in samples)])
            return kept.to(input_ids.device, non_blocking=True)
        with lora.replaced(self.model, self.factors):
            return response_nll(self.model, input_ids, response)

    def update(self, step: int):
        """Alg. 1, line 11, after the optimizer's step number `step` (from 1)."""
        if self.kind == "ema":
            for (average,), layer in zip(self.factors, self._layers(), strict=True):
                ema_update([average], [layer.product()], self.ema_alpha)
        elif self.kind == "checkpoint" and step % self.every == 0:
            self.factors = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in self._layers()]


# ---------------------------------------------------------------------------------------------- attention score

# Queries at a time: the softmax of 24 heads over 2048 keys then takes 6 or 50 MB
QUERY_CHUNK = {"cpu": 32, "cuda": 256}


def _attention_to_prompt(q: Tensor, k: Tensor, positions: Tensor, prompt: Tensor) -> Tensor:
    """Eqs. 5-7 for some queries: q (H, n, d) of the tokens at `positions` (n,), k (H_kv, L, d) float32 -> (n,)."""
    groups = len(q) // len(k)  # query heads that share one key head
    q = q.float().unflatten(0, (len(k), groups)).flatten(1, 2)  # (H_kv, groups * n, d)
    logits = (q @ k.transpose(1, 2)).unflatten(1, (groups, -1))  # (H_kv, groups, n, L)
    logits *= q.shape[-1] ** -0.5
    causal = torch.arange(k.shape[1], device=k.device) <= positions.unsqueeze(1)  # (n, L), the mask M_i
    attention = logits.masked_fill_(~causal, -torch.inf).softmax(dim=-1)
    # Eq. 5 takes the prompt's columns, Eq. 6 sums them, Eq. 7 averages over the heads. A sum of float32 may pass 1.
    return (attention @ prompt.float()).mean(dim=(0, 1)).clamp(max=1)


def attention_score(q, k: Tensor, response: Tensor) -> Tensor:
    """AttnScore, Eqs. 5-7: the attention that each response token pays to the prompt, averaged over the heads.

    q (H, L_seq, d), k (H_kv, L_seq, d), both after rope; response (L_seq,) bool -> (L_resp,) float32 in [0, 1].
    The prompt of a token is every earlier token that is not supervised, so a later turn of a conversation counts
    the user's turns, not its own earlier answers. The explicit softmax is computed for response queries only, some at
    a time. q may be a function, positions (n,) -> (H, n, d), so that it need not exist as a whole.
    """
    queries = q if callable(q) else lambda positions: q[:, positions]
    prompt, k = (~response).to(k.device, non_blocking=True), k.float()
    chunks = query_chunks(response.nonzero().squeeze(1), k.device)
    return torch.cat([_attention_to_prompt(queries(chunk), k, chunk, prompt) for chunk in chunks])


def query_chunks(positions: Tensor, device, times: int = 1) -> tuple[Tensor, ...]:
    """Positions (n,), perhaps on the host, in chunks on `device`, of `times` the size that QUERY_CHUNK gives."""
    size = times * QUERY_CHUNK.get(torch.device(device).type, QUERY_CHUNK["cpu"])
    return positions.to(device, non_blocking=True).split(size)


class AttentionProbe:
    """Eq. 7 beside flash attention: store what enters one decoder layer, recompute its attention from that (Sec. 3.3).

    A forward pre-hook keeps the hidden states that enter decoder layer `layer` (negative counts from the end). After a
    forward pass of a batch, `scores` runs that layer's norm and its q and k projections again and computes the
    explicit softmax for the response queries alone. Each forward pass of the model arms the hook once, so the rerun
    of a layer by gradient checkpointing does not fire it. `remove` takes the hooks out.
    """

    def __init__(self, model, layer: int = -1):
        layers = model.model.layers
        if not -len(layers) <= layer < len(layers):
            raise UserError(f"layer {layer} does not exist: layers are 0 to {len(layers) - 1}, or -1 for the last")
        self.layer, self.config = layers[layer], model.config
        self.hidden, self.armed = None, False
        self.hooks = [model.register_forward_pre_hook(self._arm), self.layer.register_forward_pre_hook(self._keep)]

    def _arm(self, module, args):
        self.armed = True

    def _keep(self, module, args):
        if self.armed:
            self.hidden, self.armed = args[0].detach(), False

    def remove(self):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def scores(self, response: Tensor) -> Tensor:
        """AttnScore of the batch that went through the model last: response (B, L) bool -> (B, L) float32, zero off it.

        Adapters are on, as in the forward pass; dropout is off, and no random number is drawn. Rows are padded on
        the right. Queries and keys are projected in chunks too, so memory grows with L, never with L * L. With
        `response` on the host, nothing waits for a GPU.
        """
        device, attention = self.hidden.device, self.layer.self_attn
        out = torch.zeros(response.shape, device=device)
        training = self.layer.training
        self.layer.eval()
        for hidden, supervised, row in zip(self.hidden, response, out, strict=True):
            positions = supervised.nonzero().squeeze(1)
            if len(positions) == 0:
                continue
            length = int(positions[-1]) + 1  # later tokens are padding or a turn that nobody asks about
            queries = functools.partial(self._project, attention.queries, hidden)
            keys = query_chunks(torch.arange(length), device, times=8)
            k = torch.cat([self._project(attention.keys, hidden, chunk) for chunk in keys], dim=1)
            row[positions.to(device, non_blocking=True)] = attention_score(queries, k, supervised[:length])
        self.layer.train(training)
        return out

    def _project(self, projection, hidden: Tensor, positions: Tensor) -> Tensor:
        """The layer's norm, then `projection` (its queries or keys), of some tokens: hidden (L, D) -> (heads, n, d)."""
        x = self.layer.input_layernorm(hidden[positions]).unsqueeze(0)
        return projection(x, rope_table(self.config, positions, x.dtype))[0]


# -------------------------------------------------------------------------------------- score, selection, loss


def normalize(rel: Tensor) -> Tensor:
    """Normalize(REL), Eq. 8: (rel - min) / (max - min) within one sample, into [0, 1]; all-equal input gives zeros."""
    low, high = rel.aminmax()
    return torch.where(high > low, (rel - low) / (high - low), 0.0)


def score(normalized_rel: Tensor, attention: Tensor, gamma: float) -> Tensor:
    """Score, Eq. 9: gamma * Normalize(REL) + (1 - gamma) * AttnScore."""
    return gamma * normalized_rel + (1 - gamma) * attention


def share_of(rho: float, n: int) -> int:
    """ceil(rho * n) with rho read as the decimal it is written as: 0.1 of 30 is 3, which floating point makes 4."""
    return math.ceil(Fraction(str(rho)) * n)


def select(score: Tensor, rho: float) -> Tensor:
    """Top-rho selection I_rho, Eq. 11: bool, true for exactly ceil(rho * L_resp) tokens with the highest scores.

    That is at least one; ties go to the lowest index. Raises UserError for a rho outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise UserError(f"rho is {rho}, but a share of tokens lies in (0, 1]")
    best_first = torch.sort(score, descending=True, stable=True).indices
    selected = torch.zeros_like(score, dtype=torch.bool)
    return selected.index_fill_(0, best_first[: share_of(rho, len(score))], True)  # nothing waits for a GPU


def selected_loss(nll: Tensor, selected: Tensor) -> Tensor:
    """Loss over the selected tokens, Eq. 10: the mean of nll where `selected`, (L_resp,) -> scalar; of none, 0.

    Of other objectives (paper/objectives.py): of weight * nll, where there is a weight.
    """
    return (nll * selected).sum() / (selected != 0).sum().clamp(min=1)
