"""How good a model is: the benchmarks of benchmarks.py, answered by a model, as Table 1 and as JSON.

    python evaluate.py --model NAME|DIR [--adapter DIR ...] [--tasks all] [--data DIR] [--limit N] [--out FILE]

The numbers are lm-evaluation-harness's, at a fraction of its work: choices of one question share its context, so it is
read once, with all choices behind it in one sequence whose mask is a tree; what all questions of a task begin with is
read once and kept as keys and values; only the positions that are scored meet the vocabulary.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import lora
import runs
from benchmarks import GROUPS, OWN, TABLE, TASKS
from data import Tokenizer
from model import (
    SharedPrefix,
    Transformer,
    UserError,
    generate,
    is_number,
    load_model,
    pad_right,
    read_json,
    token_scores,
)

MAX_NEW_TOKENS = 256  # of an answer whose request names no "max_gen_toks"
CACHE_SHARE = 32  # written answers are computed a token a row, so their cache may hold more than a batch has tokens
Progress = Callable[[int], None]  # is told the index of each request that has its answer

# --------------------------------------------------------------------------------------------- how a model answers


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> dict[str, list[int]]:
    """Each text's token ids. BOS comes first where the tokenizer adds it, unless the text spells it already."""
    bos, ids = tokenizer.bos or tokenizer.eos, {}
    for spelled in (False, True):
        some = [text for text in dict.fromkeys(texts) if text.startswith(bos) == spelled]
        ids |= zip(some, tokenizer.encode_prompts(some, with_prefix=not spelled), strict=True)
    return ids


class Scored(NamedTuple):
    """A request in tokens: what goes into the model, and what its last len(targets) positions are to predict."""

    inputs: list[int]
    targets: list[int]


def encode_pairs(tokenizer: Tokenizer, pairs: list[tuple[str, str]], context_length: int) -> list[Scored]:
    """(context, continuation) in tokens, cut on the left to what the model reads.

    Spaces at the end of a context belong to the continuation. Both are encoded together and split where the context,
    encoded alone, ends: so a token across the boundary falls to the side where its position puts it.
    """
    pairs = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    ids = encode_texts(tokenizer, [text for context, rest in pairs for text in (context, context + rest)])
    (first,) = tokenizer.encode_prompts([tokenizer.bos or tokenizer.eos], with_prefix=False)
    found = []
    for context, rest in pairs:
        before = ids[context]
        targets = ids[context + rest][len(before) :]
        if not 0 < len(targets) <= context_length:
            raise UserError(f"a continuation of {len(targets)} tokens cannot be scored: {rest!r}")
        whole = ((before or first) + targets)[-context_length - 1 :]
        found.append(Scored(whole[:-1], targets))
    return found


def shared_prefix(requests: list[Scored]) -> list[int]:
    """The tokens that all requests begin with, before any position that is scored."""
    common = commonprefix([request.inputs for request in requests])
    return common[: min(len(request.inputs) - len(request.targets) for request in requests)]


class Tree:
    """Requests that begin alike as one sequence, in which every token they share stands once.

    A token attends to its ancestors, the tokens before it in its own request, and stands where it stands there.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.parents: list[int] = []  # of each token: where the one before it is in this sequence; -1: nowhere
        self.depths: list[int] = []
        self.path: list[int] = []  # the tokens of the request that came last
        self.scored: dict[int, list[int]] = {}  # request -> the places that predict its targets

    def trunk(self) -> int:
        """How many tokens come before the first that does not follow the one before it."""
        return next((place for place, parent in enumerate(self.parents) if parent != place - 1), len(self.ids))

    def common(self, inputs: list[int]) -> int:
        """How many tokens a request shares with the one before it."""
        return len(commonprefix([[self.ids[place] for place in self.path], inputs]))

    def add(self, i: int, inputs: list[int], targets: int):
        """Grow the branch of request i, whose last `targets` inputs are to predict something."""
        shared = self.common(inputs)
        self.path = self.path[:shared]
        for token in inputs[shared:]:
            self.parents.append(self.path[-1] if self.path else -1)
            self.depths.append(len(self.path))
            self.path.append(len(self.ids))
            self.ids.append(token)
        self.scored[i] = self.path[len(self.path) - targets :]


def plant(requests: list[Scored], prefix: int, ratio: float) -> list[Tree]:
    """Trees of neighbouring requests; the first `prefix` tokens of all are left out.

    A request joins the tree before it where that costs less than a tree of its own: a tree of n tokens costs
    n * (ratio + n), since every token goes through the weights and is compared with all others, and `ratio` is the
    price of the first over that of one comparison.
    """

    def price(n):
        return n * (ratio + n)

    trees = []
    for i, (inputs, targets) in enumerate(requests):
        own = inputs[prefix:]
        if trees:
            tree = trees[-1]
            joined = len(tree.ids) + len(own) - tree.common(own)
        if not trees or price(joined) > price(len(tree.ids)) + price(len(own)):
            trees.append(Tree())
        trees[-1].add(i, own, len(targets))
    return trees


def price_ratio(config) -> float:
    """What a token's way through a layer's weights costs, in comparisons with one other token (multiply-adds)."""
    heads, key_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * heads + 2 * key_heads + 3 * config.intermediate_size)
    return weights / (2 * heads)


def pack(trees: list[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Trees of similar length in batches of at most `batch_tokens` tokens, padding included; the longest come first."""
    batches = []
    for tree in sorted(trees, key=lambda tree: -len(tree.ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].ids) > batch_tokens:
            batches.append([])
        batches[-1].append(tree)
    return batches


def tree_tensors(batch: list[Tree], prefix: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and positions (B, L), and the mask (B, 1, n, prefix + L): who the last n tokens may look at.

    Those before, of trees that no prefix stands before, are in all trunks and so causal. Padding is on the right.
    """
    longest = len(batch[0].ids)
    causal = 0 if prefix else min(longest - 1, *(tree.trunk() for tree in batch))
    mask = np.zeros((len(batch), 1, longest - causal, prefix + longest), dtype=bool)
    mask[..., :prefix] = True
    own = mask[:, 0, :, prefix:]
    own[:, range(longest - causal), range(causal, longest)] = True
    for ancestors, tree in zip(own, batch, strict=True):
        for place in range(causal, len(tree.ids)):
            parent = tree.parents[place]
            if parent >= causal:
                ancestors[place - causal] |= ancestors[parent - causal]
            else:
                ancestors[place - causal, : parent + 1] = True
    ids, _ = pad_right([tree.ids for tree in batch], device)
    depths, _ = pad_right([tree.depths for tree in batch], device)
    return ids, prefix + depths, torch.from_numpy(mask).to(device)


@torch.no_grad()
def loglikelihoods(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    batch_tokens: int = 1024,
    progress: Progress = lambda i: None,
) -> list[tuple[float, bool]]:
    """(log P(continuation | context) in nats, whether greedy decoding would write it) of each (context, continuation).

    Neighbours that begin alike are computed together, so keep a question's choices side by side. Under torchrun, each
    rank answers its share and all get all answers. Raises UserError for a continuation without tokens, or with more
    than the model reads.
    """
    device, requests = model.lm_head.weight.device, encode_pairs(tokenizer, pairs, model.config.max_position_embeddings)
    if not requests:
        return []
    prefix = shared_prefix(requests)
    cache = [SharedPrefix() for _ in model.model.layers] if prefix else None
    if prefix:
        model(torch.tensor([prefix], device=device), cache=cache)

    answers = {}
    for batch in runs.share(pack(plant(requests, len(prefix), price_ratio(model.config)), batch_tokens)):
        ids, positions, mask = tree_tensors(batch, len(prefix), device)
        hidden = model(ids, positions, mask, cache)
        places = [(row, place) for row, tree in enumerate(batch) for ps in tree.scored.values() for place in ps]
        rows, columns = torch.tensor(places, device=device).T
        asked = [i for tree in batch for i in tree.scored]
        targets = torch.tensor([token for i in asked for token in requests[i].targets], device=device)
        scores = token_scores(hidden[rows, columns], model.lm_head.weight, targets)
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
    answers, ids = {}, encode_texts(tokenizer, [context for context, _ in requests])
    indices = runs.share(sorted(range(len(requests)), key=lambda i: (repr(requests[i][1]), -len(ids[requests[i][0]]))))
    for settings, same in itertools.groupby(indices, key=lambda i: requests[i][1]):
        group, until = list(same), settings["until"]
        new = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        room = model.config.max_position_embeddings - new
        if room <= 0:
            raise UserError(f"an answer of {new} tokens leaves no room for its question: the model reads {room + new}")

        def text(tokens):
            return tokenizer.decode(tokens, skip_special_tokens=True)

        found = generate(
            model,
            [ids[requests[i][0]][-room:] for i in group],
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


def generation_settings(model: Transformer, tokenizer: Tokenizer) -> dict:
    """What `generate` is to know of the checkpoint's generation_config.json: stop_ids and repetition_penalty.

    stop_ids: the tokenizer's end of text and those that the file names, or config.json where there is no such file.
    """
    path = model.folder / "generation_config.json"
    settings = read_json(path) if path.exists() else model.config.raw
    named, penalty = settings.get("eos_token_id"), settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in named) or not is_number(penalty) or penalty <= 0:
        raise UserError(f"{model.folder}: eos_token_id {named} or repetition_penalty {penalty!r} of its configuration")
    return {"stop_ids": {tokenizer.eos_id, *named}, "repetition_penalty": penalty}


def gather(answers: dict) -> list:
    """The answers of all ranks, {request: answer} each, as one list in the requests' order."""
    everyone = {i: answer for part in runs.gather(answers) for i, answer in part.items()}
    return [everyone[i] for i in sorted(everyone)]


# ------------------------------------------------------------------------------------------------ what is reported


class Questions(NamedTuple):
    """A task with its rows read: each row, and the requests that it makes."""

    rows: list[dict]
    requests: list[list[tuple]]


def prepare(name: str, load: Callable, tokenizer: Tokenizer, limit: float | None = None) -> Questions:
    """The first `limit` rows of a task (below 1: that share of them) and their requests. load(split) -> rows.

    Raises UserError that names the task, and the row, where rows do not have the columns that the task reads.
    """
    task, number = TASKS[name], "any row"
    try:
        rows = task["rows"](load, tokenizer)
        if limit is not None:
            rows = rows[: math.ceil(limit * len(rows)) if limit < 1 else int(limit)]
        requests = []
        for row in rows:
            number = len(requests) + 1
            requests.append(task["requests"](row))
            nothing = ["" if isinstance(rest, dict) else (0.0, False) for _, rest in requests[-1]]
            task["metrics"](row, nothing)  # so that a column it misses is missed now, not after the work
            digest(row, "".join(context for context, _ in requests[-1]))  # nor is it text if half a character is in it
    except UserError as reason:
        raise UserError(f"{name}: {reason}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as reason:
        raise UserError(f"{name}, row {number}: {type(reason).__name__} {reason}") from None
    return Questions(rows, requests)


def loader(name: str, folder: Path | None) -> Callable:
    """load(split) -> the rows of a task's split, from <file>.<split>.jsonl in a folder, or from the hub."""
    return functools.partial(_load, TASKS[name]["file"], TASKS[name]["hub"], folder)


@functools.cache
def _load(file: str, hub: tuple | None, folder: Path | None, split: str) -> list[dict]:
    if not (folder or hub):
        raise UserError(f"rows of your own are asked about: name the folder that holds {file}.{split}.jsonl by --data")
    paths = [folder / f"{file}.{split}.jsonl"] if folder else data.hub_files(hub[0], split, hub[1])
    rows = [row for path in paths for row in data.read_file(path)]
    if not rows:
        raise UserError(f"{paths[0]} has no rows")
    return rows


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: dict[str, Questions],
    batch_tokens: int,
    progress: Callable[[str, int], None] = lambda name, row: None,
) -> dict[str, list[list]]:
    """The answers to each row's requests, of whichever kind they are: {task: [[answer, ...] of a row, ...]}.

    What is to be written is written together, whichever task asks; choices are answered task by task, since a task's
    questions begin alike. progress is told the task and the row of each answer.
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
    """Mean and standard error of each metric over rows, and their number "n". One row alone has no standard error."""
    n, result = len(values), {}
    for metric in values[0]:
        column = [value[metric] for value in values]
        mean = sum(column) / n
        result[metric] = mean
        spread = sum((x - mean) ** 2 for x in column)
        result[metric + "_stderr"] = math.sqrt(spread / (n - 1)) / math.sqrt(n) if n > 1 else None
    return result | {"n": n}


def add_groups(results: dict[str, dict]):
    """Add the groups of which every task has its result: weighted by rows (pooled standard error), or a plain mean."""
    for group, (names, metrics, weighted) in GROUPS.items():
        if any(name not in results for name in names):
            continue
        parts, score = [results[name] for name in names], {}
        sizes = [part["n"] for part in parts]
        weights = sizes if weighted else [1] * len(parts)
        for metric in metrics:
            errors = [part[metric + "_stderr"] for part in parts]
            score[metric] = sum(part[metric] * w for part, w in zip(parts, weights, strict=True)) / sum(weights)
            if None in errors:
                error = None
            elif weighted:
                total = sum((n - 1) * e**2 * n for n, e in zip(sizes, errors, strict=True)) / (sum(sizes) - len(sizes))
                error = math.sqrt(total / sum(sizes))
            else:
                error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
            score[metric + "_stderr"] = error
        results[group] = score | {"n": sum(sizes)}


def table(records: list[dict]) -> str:
    """Table 1's columns in its order, in percent, one row for each record; AVG where all ten are there.

    Beside them a column for the user's own rows, or that one alone, where they were asked about.
    """
    found = {task for record in records for task in record["results"]}
    own = [OWN] if OWN[1] in found else []
    columns = own if found == {OWN[1]} else TABLE + own
    lines = [["model", *(column for column, _, _ in columns), *(["AVG"] if columns != own else [])]]
    notes = []
    for record in records:
        results = record["results"]
        values = [100 * results[task][metric] if task in results else None for _, task, metric in columns]
        if columns != own:
            ten = values[: len(TABLE)]
            values.append(None if None in ten else sum(ten) / len(ten))
        name = record["adapter"] or record["model"]
        lines.append([runs.cell(Path(name).name), *("-" if value is None else f"{value:.2f}" for value in values)])
        for task, metric, note in (
            ("logiqa", "acc_norm", "the paper's LogiQA column may be this"),
            ("tydiqa_release", "f1", "the paper's TyDiQA column is this protocol's"),
        ):
            if task in results:
                notes.append(f"{lines[-1][0]}: {task} {metric} {100 * results[task][metric]:.2f} ({note})")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join(text + notes)


# ----------------------------------------------------------------------------------------------------- the command


def task_names(asked: str) -> list[str]:
    """The tasks that a comma-separated list of tasks and groups means; all: the ten benchmarks of Table 1."""
    names = []
    for name in asked.split(","):
        name = name.strip()
        for part in [task for _, task, _ in TABLE] if name == "all" else [name]:
            if part not in TASKS and part not in GROUPS:
                known = ["all", *(task for _, task, _ in TABLE), *(GROUPS.keys() - {t for _, t, _ in TABLE}), OWN[1]]
                raise UserError(
                    f"--tasks {part!r} is not one of {', '.join(known)}, or one of their parts, such as mmlu_anatomy"
                )
            names += GROUPS[part][0] if part in GROUPS else [part]
    return list(dict.fromkeys(names))


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def weights_key(model: Path, adapter: Path | None) -> list:
    """What tells one set of weights from another without reading it: its files' names, sizes and times."""
    files = [*sorted(model.glob("*.safetensors")), *([adapter / "adapter_model.safetensors"] if adapter else [])]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = runs.ArgumentParser("Evaluate a model on the ten benchmarks of Table 1.")
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="checkpoint: a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of a --model on the hub")
    add("--adapter", action="append", default=[], metavar="DIR",
        help="a LoRA adapter in peft's format, such as a run's folder; give several to evaluate the base and each")
    add = parser.add_argument_group("tasks and data (Appendix A.2)").add_argument
    add("--tasks", default="all",
        help="comma-separated tasks and groups, in the harness's names; all: Table 1's ten. instructions: rows of your "
        "own, DATA/instructions.test.jsonl, in any schema that train.py reads; is the answer to each the right one?")
    add("--data", metavar="DIR", help="folder of <task>.<split>.jsonl files; default: the hub's data sets")
    add("--limit", type=float, metavar="N", help="the first N rows of each task; below 1: this share of them")
    add("--out", metavar="FILE", help="JSON file, rewritten after each task; what it holds already is not run again")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-tokens", type=int, metavar="N",
        help=f"tokens computed at once, and 1/{CACHE_SHARE} of those cached for answers in writing: bounds memory; "
        "default: 1024 on a CPU, 2048 on a GPU")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights and activations")
    add("--device", default="auto", help="as torch names it; auto: a GPU if there is one, else the CPU")
    # fmt: on
    args = parser.parse_args(argv)
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise UserError(f"--limit is {args.limit}; it must be above 0")
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {args.batch_tokens}; it must be at least 1")
    if args.data and not Path(args.data).is_dir():
        raise UserError(f"--data {args.data} is no folder")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    names, device = task_names(args.tasks), runs.start_ranks(args.device)
    reports = runs.first_rank()
    _load.cache_clear()
    batch_tokens = args.batch_tokens or (1024 if device.type == "cpu" else 2048)
    report = runs.Report(Path(args.out) if args.out else None)
    tokenizer = data.load_tokenizer(args.model, args.revision)
    folder = Path(args.data) if args.data else None
    questions = {name: prepare(name, loader(name, folder), tokenizer, args.limit) for name in names}
    model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)

    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the embedding {model.config.vocab_size}"
        raise UserError(f"{args.model}: the tokenizer has {sizes}")

    records = []
    try:
        for adapter in ([None] if len(args.adapter) != 1 else []) + args.adapter:
            if adapter:
                lora.load_adapter(model, adapter)
            head = {"model": args.model, "adapter": adapter, "dtype": args.dtype, "versions": runs.versions()}
            head |= {"data": args.data, "limit": args.limit, "device": str(device)}
            key = digest(weights_key(model.folder, Path(adapter) if adapter else None))
            records.append(report.record(key, head))
            run(model, tokenizer, questions, records[-1], batch_tokens, report.save if reports else lambda: None)
            lora.remove_lora(model)
    except KeyboardInterrupt:
        if reports:
            print(f"stopped; {args.out} holds what is done" if args.out else "stopped", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if reports and records:
            print(table(records))


def run(model, tokenizer, questions: dict[str, Questions], record: dict, batch_tokens: int, save: Callable):
    """Answer the tasks that `record` does not hold yet, one after the other; save() after each.

    Tasks of one group that are answered in writing are answered at once and share their time by `cost`.
    """
    keys = {name: digest(asked.rows, asked.requests) for name, asked in questions.items()}
    left = [name for name in questions if record["keys"].get(name) != keys[name]]
    stale = [*left, *(group for group, (names, _, _) in GROUPS.items() if set(names) & set(left))]
    for name in stale:  # of other rows: not to be read as an answer to these
        for part in ("results", "keys", "timing"):
            record[part].pop(name, None)
    costs = {name: [cost(row) for row in questions[name].requests] for name in left}
    together = {}
    for name in left:
        in_writing = isinstance(questions[name].requests[0][0][1], dict)
        groups = [group for group, (names, _, _) in GROUPS.items() if in_writing and name in names]
        together.setdefault((groups or [name])[0], {})[name] = questions[name]

    total, form = sum(map(sum, costs.values())), "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, disable=not runs.first_rank(), bar_format=form) as bar:
        for title, tasks in together.items():
            bar.set_description(title)
            todo = {name: list(costs[name]) for name in tasks}
            start = time.perf_counter()

            def progress(name, row, todo=todo):
                bar.update(todo[name][row])
                todo[name][row] = 0

            record["results"] |= score(tasks, answer(model, tokenizer, tasks, batch_tokens, progress))
            seconds = time.perf_counter() - start
            bar.update(sum(map(sum, todo.values())))  # other ranks' share
            whole = sum(sum(costs[name]) for name in tasks)
            record["timing"] |= {name: seconds * sum(costs[name]) / whole for name in tasks}
            record["keys"] |= {name: keys[name] for name in tasks}
            record["seconds"] = sum(record["timing"].values())
            add_groups(record["results"])
            save()


def cost(requests: list[tuple]) -> int:
    """About how long one row takes, for the progress bar: the characters to read and, perhaps, to write."""
    written = 500 if isinstance(requests[0][1], dict) else sum(len(continuation) for _, continuation in requests)
    return len(requests[0][0]) + written


if __name__ == "__main__":
    runs.run_script(main)
