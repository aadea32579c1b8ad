"""The ten benchmarks of Table 1, and how to add one: what is asked.

Requests and metrics are those of lm-evaluation-harness 0.4.13, to the letter. A request is one of two. (context,
continuation) is answered by (log P(continuation | context), whether it is the greedy one). (context, {"until": [...]})
is answered by what greedy decoding writes, up to the first of these strings. Data is in benchmarks.json.
"""

import functools
import math
import random
import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from data import conversations, prompt_text
from paper.grading import accuracy, one_of, overlap, same_number, squad_words, stands_in, true_share, tydiqa_words
from support.files import check, read_json
from support.sources import hub_files, read_file

Task = dict  # what a benchmark is:
# "hub":      (data set, configuration or None) on the hub; None: rows of the user's own, in a local folder
# "file":     what its files in a local folder are called, <file>.<split>.jsonl
# "rows":     (load, tokenizer) -> the rows to ask, where load(split) gives a split's rows, in the hub's schema
# "requests": row -> its requests
# "metrics":  row, their answers -> {metric: value}, to be averaged over rows

DATA = read_json(Path(__file__).with_name("benchmarks.json"))
MMLU_SUBJECTS, AGIEVAL_SETS = DATA["mmlu"], DATA["agieval"]
TYDIQA = DATA["tydiqa"]  # code: the language as ids spell it, and what lm-eval calls context, question, answer in it
TYDIQA_RELEASE = DATA["tydiqa_release"]  # code: the word for passage, and the instruction, of open-instruct's prompts


def loader(name: str, folder: Path | None) -> Callable:
    """load(split) -> the rows of a task's split, from <file>.<split>.jsonl in a folder, or from the hub."""
    return functools.partial(_load, TASKS[name]["file"], TASKS[name]["hub"], folder)


@functools.cache
def _load(file: str, hub: tuple | None, folder: Path | None, split: str) -> list[dict]:
    path = f"{file}.{split}.jsonl"
    check(folder or hub, f"--data must name the folder of your own rows, {path}")
    paths = [folder / path] if folder else hub_files(hub[0], split, hub[1])
    rows = [row for path in paths for row in read_file(path)]
    check(rows, f"{paths[0]} has no rows")
    return rows


forget_rows = _load.cache_clear  # so that a command which is run again in one process reads its files again


def questions(file: str, path: str, configuration: str | None, split: str) -> Task:
    """What a task asks about: by default all rows of a split, as they are."""
    return {"hub": (path, configuration), "file": file, "rows": lambda load, tokenizer: load(split)}


def of_language(rows: list[dict], language: str) -> list[dict]:
    found = [row for row in rows if row["id"].startswith(language + "-")]
    check(found, f"no row's id starts with {language}-")
    return found


def multiple_choice(context: Callable, choices: Callable, gold: Callable) -> Task:
    """Asks for the likeliest continuation: context(row), choices(row), gold(row) -> the right ones' indices."""
    return {
        "requests": lambda row: [(context(row), " " + choice) for choice in choices(row)],
        "metrics": lambda row, answers: accuracy(answers, choices(row), gold(row)),
    }


def hellaswag_text(text: str) -> str:
    """WikiHow's markup out: "[title]" ends a sentence, other brackets vanish."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def lettered(options: list[str], strict: bool = False) -> str:
    """Options as lines of text that begin with their letters."""
    return "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=strict))


def mmlu(subject: str) -> Task:
    """One subject of MMLU, 5-shot: each row's examples are the first five of the split dev."""

    def question(row):
        return f"{row['question'].strip()}\n{lettered(row['choices'], strict=True)}Answer:"

    def rows(load, tokenizer):
        examples = load("dev")[:5]
        check(len(examples) == 5, f"the dev split has {len(examples)} rows, 5 examples are needed")
        prefix = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        prefix += "".join(f"{question(row)} {'ABCD'[row['answer']]}\n\n" for row in examples)
        return [row | {"prefix": prefix} for row in load("test")]

    return questions(f"mmlu/{subject}", "cais/mmlu", subject, "test") | {
        "rows": rows,
        "requests": lambda row: [(row["prefix"] + question(row), f" {letter}") for letter in "ABCD"],
        "metrics": lambda row, answers: {"acc": accuracy(answers, list("ABCD"), [row["answer"]])["acc"]},
    }


def tydiqa(code: str) -> Task:
    """TyDiQA's gold passages in one language, 1-shot: each row's example is drawn by a sampler that goes on."""
    language, context, question, answer = TYDIQA[code]

    def prompt(row):
        return f"{context}: {row['context']}\n\n{question}: {row['question']}\n\n{answer}:"

    def rows(load, tokenizer):
        sampler, examples = random.Random(1234), of_language(load("train"), language)
        return [row | {"example": sampler.sample(examples, 1)[0]} for row in of_language(load("validation"), language)]

    def requests(row):
        shot = f"{prompt(row['example'])} {row['example']['answers']['text'][0]}\n\n"
        return [(shot + prompt(row), {"until": ["\n"]})]

    def metrics(row, answers):
        return overlap(answers[0].strip(), row["answers"]["text"], lambda text: tydiqa_words(text, code))

    asked = questions("tydiqa", "google-research-datasets/tydiqa", "secondary_task", "validation")
    return asked | {"rows": rows, "requests": requests, "metrics": metrics}


def tydiqa_release(code: str) -> Task:
    """TyDiQA as the authors' release asks it: the same example for all, passages of at most 512 tokens, SQuAD's F1."""
    language, _, question, answer = TYDIQA[code]
    passage, instruction = TYDIQA_RELEASE[code]

    def prompt(row, tokenizer):
        ids = tokenizer.encode(row["context"])[0]
        context = tokenizer.decode(ids[:512]) if len(ids) > 512 else row["context"]
        return f"{passage}: {context}\n{question}: {row['question']}\n{answer}:"

    def rows(load, tokenizer):
        sampler, languages = random.Random(42), sorted(names[0] for names in TYDIQA.values())
        drawn = {name: sampler.sample(of_language(load("train"), name), 1)[0] for name in languages}
        shot = drawn[language]  # one generator draws for all languages, in alphabetical order
        start = f"{instruction}\n\n{prompt(shot, tokenizer)} {shot['answers']['text'][0]}\n\n"
        return [row | {"prompt": start + prompt(row, tokenizer)} for row in of_language(load("validation"), language)]

    return tydiqa(code) | {
        "rows": rows,
        "requests": lambda row: [(row["prompt"], {"until": ["\n"], "max_gen_toks": 50})],
        "metrics": lambda row, answers: overlap(answers[0].strip(), row["answers"]["text"], squad_words),
    }


def instructions_rows(load: Callable, tokenizer) -> list[dict]:
    """Rows of any schema that train.py reads, each as a prompt in its template and what should follow.

    A column "answer" names the part of the output that counts; without one, all of it does.
    """
    rows = load("test")
    found = conversations(rows, "instructions")
    fits = len(found) == len(rows) and all(turns and turns[-1]["role"] == "assistant" for turns in found)
    check(fits, "every row must be one conversation that ends with the answer that is asked for")
    whole = {"whole": True} if tokenizer.template else {}  # the checkpoint's own template says itself where BOS is
    graded = []
    for number, (row, turns) in enumerate(zip(rows, found, strict=True), 1):
        output, answer = turns[-1]["content"], row.get("answer")
        check(
            type(answer) in (type(None), str, int, float), f"row {number}: its answer {answer!r} is no text or number"
        )
        answer = None if answer is None else str(answer).strip()
        check(output.strip() if answer is None else answer, f"row {number}: its answer is empty")
        graded.append({"prompt": prompt_text(turns[:-1], tokenizer), "output": output, "answer": answer} | whole)
    return graded


def instructions_metrics(row: dict, answers: list[str]) -> dict[str, float]:
    """Was the row's output written? If the row names an answer: does that stand in what was written?"""
    written, answer = answers[0].strip(), row["answer"]
    right = written == row["output"].strip() if answer is None else stands_in(answer, written)
    return {"exact_match": float(right)}


TRUTHFULQA = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in DATA["truthfulqa"])
ARC = multiple_choice(
    context=lambda row: f"Question: {row['question']}\nAnswer:",
    choices=lambda row: row["choices"]["text"],
    gold=lambda row: [row["choices"]["label"].index(row["answerKey"])],
)
AGIEVAL = multiple_choice(*map(itemgetter, ("query", "choices", "gold")))
AGIEVAL_WRITTEN = {
    "requests": lambda row: [(row["query"], {"until": ["Q:"], "max_gen_toks": 32})],
    "metrics": lambda row, answers: {"acc": float(same_number(answers[0], str(row["answer"])))},
}
# Tasks that ask every row of a split; benchmarks.json names it
FUNCTIONS: dict[str, Task] = {
    "triviaqa": {
        "requests": lambda row: [(f"Question: {row['question']}?\nAnswer:", {"until": ["\n", ".", ","]})],
        "metrics": lambda row, answers: {"exact_match": one_of(answers[0].strip(), row["answer"]["aliases"])},
    },
    "truthfulqa_mc2": {
        "requests": lambda row: [
            (f"{TRUTHFULQA}Q: {row['question']}\nA:", " " + choice) for choice in row["mc2_targets"]["choices"]
        ],
        "metrics": lambda row, answers: {"acc": true_share(answers, row["mc2_targets"]["labels"])},
    },
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "winogrande": {  # partial evaluation: the option goes into the context, the rest of the sentence is scored
        "requests": lambda row: [
            (row["sentence"].partition("_")[0] + row[option], " " + row["sentence"].partition("_")[2].strip())
            for option in ("option1", "option2")
        ],
        "metrics": lambda row, answers: {"acc": accuracy(answers, ["-", "-"], [int(row["answer"]) - 1])["acc"]},
    },
    "hellaswag": multiple_choice(
        context=lambda row: hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
        choices=lambda row: [hellaswag_text(ending) for ending in row["endings"]],
        gold=lambda row: [int(row["label"])],
    ),
    "logiqa": multiple_choice(
        context=lambda row: (
            f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n{lettered(row['options'])}Answer:"
        ),
        choices=lambda row: row["options"],
        gold=lambda row: ["abcd".index(row["label"].strip())],
    ),
}
TASKS: dict[str, Task] = {
    **{name: questions(name, *DATA["splits"][name]) | functions for name, functions in FUNCTIONS.items()},
    **{f"mmlu_{subject}": mmlu(subject) for subject in MMLU_SUBJECTS},
    **{
        f"agieval_{name.replace('-', '_')}": questions(f"agieval/{name}", f"hails/agieval-{name}", None, "test")
        | (AGIEVAL_WRITTEN if name in ("gaokao-mathcloze", "math") else AGIEVAL)
        for name in AGIEVAL_SETS
    },
    **{f"tydiqa_goldp_{code}": tydiqa(code) for code in TYDIQA},
    **{f"tydiqa_release_{code}": tydiqa_release(code) for code in TYDIQA},
    "instructions": {
        "hub": None,
        "file": "instructions",
        "rows": instructions_rows,
        "requests": lambda row: [(row["prompt"], {"until": []} | ({"whole": True} if "whole" in row else {}))],
        "metrics": instructions_metrics,
    },
}

# group: its tasks, its metrics, and whether tasks count by their number of rows
GROUPS = {
    group: ([name for name in TASKS if name.startswith(start)], metrics, weighted)
    for group, (start, metrics, weighted) in DATA["groups"].items()
}
TABLE = DATA["table"]  # Table 1's columns: the name there, the task or group, the metric of Appendix A.2
OWN_ROWS = ("own rows", "instructions", "exact_match")  # a column beside those


def add_groups(results: dict[str, dict]):
    """Add the groups of which every task has its result: weighted by rows (pooled standard error), or a plain mean."""
    for group, (names, metrics, weighted) in GROUPS.items():
        if not results.keys() >= {*names}:
            continue
        parts, score = [results[name] for name in names], {}
        sizes = [part["n"] for part in parts]
        weights = sizes if weighted else [1] * len(parts)
        for metric in metrics:
            score[metric] = sum(part[metric] * w for part, w in zip(parts, weights, strict=True)) / sum(weights)
            errors, error = [part[metric + "_stderr"] for part in parts], None
            if weighted and None not in errors:
                total = sum((n - 1) * e**2 * n for n, e in zip(sizes, errors, strict=True)) / (sum(sizes) - len(sizes))
                error = math.sqrt(total / sum(sizes))
            elif None not in errors:
                error = math.sqrt(sum(e**2 for e in errors)) / len(errors)
            score[metric + "_stderr"] = error
        results[group] = score | {"n": sum(sizes)}


def task_names(asked: str) -> list[str]:
    """The tasks that a comma-separated list of tasks and groups means; all: the ten benchmarks of Table 1."""
    parts = {name: [name] for name in TASKS} | {group: names for group, (names, _, _) in GROUPS.items()}
    table, found = [task for _, task, _ in TABLE], []
    parts["all"] = [name for task in table for name in parts[task]]
    for name in map(str.strip, asked.split(",")):
        known = ", ".join(["all", *dict.fromkeys([*table, *GROUPS]), OWN_ROWS[1]])
        check(name in parts, f"--tasks {name!r} is not one of {known}, or one of their parts, such as mmlu_anatomy")
        found += parts[name]
    return list(dict.fromkeys(found))
