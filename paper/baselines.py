"""What the paper compares ssToken with (Sec. 4.1): Full, Random, RHO-1, TokenCleaning in both variants.

All go through train.py's loop, with selections of `train.SSToken`'s form, made before training or in every step.
Below them: the reference model, a run by its method, which method reads which flag.
"""

import argparse
import functools
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
from paper.frozen import HISTORY, FrozenLosses, cached_losses
from paper.objectives import OBJECTIVES, inputs_of, token_weights
from paper.self_evolving import PARTS, train_in_parts
from sstoken import excess_loss, select, share_of
from support import ranks
from support.adapters import ADAPTER_FILES, find_adapter, read_adapter
from support.checkpoint import CHECKPOINT_FILES, TOKENIZER_FILES, check_fits, find_folder
from support.files import check, read_log
from support.kernels import STATISTICS, PredictionStatistics


def select_everything(sizes: list[int], rho: float, seed: int, excess=None) -> list[Tensor]:
    """Full fine-tuning: every response token, of samples with `sizes` of them; a bool tensor a sample."""
    return [torch.ones(size, dtype=torch.bool) for size in sizes]


def select_at_random(sizes: list[int], rho: float, seed: int, excess=None) -> list[Tensor]:
    """Uniform Random: exactly ceil(rho * N) of the pool's N response tokens, drawn once from the seed."""
    total = sum(sizes)
    selected = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    selected[order[: share_of(rho, total)]] = True
    return list(selected.split(sizes))


def select_in_each_sample(sizes: list[int], rho: float, seed: int, excess: list[Tensor]) -> list[Tensor]:
    """RHO-1: the ceil(rho * L_resp) tokens of each sample whose excess loss (Eq. 2) is highest."""
    return [select(token_excess, rho) for token_excess in excess]


def select_in_the_pool(sizes: list[int], rho: float, seed: int, excess=None) -> list[Tensor]:
    """TokenCleaning: the floor(rho * N) of the pool's N tokens with the highest excess loss; of ties the first.

    A sample may lose all its tokens. Without a reference, as in self-evolving's first part, all are taken.
    """
    if excess is None:
        return select_everything(sizes, rho, seed)
    best_first = torch.sort(torch.cat(excess), descending=True, stable=True).indices
    count = math.floor(Fraction(str(rho)) * len(best_first))
    check(count, f"--rho {rho} of a pool of {len(best_first)} response tokens is not one token")
    selected = torch.zeros(len(best_first), dtype=torch.bool)
    selected[best_first[:count]] = True
    return list(selected.split(sizes))


def select_by_current(known: dict) -> Tensor:
    """RHO-1 as its own paper has it: by the excess loss (Eq. 2) of the current model."""
    return select(excess_loss(known["nll"], known["reference_nll"]), known["rho"])


# What each method selects before training; None: it selects in every step
METHODS = {
    "sstoken": None,
    "full": select_everything,
    "random": select_at_random,
    "rho1": select_in_each_sample,  # with --excess current, `select_by_current`
    "tokencleaning": select_in_the_pool,
    "self-evolving": select_in_the_pool,  # of each of PARTS parts, see `train_in_parts`
} | OBJECTIVES
WITH_REFERENCE = ("rho1", "tokencleaning")
OVER_THE_POOL = ("tokencleaning", "self-evolving")  # a mean within each sample would undo it


class PrecomputedSelection:
    """A selection that was made before training: a bool tensor (L_resp,) a sample, on the host."""

    history = statistics = None

    def __init__(self, masks: list[Tensor]):
        self.masks, self.counts = masks, [int(mask.sum()) for mask in masks]

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        return [self.masks[i].to(nll.device, non_blocking=True) for i in samples]

    def nothing(self, *given):
        """What there is to do at the other places of the loop."""

    start = look_back = update = close = nothing


class StepwiseSelection(PrecomputedSelection):
    """A selection that is made in every step.

    inputs: what it is made of. weigh: all that is known of a sample -> the weights of its tokens (L_resp,).
    settings: "rho", "vocabulary". counts are needed before the step: without a rho of all tokens, or of the answers
    that are kept.
    """

    def __init__(self, sizes: list[int], frozen: FrozenLosses, inputs: set, settings: dict, weigh: Callable):
        self.sizes, self.frozen, self.settings, self.weigh = sizes, frozen, settings, weigh
        self.counts = [share_of(settings["rho"], size) for size in sizes] if "rho" in inputs else sizes
        if frozen.answer_masks:
            self.counts = [int(mask.sum()) for mask in frozen.answer_masks]
        names = sorted(inputs & STATISTICS.keys())
        self.statistics = PredictionStatistics(names) if names else None

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        current = {"nll": nll} | (self.statistics.collect(nll) if self.statistics else {})
        parts = {name: values.split([self.sizes[i] for i in samples]) for name, values in current.items()}
        found = []
        for place, i in enumerate(samples):
            known = {name: values[place] for name, values in parts.items()} | self.settings
            found.append(self.weigh(known | self.frozen.known(i, nll.device)))
        return found


def make_selection(model, sizes: list[int], args, frozen: FrozenLosses) -> PrecomputedSelection | None:
    """The selection of a run's method for samples with `sizes` response tokens; None: it is ssToken's."""
    method = "surprise" if args.rho == "auto" else args.method
    settings = {"rho": args.rho, "vocabulary": model.config.vocab_size}
    if method in OBJECTIVES:
        weigh, inputs = functools.partial(token_weights, method), inputs_of(method)
        if inputs <= set(HISTORY):
            return PrecomputedSelection([weigh(frozen.known(i, "cpu")) for i in range(len(sizes))])
        return StepwiseSelection(sizes, frozen, inputs, settings, weigh)
    if args.excess == "current" and frozen.reference:
        return StepwiseSelection(sizes, frozen, {"nll", "rho"}, settings, select_by_current)
    excess, choose = None, METHODS[method]
    if frozen.reference:
        excess = list(map(excess_loss, frozen.base, frozen.reference))
    return PrecomputedSelection(choose(sizes, args.rho, args.seed, excess)) if choose else None


def reads_kept_history(args: argparse.Namespace, samples: int) -> bool:
    """Whether the history losses are computed before training: the base model's, for several epochs or --cache."""
    again = args.epochs > 1 and (args.max_steps or math.inf) > math.ceil(samples / args.batch_size)
    scores = args.method == "sstoken" and args.rho not in ("auto", 1) and args.gamma
    return bool(scores and args.history == "base" and (again or args.cache))


def is_adapter(name: str) -> bool:
    """Whether a --reference is an adapter. UserError if it is no whole model either."""
    folder = find_folder(name, CHECKPOINT_FILES + TOKENIZER_FILES + ADAPTER_FILES)
    found = [file for file in ("adapter_config.json", "config.json") if (folder / file).exists()]
    check(found, f"--reference {name} holds neither an adapter_config.json nor a config.json")
    return found[0] == "adapter_config.json"


def check_reference_model(model: Transformer, reference: str, examples: list[data.Example]):
    """UserError, before anything is computed, for a --reference whose weights do not fit."""
    if is_adapter(reference):
        read_adapter(find_adapter(reference), lora.decoder_linears(model))
    else:
        check_fits(load_model(reference, device="meta"), reference, examples)


def check_tokenizer(args: argparse.Namespace, ours: data.Tokenizer):
    """UserError if --reference cuts texts into other ids; an adapter may have no tokenizer."""
    if is_adapter(args.reference) and not (find_adapter(args.reference) / "tokenizer.json").exists():
        return
    theirs = data.load_tokenizer(args.reference)
    told = [json.loads(tokenizer.backend.to_str()) for tokenizer in (ours, theirs)]
    same = all(told[0][part] == told[1][part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"))
    same = same and (ours.eos_id, ours.prefix) == (theirs.eos_id, theirs.prefix)
    check(same, f"--reference {args.reference} has another tokenizer than {args.model}: losses do not compare")


def reference_losses(model: Transformer, examples, args) -> tuple[list[Tensor], float]:
    """L_ref of Eq. 2 by --reference, and its seconds with loading. Adapters of `model` are lost."""
    start, device, adapter = time.perf_counter(), model.lm_head.weight.device, None
    if is_adapter(args.reference):
        reference, adapter = lora.load_adapter(model, args.reference), find_adapter(args.reference)
    else:
        place = "meta" if args.shard else device
        reference = load_model(args.reference, getattr(torch, args.dtype), place)
        check_fits(reference, args.reference, examples)
        if args.shard:
            ranks.shard(reference, reference.model.layers[-1], device)
    loading = time.perf_counter() - start
    found, seconds = cached_losses(reference, adapter, examples, args)
    if adapter:
        lora.remove_lora(model)
    return found, loading + seconds


def run_method(model, examples, reference_examples, args, folder: Path, fit: Callable) -> tuple[float, dict]:
    """Compute what the method ranks by, and train with fit(samples, frozen, args, folder), which returns its steps.

    reference_examples: samples to train a reference model on first, into folder/reference.
    Returns the seconds that losses of frozen models took, and what --rho auto did.
    """
    base, reference, seconds, taken, inputs = None, None, 0.0, 0.0, inputs_of(args.method)
    of_the_pool = args.method in (*OVER_THE_POOL, *WITH_REFERENCE) and args.excess == "static"
    if args.rho == "auto":
        return train_by_itself(model, examples, args, folder, fit)
    if of_the_pool or "history_nll" in inputs or reads_kept_history(args, len(examples)):
        described = "history_entropy" in inputs
        base, seconds = cached_losses(model, None, examples, args, described)  # new adapters change nothing
    if args.method == "self-evolving":
        return seconds + train_in_parts(model, examples, base, args, folder, fit), {}
    if reference_examples:
        plain = argparse.Namespace(**vars(args) | {"method": "full", "excess": "static"})
        fit(reference_examples, FrozenLosses(), plain, folder / "reference")
        reference, taken = cached_losses(model, folder / "reference", examples, args)
    elif args.method in WITH_REFERENCE:
        reference, taken = reference_losses(model, examples, args)
    if reference:
        lora.new_adapters(model, args)
    fit(examples, FrozenLosses(base, reference), args, folder)
    return seconds + taken, {}


def train_by_itself(model, examples, args, folder: Path, fit: Callable) -> tuple[float, dict]:
    """--rho auto: drop answers that do not belong to their prompt, train on the rest. Returns as `run_method`."""
    own, others = auto.first_tokens(examples), auto.behind_other_prompts(examples, args.seed)
    losses, seconds = cached_losses(model, None, own + others, args) if others else ([], 0.0)
    found = auto.filter_answers(own, losses[: len(own)], losses[len(own) :])
    masks = found.tokens(examples)
    steps = fit(examples, FrozenLosses(answer_masks=masks), args, folder)
    if not ranks.first_rank():
        return seconds, {}
    belonging = sum(int(masks[i].sum()) for batch in steps for samples in batch for i in samples)
    surprise = 1 - sum(line["selected_tokens"] for line in read_log(folder)) / max(belonging, 1)
    n, dropped = len(found.mask), int((~found.mask).sum())
    kept = f"{n - dropped:,} of {n:,} answers belong to their prompt, {dropped:,} do not"
    kept = f"all {n:,} answers are kept: {found.reason}" if found.reason else kept
    ranks.say(f"--rho auto: {kept}; of the tokens of those kept, {surprise:.1%} were dropped as surprise")
    record = {"answers": n, "dropped": dropped, "reason": found.reason}
    return seconds, record | {"surprise": round(surprise, 6)}


def add_flags(parser):
    """The flags of the reference model."""
    add = parser.group("reference model (rho1, tokencleaning)")
    # fmt: off
    add("--reference", metavar="NAME|DIR", help="reference of Eq. 2: an adapter, or a model with the same tokenizer")
    add("--reference-data", metavar="SOURCE[,SOURCE...]", help="train the reference first on these rows, in full")
    add("--reference-top", type=int, bound="at least 1", metavar="K",
        help="train the reference on the K best-rated rows (Sec. 4.1: 10000); with --method full, train on them")
    add("--rating-field", default="score", metavar="COLUMN", help="the column that --reference-top reads")
    add("--excess", choices=("static", "current"), default="static",
        help="for rho1: excess loss of the base model (static), or of the current model as in RHO-1's paper")
    # fmt: on


# Which methods read a flag of train.py that not all of them read
OF_THE_SCORE = ("--gamma", "--layer", "--gain", "--history", "--ema-alpha", "--history-every", "--attention-only")
READS = dict.fromkeys(OF_THE_SCORE, ("sstoken",)) | {"--excess": ("rho1",)}
READS |= dict.fromkeys(("--reference", "--reference-data"), WITH_REFERENCE)
READS |= dict.fromkeys(("--reference-top", "--rating-field"), ("full", *WITH_REFERENCE))
READS["--rho"] = tuple(name for name in METHODS if "rho" in inputs_of(name) or name not in ("full", *OBJECTIVES))


def reads(method: str, flag: str) -> bool:
    """Whether a method reads a flag of train.py; auto: sstoken with --rho auto."""
    if method == "auto":
        return flag not in OF_THE_SCORE and reads("sstoken", flag)
    return method in READS.get(flag, METHODS)


def check_flags(args: argparse.Namespace, given: list[str]):
    """UserError for flags that do not go together. Sets --loss-mean."""
    method, name = args.method, f"--method {args.method}"
    rule = f"--rho auto is for --method sstoken; {method} takes a share, or none"
    check(args.rho != "auto" or method == "sstoken", rule)
    if args.rho == "auto":
        method, name = "auto", "--rho auto"
    for flag in given:
        right = f"it is for --method {' or '.join(READS.get(flag, ()))}"
        check(reads(method, flag), f"{flag} has no effect with {name}; {right}")
    for flag, kind in (("--ema-alpha", "ema"), ("--history-every", "checkpoint")):
        fits = flag not in given or args.history == kind
        check(fits, f"{flag} has no effect with --history {args.history}; it is for {kind}")
    trained, pooled = args.reference_data or args.reference_top, args.method in OVER_THE_POOL
    rule = "--reference is a model that is there: it does not go with --reference-data or -top"
    check(not (args.reference and trained), rule)
    needs = args.method in WITH_REFERENCE and not (args.reference or trained)
    check(not needs, f"{name} needs --reference, or --reference-data or -top to train one")
    few = args.method == "self-evolving" and args.max_steps and args.max_steps < PARTS
    check(not few, f"--max-steps {args.max_steps} leaves some of the {PARTS} parts untrained")
    rule = f"{name} ranks over the pool, which --loss-mean sample would undo"
    check(not pooled or args.loss_mean != "sample", rule)
    args.loss_mean = args.loss_mean or ("batch" if pooled else "sample")
    parted = args.shard and args.reference and is_adapter(args.reference)
    check(not parted, f"--shard cannot use the adapter --reference {args.reference}: merge it (train.py --merge)")
