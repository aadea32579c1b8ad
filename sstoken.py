"""ssToken: self-modulated and semantic-aware token selection. Every equation of the paper is one function here.

A function takes the response tokens of one sample, as 1-D float32 tensors of length L_resp, unless it says otherwise.
The file needs torch alone. What words mean, here and in the other files:

row        a record of a data set
sample     a row as token ids: one conversation
response   the supervised tokens of a sample, L_resp in all: the assistant's answers and their end tokens
prompt     of a response token: all earlier tokens that are not supervised
nll        negative log-likelihood of a token, in nats: its loss
L_theta    nll under the current model
L_his      nll under the history model: the model before fine-tuning, or an earlier state of it
L_ref      nll under a reference model, which only some baselines have
REL        L_his - L_theta, Eq. 3
AttnScore  the attention that a response token pays to the prompt, Eq. 7
gamma      the weight of REL in the score, Eq. 9
rho        the share of a sample's response tokens that is selected, Eq. 11
pass       one forward computation, of one micro-batch
step       one update of the weights, after the passes of a whole batch
part       a fifth of the samples, in TokenCleaning's self-evolving variant
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def ema_update(history: Iterable[Tensor], current: Iterable[Tensor], alpha: float):
    """Exponential moving average of the history model, Eq. 4: history <- alpha * history + (1 - alpha) * current.

    In place, tensor by tensor. Keep `history` in float32: in bfloat16 a step of 1 - alpha = 0.001 rounds to nothing.
    """
    for old, new in zip(history, current, strict=True):
        old.mul_(alpha).add_(new, alpha=1 - alpha)


# ---------------------------------------------------------------------------------------------- attention score

# Queries at a time: the softmax of 24 heads over 2048 keys then takes 6 or 50 MB
QUERY_CHUNK = {"cpu": 32, "cuda": 256}


def _attention_to_prompt(q, k, positions, prompt, scale=None, cap=None, window=None) -> Tensor:
    """Eqs. 5 and 6: q (H, n, d) of tokens at `positions` (n,), k (H_kv, L, d) float32 -> (H, n)."""
    groups = len(q) // len(k)  # query heads that share one key head
    q = q.float().unflatten(0, (len(k), groups)).flatten(1, 2)  # (H_kv, groups * n, d)
    logits = (q @ k.transpose(1, 2)).unflatten(1, (groups, -1))  # (H_kv, groups, n, L)
    logits *= scale or q.shape[-1] ** -0.5
    if cap:
        logits = cap * (logits / cap).tanh()
    behind = positions.unsqueeze(1) - torch.arange(k.shape[1], device=k.device)  # (n, L)
    visible = (behind >= 0) & (behind < (window or k.shape[1]))  # the mask M_i
    attention = logits.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
    return (attention @ prompt.float()).flatten(0, 1)  # Eq. 5 takes the prompt's columns, Eq. 6 sums them


def attention_score(q: Tensor, k: Tensor, response: Tensor, **settings) -> Tensor:
    """AttnScore, Eqs. 5-7: the attention that each response token pays to the prompt, averaged over the heads.

    q (H, L_seq, d), k (H_kv, L_seq, d), both after rope; response (L_seq,) bool -> (L_resp,) float32 in [0, 1].
    The softmax is for response queries only, some at a time: memory is linear in L_seq.
    settings: scale of the logits (default d ** -0.5), their soft cap, window (how many tokens a token sees).
    """
    prompt, k, scores = (~response).to(k.device, non_blocking=True), k.float(), []
    positions, size = response.nonzero().squeeze(1), QUERY_CHUNK.get(k.device.type, QUERY_CHUNK["cpu"])
    for chunk in positions.to(k.device, non_blocking=True).split(size):
        heads = _attention_to_prompt(q[:, chunk], k, chunk, prompt, **settings)
        scores.append(heads.mean(dim=0).clamp(max=1))  # Eq. 7; a sum of float32 may pass 1
    return torch.cat(scores)


class AttentionProbe:
    """Eq. 7 beside flash attention: keep what enters one decoder layer, recompute its attention from that (Sec. 3.3).

    A pre-hook keeps the hidden states and rotary tables that enter decoder layer `layer` (negative: from the end), of
    our Transformer or of transformers' models. `scores` runs the layer's norm, q and k projections again, and the
    softmax for response queries alone. A layer that gradient checkpointing runs again does not fire the hook.
    ValueError if there is no such layer, or its attention differs: the model reads eight tokens to see that.
    """

    def __init__(self, model: nn.Module, layer: int = -1):
        layers = next((module.layers for module in model.modules() if hasattr(module, "layers")), [model])
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer {layer} does not exist: layers are 0 to {len(layers) - 1}")
        self.layer, self.hidden, self.armed = layers[layer], None, False
        self.attention = attention = getattr(self.layer, "self_attn", None)
        window = getattr(getattr(attention, "config", None), "sliding_window", None)
        self.settings = {
            "scale": getattr(attention, "scaling", None),
            "cap": getattr(attention, "attn_logit_softcapping", None),
            "window": getattr(attention, "sliding_window", window),
        }
        keep = self.layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.hooks = [model.register_forward_pre_hook(self._arm), keep]
        if not next(model.parameters()).is_meta:
            self._compare(model)

    def _arm(self, module, args):
        self.armed = True

    def _keep(self, module, args, named):
        if self.armed:
            self.hidden, self.armed = (args[0] if args else named["hidden_states"]).detach(), False
            self.rope = named["position_embeddings"] if "position_embeddings" in named else args[1]

    def remove(self):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _compare(self, model: nn.Module):
        """The layer attends to values of 1 for the prompt, else 0: what enters o_proj is Eq. 6, head by head."""
        tokens = torch.arange(8, device=next(model.parameters()).device)
        prompt, found, training = tokens % 2 == 0, [], model.training
        try:
            with (
                self.attention.v_proj.register_forward_hook(lambda _, args, v: v * 0 + prompt.to(v)[:, None]),
                self.attention.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][0])),
            ):
                model.eval()(tokens.unsqueeze(0))
            q, k = (self._project(name)[0] for name in "qk")
            heads = _attention_to_prompt(q, k.float(), tokens, prompt, **self.settings)
            off = (found[0].unflatten(1, (len(q), -1)).mean(dim=2).T - heads).abs().max()
            if off > 0.01:  # bfloat16 rounds by 0.003
                raise ValueError(f"{off:.2f} off")
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            self.remove()
            raise ValueError(f"the attention of {type(self.layer).__name__} is not a Llama's: {error}") from error
        finally:
            model.train(training)

    @torch.no_grad()
    def scores(self, response: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """AttnScore of the batch that went through the model last: response (B, L) bool -> (B, L) float32, zero off it.

        attention_mask (B, L): 0 for padding, on either side; default: on the right. Adapters are on, dropout is off.
        With `response` on the host and no mask, nothing waits for a GPU.
        """
        out = torch.zeros(response.shape, device=self.hidden.device)
        training, place = self.layer.training, 0
        self.layer.eval()
        q, k = (self._project(name) for name in "qk")
        for row, supervised in enumerate(response):
            positions = supervised.nonzero().squeeze(1)
            if len(positions) == 0:
                continue
            start = 0 if attention_mask is None else int(attention_mask[row].int().argmax())
            end = int(positions[-1]) + 1  # later tokens are padding or a turn that nobody asks about
            own, tokens = row, slice(start, end)
            if len(q) < len(response):  # `model.packed`: one row holds all
                own, tokens = 0, slice(place, place + end)
                place += end
            found = attention_score(q[own, :, tokens], k[own, :, tokens], supervised[start:end], **self.settings)
            out[row, positions.to(out.device, non_blocking=True)] = found
        self.layer.train(training)
        return out

    def _project(self, name: str) -> Tensor:
        """Norm, projection, norm of heads and rope of all kept states: (B, heads, L, d)."""
        (B, L, _), found = self.hidden.shape, []
        rope = [table.reshape(-1, *table.shape[-2:]).expand(B, L, -1).flatten(0, 1) for table in self.rope]
        size = 16 * QUERY_CHUNK.get(self.hidden.device.type, QUERY_CHUNK["cpu"])
        for x, cos, sin in zip(*(rows.split(size) for rows in (self.hidden.flatten(0, 1), *rope)), strict=True):
            x = getattr(self.attention, f"{name}_proj")(self.layer.input_layernorm(x.unsqueeze(0)))
            x = x.unflatten(-1, (-1, self.attention.head_dim))
            x = getattr(self.attention, f"{name}_norm", nn.Identity())(x)[0].transpose(0, 1)  # (heads, n, d)
            x, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
            first, second = x.chunk(2, dim=-1)
            found.append(torch.cat((x * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1))
        return torch.cat(found, dim=1).unflatten(1, (B, L)).transpose(0, 1)


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

    That is at least one; ties go to the lowest index. Raises ValueError for a rho outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho is {rho}, but a share of tokens lies in (0, 1]")
    best_first = torch.sort(score, descending=True, stable=True).indices
    selected = torch.zeros_like(score, dtype=torch.bool)
    return selected.index_fill_(0, best_first[: share_of(rho, len(score))], True)  # nothing waits for a GPU


def selected_loss(nll: Tensor, selected: Tensor) -> Tensor:
    """Loss over the selected tokens, Eq. 10: the mean of nll where `selected`, (L_resp,) -> scalar; of none, 0.

    Of other objectives (paper/objectives.py): of weight * nll, where there is a weight.
    """
    return (nll * selected).sum() / (selected != 0).sum().clamp(min=1)
