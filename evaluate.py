"""How good a model is: the benchmarks of paper/benchmarks.py, answered by a model, as Table 1 and as JSON.

    python evaluate.py --model NAME|DIR [--adapter DIR ...] [--tasks all] [--data DIR] [--limit N] [--out FILE]

The numbers are lm-evaluation-harness's, in less time: results/evaluation.md says how.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import data
import lora
from data import Tokenizer
from model import Transformer, centred_logits, load_model
from paper.benchmarks import GROUPS, OWN_ROWS, TABLE, TASKS, add_groups, forget_rows, loader, task_names
from support import chat, command, losses, machine, ranks, templates
from support.adapters import find_adapter, read_adapter
from support.command import ArgumentParser, cell, short_names
from support.decoding import SharedPrefix, check_numbers, generate, generation_settings
from support.files import UserError, check
from support.kernels import logits_at_once
from support.packing import encode_contexts, encode_pairs, pack, plant, price_ratio, shared_prefix, tree_tensors
from support.start import run_script

MAX_NEW_TOKENS = 256  # of an answer whose request names no "max_gen_toks"
CACHE_SHARE = 32  # written answers take a token a row at a time, so their cache may hold more than a batch
Progress = Callable[[int], None]  # is told the index of each answered request

# --------------------------------------------------------------------------------------------- how a model answers


@torch.no_grad()
def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """log P(targets_t | hidden_t), (T,) float32, and whether each target is the likeliest token, (T,) bool.

    Arguments as token_nll's. Without gradients; `chunk` rows of logits exist at a time.
    """
    chunk, log_p, greedy = chunk or logits_at_once(len(weight), hidden.device), [], []
    for rows in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits, target_logit = centred_logits(rows[0], weight, rows[1])
        largest = logits.amax(dim=1, keepdim=True)
        greedy.append((target_logit == largest).squeeze(1))
        total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        log_p.append((target_logit - largest - total.log()).squeeze(1))
    return torch.cat(log_p), torch.cat(greedy)


@torch.no_grad()
def loglikelihoods(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    batch_tokens: int = 1024,
    progress: Progress = lambda i: None,
) -> list[tuple[float, bool]]:
    """(log P(continuation | context) in nats, whether greedy decoding would write it) of each (context, continuation).

    Neighbours that begin alike are computed together, so keep a question's choices side by side. Under torchrun each
    rank answers its share. UserError for a continuation without tokens, or too long for the model.
    """
    device, config = model.lm_head.weight.device, model.config
    requests = encode_pairs(tokenizer, pairs, config.max_position_embeddings, config.vocab_size)
    if not requests:
        return []
    prefix = shared_prefix(requests)
    cache = [SharedPrefix() for _ in model.model.layers] if prefix else None
    if prefix:
        model(torch.tensor([prefix], device=device), cache=cache)

    answers = {}
    trees = plant(requests, len(prefix), price_ratio(model.config))
    for batch in ranks.share(pack(trees, batch_tokens, device)):
        ids, positions, mask = tree_tensors(batch, len(prefix), device)
        hidden = model(ids, positions, mask, cache)
        places = [(row, place) for row, tree in enumerate(batch) for ps in tree.scored.values() for place in ps]
        rows, columns = torch.tensor(places, device=device).T
        asked = [i for tree in batch for i in tree.scored]
        targets = torch.tensor([token for i in asked for token in requests[i].targets], device=device)
        scores = token_scores(hidden[rows, columns], model.lm_head.weight, targets)
        check_numbers(scores[0], model)
        sizes = [len(requests[i].targets) for i in asked]
        for i, log_p, greedy in zip(asked, *(values.cpu().split(sizes) for values in scores), strict=True):
            answers[i] = (log_p.sum().item(), bool(greedy.all()))
            progress(i)
    return gather(answers)


def generations(
    model: Transformer,
    tokenizer: Tokenizer,
    requests: list[tuple[str, dict]],
    batch_tokens: int = 1024,
    progress: Progress = lambda i: None,
) -> list[str]:
    """What greedy decoding writes after each context, up to the first of its "until" strings or the end of text.

    "max_gen_toks" (default: 256) bounds an answer's tokens; a context is cut on the left to leave room for them.
    Under torchrun as `loglikelihoods`.
    """
    answers, ids = {}, encode_contexts(tokenizer, requests, model.config.vocab_size)
    text = partial(tokenizer.decode, skip_special_tokens=True)
    indices = ranks.share(sorted(range(len(requests)), key=lambda i: (repr(requests[i][1]), -len(ids[i]))))
    for settings, same in itertools.groupby(indices, key=lambda i: requests[i][1]):
        group, until, new = list(same), settings["until"], settings.get("max_gen_toks", MAX_NEW_TOKENS)
        room = model.config.max_position_embeddings - new
        check(room > 0, f"an answer of {new} tokens leaves no room for its question")
        found = generate(
            model,
            [ids[i][-room:] for i in group],
            new,
            stop=lambda tokens, until=until: any(stop in text(tokens) for stop in until),
            batch_tokens=batch_tokens,
            cache_tokens=CACHE_SHARE * batch_tokens,
            ended=lambda n, group=group: progress(group[n]),
            **generation_settings(model, tokenizer),
        )
        for i, tokens in zip(group, found, strict=True):
            written = text(tokens)
            answers[i] = written[: min((written.find(stop) for stop in until if stop in written), default=None)]
    return gather(answers)


def gather(answers: dict) -> list:
    """The answers of all ranks, {request: answer} each, as one list in the requests' order."""
    everyone = {i: answer for part in ranks.gather(answers) for i, answer in part.items()}
    return [everyone[i] for i in sorted(everyone)]


# ------------------------------------------------------------------------------------------------ what is reported


class Questions(NamedTuple):
    """A task with its rows read: each row, and the requests that it makes."""

    rows: list[dict]
    requests: list[list[tuple]]
    key: str  # their digest


def prepare(name: str, load: Callable, tokenizer: Tokenizer, limit: float | None = None) -> Questions:
    """The first `limit` rows of a task (below 1: that share of them) and their requests. load(split) -> rows.

    Raises UserError naming task and row where a column is missing that the task reads.
    """
    task, number = TASKS[name], "any row"
    try:
        rows = task["rows"](load, tokenizer)
        if limit is not None:
            rows = rows[: math.ceil(limit * len(rows)) if limit < 1 else int(limit)]
        requests, keys = [], []
        for row in rows:
            number = len(requests) + 1
            requests.append(task["requests"](row))
            nothing = ["" if isinstance(rest, dict) else (0.0, False) for _, rest in requests[-1]]
            task["metrics"](row, nothing)  # so that a column it misses is missed before the work
            keys.append(losses.digest(row, requests[-1]))  # fails where half a character is no text
    except UserError as reason:
        raise UserError(f"{name}: {reason}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as reason:
        raise UserError(f"{name}, row {number}: {type(reason).__name__} {reason}") from None
    return Questions(rows, requests, losses.digest(keys))


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: dict[str, Questions],
    batch_tokens: int,
    progress: Callable[[str, int], None] = lambda name, row: None,
) -> dict[str, list[list]]:
    """The answers to all requests: {task: [[answer, ...] of a row, ...]}.

    Written answers of all tasks are computed together. Choices come task by task, since a task's questions begin alike.
    progress(task, row) is called for each answer.
    """
    asked = [
        (name, row, request)
        for name, task in questions.items()
        for row, requests in enumerate(task.requests)
        for request in requests
    ]
    calls = [(generations, [place for place in asked if isinstance(place[2][1], dict)])]
    choices = [place for place in asked if isinstance(place[2][1], str)]
    calls += [(loglikelihoods, list(places)) for _, places in itertools.groupby(choices, key=lambda place: place[0])]
    answers = {name: [[] for _ in task.rows] for name, task in questions.items()}
    for respond, places in calls:

        def done(i, places=places):
            progress(*places[i][:2])

        found = respond(model, tokenizer, [request for _, _, request in places], batch_tokens, done)
        for (name, row, _), response in zip(places, found, strict=True):
            answers[name][row].append(response)
    return answers


def score(questions: dict[str, Questions], answers: dict[str, list[list]]) -> dict[str, dict]:
    """Each task's metrics over its rows, as `summarize` gives them."""
    return {
        name: summarize([TASKS[name]["metrics"](*graded) for graded in zip(task.rows, answers[name], strict=True)])
        for name, task in questions.items()
    }


def summarize(values: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean and standard error of each metric over rows, and their number "n". One row has no standard error."""
    n, result = len(values), {}
    for metric in values[0]:
        column = [value[metric] for value in values]
        mean = sum(column) / n
        result[metric] = mean
        spread = sum((x - mean) ** 2 for x in column)
        result[metric + "_stderr"] = math.sqrt(spread / (n - 1)) / math.sqrt(n) if n > 1 else None
    return result | {"n": n}


def table(records: list[dict]) -> str:
    """Table 1's columns in its order, in percent, a row for each record; AVG where all ten are there.

    The user's own rows have a column beside these, or alone.
    """
    found = {task for record in records for task in record["results"]}
    own = [OWN_ROWS] if OWN_ROWS[1] in found else []
    columns = own if found == {OWN_ROWS[1]} else TABLE + own
    lines = [["model", *(column for column, _, _ in columns), *(["AVG"] if columns != own else [])]]
    notes, names = [], short_names([record["adapter"] or record["model"] for record in records])
    for record, name in zip(records, names, strict=True):
        results = record["results"]
        values = [100 * results[task][metric] if task in results else None for _, task, metric in columns]
        if columns != own:
            ten = values[: len(TABLE)]
            values.append(None if None in ten else sum(ten) / len(ten))
        lines.append([cell(name), *("-" if value is None else f"{value:.2f}" for value in values)])
        for task, metric, note in (
            ("logiqa", "acc_norm", "the paper's LogiQA column may be this"),
            ("tydiqa_release", "f1", "the paper's TyDiQA column is this protocol's"),
        ):
            if task in results:
                notes.append(f"{lines[-1][0]}: {task} {metric} {100 * results[task][metric]:.2f} ({note})")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines]
    return "\n".join(text + notes)


# ----------------------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = ArgumentParser("Evaluate a model on the ten benchmarks of Table 1.")
    # fmt: off
    add = parser.group("model")
    add("--model", required=True, help="a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of --model on the hub")
    add("--adapter", action="append", default=[], metavar="NAME|DIR",
        help="a LoRA adapter in peft's format, such as a run's folder; given several times: the base model and each")
    add = parser.group("tasks and data (Appendix A.2)")
    add("--tasks", default="all", help="tasks and groups by lm-eval's names, comma-separated. all: the ten of Table 1. "
        "instructions: your own rows, in DATA/instructions.test.jsonl")
    add("--data", metavar="DIR", help="folder of <task>.<split>.jsonl files (default: the data sets on the hub)")
    add("--limit", type=float, bound="above 0", metavar="N",
        help="ask the first N rows of each task; below 1: that share of them")
    add("--out", metavar="FILE", help="JSON file of the results. What it holds already is not asked again")
    add = parser.group("machine")
    add("--batch-tokens", type=int, bound="at least 1", metavar="N",
        help=f"tokens per forward pass; the cache of written answers holds {CACHE_SHARE} times as many; bounds "
        "memory (default: 1024 on a CPU, 2048 on a GPU)")
    # fmt: on
    chat.add_flags(parser)
    templates.add_flags(parser, "model", default=None)
    command.add_flags(parser)
    args = parser.parse_args(argv)
    check(args.data is None or os.path.isdir(args.data), f"--data {args.data} is not a folder")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    names, device = task_names(args.tasks) if args.ask is None else [], ranks.start_ranks(args.device)
    forget_rows()
    batch_tokens = args.batch_tokens or (1024 if device.type == "cpu" else 2048)
    report = losses.Report(Path(args.out) if args.out and ranks.first_rank() else None)
    args.template = args.template or templates.trained_in(args.adapter)
    tokenizer = data.load_tokenizer(args.model, args.revision, args.template)
    folder = args.data and Path(args.data)
    questions = {name: prepare(name, loader(name, folder), tokenizer, args.limit) for name in names}
    model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)
    for adapter in args.adapter:  # all, before the first is evaluated
        read_adapter(find_adapter(adapter), lora.decoder_linears(model))
    if any(isinstance(asked.requests[0][0][1], dict) for asked in questions.values()):
        generation_settings(model, tokenizer)
    if args.ask is not None:
        return talk(model, tokenizer, args)

    records = []
    try:
        for adapter in ([None] if len(args.adapter) != 1 else []) + args.adapter:
            if adapter:
                lora.load_adapter(model, adapter)
            head = {name: getattr(args, name) for name in ("model", "dtype", "template", "data", "limit")}
            head |= {"adapter": adapter, "device": str(device), "versions": machine.versions()}
            key = losses.model_key(model.folder, adapter and find_adapter(adapter))
            records.append(ranks.gather(report.record(key, head))[0])
            run(model, tokenizer, questions, records[-1], batch_tokens, report.saving)
            lora.remove_lora(model)
    except KeyboardInterrupt:
        if ranks.first_rank():
            print(f"stopped; {args.out} holds what is done" if args.out else "stopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if ranks.first_rank() and records:
            print(table(records))


def talk(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace):
    """--ask: answers of the base model and of each adapter."""
    become = [partial(lora.remove_lora, model)]
    become += [partial(lora.load_adapter, model, name) for name in args.adapter]
    who = short_names([args.model, *args.adapter])
    chat.converse(model, tokenizer, args.ask, who, become, partial(data.prompt_ids, tokenizer=tokenizer))


def unanswered(record: dict, questions: dict[str, Questions]) -> list[str]:
    """The tasks that a record does not answer. Answers to other rows, and their groups, are removed from it."""
    left = [name for name, asked in questions.items() if record["keys"].get(name) != asked.key]
    for name in [*left, *(group for group, (names, _, _) in GROUPS.items() if {*names} & {*left})]:
        for part in losses.PARTS:
            record[part].pop(name, None)
    return left


def run(model, tokenizer, questions: dict[str, Questions], record: dict, batch_tokens: int, saving: Callable):
    """Answer the tasks that `record` does not hold, one by one, and save each in it.

    Tasks of a group with written answers are answered at once. Their time is divided by `cost`.
    """
    left = unanswered(record, questions)
    costs = {name: [cost(row) for row in questions[name].requests] for name in left}
    together = {}
    for name in left:
        in_writing = isinstance(questions[name].requests[0][0][1], dict)
        groups = [group for group, (names, _, _) in GROUPS.items() if in_writing and name in names]
        together.setdefault((groups or [name])[0], {})[name] = questions[name]

    total, form = sum(map(sum, costs.values())), "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, disable=not ranks.first_rank(), bar_format=form) as bar:
        for title, tasks in together.items():
            bar.set_description(title)
            todo, start = {name: list(costs[name]) for name in tasks}, time.perf_counter()

            def progress(name, row, todo=todo):
                bar.update(todo[name][row])
                todo[name][row] = 0

            results = score(tasks, answer(model, tokenizer, tasks, batch_tokens, progress))
            pace = (time.perf_counter() - start) / sum(sum(costs[name]) for name in tasks)
            bar.update(sum(map(sum, todo.values())))  # other ranks' share
            with saving(record):
                unanswered(record, questions)
                record["results"] |= results
                record["timing"] |= {name: pace * sum(costs[name]) for name in tasks}
                record["keys"] |= {name: questions[name].key for name in tasks}
                record["seconds"] = sum(record["timing"].values())
                add_groups(record["results"])


def cost(requests: list[tuple]) -> int:
    """About how long a row takes, for the progress bar: the characters to read and perhaps to write."""
    written = 500 if isinstance(requests[0][1], dict) else sum(len(rest) for _, rest in requests)
    return len(requests[0][0]) + written


if __name__ == "__main__":
    run_script(main)
