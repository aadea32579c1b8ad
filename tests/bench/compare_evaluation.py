"""Both evaluators on a folder of real rows: every request, answer and metric compared, and both times.

    python tests/bench/compare_evaluation.py --model DIR --data DIR [--tasks all] [--limit N] [--dtype float32]
        [--keep FILE]

DIR holds <file>.<split>.jsonl as evaluate.py --data reads it. First the harness, one benchmark after the other, then
ours, on the same threads. --keep: a JSON file with the harness's side, which is slow: what it holds is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))

import torch
from harness import Harness, differences, metric_differences

import evaluate
from lora import load_adapter
from model import load_model
from paper import benchmarks
from paper.benchmarks import TABLE
from support import machine, packing
from support.files import write_json
from support.tokenizer import load_tokenizer

FAMILIES = {"generation": ("triviaqa", "tydiqa"), "one-token choices": ("mmlu",)}  # the others: several tokens


def ours(model, tokenizer, questions: dict, batch_tokens: int) -> dict:
    """Our results, answers and seconds on the tasks of one benchmark."""
    start = time.perf_counter()
    answers = evaluate.answer(model, tokenizer, questions, batch_tokens)
    results = evaluate.score(questions, answers)
    seconds = time.perf_counter() - start
    benchmarks.add_groups(results)
    return {"results": results, "answers": answers, "seconds": seconds}


def tokens_to_process(model, tokenizer, questions: dict, answers: dict, batch_size: int) -> tuple[int, int]:
    """The fewest tokens that can answer one benchmark, padding left out: our way, and the harness's.

    The harness reads a context once for each choice (once for all choices of one token), and writes in each batch of
    answers as many tokens as the longest takes.
    """
    least = theirs = 0
    for task, asked in questions.items():
        requests = [request for row in asked.requests for request in row]
        pairs = [request for request in requests if isinstance(request[1], str)]
        texts = [answer[0] for answer in answers[task]] if not pairs else []
        if pairs:
            scored = packing.encode_pairs(tokenizer, pairs, model.config.max_position_embeddings)
            prefix = len(packing.shared_prefix(scored))
            trees = packing.plant(scored, prefix, packing.price_ratio(model.config))
            least += prefix + sum(len(tree.ids) for tree in trees)
            theirs += sum(len(inputs) for inputs in {tuple(s.inputs) for s in scored})
        lengths = []
        for (context, settings), text in zip(requests if texts else [], texts, strict=True):
            prompt, answer = tokenizer.encode_prompts([context, text])
            lengths.append((len(prompt), min(len(answer) + 1, settings.get("max_gen_toks", evaluate.MAX_NEW_TOKENS))))
        lengths.sort(reverse=True)
        least += sum(map(sum, lengths))
        for start in range(0, len(lengths), batch_size):
            batch = lengths[start : start + batch_size]
            theirs += sum(prompt for prompt, _ in batch) + len(batch) * max(answer for _, answer in batch)
    return least, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--tasks", default=",".join(task for _, task, _ in TABLE))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8, help="the harness's")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="ours")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()

    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    harness, names = None, args.tasks.split(",")
    for name in names:
        if name not in kept:
            harness = harness or Harness(args.model, args.data, args.dtype, args.batch_size, args.adapter)
            kept[name] = harness.run(name, args.limit)
            if args.keep:
                write_json(args.keep, kept)
    del harness

    machine.reuse_memory()  # as evaluate.py does
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, getattr(torch, args.dtype))
    if args.adapter:
        load_adapter(model, args.adapter)
    times, wrong = {}, []
    print("| benchmark | metric | rows | ours | lm-eval | seconds | lm-eval | ratio | tokens | lm-eval | ratio |")
    print("|---|---|" + "---:|" * 9)
    for name in names:
        questions = {
            task: evaluate.prepare(task, benchmarks.loader(task, args.data), tokenizer, args.limit)
            for task in benchmarks.task_names(name)
        }
        theirs, mine = kept[name], ours(model, tokenizer, questions, args.batch_tokens)
        least, naive = tokens_to_process(model, tokenizer, questions, mine["answers"], args.batch_size)
        for task, asked in questions.items():
            wrong += differences(task, asked.requests, mine["answers"][task], theirs["samples"][task])
        wrong += metric_differences(mine["results"], theirs["results"])
        times[name] = (mine["seconds"], theirs["seconds"])
        metric = next(m for _, task, m in TABLE if task == name)
        score = mine["results"][name]
        there = theirs["results"].get(name) or plain_mean(theirs["results"], metric)
        cells = [name, metric, score["n"], f"{100 * score[metric]:.2f}", f"{100 * there[metric]:.2f}"]
        cells += [f"{mine['seconds']:.1f}", f"{theirs['seconds']:.1f}", f"{theirs['seconds'] / mine['seconds']:.1f}"]
        cells += [f"{least:,}", f"{naive:,}", f"{naive / least:.1f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    groups = {family: [n for n in names if n in times] for family, names in FAMILIES.items()}
    groups["choices of several tokens"] = [n for n in times if not any(n in names for names in FAMILIES.values())]
    for family, names in {**groups, "all": list(times)}.items():
        if names:
            mine, there = (sum(times[n][side] for n in names) for side in (0, 1))
            print(f"{family}: {mine:.0f} s, lm-eval {there:.0f} s, ratio {there / mine:.2f}")
    print(f"{len(wrong)} differences", *wrong[:20], sep="\n")
    sys.exit(bool(wrong))


def plain_mean(results: dict, metric: str) -> dict:
    return {metric: sum(scores[metric] for scores in results.values()) / len(results)}


if __name__ == "__main__":
    main()
