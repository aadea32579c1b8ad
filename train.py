"""Algorithm 1: fine-tune a Llama or Qwen on the tokens that ssToken selects.

    python train.py --model meta-llama/Llama-3.2-3B

`train` is the algorithm, with its line numbers in the comments. `SSToken` above it selects: lines 5 to 9. Other methods
take its place (paper/baselines.py). Below: the command line, and a whole run.
"""

import argparse
import functools
import math
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from model import Transformer, load_model, response_nll, response_places
from paper import baselines
from paper.baselines import METHODS, OVER_THE_POOL, PARTS, WITH_REFERENCE
from paper.frozen import FrozenLosses, response_losses
from paper.objectives import GAINS
from sstoken import AttentionProbe, normalize, score, select, selected_loss, sft_loss, share_of
from support import command, handoff, machine, ranks, runs, sources, templates
from support.checkpoint import check_fits
from support.files import UserError, check, check_writable
from support.packing import pass_cost
from support.start import run_script

# ----------------------------------------------------------------------------------------- the schedule of a step


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(warmup_ratio * steps) steps, then linear decay; `step` counts from 1."""
    warmup = share_of(warmup_ratio, steps)
    decay = (steps - step + 1) / (steps - warmup + 1)
    return peak * min(step / warmup, decay) if warmup else peak * decay


def sample_weights(batch: list[list[int]], counts: list[int], loss_mean: str) -> dict[int, float]:
    """The weight of each sample's mean loss (Eq. 10) in the loss of a step, whatever its micro-batches.

    sample: every sample that has a selected token weighs the same. batch: every selected token does.
    """
    shares = {i: counts[i] if loss_mean == "batch" else min(counts[i], 1) for passed in batch for i in passed}
    total = max(sum(shares.values()), 1)
    return {i: share / total for i, share in shares.items()}


def weighted_loss(nll: Tensor, selected: list[Tensor], weights: list[float]) -> Tensor:
    """A micro-batch's part of the step's loss: each sample's Eq. 10 times its weight, added up.

    nll (sum of L_resp,): the samples' losses, one sample after the other; selected: a tensor (L_resp,) for each.
    """
    losses = [0 * nll.sum()]  # all ranks go backward equally often, also without a selected token
    for nll_i, selected_i, weight in zip(nll.split([len(mask) for mask in selected]), selected, weights, strict=True):
        if weight:
            losses.append(weight * selected_loss(nll_i, selected_i))
    return torch.stack(losses).sum()


def update(optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, record: runs.StepRecord, checkpoints):
    """Alg. 1, line 10, on all ranks. Without a selected token nothing changes: AdamW would move by its momentum.

    UserError for a loss or gradient that is not finite. Returns whether a signal asks to stop after this step.
    """
    adapters = optimizer.param_groups[0]["params"]
    ranks.sum_over_ranks([p.grad for p in adapters])  # nothing else of the model crosses between ranks
    gradient_norm = torch.nn.utils.clip_grad_norm_(adapters, max_grad_norm or math.inf)
    loss, tokens, norm, stop = record.read(gradient_norm, checkpoints.signal)
    checkpoints.check_numbers(record.number, loss, norm, record.samples)
    optimizer.param_groups[0]["lr"] = lr
    if tokens:
        optimizer.step()
    optimizer.zero_grad()
    return stop


def plan_steps(lengths: list[int], args: argparse.Namespace, device: torch.device) -> list[list[list[int]]]:
    """All optimizer steps, each a list of micro-batches, each a list of sample indices; --max-steps at most."""
    shape = args.batch_size, args.micro_batch_size
    limit = pass_cost(device), args.pass_tokens, not args.pack
    plans = [data.plan_batches(lengths, *shape, f"{args.seed} {epoch}", *limit) for epoch in range(args.epochs)]
    return [batch for plan in plans for batch in plan][: args.max_steps]


# --------------------------------------------------------------------------------------------------- Algorithm 1


class SSToken:
    """ssToken's selection of the response tokens to train on: Alg. 1, lines 2, 5 to 9 and 11.

    sizes: L_resp of each sample. base: the base model's losses, (L_resp,) for each sample, if they are known.
    """

    statistics = None  # only the loss of each token is needed

    def __init__(self, model: Transformer, sizes: list[int], args, base: list[Tensor] | None = None):
        self.args, self.sizes = args, sizes
        self.counts = [share_of(args.rho, size) for size in sizes]  # of tokens that will be selected
        self.probe = AttentionProbe(model, args.layer)
        kind = args.history if args.rho < 1 and args.gamma > 0 else "base"
        self.history = lora.History(model, kind, args.ema_alpha, args.history_every, base)  # Alg. 1, line 2

    def start(self, step: int, seen: int):
        """Before step `step`, after `seen` samples: which of the two signals the score reads."""
        self.gamma = self.args.gamma if seen >= self.args.attention_only else 0.0
        known = step == 1 and self.history.base  # REL is then zero, not a rounding error
        self.reads_rel = self.args.rho < 1 and self.gamma > 0 and not known
        self.reads_attention = self.args.rho < 1 and self.gamma < 1

    def look_back(self, samples: list[int], ids: Tensor, response: Tensor):
        """The history pass of a micro-batch: L_his. The probe keeps hidden states of the pass after it."""
        self.history_nll = self.history.nll(ids, response, samples) if self.reads_rel else None

    def choose(self, samples: list[int], response: Tensor, nll: Tensor) -> list[Tensor]:
        """Which response tokens are selected, bool (L_resp,) for each sample. nll (response.sum(),): L_theta."""
        rel = torch.zeros_like(nll)  # stays zero if the score does not read it
        attention = torch.zeros_like(nll)
        if self.reads_rel:
            rel = GAINS[self.args.gain](nll, self.history_nll)  # Alg. 1, line 5
        if self.reads_attention:
            attention = self.probe.scores(response).flatten()[response_places(response, nll.device)]  # Alg. 1, line 6
        sizes, selected = [self.sizes[i] for i in samples], []
        for rel_i, attention_i in zip(rel.split(sizes), attention.split(sizes), strict=True):
            token_scores = score(normalize(rel_i), attention_i, self.gamma)  # Alg. 1, lines 7 and 8
            selected.append(select(token_scores, self.args.rho))  # Alg. 1, line 9
        return selected

    def update(self, step: int):
        """After the optimizer's step number `step`."""
        self.history.update(step)  # Alg. 1, line 11

    def close(self):
        self.probe.remove()


def train(
    model: Transformer,
    examples: list[data.Example],
    args: argparse.Namespace,
    log: Callable[[dict], None],
    checkpoints: runs.Checkpoints | None = None,
    frozen: FrozenLosses | None = None,
) -> Transformer:
    """Fine-tune the adapters of `model` on `examples` by Algorithm 1. `log` gets a dict after every optimizer step.

    Under torchrun each rank computes its share of the micro-batches, and all make the same update. checkpoints: the run
    goes on from the newest one, and writes others. frozen: losses that are known before training.
    """
    frozen, checkpoints = frozen or FrozenLosses(), checkpoints or runs.Checkpoints()
    device = model.lm_head.weight.device
    sizes = [int(e.response.sum()) for e in examples]
    steps = plan_steps([len(e.ids) for e in examples], args, device)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=args.lr, weight_decay=0.0)
    model.train()
    selection = baselines.make_selection(model, sizes, args, frozen) or SSToken(model, sizes, args, frozen.base)
    done = checkpoints.restore(adapters, optimizer, selection.history, device)
    seen = sum(len(samples) for batch in steps[:done] for samples in batch)

    for step, batch in enumerate(steps[done:], done + 1):  # Alg. 1, line 3
        record = runs.StepRecord(step, batch, examples, device)
        weights = sample_weights(batch, selection.counts, args.loss_mean)
        selection.start(step, seen)
        for samples in ranks.share_passes(batch):  # Alg. 1, line 4
            ids, response = data.collate([examples[i] for i in samples], device)
            selection.look_back(samples, ids, response)  # L_his
            nll = response_nll(model, ids, response, selection.statistics)  # L_theta
            selected = selection.choose(samples, response, nll.detach())  # Alg. 1, lines 5 to 9
            loss = weighted_loss(nll, selected, [weights[i] for i in samples])  # Eq. 10, a mean over samples
            loss.backward()
            record.add(loss, selected)
        lr = learning_rate(step, len(steps), args.lr, args.warmup_ratio)
        stop = update(optimizer, lr, args.max_grad_norm, record, checkpoints)  # Alg. 1, line 10
        selection.update(step)  # Alg. 1, line 11
        seen += len(record.samples)
        log(record.line(lr))
        checkpoints.after(step, stop)
    selection.close()
    return model  # Alg. 1, line 13


# -------------------------------------------------------------------------------------------------- command line

MICRO_BATCH = {"cpu": 4, "cuda": 16}  # by default, at most: smaller ones leave a GPU waiting

# Without --model: a tiny Llama and its rows, by demo/make.py
DEMO_FOLDER = os.path.relpath(Path(__file__).parent / "demo")
DEMO_FILES = {"model": "model", "data": "sft.jsonl", "eval_data": "instructions.test.jsonl"}
DEMO_FILES = {flag: f"{DEMO_FOLDER}/{name}" for flag, name in DEMO_FILES.items()}
DEMO_SETTINGS = {"lr": 4e-3, "epochs": 4, "micro_batch_size": 48, "max_length": 128}
DEMO_SETTINGS |= {"snapshot_every": 28, "eval_every": 28}


def make_parser() -> command.ArgumentParser:
    """The flags of the algorithm and its optimizer. Other flags are declared in the module that reads them."""
    parser = command.ArgumentParser("Fine-tune a Llama or Qwen on the tokens that ssToken selects (Algorithm 1).")
    settings = ", ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in DEMO_SETTINGS.items())
    # fmt: off
    add = parser.group("to begin with")
    add("--model", help="a folder in Hugging Face layout, or a name on the hub. "
        f"Default: the demo model with its own rows and settings: {settings}")
    add("--data", default=data.RELEASED_POOL, metavar="SOURCE[,SOURCE...]",
        help="files, folders or hub data sets (NAME, NAME:SPLIT, NAME:CONFIGURATION:SPLIT); "
        "pool: a new draw of the mixture of Sec. 4.1")
    add("--out", help="folder of the run (default: a new one under runs/)")
    add("--method", choices=METHODS, default="sstoken", help="what selects the tokens (Sec. 4.1)")
    add("--rho", type=command.share, default=0.6, bound="in (0, 1], or auto",
        help="share of the response tokens to select (Eq. 11); 1: all, without scores; auto: the run finds the share")
    add("--gamma", type=float, default=0.5, bound="in [0, 1]",
        help="weight of REL; attention has the rest (Eq. 9). 0: no history pass")
    add("--lr", type=float, default=1e-4, bound="above 0 and finite", help="peak learning rate")
    add("--epochs", type=int, default=1, bound="at least 1", help="passes over the data")
    add("--batch-size", type=int, default=48, bound="at least 1", help="samples per optimizer step, over all ranks")
    add("--limit", type=int, bound="at least 1", metavar="N", help="read the first N rows of each source")

    add = parser.group("method")
    add("--layer", type=int, default=-1, help="decoder layer of the attention score (Eq. 7, Table 2); -1: the last")
    add("--gain", choices=GAINS, default="log",
        help="log: REL (Eq. 3). probability: the gain in probability, an extension (results/README.md)")
    add("--history", choices=("base", "ema", "checkpoint"), default="base",
        help="history model of Eq. 3. base: the model before training. ema: a moving average (Eq. 4). "
        "checkpoint: the adapter of some steps ago")
    add("--ema-alpha", type=float, default=0.999, bound="in [0, 1]", help="alpha of Eq. 4, for --history ema")
    add("--history-every", type=int, default=100, bound="at least 1", metavar="N",
        help="renew --history checkpoint every N steps")
    add("--loss-mean", choices=("sample", "batch"),
        help="sample: mean over a sample's selected tokens (Eq. 10), then over samples. batch: mean over all selected "
        f"tokens of a batch. Default: sample; {' and '.join(OVER_THE_POOL)} always take batch")
    add("--attention-only", type=int, default=0, bound="at least 0", metavar="N",
        help="use gamma 0 for the first N samples, in whole batches; the authors' release: 10000")

    add = parser.group("model and data")
    add("--revision", help="branch, tag or commit of --model on the hub")
    add("--eval-data", metavar="SOURCE[,SOURCE...]", help="held-out rows: their loss is measured before and after")
    add("--max-length", type=int, default=2048, bound="at least 2", help="tokens of a sample; the rest is cut")

    add = parser.group("optimisation (Appendix A.3)")
    add("--micro-batch-size", type=int, bound="at least 1", help="samples per forward pass. "
        "Default: a divisor of --batch-size, up to 4 on a CPU and 16 on a GPU, there limited by tokens too")
    add("--warmup-ratio", type=float, default=0.03, bound="in [0, 1]", help="share of the steps that warm up")
    add("--max-grad-norm", type=float, default=0.0, bound="at least 0", help="clip the gradient's norm; 0: never")
    add("--max-steps", type=int, bound="at least 1", metavar="N",
        help="stop after N optimizer steps; the schedule of the learning rate ends there too")
    add("--seed", type=int, default=42, bound="from 0 to 2^63 - 1",
        help="of the data order, the adapters, dropout and random selection")
    # fmt: on
    for module in (sources, templates, lora, baselines, runs, command, ranks):
        module.add_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.model is None:
        parser.set_defaults(**DEMO_FILES, **DEMO_SETTINGS)
        args = parser.parse_args(argv)  # a flag that is given still counts
        args.overwrite = args.overwrite or not (args.out or args.resume)
        args.out = args.out or f"runs/demo-{args.rho if args.rho == 'auto' else args.method}"

    args.pass_tokens = None
    if args.micro_batch_size is None:
        kind = "cpu" if machine.find_device(args.device).type == "cpu" else "cuda"
        most = args.batch_size if args.pack else MICRO_BATCH[kind]
        args.pass_tokens = 4 * args.max_length if kind == "cuda" or args.pack else None
        args.micro_batch_size = max(n for n in range(1, most + 1) if args.batch_size % n == 0)
    args.micro_batch_size = part = min(args.micro_batch_size, args.batch_size)
    check(args.batch_size % part == 0, f"--micro-batch-size {part} does not divide --batch-size {args.batch_size}")
    runs.check_flags(args)
    baselines.check_flags(args, parser.given(argv))
    return args


# ------------------------------------------------------------------------------------------------- a run, as a whole


def prepare(args: argparse.Namespace, device: torch.device, examples: list[data.Example]) -> Transformer:
    """The model with new adapters, checked against the data, its weights in place or sharded."""
    model = load_model(args.model, getattr(torch, args.dtype), "meta" if args.shard else device, args.revision)
    check_fits(model, args.model, examples)
    if args.reference:
        baselines.check_reference_model(model, args.reference, examples)
    if args.cache:
        check_writable(Path(args.cache) / "losses")
    try:
        AttentionProbe(model, args.layer).remove()
    except ValueError as error:  # before anything is written
        raise UserError(f"--layer: {error}") from None
    model.gradient_checkpointing, model.packed = args.gradient_checkpointing, args.pack
    lora.new_adapters(model, args)
    if args.compile:
        machine.compile_layers(model)
    if args.shard:
        ranks.shard(model, model.model.layers[args.layer], device)
        lora.new_adapters(model, args)  # drawn again, where there is memory for them
    return model


def fit(run: runs.Run, model, samples: list[data.Example], frozen: FrozenLosses, args, folder: Path) -> list:
    """Train the model's adapters, into `folder`, the run's own or one inside it. Returns the steps."""
    steps = plan_steps([len(sample.ids) for sample in samples], args, torch.device(args.device))
    content = {
        "the losses of the base model (--cache)": runs.fingerprint(frozen.base or []),
        "the losses of the reference": runs.fingerprint(frozen.reference or []),
    }
    save_adapter = functools.partial(lora.save_adapter, model)
    with run.training(args, samples, content, folder, len(steps), save_adapter) as (log, checkpoints):
        train(model, samples, args, log, checkpoints, frozen)
    return steps


def merge(model: Transformer, args: argparse.Namespace, folder: Path):
    """Write folder/merged: the model with its adapters in it.

    Where the model is in parts, the base is merged as it was loaded, and the adapter as it was saved.
    """
    if args.shard or args.method == "self-evolving":
        model = load_model(args.model, getattr(torch, args.dtype), "cpu", args.revision)
        lora.load_adapter(model, folder)
    dtype = args.merge_dtype or args.dtype
    error = lora.merge(model, folder / "merged", getattr(torch, dtype)).merge_error
    advice = "; --merge-dtype float32 keeps all of it" if error > 0.01 else ""
    print(f"merged into {dtype}, whose rounding changes the update by {error:.2%} of its norm{advice}")


def main(argv: list[str] | None = None):
    start, args = time.perf_counter(), parse_arguments(argv)
    device = ranks.start_ranks(args.device, args.shard)
    args.device = str(device)
    machine.compute_exactly(device)
    ranks.say(f"reading {args.model} and {args.data}")

    tokenizer = data.load_tokenizer(args.model, args.revision, args.template)
    if args.reference:
        baselines.check_tokenizer(args, tokenizer)

    def load(names: str | None, top: int | None = None) -> data.Dataset:
        account = sources.Account(args.skip_bad_rows)
        choice = (args.limit, args.seed, top, args.rating_field)
        return data.load_examples(names, tokenizer, args.max_length, *choice, account=account)

    training = load(args.data, args.reference_top if args.method == "full" else None)
    if args.method == "self-evolving" and len(training.examples) < PARTS:
        n = len(training.examples)
        raise UserError(f"--method self-evolving cuts the data into {PARTS} parts, but there are {n} samples")
    held_out = load(args.eval_data)
    trains_reference = args.method in WITH_REFERENCE and not args.reference
    reference = load((args.reference_data or args.data) if trains_reference else None, args.reference_top)
    model = prepare(args, device, training.examples + held_out.examples + reference.examples)
    run = runs.Run(args, model, *training)
    if held_out.examples:  # Eq. 1 over all their response tokens, in nats a token
        run.held_out_loss = lambda: sft_loss(torch.cat(response_losses(model, held_out.examples))).item()
    seconds = {"loading": time.perf_counter() - start}

    run.introduce(model, training.examples, training.account.lengths(args.max_length))
    if held_out.examples:
        ranks.say(f"held out: {len(held_out.examples):,} samples; {held_out.account.lengths(args.max_length)}")
    for line in dict.fromkeys(line for loaded in (training, held_out, reference) for line in loaded.account.lines()):
        ranks.say(line)
    run.report_held_out("before")
    both = training.examples, reference.examples
    seconds["losses"], auto = baselines.run_method(model, *both, args, run.folder, functools.partial(fit, run, model))
    run.report_held_out("after")
    run.finish(seconds, auto)
    if ranks.first_rank():
        handoff.write_tokenizer(tokenizer, model.folder, run.folder)  # with the template that the run was trained in
        handoff.write_card(run.record, run.folder, vars(parse_arguments(["--model", args.model])))
    if args.merge and ranks.first_rank():
        merge(model, args, run.folder)
        handoff.write_tokenizer(tokenizer, model.folder, run.folder / "merged")

    ranks.say(f"wrote {', '.join(run.written())} to {run.folder}; go on with:")
    demo = DEMO_FOLDER if args.model == DEMO_FILES["model"] else None
    for line in handoff.next_commands(args, run.folder, trains_reference, demo):
        ranks.say("  python", shlex.join(line))


if __name__ == "__main__":
    run_script(main)
