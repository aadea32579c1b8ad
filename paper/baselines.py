"""What the paper compares ssToken with (Sec. 4.1): Full, Random, RHO-1, TokenCleaning in both variants.

All go through train.py's loop. A selection is made before training starts (`PrecomputedSelection`) or in every step
(`ExcessOfCurrent`, `Objective`); each has the form of `train.SSToken`. Below: the reference model, a run by its method,
which flag is for which method.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from model import Transformer, load_model
from paper import auto
from paper.frozen import FrozenLosses, cached_losses
from paper.objectives import OBJECTIVES, inputs_of, token_weights
from paper.self_evolving import PARTS, train_in_parts
from sstoken import excess_loss, select, share_of
from support import ranks
from support.adapters import ADAPTER_FILES, find_adapter, read_adapter
from support.checkpoint import CHECKPOINT_FILES, TOKENIZER_FILES, check_fits, find_folder
from support.files import UserError, read_log
from support.kernels import STATISTICS, PredictionStatistics

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


# --------------------------------------------------------------------------------- selections, in train.SSToken's form


class PrecomputedSelection:
    """A selection that was made before training started: a bool tensor (L_resp,) a sample, on the host."""

    history = statistics = None

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


class ExcessOfCurrent(PrecomputedSelection):
    """RHO-1 as its own paper has it: the excess loss (Eq. 2) of the current model over the reference, in every step."""

    def __init__(self, reference: list[Tensor], rho: float):
        self.reference, self.rho = reference, rho
        self.counts = [share_of(rho, len(nll)) for nll in reference]

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        reference = [self.reference[i].to(nll.device, non_blocking=True) for i in samples]
        parts = zip(nll.split([len(ref) for ref in reference]), reference, strict=True)
        return [select(excess_loss(current, ref), self.rho) for current, ref in parts]


class Objective(PrecomputedSelection):
    """One of OBJECTIVES that asks for something of the current model, in every step. frozen: of the base model.

    How many tokens a sample keeps is known before only where rho says it; otherwise, where --loss-mean batch weighs
    samples by that, it counts all of its response tokens, with --rho auto those of answers that belong to their prompt.
    """

    def __init__(self, sizes: list[int], args: argparse.Namespace, frozen: FrozenLosses):
        self.sizes, self.args, self.frozen = sizes, args, frozen
        self.method = "surprise" if args.rho == "auto" else args.method
        self.counts = [share_of(args.rho, size) for size in sizes] if "rho" in inputs_of(self.method) else sizes
        if frozen.answer_masks:
            self.counts = [int(mask.sum()) for mask in frozen.answer_masks]
        described = inputs_of(self.method) & STATISTICS.keys()
        self.statistics = PredictionStatistics(sorted(described)) if described else None

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        current = {"nll": nll} | (self.statistics.collect(nll) if self.statistics else {})
        parts = {name: values.split([self.sizes[i] for i in samples]) for name, values in current.items()}
        found = []
        for place, i in enumerate(samples):
            known = {name: values[place] for name, values in parts.items()} | self.frozen.of_base(i, nll.device)
            mask = self.frozen.answer_masks[i].to(nll.device, non_blocking=True) if self.frozen.answer_masks else True
            found.append(token_weights(self.method, known | {"rho": self.args.rho}, mask))
        return found


def make_selection(
    model, sizes: list[int], args: argparse.Namespace, frozen: FrozenLosses
) -> PrecomputedSelection | None:
    """The selection of the method that `args` names for samples with `sizes` response tokens; None: it is ssToken's."""
    if args.method in OBJECTIVES and inputs_of(args.method) <= {"history_nll", "history_entropy", "history_spread"}:
        return PrecomputedSelection([token_weights(args.method, frozen.of_base(i, "cpu")) for i in range(len(sizes))])
    if args.rho == "auto" or args.method in OBJECTIVES:
        return Objective(sizes, args, frozen)
    if args.excess == "current" and frozen.reference:
        return ExcessOfCurrent(frozen.reference, args.rho)
    if not METHODS[args.method]:
        return None
    pairs = zip(frozen.base, frozen.reference, strict=True) if frozen.reference else None
    excess = [excess_loss(base, better) for base, better in pairs] if pairs else None
    return PrecomputedSelection(METHODS[args.method](sizes, args.rho, args.seed, excess))


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
    found, seconds = cached_losses(reference, adapter, examples, args)
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
) -> tuple[float, dict]:
    """Compute what the method ranks by, and train by it.

    reference_examples: what a reference model is to be trained on first, into folder/reference, if one is.
    fit: (samples, frozen, args, folder) trains the adapters that the model has, and returns the steps that it took.
    Returns the seconds that losses of frozen models took, and, with --rho auto, what it did, for the record.
    """
    device, seconds = model.lm_head.weight.device, 0.0
    base = reference = None
    ranks_by_base = args.method in ("self-evolving", *WITH_REFERENCE) and args.excess == "static"
    if args.rho == "auto" or ranks_by_base or reads_kept_history(args) or "history_nll" in inputs_of(args.method):
        described = "history_entropy" in inputs_of(args.method)
        base, seconds = cached_losses(model, None, examples, args, described)  # new adapters change nothing
    if args.rho == "auto":
        return train_by_itself(model, examples, base, seconds, args, folder, fit)
    if reference_examples:
        plain = argparse.Namespace(**vars(args) | {"method": "full", "excess": "static"})
        fit(reference_examples, FrozenLosses(), plain, folder / "reference")
        reference, taken = cached_losses(model, folder / "reference", examples, args)
        lora.new_adapters(model, args)
        seconds += taken
    elif args.method in WITH_REFERENCE:
        reference, taken = reference_losses(model, examples, args, device)
        seconds += taken
    if args.method == "self-evolving":
        return seconds + train_in_parts(model, examples, base, args, folder, fit), {}
    fit(examples, FrozenLosses(base, reference), args, folder)
    return seconds, {}


def train_by_itself(model, examples, base: list[Tensor], seconds: float, args, folder: Path, fit: Callable):
    """--rho auto: drop answers that do not belong to their prompt, train on the rest, say what was dropped.

    base: the base model's losses, which took `seconds`. Returns as `run_method` does.
    """
    others = auto.behind_other_prompts(examples, args.seed)
    elsewhere, taken = cached_losses(model, None, others, args) if others else ([], 0.0)
    found = auto.filter_answers(examples, base, elsewhere)
    masks = found.tokens(examples)
    steps = fit(examples, FrozenLosses(base, answer_masks=masks), args, folder)
    if not ranks.first_rank():
        return seconds + taken, {}
    belonging = sum(int(masks[i].sum()) for batch in steps for samples in batch for i in samples)
    surprise = 1 - sum(line["selected_tokens"] for line in read_log(folder)) / max(belonging, 1)
    n, dropped = len(found.mask), int((~found.mask).sum())
    kept = f"{n - dropped:,} of {n:,} answers belong to their prompt, {dropped:,} do not"
    kept = f"all {n:,} answers are kept: {found.reason}" if found.reason else kept
    ranks.say(f"--rho auto: {kept}; of the tokens of those kept, {surprise:.1%} were dropped as surprise")
    return seconds + taken, {"answers": n, "dropped": dropped, "reason": found.reason, "surprise": round(surprise, 6)}


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


# Which methods read a flag of train.py that not all of them read
OF_THE_SCORE = ("--gamma", "--layer", "--gain", "--history", "--ema-alpha", "--history-every", "--attention-only")
READS = dict.fromkeys(OF_THE_SCORE, ("sstoken",)) | {"--excess": ("rho1",)}
READS |= dict.fromkeys(("--reference", "--reference-data"), WITH_REFERENCE)
READS |= dict.fromkeys(("--reference-top", "--rating-field"), ("full", *WITH_REFERENCE))
READS["--rho"] = tuple(name for name in METHODS if "rho" in inputs_of(name) or name not in ("full", *OBJECTIVES))


def reads(method: str, flag: str) -> bool:
    """Whether a method reads a flag of train.py; auto: sstoken with --rho auto, which reads none of the score's."""
    if method == "auto":
        return flag not in OF_THE_SCORE and reads("sstoken", flag)
    return method in READS.get(flag, METHODS)


def check_flags(args: argparse.Namespace, given: list[str]):
    """UserError where the method lacks what it ranks by, or is `given` a flag that it does not read.

    Fills in --loss-mean.
    """
    if args.rho == "auto" and args.method != "sstoken":
        raise UserError(f"--rho auto is for --method sstoken; {args.method} takes a share, or none")
    for flag in given:
        if not reads("auto" if args.rho == "auto" else args.method, flag):
            name = "--rho auto" if args.rho == "auto" else f"--method {args.method}"
            raise UserError(f"{flag} has no effect with {name}; it is for --method {' or '.join(READS[flag])}")
    for flag, kind in (("--ema-alpha", "ema"), ("--history-every", "checkpoint")):
        if flag in given and args.history != kind:
            raise UserError(f"{flag} has no effect with --history {args.history}; it is for {kind}")
    if args.reference and (args.reference_data or args.reference_top):
        raise UserError("--reference names a model that is there: it does not go with --reference-data or -top")
    if args.method in WITH_REFERENCE and not (args.reference or args.reference_data or args.reference_top):
        raise UserError(f"--method {args.method} needs --reference DIR, or --reference-data or -top to train one")
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
