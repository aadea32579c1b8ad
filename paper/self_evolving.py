"""TokenCleaning's self-evolving variant: the pool part by part, each ranked by the model that the parts before made."""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import lora
from model import Transformer
from paper.frozen import FrozenLosses, response_losses
from support import ranks
from support.adapters import write_adapter
from support.files import read_json, read_log, write_lines

PARTS = 5


def train_in_parts(model, examples, base: list[Tensor], args: argparse.Namespace, folder: Path, fit: Callable) -> float:
    """Train on PARTS parts of the pool, one after the other. Returns the seconds that the references' losses took.

    The first part trains on all its tokens. Then the model so far, its adapters frozen, is the reference of the next
    part. `fit` trains new adapters, with their own warm-up and decay; `folder` gets their sum as one adapter.
    """
    order, seconds, done = random.Random(f"{args.seed} parts").sample(range(len(examples)), len(examples)), 0.0, []
    for number in range(1, PARTS + 1):
        part = sorted(order[number - 1 :: PARTS])
        samples, frozen = [examples[i] for i in part], FrozenLosses()
        if number > 1:
            start = time.perf_counter()
            freeze_adapters(model)
            frozen = FrozenLosses([base[i] for i in part], response_losses(model, samples))
            seconds += time.perf_counter() - start
            lora.new_adapters(model, args, number)
        done.append(folder / f"part-{number}")
        steps = args.max_steps and args.max_steps * number // PARTS - args.max_steps * (number - 1) // PARTS
        fit(samples, frozen, argparse.Namespace(**vars(args) | {"max_steps": steps}), done[-1])
        if ranks.first_rank():
            lines = [line | {"part": i} for i, part in enumerate(done, 1) for line in read_log(part)]
            write_lines(folder / "log.jsonl", [line | {"step": step} for step, line in enumerate(lines, 1)])
    if ranks.first_rank():
        join_adapters(done, folder)
    return seconds


class StackedLoRA(lora.LoRALinear):
    """A LoRALinear on top of earlier adapters: its frozen part is W x + b + (alpha / rank) sum_i B_i A_i x."""

    earlier: tuple[Tensor, Tensor]  # the A of all of them, stacked, and the B, side by side

    def frozen(self, x: Tensor) -> Tensor:
        (A, B), y = self.earlier, super().frozen(x)
        update = torch.nn.functional.linear(x.flatten(0, -2), A.to(x.dtype))
        return y.addmm_(update, B.to(x.dtype).T, alpha=self.alpha / self.rank)

    @torch.no_grad()
    def product(self) -> Tensor:
        A, B = self.earlier
        return super().product().add_(B @ A)


@torch.no_grad()
def freeze_adapters(model: Transformer):
    """Freeze the adapters, in place, and put new ones on top of them.

    They stay beside the weights: in bfloat16 most updates are less than half of a weight's last digit.
    """
    for layer in lora.lora_layers(model).values():
        A, B = getattr(layer, "earlier", (layer.lora_A[:0], layer.lora_B[:, :0]))
        layer.__class__ = StackedLoRA  # the same module, since sharded weights know theirs
        layer.earlier = (torch.cat([A, layer.lora_A]), torch.cat([B, layer.lora_B], dim=1))
        layer.reset_adapter()


def join_adapters(folders: list[Path], folder: Path):
    """Write as one adapter those of `folders`, each of them trained on top of all before it.

    With the A stacked and the B side by side, one product is the sum of theirs; rank and alpha add up.
    """
    parts = [load_file(part / "adapter_model.safetensors") for part in folders]
    config = read_json(folders[0] / "adapter_config.json")
    dims = {name: 0 if name.endswith("lora_A.weight") else 1 for name in parts[0]}
    tensors = {name: torch.cat([part[name] for part in parts], dim) for name, dim in dims.items()}
    for key in ("r", "lora_alpha"):
        config[key] *= len(folders)
    write_adapter(folder, tensors, config)
