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
    """TokenCleaning's self-evolving variant: PARTS parts of the pool, one after the other, each with new adapters.

    The first part trains on all its tokens. For each further one the model so far, its adapters frozen into it, becomes
    the reference: the part's tokens are ranked by excess loss of the base model over it. `fit` trains the adapters,
    with a warm-up and a decay of their own, into folder/part-1, ...; together they are written to `folder` as one
    adapter. Returns the seconds that the references' losses took.
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
            lines = [line | {"step": step} for step, line in enumerate(lines, 1)]
            write_lines(folder / "log.jsonl", lines)
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
    """Make the adapters part of the frozen model, in place, and leave new ones on top of them.

    As `lora.merge` does, but beside the weights instead of in them: in bfloat16 most updates of a short training are
    smaller than half of a weight's last digit, and adding them would change nothing.
    """
    for layer in lora.lora_layers(model).values():
        A, B = getattr(layer, "earlier", (layer.lora_A[:0], layer.lora_B[:, :0]))
        layer.__class__ = StackedLoRA  # the same module, since sharded weights know theirs
        layer.earlier = (torch.cat([A, layer.lora_A]), torch.cat([B, layer.lora_B], dim=1))
        layer.reset_adapter()


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
    write_adapter(folder, tensors, config)
