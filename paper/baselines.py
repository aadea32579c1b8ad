"""What the paper compares ssToken with (Sec. 4.1): Full, Random, RHO-1, TokenCleaning in both variants.

All go through train.py's loop. What they select is known before training starts (`Fixed`), or, for RHO-1 of the current
model, in every step (`ExcessOfCurrent`); both have the form of `train.SSToken`. Below: losses of frozen models, which
they rank by, the reference model, and TokenCleaning's self-evolving variant, which trains part by part.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import data
import lora
from model import Transformer, load_model, response_nll
from paper.objectives import OBJECTIVES, asks, own_prompt, under_other_prompts, weigh
from sstoken import excess_loss, select, share_of
from support import ranks
from support.adapters import ADAPTER_FILES, find_adapter, read_adapter, write_adapter
from support.checkpoint import CHECKPOINT_FILES, TOKENIZER_FILES, check_fits, find_folder
from support.files import UserError, read_json, read_log, write_lines
from support.kernels import DESCRIPTIONS, Watch
from support.losses import kept_losses, losses_key

# --------------------------------------------------------------------------------- masks made before training starts


def select_everything(sizes: list[int], rho: float, seed: int, excess=None) -> list[Tensor]:
    """Full fine-tuning: every response token of samples with `sizes` response tokens, one bool tensor a sample."""
    return [torch.ones(size, dtype=torch.bool) for size in sizes]


def select_at_random(sizes: list[int], rho: float, seed: int, excess=None) -> list[Tensor]:
    """The paper's Uniform Random: exactly ceil(rho * N) of the pool's N response tokens, drawn once from the seed."""
    total = sum(sizes)
    selected = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    selected[order[: share_of(rho, total)]] = True
    return list(selected.split(sizes))


def select_in_each_sample(sizes: list[int], rho: float, seed: int, excess: list[Tensor]) -> list[Tensor]:
    """RHO-1: the ceil(rho * L_resp) tokens of each sample whose excess loss (Eq. 2) is highest."""
    return [select(token_excess, rho) for token_excess in excess]


def select_in_the_pool(sizes: list[int], rho: float, seed: int, excess: list[Tensor] | None) -> list[Tensor]:
    """TokenCleaning: the floor(rho * N) of the pool's N response tokens whose excess loss is highest; ties: the first.

    A sample may lose all its tokens. Without a reference, as in the first part of self-evolving, all are taken.
    """
    if excess is None:
        return select_everything(sizes, rho, seed)
    best_first = torch.sort(torch.cat(excess), descending=True, stable=True).indices
    count = math.floor(Fraction(str(rho)) * len(best_first))
    if not count:
        raise UserError(f"--rho {rho} of a pool of {len(best_first)} response tokens is not one token")
    selected = torch.zeros(len(best_first), dtype=torch.bool)
    selected[best_first[:count]] = True
    return list(selected.split(sizes))


# What each method selects before training starts; None: it selects anew in every step
METHODS = {
    "sstoken": None,
    "full": select_everything,
    "random": select_at_random,
    "rho1": select_in_each_sample,  # with --excess current, anew in every step too
    "tokencleaning": select_in_the_pool,
    "self-evolving": select_in_the_pool,  # of each of PARTS parts, see `train_in_parts`
} | OBJECTIVES
WITH_REFERENCE = ("rho1", "tokencleaning")
OVER_THE_POOL = ("tokencleaning", "self-evolving")  # a mean within each sample would undo what they rank
PARTS = 5


# --------------------------------------------------------------------------------- selections, in train.SSToken's form


class Fixed:
    """A selection that was made before training started: a bool tensor (L_resp,) a sample, on the host."""

    history = watch = None

    def __init__(self, masks: list[Tensor]):
        self.masks, self.counts = masks, [int(mask.sum()) for mask in masks]

    def start(self, step: int, seen: int):
        pass

    def look_back(self, samples: list[int], ids: Tensor, response: Tensor):
        pass

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        return [self.masks[i].to(nll.device, non_blocking=True) for i in samples]

    def update(self, step: int):
        pass

    def close(self):
        pass


class ExcessOfCurrent(Fixed):
    """RHO-1 as its own paper has it: the excess loss (Eq. 2) of the current model over the reference, in every step."""

    def __init__(self, reference: list[Tensor], rho: float):
        self.reference, self.rho = reference, rho
        self.counts = [share_of(rho, len(nll)) for nll in reference]

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        reference = [self.reference[i].to(nll.device, non_blocking=True) for i in samples]
        parts = zip(nll.split([len(ref) for ref in reference]), reference, strict=True)
        return [select(excess_loss(current, ref), self.rho) for current, ref in parts]


class Objective(Fixed):
    """One of OBJECTIVES that asks for something of the current model, in every step. frozen: of the base model.

    How many tokens a sample keeps is known before only where rho says it; otherwise, where --loss-mean batch weighs
    samples by that, it counts all of its response tokens.
    """

    def __init__(self, sizes: list[int], args: argparse.Namespace, frozen: "Frozen"):
        self.sizes, self.args, self.frozen = sizes, args, frozen
        self.method = "surprise" if args.rho == "auto" else args.method
        self.own = frozen.belong() if args.rho == "auto" else [True] * len(sizes)
        counts = [share_of(args.rho, size) for size in sizes] if "rho" in asks(self.method) else sizes
        self.counts = [count * own for count, own in zip(counts, self.own, strict=True)]
        described = asks(self.method) & DESCRIPTIONS.keys()
        self.watch = Watch(sorted(described)) if described else None

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        current = {"nll": nll} | (self.watch.take(nll) if self.watch else {})
        parts = {name: values.split([self.sizes[i] for i in samples]) for name, values in current.items()}
        found = []
        for place, i in enumerate(samples):
            known = {name: values[place] for name, values in parts.items()} | self.frozen.of_base(i, nll.device)
            weights = weigh(self.method, known | {"rho": self.args.rho})
            found.append(weights if self.own[i] else torch.zeros_like(weights))
        return found


def make_selection(model, sizes: list[int], args: argparse.Namespace, frozen: "Frozen") -> Fixed | None:
    """The selection of the method that `args` names for samples with `sizes` response tokens; None: it is ssToken's."""
    if args.rho == "auto":
        return Objective(sizes, args, frozen)
    if args.method in OBJECTIVES:
        if asks(args.method) <= {"history_nll", "history_entropy", "history_spread"}:
            return Fixed([weigh(args.method, frozen.of_base(i, "cpu")) for i in range(len(sizes))])
        return Objective(sizes, args, frozen)
    if args.excess == "current" and frozen.reference:
        return ExcessOfCurrent(frozen.reference, args.rho)
    if not METHODS[args.method]:
        return None
    pairs = zip(frozen.base, frozen.reference, strict=True) if frozen.reference else None
    excess = [excess_loss(base, better) for base, better in pairs] if pairs else None
    return Fixed(METHODS[args.method](sizes, args.rho, args.seed, excess))


# ------------------------------------------------------------------------------------------- losses of frozen models

SCORING_BATCH = 4  # samples a pass, whatever the run's micro-batches are


class Frozen(NamedTuple):
    """Losses of models that stay as they are while another trains: a (L_resp,) tensor a sample, on the host, or None.

    base: before training; where they are asked for, (3, L_resp): losses, entropy and spread of what was predicted.
    reference: L_ref of Eq. 2. elsewhere: the base model's of each answer under another sample's prompt; may be empty.
    """

    base: list[Tensor] | None = None
    reference: list[Tensor] | None = None
    elsewhere: list[Tensor] | None = None

    def of_base(self, sample: int, device) -> dict[str, Tensor]:
        """What is known of the base model's predictions of a sample, by the names that objectives ask for."""
        if not self.base:
            return {}
        rows = self.base[sample].to(device, non_blocking=True)
        names = ("history_nll", "history_entropy", "history_spread")
        return dict(zip(names, rows.view(-1, rows.shape[-1]), strict=False))

    def belong(self) -> list[bool]:
        """Which answers belong to their prompt, by `own_prompt`; all, where there is no other prompt."""
        if not self.elsewhere:
            return [True] * len(self.base)
        gains = [theirs.sum() - ours.sum() for theirs, ours in zip(self.elsewhere, self.base, strict=True)]
        return own_prompt(torch.stack(gains)).tolist()


def scoring_passes(examples: list[data.Example]) -> list[list[int]]:
    """The passes in which all that is kept is computed: sample indices, SCORING_BATCH at most in one.

    They depend on `examples` alone, so the same weights always give the same bits.
    """
    lengths = [len(e.ids) for e in examples]
    return next(data.plan_batches(lengths, max(1, len(lengths)), SCORING_BATCH, seed=0), [])


@torch.no_grad()
def response_losses(model: Transformer, examples: list[data.Example], described: bool = False) -> list[Tensor]:
    """The loss of every response token, adapters on, dropout off: a (L_resp,) float32 tensor a sample, on the host.

    described: (3, L_resp) instead, with the entropy and the spread of each token's predicted distribution below. All
    ranks take part in `scoring_passes`, and each returns all.
    """
    training, device, found = model.training, model.lm_head.weight.device, {}
    watch = Watch(["entropy", "spread"]) if described else None
    model.eval()
    passes = ranks.share_passes(scoring_passes(examples))
    for samples in tqdm(passes, "losses", leave=False, disable=not ranks.first_rank()):
        batch = [examples[i] for i in samples]
        nll = response_nll(model, *data.collate(batch, device), watch)
        nll = torch.stack([nll, *watch.take(nll).values()]).cpu() if watch else nll.cpu()
        found |= zip(samples, nll.split([int(e.response.sum()) for e in batch], -1), strict=True) if batch else {}
    model.train(training)
    found = {i: nll for part in ranks.gather(found) for i, nll in part.items()}
    check_losses(model, found)
    return [found[i] for i in range(len(examples))]


def check_losses(model: Transformer, found: dict[int, Tensor]):
    """UserError if a model has no finite loss for a token of some samples: {sample: (L_resp,) losses}."""
    if broken := [str(i) for i, nll in sorted(found.items()) if not nll.isfinite().all()]:
        raise UserError(f"{model.name_or_path}: the loss of samples {', '.join(broken)} (from 0) is no finite number")


def frozen_losses(
    model: Transformer, adapter: Path | None, examples, args, described: bool = False
) -> tuple[list[Tensor], float]:
    """`response_losses` of a frozen model, by way of --cache, and their seconds; adapter: the folder of its adapter."""
    cache, key = Path(args.cache) if args.cache else None, ""
    if cache and ranks.first_rank():
        key = losses_key(model.folder, adapter, examples, args.dtype, torch.device(args.device).type)
        key += "-described" * described
    sizes = [int(example.response.sum()) for example in examples]
    found, seconds = kept_losses(
        cache, key, lambda: torch.cat(response_losses(model, examples, described), -1).flatten()
    )
    return list((found.view(3, -1) if described else found).split(sizes, -1)), seconds


def reads_kept_history(args: argparse.Namespace) -> bool:
    """Whether ssToken's history losses are to come from --cache: those of a fixed base model can."""
    scores = args.method == "sstoken" and args.rho not in ("auto", 1)
    return bool(args.cache and scores and args.history == "base" and args.gamma)


# ----------------------------------------------------------------------------------------------- the reference model


def find_reference(name: str) -> Path:
    """The folder of a --reference, local or on the hub: of an adapter, or of a whole model."""
    folder = find_folder(name, CHECKPOINT_FILES + TOKENIZER_FILES + ADAPTER_FILES)
    if not any((folder / file).exists() for file in ("adapter_config.json", "config.json")):
        raise UserError(f"--reference {name} holds neither an adapter_config.json nor a config.json")
    return folder


def is_adapter(name: str) -> bool:
    return (find_reference(name) / "adapter_config.json").exists()


def check_reference_model(model: Transformer, reference: str, examples: list[data.Example]):
    """UserError for a --reference that cannot be used, before anything is computed: its weights' names and shapes."""
    if is_adapter(reference):
        read_adapter(find_adapter(reference), lora.decoder_linears(model))
    else:
        check_fits(load_model(reference, device="meta"), reference, examples)


def check_tokenizer(args: argparse.Namespace, ours: data.Tokenizer):
    """UserError if the model that --reference names cuts texts into other ids; adapters may come without tokenizer."""
    folder = find_reference(args.reference)
    if is_adapter(args.reference) and not (folder / "tokenizer.json").exists():
        return
    theirs = data.load_tokenizer(args.reference)
    parts = [json.loads(tokenizer.backend.to_str()) for tokenizer in (ours, theirs)]
    same = all(parts[0][part] == parts[1][part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"))
    if not same or (ours.eos_id, ours.prefix) != (theirs.eos_id, theirs.prefix):
        raise UserError(f"--reference {args.reference} has another tokenizer than {args.model}: losses do not compare")


def reference_losses(
    model: Transformer, examples: list[data.Example], args: argparse.Namespace, device
) -> tuple[list[Tensor], float]:
    """L_ref of Eq. 2 from the model that --reference names, and the seconds that it took, loading included.

    An adapter takes the place of the adapters of `model`, which are new ones afterwards.
    """
    start, adapter = time.perf_counter(), None
    if is_adapter(args.reference):
        reference, adapter = lora.load_adapter(model, args.reference), find_adapter(args.reference)
    else:
        reference = load_model(args.reference, getattr(torch, args.dtype), "meta" if args.shard else device)
        check_fits(reference, args.reference, examples)
        if args.shard:
            ranks.shard(reference, reference.model.layers[-1], device)
    loading = time.perf_counter() - start
    found, seconds = frozen_losses(reference, adapter, examples, args)
    if adapter:
        lora.remove_lora(model)
        lora.new_adapters(model, args)
    return found, loading + seconds


# ------------------------------------------------------------------------------------------------- a run, by its method


def run_method(
    model: Transformer,
    examples: list[data.Example],
    reference_examples: list[data.Example],
    args: argparse.Namespace,
    folder: Path,
    fit: Callable,
) -> float:
    """Compute what the method ranks by, and train by it; returns the seconds that losses of frozen models took.

    reference_examples: what a reference model is to be trained on first, into folder/reference, if one is.
    fit: (samples, frozen, args, folder) trains the adapters that the model has.
    """
    device, seconds = model.lm_head.weight.device, 0.0
    base = reference = elsewhere = None
    ranks_by_base = args.method in ("self-evolving", *WITH_REFERENCE) and args.excess == "static"
    if args.rho == "auto" or ranks_by_base or reads_kept_history(args) or "history_nll" in asks(args.method):
        described = "history_entropy" in asks(args.method)
        base, seconds = frozen_losses(model, None, examples, args, described)  # new adapters change nothing
    if args.rho == "auto":
        others = under_other_prompts(examples, args.seed)
        elsewhere, taken = frozen_losses(model, None, others, args) if others else ([], 0.0)
        seconds += taken
    if reference_examples:
        plain = argparse.Namespace(**vars(args) | {"method": "full", "excess": "static"})
        fit(reference_examples, Frozen(), plain, folder / "reference")
        reference, taken = frozen_losses(model, folder / "reference", examples, args)
        lora.new_adapters(model, args)
        seconds += taken
    elif args.method in WITH_REFERENCE:
        reference, taken = reference_losses(model, examples, args, device)
        seconds += taken
    if args.method == "self-evolving":
        return seconds + train_in_parts(model, examples, base, args, folder, fit)
    fit(examples, Frozen(base, reference, elsewhere), args, folder)
    return seconds


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
        samples, frozen = [examples[i] for i in part], Frozen()
        if number > 1:
            start = time.perf_counter()
            freeze_adapters(model)
            frozen = Frozen([base[i] for i in part], response_losses(model, samples))
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


# --------------------------------------------------------------------------------------------------------- the flags


def add_flags(parser):
    """The flags of the reference model."""
    add = parser.group("reference model (rho1, tokencleaning)")
    # fmt: off
    add("--reference", metavar="NAME|DIR",
        help="the reference of Eq. 2: an adapter of --model (a run's folder), or a whole model with the same tokenizer")
    add("--reference-data", metavar="SOURCE[,SOURCE...]",
        help="train the reference first, as --method full does (with this method's --loss-mean), on these rows, into "
        "OUT/reference")
    add("--reference-top", type=int, bound="at least 1", metavar="K",
        help="train it on the K best-rated rows of --reference-data (default: of --data); Sec. 4.1: 10000 of the pool. "
        "With --method full: train on those of --data, and so make a reference")
    add("--rating-field", default="score", metavar="COLUMN", help="the column that --reference-top reads")
    add("--excess", choices=("static", "current"), default="static",
        help="for rho1: excess loss of the base model over the reference, as the paper's baselines were run, or of the "
        "current model, as in the paper of RHO-1")
    # fmt: on


def check_reference(args: argparse.Namespace):
    """UserError where the method lacks what it ranks by, or is given what it does not read; fills in --loss-mean."""
    if args.reference and (args.reference_data or args.reference_top):
        raise UserError("--reference names a model that is there: it does not go with --reference-data or -top")
    trained = args.reference_data or args.reference_top
    if args.method in WITH_REFERENCE:
        if not args.reference and not trained:
            raise UserError(f"--method {args.method} needs --reference DIR, or --reference-data or -top to train one")
    elif args.reference or args.reference_data or (args.reference_top and args.method != "full"):
        raise UserError(f"--method {args.method} has no reference model; {' and '.join(WITH_REFERENCE)} do")
    if args.rho == "auto" and args.method != "sstoken":
        raise UserError(f"--rho auto is for --method sstoken; {args.method} takes a share, or none")
    if args.excess == "current" and args.method != "rho1":
        raise UserError("--excess current is for --method rho1: the others' ranking is made before training starts")
    if args.method == "self-evolving" and args.max_steps and args.max_steps < PARTS:
        raise UserError(f"--max-steps {args.max_steps} leaves some of self-evolving's {PARTS} parts untrained")
    if args.method in OVER_THE_POOL:
        if args.loss_mean == "sample":
            raise UserError(f"--method {args.method} ranks over the pool, which --loss-mean sample would undo")
        args.loss_mean = "batch"
    args.loss_mean = args.loss_mean or "sample"
    if args.shard and args.reference and is_adapter(args.reference):
        raise UserError(
            f"--shard wants a whole model as --reference, {args.reference} is an adapter (train.py --merge)"
        )
