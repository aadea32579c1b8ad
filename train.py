"""Algorithm 1: fine-tune a Llama or Qwen on the tokens that ssToken selects.

    python train.py --model meta-llama/Llama-3.2-3B

`train` is the algorithm, its line numbers in the comments. What it needs is above it: the history model, the
selections that are made before training starts (the baselines), the schedule. Below it are the command line, what the
baselines need beside the loop (a reference model, training part by part), and a run from its start to its end.
"""

import argparse
import json
import math
import os
import random
import shlex
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import data
import lora
import runs
from model import Transformer, UserError, load_model, response_nll, response_places, to_device, write_json, writing
from sstoken import (
    AttentionProbe,
    ema_update,
    excess_loss,
    normalize,
    probability_gain,
    retrospective_excess_loss,
    score,
    select,
    selected_loss,
    sft_loss,
    share_of,
)

# --------------------------------------------------------------------------------- per-token losses, kept or computed

SCORING_BATCH = 4  # samples a pass, whatever the run's micro-batches are


class Frozen(NamedTuple):
    """Losses of models that stay as they are while another trains: a (L_resp,) tensor a sample, on the host, or None.

    base: before training. reference: L_ref of Eq. 2.
    """

    base: list[Tensor] | None = None
    reference: list[Tensor] | None = None


def scoring_passes(examples: list[data.Example]) -> list[list[int]]:
    """The passes in which all that is kept is computed: sample indices, SCORING_BATCH at most in one.

    They depend on `examples` alone, so the same weights always give the same bits.
    """
    (passes,) = data.plan_batches([len(e.ids) for e in examples], len(examples), SCORING_BATCH, seed=0)
    return passes


@torch.no_grad()
def response_losses(model: Transformer, examples: list[data.Example]) -> list[Tensor]:
    """The loss of every response token, adapters on, dropout off: a (L_resp,) float32 tensor a sample, on the host.

    All ranks take part in `scoring_passes`, and each returns all.
    """
    training, device, found = model.training, model.lm_head.weight.device, {}
    model.eval()
    passes = runs.share_passes(scoring_passes(examples))
    for samples in tqdm(passes, "losses", leave=False, disable=not runs.first_rank()):
        batch = [examples[i] for i in samples]
        nll = response_nll(model, *data.collate(batch, device)).cpu()
        found |= zip(samples, nll.split([int(e.response.sum()) for e in batch]), strict=True) if batch else {}
    model.train(training)
    found = {i: nll for part in runs.gather(found) for i, nll in part.items()}
    if broken := [str(i) for i, nll in sorted(found.items()) if not nll.isfinite().all()]:
        raise UserError(f"{model.name_or_path}: the loss of samples {', '.join(broken)} (from 0) is no finite number")
    return [found[i] for i in range(len(examples))]


# ------------------------------------------------------------------------------------------- the history model


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
            return to_device(torch.cat([torch.zeros(0), *(self.kept[i] for i in samples)]), input_ids.device)
        with lora.replaced(self.model, self.factors):
            return response_nll(self.model, input_ids, response)

    def update(self, step: int):
        """Alg. 1, line 11, after the optimizer's step number `step` (from 1)."""
        if self.kind == "ema":
            for (average,), layer in zip(self.factors, self._layers(), strict=True):
                ema_update([average], [layer.product()], self.ema_alpha)
        elif self.kind == "checkpoint" and step % self.every == 0:
            self.factors = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in self._layers()]


# ------------------------------------------------------------------------- selections made before training starts


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


# A method either has its selection made here, once, or (None) makes it anew in every step from the model's state.
METHODS = {
    "sstoken": None,
    "full": select_everything,
    "random": select_at_random,
    "rho1": select_in_each_sample,  # with --excess current, anew in every step too
    "tokencleaning": select_in_the_pool,
    "self-evolving": select_in_the_pool,  # of each of PARTS parts, see `train_in_parts`
}
WITH_REFERENCE = ("rho1", "tokencleaning")
OVER_THE_POOL = ("tokencleaning", "self-evolving")  # a mean within each sample would undo what they rank
PARTS = 5


# How much a token has gained over the history model: Eq. 3, or the extension in its place
GAINS = {"log": retrospective_excess_loss, "probability": probability_gain}


# --------------------------------------------------------------------------------------------------- Algorithm 1


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(warmup_ratio * steps) steps, then linear decay; `step` counts from 1."""
    warmup = share_of(warmup_ratio, steps)
    decay = (steps - step + 1) / (steps - warmup + 1)
    return peak * min(step / warmup, decay) if warmup else peak * decay


def sample_weights(batch: list[list[int]], counts: list[int], loss_mean: str) -> dict[int, float]:
    """The weight of each sample's mean loss (Eq. 10) in the loss of a step, whatever its micro-batches.

    sample: every sample that has a selected token weighs the same. batch: every selected token does.
    """
    counted = {i: counts[i] for micro_batch in batch for i in micro_batch if counts[i]}
    total = sum(counted.values()) if loss_mean == "batch" else len(counted)
    return {i: (count if loss_mean == "batch" else 1) / total for i, count in counted.items()}


def plan_steps(lengths: list[int], args: argparse.Namespace, device: torch.device) -> list[list[list[int]]]:
    """Every optimizer step of the run as a list of micro-batches of sample indices: the epochs, cut at --max-steps."""
    shape = (args.batch_size, args.micro_batch_size)
    cost = data.PASS_COST["cpu" if device.type == "cpu" else "cuda"]
    seeds = [f"{args.seed} {epoch}" for epoch in range(args.epochs)]
    return [batch for seed in seeds for batch in data.plan_batches(lengths, *shape, seed, cost)][: args.max_steps]


def train(
    model: Transformer,
    examples: list[data.Example],
    args: argparse.Namespace,
    log: Callable[[dict], None],
    checkpoints: runs.Checkpoints | None = None,
    frozen: Frozen | None = None,
) -> Transformer:
    """Fine-tune the adapters of `model` on `examples` by Algorithm 1; `log` gets a dict after every optimizer step.

    Started by torchrun, each rank computes its share of a step's micro-batches and all make the same update. With
    `checkpoints` the run goes on from the newest, and leaves others behind. `frozen` holds the losses that the
    baselines rank by, or that ssToken's history need not compute again; the adapters are new ones then.
    """
    device = model.lm_head.weight.device
    lengths, sizes = [len(e.ids) for e in examples], [int(e.response.sum()) for e in examples]
    steps = plan_steps(lengths, args, device)
    frozen = frozen or Frozen()
    reference = frozen.reference if args.excess == "current" else None
    fixed = None
    if METHODS[args.method] and not reference:
        pairs = zip(frozen.base, frozen.reference, strict=True) if frozen.reference else None
        excess = [excess_loss(base, better) for base, better in pairs] if pairs else None
        fixed = METHODS[args.method](sizes, args.rho, args.seed, excess)
    # How many tokens of a sample will be selected is known before which, and with it the sample's weight in the loss.
    counts = [int(s.sum()) for s in fixed] if fixed else [share_of(args.rho, size) for size in sizes]
    scored = not fixed and not reference and args.rho < 1  # otherwise the selection is known without ssToken's score

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=args.lr, weight_decay=0.0)
    probe = AttentionProbe(model, args.layer)
    model.train()
    kind = args.history if scored and args.gamma > 0 else "base"  # nothing is kept that no score reads
    history = History(model, kind, args.ema_alpha, args.history_every, frozen.base)  # Alg. 1, line 2
    checkpoints = checkpoints or runs.Checkpoints()
    done = checkpoints.restore(adapters, optimizer, history, device)
    seen = sum(len(micro_batch) for batch in steps[:done] for micro_batch in batch)

    for step, batch in enumerate(steps[done:], done + 1):  # Alg. 1, line 3
        start, loss_sum, selected_sum = time.perf_counter(), *torch.zeros(2, device=device)
        weights = sample_weights(batch, counts, args.loss_mean)
        gamma = args.gamma if seen >= args.attention_only else 0.0
        uses_rel, uses_attention = scored and gamma > 0, scored and gamma < 1
        if step == 1 and history.kept:  # the model is its own history: REL is zero, not what rounding makes of it
            uses_rel = False

        for micro_batch in runs.share_passes(batch):  # Alg. 1, line 4
            ids, response = data.collate([examples[i] for i in micro_batch], device)
            history_nll = history.nll(ids, response, micro_batch) if uses_rel else None
            nll = response_nll(model, ids, response)
            rel, attention = torch.zeros_like(nll), torch.zeros_like(nll)  # without a weight in the score, left at zero
            if uses_rel:
                rel = GAINS[args.gain](nll.detach(), history_nll)  # Alg. 1, line 5
            if uses_attention:
                attention = probe.scores(response).flatten()[response_places(response, device)]  # Alg. 1, line 6

            losses = [0 * nll.sum()]  # all ranks go backward equally often, also one without a selected token
            tokens_of = [x.split([sizes[i] for i in micro_batch]) for x in (nll, rel, attention) if micro_batch]
            for i, nll_i, rel_i, attention_i in zip(micro_batch, *tokens_of, strict=True):
                token_scores = score(normalize(rel_i), attention_i, gamma)  # Alg. 1, lines 7 and 8
                if reference:  # RHO-1 of the current model has Eq. 2 in their place
                    token_scores = excess_loss(nll_i.detach(), to_device(reference[i], device))
                selected = to_device(fixed[i], device) if fixed else select(token_scores, args.rho)  # Alg. 1, line 9
                selected_sum += selected.sum()
                if i in weights:
                    losses.append(weights[i] * selected_loss(nll_i, selected))
            loss = torch.stack(losses).sum()
            loss.backward()
            loss_sum += loss.detach()

        lr = learning_rate(step, len(steps), args.lr, args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        runs.sum_over_ranks([p.grad for p in adapters])  # nothing else of the model crosses between ranks
        gradient_norm = torch.nn.utils.clip_grad_norm_(adapters, args.max_grad_norm or math.inf)
        optimizer.step()  # Alg. 1, line 10
        optimizer.zero_grad()
        history.update(step)  # Alg. 1, line 11

        members = [i for micro_batch in batch for i in micro_batch]
        seen += len(members)
        sums = runs.sum_over_ranks([loss_sum, selected_sum])
        total_loss, total_selected, norm = torch.stack([*sums, gradient_norm]).tolist()
        checkpoints.check_numbers(step, total_loss, norm, {i: examples[i] for i in members})
        log(
            {
                "step": step,
                "loss": total_loss,
                "lr": lr,
                "tokens": sum(lengths[i] for i in members),
                "response_tokens": sum(sizes[i] for i in members),
                "selected_tokens": int(total_selected),
                "seconds": round(time.perf_counter() - start, 3),
                "peak_memory_mb": round(runs.peak_memory_mb(device), 1),
            }
        )
        checkpoints.after(step)
    probe.remove()
    return model  # Alg. 1, line 13


# -------------------------------------------------------------------------------------------------- command line

# What `python train.py` does without --model: a tiny Llama and its rows, all of it made by demo/make.py
DEMO_FOLDER = os.path.relpath(Path(__file__).parent / "demo")
DEMO_FILES = {"model": "model", "data": "sft.jsonl", "eval_data": "instructions.test.jsonl"}
DEMO_FILES = {flag: f"{DEMO_FOLDER}/{name}" for flag, name in DEMO_FILES.items()}
DEMO_SETTINGS = {"lr": 4e-3, "epochs": 4, "micro_batch_size": 24, "max_length": 128, "snapshot_every": 28}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = runs.ArgumentParser("Fine-tune a Llama or Qwen on the tokens that ssToken selects (Algorithm 1).")
    add = parser.add_argument_group("method").add_argument
    # fmt: off
    add("--method", choices=METHODS, default="sstoken", help="what chooses the tokens to train on (Sec. 4.1)")
    add("--rho", type=float, default=0.6, help="share of a sample's response tokens to select (Eq. 11); 1: no scoring")
    add("--gamma", type=float, default=0.5, help="weight of REL, against attention (Eq. 9); 0 skips the history pass")
    add("--layer", type=int, default=-1, help="decoder layer whose attention is scored (Eq. 7, Table 2); -1: the last")
    add("--gain", choices=GAINS, default="log",
        help="log: REL, the gain in log-probability (Eq. 3). probability: an extension, not in the paper: the gain in "
        "probability, which a token that stays improbable does not have; what it changes: results/README.md")
    add("--history", choices=("base", "ema", "checkpoint"), default="base",
        help="history model of Eq. 3. base: the model before training, no extra memory. ema: Eq. 4 on the merged "
        "weights, exactly; costs a float32 copy of every adapted matrix, and a second full-size product at each of "
        "them in the history pass. checkpoint: the adapter as it was at the last refresh")
    add("--ema-alpha", type=float, default=0.999, help="alpha of Eq. 4, for --history ema")
    add("--history-every", type=int, default=100, metavar="N", help="refresh --history checkpoint every N steps")
    add("--loss-mean", choices=("sample", "batch"),
        help="sample: mean over each sample's selected tokens (Eq. 10), then over samples. batch: mean over all the "
        "selected tokens of a global batch, much as the authors' release. Default: batch for methods that rank over "
        f"the pool ({', '.join(OVER_THE_POOL)}), which take nothing else; sample for the others")
    add("--attention-only", type=int, default=0, metavar="N",
        help="select by attention alone (gamma 0) for the first N samples, in whole batches; the release: 10000")

    add = parser.add_argument_group("reference model (rho1, tokencleaning)").add_argument
    add("--reference", metavar="DIR",
        help="the reference of Eq. 2: an adapter of --model (a run's folder), or a whole model with the same tokenizer")
    add("--reference-data", metavar="SOURCE[,SOURCE...]",
        help="train the reference first, as --method full does (with this method's --loss-mean), on these rows, into "
        "OUT/reference")
    add("--reference-top", type=int, metavar="K",
        help="train it on the K best-rated rows of --reference-data (default: of --data); Sec. 4.1: 10000 of the pool. "
        "With --method full: train on those of --data, and so make a reference")
    add("--rating-field", default="score", metavar="COLUMN", help="the column that --reference-top reads")
    add("--excess", choices=("static", "current"), default="static",
        help="for rho1: excess loss of the base model over the reference, as the paper's baselines were run, or of the "
        "current model, as in the paper of RHO-1")

    add = parser.add_argument_group("model and data").add_argument
    add("--model",
        help="checkpoint: a folder in Hugging Face layout, or a name on the hub. Default: the demo's, with its rows "
        "and settings: " + ", ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in DEMO_SETTINGS.items()))
    add("--revision", help="branch, tag or commit of a --model on the hub")
    add("--data", default=data.RELEASED_POOL, metavar="SOURCE[,SOURCE...]",
        help=".json, .jsonl or .parquet files, hub data sets, or pool: a fresh draw of Sec. 4.1's mixture")
    add("--eval-data", metavar="SOURCE[,SOURCE...]", help="held-out rows: their response loss before and after")
    add("--limit", type=int, metavar="N", help="take the first N rows of each source")
    add("--max-length", type=int, default=2048, help="cut samples to this many tokens (Appendix A.3)")
    add("--cache", metavar="DIR",
        help="keep the per-token losses of frozen models there, and take from there what earlier runs on the same "
        "weights and rows have kept; several runs may share it")
    add("--out", help="folder of the run; default: a new one under runs/")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--checkpoint-every", type=int, metavar="N",
        help="steps between two checkpoints, of which OUT keeps the last two; default: a tenth of the run")
    add("--snapshot-every", type=int, metavar="N",
        help="keep the adapter as it is after every N steps, in OUT/step-...: visualize.py shows them one by one")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint in --out, with the same adapter in the end as a run that never stopped; "
        "where there is none, start")
    add("--merge", action="store_true", help="also write OUT/merged, base and adapter in one checkpoint")

    add = parser.add_argument_group("optimisation (Appendix A.3)").add_argument
    add("--batch-size", type=int, default=48, help="samples per optimizer step, of all ranks together")
    add("--micro-batch-size", type=int, help="samples per forward pass; default: the largest divisor up to 4")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps in which the learning rate rises")
    add("--max-grad-norm", type=float, default=0.0, help="clip the gradient's norm; 0: no clipping")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--max-steps", type=int, metavar="N", help="stop after N optimizer steps; the schedule ends there too")
    add("--lora-rank", type=int, default=64, help="rank of the adapters")
    add("--lora-alpha", type=float, default=16, help="scale of the adapters: alpha / rank")
    add("--lora-dropout", type=float, default=0.1, help="dropout on the adapters' input")
    add("--seed", type=int, default=42, help="of the data order, the adapters, dropout and random selection")

    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights and activations")
    add("--device", default="auto", help="as torch names it; auto: a GPU if there is one, else the CPU")
    add("--gradient-checkpointing", action="store_true",
        help="keep only each layer's input for the backward pass: the same result, less memory, about a third slower")
    add("--shard", action="store_true",
        help="under torchrun: cut the frozen weights into one part a rank (FSDP2), for models larger than one device")
    # fmt: on
    args = parser.parse_args(argv)
    if args.model is None:
        parser.set_defaults(**DEMO_FILES, **DEMO_SETTINGS)
        args = parser.parse_args(argv)  # a flag that is given still counts
        args.overwrite = args.overwrite or not (args.out or args.resume)
        args.out = args.out or f"runs/demo-{args.method}"

    if args.micro_batch_size is None:
        args.micro_batch_size = next((n for n in (4, 3, 2) if args.batch_size % n == 0), 1)
    bounds = {
        "--rho": (0 < args.rho <= 1, "in (0, 1]"),
        "--gamma": (0 <= args.gamma <= 1, "in [0, 1]"),
        "--ema-alpha": (0 <= args.ema_alpha <= 1, "in [0, 1]"),
        "--warmup-ratio": (0 <= args.warmup_ratio <= 1, "in [0, 1]"),
        "--lora-dropout": (0 <= args.lora_dropout < 1, "in [0, 1)"),
        "--max-grad-norm": (args.max_grad_norm >= 0, "at least 0"),
        "--lr": (0 < args.lr < float("inf"), "above 0 and finite"),
        "--lora-alpha": (0 < args.lora_alpha < float("inf"), "above 0 and finite"),
        "--attention-only": (args.attention_only >= 0, "at least 0"),
        "--max-length": (args.max_length >= 2, "at least 2"),
    }
    bounds["--seed"] = (0 <= args.seed < 2**63, "from 0 to 2^63 - 1")
    counts = ("batch_size", "micro_batch_size", "epochs", "max_steps", "limit", "history_every", "lora_rank")
    for flag in (*counts, "checkpoint_every", "snapshot_every", "reference_top"):
        value = getattr(args, flag)
        bounds["--" + flag.replace("_", "-")] = (value is None or value >= 1, "at least 1")
    for flag, (fits, bound) in bounds.items():
        if not fits:
            raise UserError(f"{flag} is {getattr(args, flag[2:].replace('-', '_'))}; it must be {bound}")
    if args.batch_size % args.micro_batch_size:
        raise UserError(f"--micro-batch-size {args.micro_batch_size} does not divide --batch-size {args.batch_size}")
    if args.resume and (args.overwrite or not args.out):
        raise UserError("--resume goes on with the run in --out: it needs that flag, and does not go with --overwrite")
    check_reference(args)
    return args


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


# What may differ between a run and the one that goes on with it: none of it changes the adapter, but for --cache where
# ssToken's history comes from there, of which `settings` keeps account.
FREE = {"out", "overwrite", "resume", "checkpoint_every", "snapshot_every", "merge", "eval_data", "cache", "debug"}


def settings(args: argparse.Namespace, weights: str, examples: list[data.Example], frozen: Frozen) -> dict:
    """All that the adapter depends on, by the names that a user knows: for checkpoints, which hold for nothing else.

    weights: the base model's fingerprint.
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
    return flags | {
        "--device": torch.device(args.device).type,
        "the number of ranks": runs.ranks(),
        "the content of --model": weights,
        "the content of --data": runs.fingerprint(tensor for example in examples for tensor in example),
        "history losses from --cache": reads_kept_history(args),
        "the losses of the base model": runs.fingerprint(frozen.base or []),
        "the losses of the reference": runs.fingerprint(frozen.reference or []),
    }


def prepare(args: argparse.Namespace, device: torch.device, examples: list[data.Example]) -> Transformer:
    """The model with new adapters, ready to train: checked against the data, its weights in place or sharded."""
    model = load_model(args.model, getattr(torch, args.dtype), "meta" if args.shard else device, args.revision)
    check_fits(model, args.model, examples)
    AttentionProbe(model, args.layer).remove()  # a layer that does not exist is refused before anything is written
    model.gradient_checkpointing = args.gradient_checkpointing
    new_adapters(model, args)
    if args.shard:
        runs.shard(model, model.model.layers[args.layer], device)
        new_adapters(model, args)  # drawn again, where there is memory for them
    return model


def check_fits(model: Transformer, name: str, examples: list[data.Example]):
    """UserError for samples with tokens that the model does not have, or more of them than it reads."""
    if (largest := max(int(e.ids.max()) for e in examples)) >= model.config.vocab_size:
        raise UserError(f"{name}: token id {largest} is outside the embedding of {model.config.vocab_size} rows")
    if (longest := max(len(e.ids) for e in examples)) > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UserError(f"{name} reads {context} tokens, a sample has {longest}: lower --max-length to {context}")


def new_adapters(model: Transformer, args: argparse.Namespace, part: int = 0):
    """Adapters that change nothing yet, from the seed and the part of self-evolving that they are for."""
    seed = random.Random(f"{args.seed} {part}").getrandbits(62) if part else args.seed
    torch.manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        layer.reset_adapter()
    if not lora.lora_layers(model):
        lora.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if runs.rank():
        torch.manual_seed(seed + runs.rank())  # the same adapters on all ranks, dropout of its own on each


# ----------------------------------------------------------------------------------------- what the baselines need


def reads_kept_history(args: argparse.Namespace) -> bool:
    """Whether ssToken's history losses are to come from --cache: those of a fixed base model can."""
    return bool(args.cache and args.method == "sstoken" and args.history == "base" and args.gamma and args.rho < 1)


def is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def check_tokenizer(args: argparse.Namespace, ours: data.Tokenizer):
    """UserError if the model that --reference names cuts texts into other ids; adapters may come without tokenizer."""
    if is_adapter(args.reference) and not (Path(args.reference) / "tokenizer.json").exists():
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
        reference, adapter = lora.load_adapter(model, args.reference), Path(args.reference)
    else:
        reference = load_model(args.reference, getattr(torch, args.dtype), "meta" if args.shard else device)
        check_fits(reference, args.reference, examples)
        if args.shard:
            runs.shard(reference, reference.model.layers[-1], device)
    loading = time.perf_counter() - start
    found, seconds = frozen_losses(reference, adapter, examples, args)
    if adapter:
        lora.remove_lora(model)
        new_adapters(model, args)
    return found, loading + seconds


def frozen_losses(model: Transformer, adapter: Path | None, examples, args) -> tuple[list[Tensor], float]:
    """`response_losses` of a frozen model, by way of --cache, and their seconds; adapter: the folder of its adapter."""
    cache, key = Path(args.cache) if args.cache else None, ""
    if cache and runs.first_rank():
        key = runs.losses_key(model.folder, adapter, examples, args.dtype, torch.device(args.device).type)
    nll, seconds = runs.kept_losses(cache, key, lambda: torch.cat(response_losses(model, examples)))
    return list(nll.split([int(example.response.sum()) for example in examples])), seconds


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
            lora.freeze_adapters(model)
            frozen = Frozen([base[i] for i in part], response_losses(model, samples))
            seconds += time.perf_counter() - start
            new_adapters(model, args, number)
        done.append(folder / f"part-{number}")
        steps = args.max_steps and args.max_steps * number // PARTS - args.max_steps * (number - 1) // PARTS
        fit(samples, frozen, argparse.Namespace(**vars(args) | {"max_steps": steps}), done[-1])
        if runs.first_rank():
            lines = [line | {"part": i} for i, part in enumerate(done, 1) for line in runs.read_log(part)]
            lines = [line | {"step": step} for step, line in enumerate(lines, 1)]
            runs.write_lines(folder / "log.jsonl", lines)
    if runs.first_rank():
        lora.join_adapters(done, folder)
    return seconds


# ------------------------------------------------------------------------------------------------- a run, as a whole


def main(argv: list[str] | None = None):
    start = time.perf_counter()
    args = parse_arguments(argv)
    device = runs.start_ranks(args.device)
    args.device = str(device)
    torch.set_float32_matmul_precision("highest")  # no TF32: a score is not to change with the GPU
    if device.type == "cuda":  # one seed, one adapter, on a GPU too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if args.shard and not runs.started_by_torchrun():
        raise UserError("--shard cuts the weights into one part a rank: start train.py with torchrun")

    tokenizer = data.load_tokenizer(args.model, args.revision)
    if args.reference:
        check_tokenizer(args, tokenizer)

    def load(sources, *choice):
        return data.load_examples(sources, tokenizer, args.max_length, args.limit, args.seed, *choice)

    best = (args.reference_top, args.rating_field) if args.reference_top else ()
    examples, dropped = load(args.data, *best) if args.method == "full" else load(args.data)
    if args.method == "self-evolving" and len(examples) < PARTS:
        raise UserError(f"--method self-evolving cuts the data into {PARTS} parts, there are {len(examples)} samples")
    held_out, lost = load(args.eval_data) if args.eval_data else ([], 0)
    trains_reference = args.method in WITH_REFERENCE and not args.reference
    reference_examples = load(args.reference_data or args.data, *best)[0] if trains_reference else []
    model = prepare(args, device, examples + held_out + reference_examples)
    weights = runs.fingerprint(p for p in model.parameters() if not p.requires_grad)
    if args.resume:
        runs.check_arguments(Path(args.out), vars(args), FREE)
    folder = runs.open_folder(args.out, f"{Path(args.model).name}-{args.method}", args.overwrite, args.resume)
    content = {"--model": weights, "--data": runs.fingerprint(tensor for example in examples for tensor in example)}
    record = {"arguments": vars(args), "versions": runs.versions(), "fingerprints": content}
    record |= {"samples": len(examples), "dropped": dropped}
    seconds = {"loading": time.perf_counter() - start, "losses": 0.0}

    def say(*words):
        if runs.first_rank():
            print(*words, flush=True)

    def save_record():
        if runs.first_rank():
            write_json(folder / "run.json", record)

    def no_response(count):
        return f"{count} dropped, without a response token in the first {args.max_length}"

    def fit(samples, frozen, arguments, place):
        """Train the adapters that the model has, into the folder `place`."""
        total = len(plan_steps([len(sample.ids) for sample in samples], arguments, device))
        own = settings(arguments, weights, samples, frozen)
        checkpoints = runs.Checkpoints(place, total, args.checkpoint_every, own)  # refuses before anything is written
        with writing(place):
            place.mkdir(exist_ok=True)
        save_record()
        with tqdm(total=total, desc=place.name, unit="step", disable=not runs.first_rank()) as bar, checkpoints:

            def log(line):
                if runs.first_rank():
                    runs.append_line(place / "log.jsonl", line)
                    if args.snapshot_every and line["step"] % args.snapshot_every == 0:
                        lora.save_adapter(model, place / runs.SNAPSHOT.format(line["step"]))
                share, speed = line["selected_tokens"] / line["response_tokens"], line["tokens"] / line["seconds"]
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:.0f} tokens/s, {share:.1%} selected")
                bar.update(line["step"] - bar.n)

            train(model, samples, arguments, log, checkpoints, frozen)
        if runs.first_rank():
            lora.save_adapter(model, place)

    def report_held_out(when):
        if held_out:
            loss = record[f"held_out_loss_{when}"] = sft_loss(torch.cat(response_losses(model, held_out))).item()
            say(f"held-out response loss {when} training: {loss:.4f} nats a token, {len(held_out)} samples")

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, answers = sum(len(e.ids) for e in examples), sum(int(e.response.sum()) for e in examples)
    frozen_size = sum(p.numel() for p in model.parameters()) - trained
    say(f"model: {args.model}, {frozen_size:,} frozen parameters, {trained:,} trained")
    say(f"data: {len(examples):,} samples, {tokens:,} tokens, {answers:,} of them responses;", no_response(dropped))
    if held_out:
        say(f"held out: {len(held_out):,} samples;", no_response(lost))

    report_held_out("before")
    base = reference = None
    if args.method in ("self-evolving", *WITH_REFERENCE) and args.excess == "static" or reads_kept_history(args):
        base, seconds["losses"] = frozen_losses(model, None, examples, args)  # new adapters change nothing
    if trains_reference:
        plain = argparse.Namespace(**vars(args) | {"method": "full", "excess": "static"})
        fit(reference_examples, Frozen(), plain, folder / "reference")
        reference, taken = frozen_losses(model, folder / "reference", examples, args)
        new_adapters(model, args)
        seconds["losses"] += taken
    elif args.method in WITH_REFERENCE:
        reference, taken = reference_losses(model, examples, args, device)
        seconds["losses"] += taken
    if args.method == "self-evolving":
        seconds["losses"] += train_in_parts(model, examples, base, args, folder, fit)
    else:
        fit(examples, Frozen(base, reference), args, folder)
    report_held_out("after")

    if runs.first_rank():
        steps = {"reference": runs.read_log(folder / "reference") if trains_reference else []}
        steps["training"] = runs.read_log(folder)
        for what, lines in steps.items():
            seconds[what] = sum(line["seconds"] for line in lines)  # before a stop and after it
        record["seconds"] = {what: round(taken, 3) for what, taken in seconds.items()}
        save_record()
        if args.merge and (args.shard or args.method == "self-evolving"):  # the base, whole, and one adapter
            model = lora.load_adapter(load_model(args.model, getattr(torch, args.dtype), "cpu", args.revision), folder)
        if args.merge:
            lora.merge(model, folder / "merged")
    say(f"wrote {', '.join(file for file in runs.FILES if (folder / file).exists())} to {folder}; go on with:")
    these, demo = ["--model", args.model, "--adapter", str(folder)], args.model == DEMO_FILES["model"]
    own_rows = ["--tasks", "instructions", "--data", DEMO_FOLDER] if demo else []
    say(" ", shlex.join(["python", "evaluate.py", *these, *own_rows]))
    say(" ", shlex.join(["python", "visualize.py", *these, "--data", args.eval_data or args.data]))
    if demo:
        say("  python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data tatsu-lab/alpaca --limit 1000")


if __name__ == "__main__":
    runs.run_script(main)
