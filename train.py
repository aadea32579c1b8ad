"""Algorithm 1: fine-tune a Llama or Qwen on the tokens that ssToken selects.

    python train.py --model meta-llama/Llama-3.2-3B

`train` is the algorithm, its line numbers in the comments. What it needs is above it: the history model, the
selections that are made before training starts (the baselines), the schedule. The command line is below it.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import lora
import runs
from model import Transformer, UserError, load_model, response_nll, response_places, to_device, write_json
from sstoken import (
    AttentionProbe,
    ema_update,
    normalize,
    retrospective_excess_loss,
    score,
    select,
    selected_loss,
    share_of,
)

# ------------------------------------------------------------------------------------------- the history model


class History:
    """theta_his of Eq. 3: the base model, an average of past models (Eq. 4), or the model of some steps ago.

    All three share the frozen base weights and differ in what is added to them: nothing, one averaged matrix a
    layer, or an old adapter. Since theta^t = W + (alpha / rank) B A with W fixed, averaging the products B A averages
    the merged weights exactly. At step 0 each of them is the base model.
    """

    def __init__(self, model: Transformer, kind: str, ema_alpha: float, every: int):
        self.model, self.kind, self.ema_alpha, self.every = model, kind, ema_alpha, every
        self.factors = None  # nothing: the base model
        if kind == "ema":
            self.factors = [(torch.zeros_like(layer.product()),) for layer in self._layers()]

    def _layers(self):
        return lora.lora_layers(self.model).values()

    @torch.no_grad()
    def nll(self, input_ids: Tensor, response: Tensor) -> Tensor:
        """L_his of the response tokens of a batch: input_ids, response (B, L) -> (response.sum(),), as response_nll."""
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


def select_everything(sizes: list[int], rho: float, seed: int) -> list[Tensor]:
    """Full fine-tuning: every response token of samples with `sizes` response tokens, one bool tensor a sample."""
    return [torch.ones(size, dtype=torch.bool) for size in sizes]


def select_at_random(sizes: list[int], rho: float, seed: int) -> list[Tensor]:
    """The paper's Uniform Random: exactly ceil(rho * N) of the pool's N response tokens, drawn once from the seed."""
    total = sum(sizes)
    selected = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    selected[order[: share_of(rho, total)]] = True
    return list(selected.split(sizes))


# A method either has its selection made here, once, or (None) makes it anew in every step from the model's state.
METHODS = {"sstoken": None, "full": select_everything, "random": select_at_random}


# --------------------------------------------------------------------------------------------------- Algorithm 1


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(warmup_ratio * steps) steps, then linear decay; `step` counts from 1."""
    warmup = share_of(warmup_ratio, steps)
    decay = (steps - step + 1) / (steps - warmup + 1)
    return peak * min(step / warmup, decay) if warmup else peak * decay


@torch.no_grad()
def mean_response_loss(model: Transformer, examples: list[data.Example], micro_batch_size: int, device) -> float:
    """Loss per response token of `examples`, adapters on, dropout off, in nats. All ranks take part."""
    model.eval()
    total = 0.0
    (passes,) = data.plan_batches([len(e.ids) for e in examples], len(examples), micro_batch_size, seed=0)
    for micro_batch in runs.share_passes(passes):
        total += response_nll(model, *data.collate([examples[i] for i in micro_batch], device)).sum().item()
    return sum(runs.gather(total)) / sum(int(e.response.sum()) for e in examples)


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
) -> Transformer:
    """Fine-tune the adapters of `model` on `examples` by Algorithm 1; `log` gets a dict after every optimizer step.

    Started by torchrun, each rank computes its share of a step's micro-batches and all make the same update. With
    `checkpoints` the run goes on from the newest, and leaves others behind.
    """
    device = model.lm_head.weight.device
    lengths, sizes = [len(e.ids) for e in examples], [int(e.response.sum()) for e in examples]
    steps = plan_steps(lengths, args, device)
    fixed = METHODS[args.method] and METHODS[args.method](sizes, args.rho, args.seed)
    # How many tokens of a sample will be selected is known before which, and with it the sample's weight in the loss.
    counts = [int(s.sum()) for s in fixed] if fixed else [share_of(args.rho, size) for size in sizes]
    scored = fixed is None and args.rho < 1  # otherwise the selection is known without any score

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=args.lr, weight_decay=0.0)
    probe = AttentionProbe(model, args.layer)
    model.train()
    kind = args.history if scored and args.gamma > 0 else "base"  # nothing is kept that no score reads
    history = History(model, kind, args.ema_alpha, args.history_every)  # Alg. 1, line 2
    checkpoints = checkpoints or runs.Checkpoints()
    done = checkpoints.restore(adapters, optimizer, history, device)
    seen = sum(len(micro_batch) for batch in steps[:done] for micro_batch in batch)

    for step, batch in enumerate(steps[done:], done + 1):  # Alg. 1, line 3
        start, loss_sum, selected_sum = time.perf_counter(), *torch.zeros(2, device=device)
        weights = sample_weights(batch, counts, args.loss_mean)
        gamma = args.gamma if seen >= args.attention_only else 0.0
        uses_rel, uses_attention = scored and gamma > 0, scored and gamma < 1

        for micro_batch in runs.share_passes(batch):  # Alg. 1, line 4
            ids, response = data.collate([examples[i] for i in micro_batch], device)
            history_nll = history.nll(ids, response) if uses_rel else None
            nll = response_nll(model, ids, response)
            rel, attention = torch.zeros_like(nll), torch.zeros_like(nll)  # without a weight in the score, left at zero
            if uses_rel:
                rel = retrospective_excess_loss(nll.detach(), history_nll)  # Alg. 1, line 5
            if uses_attention:
                attention = probe.scores(response).flatten()[response_places(response, device)]  # Alg. 1, line 6

            losses = [0 * nll.sum()]  # all ranks go backward equally often, also one without a selected token
            tokens_of = [x.split([sizes[i] for i in micro_batch]) for x in (nll, rel, attention) if micro_batch]
            for i, nll_i, rel_i, attention_i in zip(micro_batch, *tokens_of, strict=True):
                token_scores = score(normalize(rel_i), attention_i, gamma)  # Alg. 1, lines 7 and 8
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
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(adapters, args.max_grad_norm)
        optimizer.step()  # Alg. 1, line 10
        optimizer.zero_grad()
        history.update(step)  # Alg. 1, line 11

        members = [i for micro_batch in batch for i in micro_batch]
        seen += len(members)
        total_loss, total_selected = torch.stack(runs.sum_over_ranks([loss_sum, selected_sum])).tolist()
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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = runs.ArgumentParser("Fine-tune a Llama or Qwen on the tokens that ssToken selects (Algorithm 1).")
    add = parser.add_argument_group("method").add_argument
    # fmt: off
    add("--method", choices=METHODS, default="sstoken", help="what chooses the tokens to train on (Sec. 4.1)")
    add("--rho", type=float, default=0.6, help="share of a sample's response tokens to select (Eq. 11); 1: no scoring")
    add("--gamma", type=float, default=0.5, help="weight of REL, against attention (Eq. 9); 0 skips the history pass")
    add("--layer", type=int, default=-1, help="decoder layer whose attention is scored (Eq. 7, Table 2); -1: the last")
    add("--history", choices=("base", "ema", "checkpoint"), default="base",
        help="history model of Eq. 3. base: the model before training, no extra memory. ema: Eq. 4 on the merged "
        "weights, exactly; costs a float32 copy of every adapted matrix, and a second full-size product at each of "
        "them in the history pass. checkpoint: the adapter as it was at the last refresh")
    add("--ema-alpha", type=float, default=0.999, help="alpha of Eq. 4, for --history ema")
    add("--history-every", type=int, default=100, metavar="N", help="refresh --history checkpoint every N steps")
    add("--loss-mean", choices=("sample", "batch"), default="sample",
        help="sample: mean over each sample's selected tokens (Eq. 10), then over samples. batch: mean over all the "
        "selected tokens of a global batch, much as the authors' release")
    add("--attention-only", type=int, default=0, metavar="N",
        help="select by attention alone (gamma 0) for the first N samples, in whole batches; the release: 10000")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="checkpoint: a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of a --model on the hub")
    add("--data", default=data.RELEASED_POOL, metavar="SOURCE[,SOURCE...]",
        help=".json, .jsonl or .parquet files, hub data sets, or pool: a fresh draw of Sec. 4.1's mixture")
    add("--eval-data", metavar="SOURCE[,SOURCE...]", help="held-out rows: their response loss before and after")
    add("--limit", type=int, metavar="N", help="take the first N rows of each source")
    add("--max-length", type=int, default=2048, help="cut samples to this many tokens (Appendix A.3)")
    add("--out", help="folder of the run; default: a new one under runs/")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--checkpoint-every", type=int, metavar="N",
        help="steps between two checkpoints, of which OUT keeps the last two; default: a tenth of the run")
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
    for flag in (*counts, "checkpoint_every"):
        value = getattr(args, flag)
        bounds["--" + flag.replace("_", "-")] = (value is None or value >= 1, "at least 1")
    for flag, (fits, bound) in bounds.items():
        if not fits:
            raise UserError(f"{flag} is {getattr(args, flag[2:].replace('-', '_'))}; it must be {bound}")
    if args.batch_size % args.micro_batch_size:
        raise UserError(f"--micro-batch-size {args.micro_batch_size} does not divide --batch-size {args.batch_size}")
    if args.resume and (args.overwrite or not args.out):
        raise UserError("--resume goes on with the run in --out: it needs that flag, and does not go with --overwrite")
    return args


# What may differ between a run and the one that goes on with it: none of it changes the adapter.
FREE = {"out", "overwrite", "resume", "checkpoint_every", "merge", "eval_data"}


def settings(model: Transformer, examples: list[data.Example], args: argparse.Namespace) -> dict:
    """All that the adapter depends on, by the names that a user knows: for checkpoints, which hold for nothing else."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
    return flags | {
        "--device": model.lm_head.weight.device.type,
        "the number of ranks": runs.ranks(),
        "the content of --model": runs.fingerprint(p for p in model.parameters() if not p.requires_grad),
        "the content of --data": runs.fingerprint(tensor for example in examples for tensor in example),
    }


def prepare(args: argparse.Namespace, device: torch.device, examples: list[data.Example]) -> Transformer:
    """The model with new adapters, ready to train: checked against the data, its weights in place or sharded."""
    model = load_model(args.model, getattr(torch, args.dtype), "meta" if args.shard else device, args.revision)
    if (largest := max(int(e.ids.max()) for e in examples)) >= model.config.vocab_size:
        raise UserError(f"{args.model}: token id {largest} is outside the embedding of {model.config.vocab_size} rows")
    if (longest := max(len(e.ids) for e in examples)) > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise UserError(f"{args.model} reads {context} tokens, a sample has {longest}: lower --max-length to {context}")
    AttentionProbe(model, args.layer).remove()  # a layer that does not exist is refused before anything is written
    model.gradient_checkpointing = args.gradient_checkpointing
    torch.manual_seed(args.seed)
    lora.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if args.shard:
        torch.manual_seed(args.seed)  # the adapters are drawn again, where there is memory for them
        runs.shard(model, model.model.layers[args.layer], device)
    if runs.rank():
        torch.manual_seed(args.seed + runs.rank())  # the same adapters on all ranks, dropout of its own on each
    return model


def main(argv: list[str] | None = None):
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
    examples, dropped = data.load_examples(args.data, tokenizer, args.max_length, args.limit, args.seed)
    held_out, lost = (
        data.load_examples(args.eval_data, tokenizer, args.max_length, args.limit) if args.eval_data else ([], 0)
    )
    model = prepare(args, device, examples + held_out)
    total = len(plan_steps([len(e.ids) for e in examples], args, device))
    folder = runs.open_folder(args.out, f"{Path(args.model).name}-{args.method}", args.overwrite, args.resume)
    checkpoints = runs.Checkpoints(folder, total, args.checkpoint_every, settings(model, examples, args))
    record = {"arguments": vars(args), "versions": runs.versions(), "samples": len(examples), "dropped": dropped}

    def say(*words):
        if runs.first_rank():
            print(*words, flush=True)

    def save_record():
        if runs.first_rank():
            write_json(folder / "run.json", record)

    def no_response(count):
        return f"{count} dropped, without a response token in the first {args.max_length}"

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, answers = sum(len(e.ids) for e in examples), sum(int(e.response.sum()) for e in examples)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    say(f"model: {args.model}, {frozen:,} frozen parameters, {trained:,} trained")
    say(f"data: {len(examples):,} samples, {tokens:,} tokens, {answers:,} of them responses;", no_response(dropped))
    if held_out:
        say(f"held out: {len(held_out):,} samples;", no_response(lost))
    save_record()

    def report_held_out(when):
        if held_out:
            loss = mean_response_loss(model, held_out, args.micro_batch_size, device)
            record[f"held_out_loss_{when}"] = loss
            say(f"held-out response loss {when} training: {loss:.4f} nats a token, {len(held_out)} samples")
            save_record()

    report_held_out("before")
    with tqdm(total=total, unit="step", disable=not runs.first_rank()) as bar, checkpoints:

        def log(line):
            if runs.first_rank():
                runs.append_line(folder / "log.jsonl", line)
            share, speed = line["selected_tokens"] / line["response_tokens"], line["tokens"] / line["seconds"]
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:.0f} tokens/s, {share:.1%} selected")
            bar.update(line["step"] - bar.n)

        train(model, examples, args, log, checkpoints)
    report_held_out("after")

    if runs.first_rank():
        lora.save_adapter(model, folder)
        if args.merge and args.shard:  # the base as a whole again, in the host's memory
            model = lora.load_adapter(load_model(args.model, getattr(torch, args.dtype), "cpu", args.revision), folder)
        if args.merge:
            lora.merge(model, folder / "merged")
    say(
        f"wrote {', '.join(file for file in runs.FILES if (folder / file).exists())} to {folder}; "
        f"evaluate with: python evaluate.py --model {args.model} --adapter {folder}"
    )


if __name__ == "__main__":
    runs.run_script(main)
