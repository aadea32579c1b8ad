"""LoRA, the only part that is trained: y = W x + b + (alpha / rank) B A dropout(x), with W frozen (Hu et al., 2022).

`LoRALinear` is a Linear whose weight keeps its name, so a model with adapters is still the checkpoint it came from.
Adapters are saved and read in peft's file format.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import (
    Linear,
    Transformer,
    UserError,
    is_count,
    is_number,
    read_json,
    save_model,
    write_json,
    write_whole,
    writing,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Dropout(torch.autograd.Function):
    """x with `dropped` of 65,536 elements, drawn at random, set to zero; the rest as they are."""

    @staticmethod
    def forward(ctx, x, dropped):
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # four numbers from each draw, -2^15 to 2^15 - 1
        first_kept = dropped - 2**15
        kept = bits.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).to(torch.int8)  # 1 where kept, else 0
        ctx.save_for_backward(kept)
        return _where(kept, x)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return _where(kept, grad), None


def _where(kept: Tensor, x: Tensor) -> Tensor:
    """x where `kept` is 1, zero where it is 0: a product of bit patterns, which no infinity and no rounding enters."""
    pattern = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.contiguous().view(pattern) * kept).view(x.dtype)


def dropout(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """x with a share `rate` of its elements set to zero, and the factor that gives it back its expectation.

    All layers that read the same x get the same elements of it: q, k and v do, and gate and up. On a CPU the rate is
    rounded to 1 / 65,536, the factor is that of the rounded rate.
    """
    if x.device.type != "cpu":
        if not hasattr(x, "dropped"):
            x.dropped = F.dropout(x, rate)
        return x.dropped, 1.0
    dropped = min(round(rate * 2**16), 2**16 - 1)
    if not hasattr(x, "dropped"):
        x.dropped = _Dropout.apply(x, dropped)  # F.dropout draws a number an element, which takes ten times as long
    return x.dropped, 2**16 / (2**16 - dropped)


class LoRALinear(Linear):
    """A frozen Linear with a trainable low-rank update: y = W x + b + (alpha / rank) B A dropout(x).

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
        self.earlier = None  # factors of frozen adapters beneath this one, see `freeze_adapters`
        self.train(base.training)

    @torch.no_grad()
    def reset_adapter(self):
        """A new adapter: A drawn at random, B zero, so that it changes nothing."""
        drawn = torch.empty(self.lora_A.shape)  # on the CPU: one seed, one adapter, on any device
        self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        y = F.linear(x.flatten(0, -2), self.weight, self.bias)
        if self.earlier:
            A, B = self.earlier
            y.addmm_(F.linear(x.flatten(0, -2), A.to(x.dtype)), B.to(x.dtype).T, alpha=self.alpha / self.rank)
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

    @torch.no_grad()
    def product(self) -> Tensor:
        """B A, (out, in) float32: the update of W before it is scaled by alpha / rank."""
        return self.lora_B @ self.lora_A


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of `model` under its dotted name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def decoder_linears(model: Transformer) -> dict[str, nn.Linear]:
    """Every layer that can be adapted, under its dotted name: all but the head, whose weight token_nll takes itself."""
    modules = model.model.named_modules(prefix="model")
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _replace(model: nn.Module, name: str, layer: nn.Linear):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def add_lora(model: Transformer, rank=64, alpha=16, dropout=0.1, targets=TARGETS) -> Transformer:
    """Freeze `model` and adapt, in place, every Linear whose name is one of `targets` or ends in one (Appendix A.3).

    Raises UserError for a rank below 1, a dropout outside [0, 1), a target that the decoder does not have;
    ValueError when there are adapters already.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; remove_lora takes them out")
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"LoRA needs a rank of at least 1 and a dropout in [0, 1), not {rank} and {dropout}")
    linears = decoder_linears(model)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            raise UserError(f"LoRA target {target} names no linear layer of the decoder")
    model.requires_grad_(False)
    for name, linear in linears.items():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            _replace(model, name, LoRALinear(linear, rank, alpha, dropout))
    return model


def remove_lora(model: Transformer) -> Transformer:
    """Take the adapters out again, in place: every LoRALinear becomes the Linear that it was."""
    for name, layer in lora_layers(model).items():
        linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        _replace(model, name, linear.train(layer.training))
    return model


@contextmanager
def replaced(model: nn.Module, factors: list[tuple[Tensor, ...]] | None):
    """Within the block, adapted layer i multiplies by `factors[i]` in turn: another (A, B), or one (out, in) matrix.

    None stands for the base model: no update at all. There is no dropout before a stand-in.
    """
    layers = list(lora_layers(model).values())
    before = [layer.stand_in for layer in layers]
    try:
        for layer, stand_in in zip(layers, factors or [()] * len(layers), strict=True):
            layer.stand_in = stand_in
        yield
    finally:
        for layer, stand_in in zip(layers, before, strict=True):
            layer.stand_in = stand_in


@torch.no_grad()
def freeze_adapters(model: Transformer):
    """Make the adapters part of the frozen model, in place, and leave new ones on top of them.

    As `merge` does, but beside the weights instead of in them: in bfloat16 most updates of a short training are smaller
    than half of a weight's last digit, and adding them would change nothing.
    """
    for layer in lora_layers(model).values():
        below = layer.earlier or (layer.lora_A[:0], layer.lora_B[:, :0])
        layer.earlier = (torch.cat([below[0], layer.lora_A]), torch.cat([below[1], layer.lora_B], dim=1))
        layer.reset_adapter()


def disabled(model: nn.Module):
    """A context manager within which `model` is exactly the base model: its adapters are passed over."""
    return replaced(model, None)


@torch.no_grad()
def merge(model: Transformer, folder=None) -> Transformer:
    """Fold each update into its weight, in place: W + (alpha / rank) B A, added in float32, then rounded to W's dtype.

    The adapters are gone afterwards. With `folder`, the result is also written as a checkpoint of its own, which
    transformers, vLLM and lm-eval load.
    """
    for layer in lora_layers(model).values():
        update = layer.product()
        if layer.earlier:
            update += layer.earlier[1] @ layer.earlier[0]
        layer.weight.copy_(layer.weight.float().add_(update, alpha=layer.alpha / layer.rank))
    remove_lora(model)
    if folder is not None:
        save_model(model, folder)
    return model


# ------------------------------------------------------------------------------------------- peft's file format

PREFIX = "base_model.model."


def save_adapter(model: Transformer, folder):
    """Write adapter_model.safetensors (float32) and adapter_config.json to `folder`; peft's PeftModel loads them."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    write_whole(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "revision": model.revision,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def join_adapters(folders: list[Path], folder: Path):
    """Write as one adapter those of `folders`, each of them trained on top of all before it (`freeze_adapters`).

    Their updates add up: with the A stacked and the B side by side, one product is the sum of theirs. So the rank is
    the sum of their ranks, and alpha grows with it.
    """
    parts = [load_file(part / "adapter_model.safetensors") for part in folders]
    config = read_json(folders[0] / "adapter_config.json")
    tensors = {
        name: torch.cat([part[name] for part in parts], dim=0 if name.endswith("lora_A.weight") else 1)
        for name in parts[0]
    }
    for key in ("r", "lora_alpha"):
        config[key] *= len(folders)
    write_whole(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


# What peft can switch on that changes the result and is not implemented here
UNSUPPORTED = [
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern"),
    *(
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "layer_replication",
        "alora_invocation_tokens",
    ),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
]


def load_adapter(model: Transformer, folder) -> Transformer:
    """Add the adapter in `folder`, ours or peft's, to `model` in place; adapters that it had before are taken out.

    Raises UserError, by name, for a missing or leftover tensor, a shape that does not fit this base model, and any
    peft feature that would change the result and is not implemented.
    """
    folder = Path(folder)
    config, path = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{folder}: peft_type {config.get('peft_type')}, bias {config.get('bias')} is not plain LoRA")
    rank, alpha, rate = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if not is_count(rank):
        raise UserError(f"{folder}: r is {rank!r}, not a whole number above 0")
    if not is_number(alpha):
        raise UserError(f"{folder}: lora_alpha is {alpha!r}, not a number")
    if not is_number(rate) or not 0 <= rate < 1:
        raise UserError(f"{folder}: lora_dropout is {rate!r}, not a number in [0, 1)")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{folder}: {key} is not implemented")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):  # the others change the base too
        raise UserError(f"{folder}: init_lora_weights {config['init_lora_weights']!r} is not implemented")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as reason:
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from None
    parts = {name: name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    targets = sorted(set(parts.values()))
    remove_lora(model)
    linears = decoder_linears(model)
    for name, target in parts.items():
        if target not in linears:
            raise UserError(f"{path}: {name} adapts no linear layer of this decoder")
    expected = {}  # checked before anything is built by the config's rank
    for target in targets:
        expected[f"{PREFIX}{target}.lora_A.weight"] = [rank, linears[target].in_features]
        expected[f"{PREFIX}{target}.lora_B.weight"] = [linears[target].out_features, rank]
    for name, shape in expected.items():
        stored = list(tensors[name].shape) if name in tensors else None
        if stored != shape:
            problem = "is missing" if stored is None else f"has shape {stored}, not {shape}"
            raise UserError(f"{path}: {name} {problem}")
        if tensors[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: {name} is stored as {tensors[name].dtype}, not as a float")
    if leftover := tensors.keys() - expected.keys():
        raise UserError(f"{path}: tensor {min(leftover)} has no place in a plain LoRA adapter")
    add_lora(model, rank, alpha, rate, targets)
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            getattr(layer, part).data.copy_(tensors[f"{PREFIX}{name}.{part}.weight"])
    return model
