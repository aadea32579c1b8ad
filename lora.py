"""LoRA (Hu et al., 2022), the only part that is trained: a low-rank update beside each frozen weight.

`LoRALinear` is a Linear whose weight keeps its name, so a model with adapters is still its checkpoint.
"""

import argparse
import math
import random
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer, response_nll
from sstoken import ema_update
from support import ranks
from support.adapters import find_adapter, read_adapter, write_factors
from support.checkpoint import save_model
from support.files import check
from support.kernels import dropout

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A frozen Linear with a low-rank update: y = W x + b + (alpha / rank) B A dropout(x).

    weight (out, in) and bias are the base's own tensors, in its dtype. lora_A (rank, in) and lora_B (out, rank) are
    float32 whatever that dtype is, and are cast to the input's where they are used.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=base.weight.device))
        self.reset_adapter()
        self.stand_in = None  # factors used instead of (A, B), see `replaced`
        self.train(base.training)

    @torch.no_grad()
    def reset_adapter(self):
        """A new adapter: A drawn at random, B zero, so that it changes nothing."""
        drawn = torch.empty(self.lora_A.shape)  # on the CPU: one seed, one adapter, on any device
        self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = self.frozen(x)
        scale, factors = self.alpha / self.rank, self.stand_in
        if factors is None:
            factors = self.lora_A, self.lora_B
            if self.training and self.dropout:
                x, correction = dropout(x, self.dropout)
                scale *= correction
        if factors:
            update = x.flatten(0, -2)
            for factor in factors[:-1]:
                update = F.linear(update, factor.to(x.dtype))
            y.addmm_(update, factors[-1].to(x.dtype).T, alpha=scale)
        return y.view(*x.shape[:-1], -1)

    def frozen(self, x: Tensor) -> Tensor:  # W x + b: (..., in) -> (n, out)
        return F.linear(x.flatten(0, -2), self.weight, self.bias)

    @torch.no_grad()
    def product(self) -> Tensor:
        """B A, (out, in) float32: the update of W before it is scaled by alpha / rank."""
        return self.lora_B @ self.lora_A


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of `model` under its dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def decoder_linears(model: Transformer) -> dict[str, nn.Linear]:
    """Every layer that can be adapted, by its dotted name: all but the head, whose weight token_nll takes."""
    modules = model.model.named_modules(prefix="model")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def add_lora(model: Transformer, rank=64, alpha=16, dropout=0.1, targets=TARGETS) -> Transformer:
    """Freeze `model` and adapt, in place, every Linear whose name is one of `targets` or ends in one (Appendix A.3).

    Raises UserError for a rank below 1, a dropout outside [0, 1), a target that the decoder does not have;
    ValueError when there are adapters already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; remove_lora takes them out")
    fits = rank >= 1 and 0 <= dropout < 1
    check(fits, f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {rank} and {dropout}")
    linears = decoder_linears(model)
    for target in targets:
        found = any(f".{name}".endswith(f".{target}") for name in linears)
        check(found, f"LoRA target {target} names no linear layer of the decoder")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout))
    return model


def remove_lora(model: Transformer) -> Transformer:
    """Take the adapters out again, in place: every LoRALinear becomes the Linear that it was."""
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return model


@contextmanager
def replaced(model: nn.Module, factors: list[tuple[Tensor, ...]] | None):
    """A context in which adapted layer i uses factors[i] instead of its adapter: another (A, B), or a matrix (out, in).

    factors None: no update, the base model. There is no dropout. Contexts do not nest.
    """
    layers = list(lora_layers(model).values())
    try:
        for layer, stand_in in zip(layers, factors or [()] * len(layers), strict=True):
            layer.stand_in = stand_in
        yield
    finally:
        for layer in layers:
            layer.stand_in = None


def disabled(model: nn.Module):
    """A context in which `model` is the base model: its adapters are off."""
    return replaced(model, None)


@torch.no_grad()
def merge(model: Transformer, folder=None, dtype: torch.dtype | None = None) -> Transformer:
    """Fold each update into its weight, in place: W + (alpha / rank) B A, added in float32, then rounded to `dtype`.

    Default: W's dtype. The adapters are gone then. `model.merge_error`: the norm of what rounding lost over the norm of
    the update. With `folder`, a checkpoint is written there.
    """
    lost, whole = 0.0, 1e-30
    for layer in lora_layers(model).values():
        update, scale = layer.product(), layer.alpha / layer.rank
        exact = layer.weight.float().add(update, alpha=scale)
        layer.weight.data = exact.to(dtype or layer.weight.dtype)
        lost += (layer.weight - exact).square().sum().item()
        whole += update.mul_(scale).square().sum().item()
    remove_lora(model).to(dtype or model.lm_head.weight.dtype)
    model.merge_error = math.sqrt(lost / whole)
    if folder is not None:
        save_model(model, folder)
    return model


def new_adapters(model: Transformer, args: argparse.Namespace, part: int = 0):
    """Give `model` new adapters, which change nothing yet; drawn from the seed and the part of self-evolving."""
    seed = random.Random(f"{args.seed} {part}").getrandbits(62) if part else args.seed
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.reset_adapter()
    if not lora_layers(model):
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if ranks.rank():
        torch.manual_seed(seed + ranks.rank())  # one adapter, but each rank has its own dropout


class History:
    """theta_his of Eq. 3: the base model, an average of past models (Eq. 4), or the model of some steps ago.

    All three share the base weights W. What is added to W differs: nothing, one averaged matrix a layer, or an old
    adapter. Averaging the products B A averages the merged weights W + (alpha / rank) B A exactly, since W is fixed.
    """

    def __init__(self, model: Transformer, kind: str, ema_alpha: float, every: int, base: list[Tensor] | None = None):
        """base: the base model's losses, (L_resp,) for each sample, if they are known."""
        self.model, self.kind, self.ema_alpha, self.every = model, kind, ema_alpha, every
        self.base = base if kind == "base" else None
        self.factors = None  # nothing: the base model
        if kind == "ema":
            self.factors = [(torch.zeros_like(layer.product()),) for layer in lora_layers(self.model).values()]

    @torch.no_grad()
    def nll(self, input_ids: Tensor, response: Tensor, samples: list[int] = ()) -> Tensor:
        """L_his, as response_nll: input_ids, response (B, L) -> (response.sum(),). samples: numbers in `base`."""
        if self.base:
            known = torch.cat([torch.zeros(0), *(self.base[i] for i in samples)])
            return known.to(input_ids.device, non_blocking=True)
        with replaced(self.model, self.factors):
            return response_nll(self.model, input_ids, response)

    def update(self, step: int):
        """Alg. 1, line 11, after the optimizer's step number `step` (from 1)."""
        if self.kind == "ema":
            for (average,), layer in zip(self.factors, lora_layers(self.model).values(), strict=True):
                ema_update([average], [layer.product()], self.ema_alpha)
        elif self.kind == "checkpoint" and step % self.every == 0:
            layers = lora_layers(self.model).values()
            self.factors = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in layers]


# ------------------------------------------------------------------------------------------------------- files


def save_adapter(model: Transformer, folder):
    """Write the adapters (float32) to `folder` in peft's format; peft loads them."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    factors = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    settings = {"r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout}
    settings |= {"base_model_name_or_path": model.name_or_path, "revision": model.revision}
    write_factors(folder, factors, decoder_linears(model), settings)


def load_adapter(model: Transformer, folder) -> Transformer:
    """Add an adapter, ours or peft's, a folder or on the hub, to `model` in place of those that it had.

    Raises UserError, by name, for a missing or leftover tensor, a shape that does not fit this base model, and any
    peft feature that would change the result and is not implemented.
    """
    rank, alpha, rate, factors = read_adapter(find_adapter(folder), decoder_linears(model))
    add_lora(remove_lora(model), rank, alpha, rate, list(factors))
    for name, layer in lora_layers(model).items():
        for own, stored in zip((layer.lora_A, layer.lora_B), factors[name], strict=True):
            own.data.copy_(stored)
    return model


def add_flags(parser):
    """The adapters' flags (Appendix A.3)."""
    add = parser.group("optimisation (Appendix A.3)")
    add("--lora-rank", type=int, default=64, bound="at least 1", help="rank of the adapters")
    add("--lora-alpha", type=float, default=16, bound="above 0 and finite", help="scale of the adapters: alpha / rank")
    add("--lora-dropout", type=float, default=0.1, bound="in [0, 1)", help="dropout on the adapters' input")
