"""The ten benchmarks of Table 1, and how to add one: what is asked, and how an answer is graded.

Requests and metrics are those of lm-evaluation-harness 0.4.13, to the letter. A request is (context, continuation),
answered by (log P(continuation | context), whether it is the greedy one), or (context, {"until": [...], ...}),
answered by the text that greedy decoding writes up to the first of these strings.
"""

import functools
import math
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import conversations, prompt_text
from support.files import UserError
from support.sources import hub_files, read_file

Row = dict  # one question, in the schema of its hub data set
Task = dict
"""What a benchmark is:

"hub":      (data set, configuration or None) on the hub; None: rows of the user's own, in a local folder
"file":     what its files in a local folder are called, <file>.<split>.jsonl
"rows":     (load, tokenizer) -> the rows to ask, where load(split) gives the rows of a split
"requests": row -> its requests
"metrics":  row, their answers -> {metric: value}, to be averaged over rows
"""


# ------------------------------------------------------------------------------------------------ several choices


def split(name: str) -> Callable:
    """Ask every row of one split, as it is."""
    return lambda load, tokenizer: load(name)


def accuracy(answers: list, choices: list[str], gold: list[int]) -> dict[str, float]:
    """Is the likeliest choice in `gold`, the right ones (acc)? And the likeliest per character (acc_norm)?"""
    likelihood = np.array([log_p for log_p, _ in answers])
    with np.errstate(divide="ignore", invalid="ignore"):
        per_character = likelihood / np.array([float(len(choice)) for choice in choices])
    return {"acc": float(likelihood.argmax() in gold), "acc_norm": float(per_character.argmax() in gold)}


def multiple_choice(file, hub, rows, context, choices, gold, metrics=("acc", "acc_norm")) -> Task:
    """A task whose answer is the likeliest continuation: context(row), choices(row), gold(row) -> indices."""

    def grade(row, answers):
        scores = accuracy(answers, choices(row), gold(row))
        return {metric: scores[metric] for metric in metrics}

    def requests(row):
        return [(context(row), " " + choice) for choice in choices(row)]

    return {"hub": hub, "file": file, "rows": rows, "requests": requests, "metrics": grade}


def arc(name: str, configuration: str) -> Task:
    return multiple_choice(
        name,
        ("allenai/ai2_arc", configuration),
        split("test"),
        context=lambda row: f"Question: {row['question']}\nAnswer:",
        choices=lambda row: row["choices"]["text"],
        gold=lambda row: [row["choices"]["label"].index(row["answerKey"])],
    )


def hellaswag_text(text: str) -> str:
    """WikiHow's markup out: "[title]" ends a sentence, other brackets vanish."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


HELLASWAG = multiple_choice(
    "hellaswag",
    ("Rowan/hellaswag", None),
    split("validation"),
    context=lambda row: hellaswag_text(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
    choices=lambda row: [hellaswag_text(ending) for ending in row["endings"]],
    gold=lambda row: [int(row["label"])],
)

LOGIQA = multiple_choice(
    "logiqa",
    ("EleutherAI/logiqa", "logiqa"),
    split("test"),
    context=lambda row: (
        f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n"
        + "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", row["options"], strict=False))
        + "Answer:"
    ),
    choices=lambda row: row["options"],
    gold=lambda row: ["abcd".index(row["label"].strip())],
)


def winogrande_requests(row: Row) -> list:
    """Partial evaluation: the option goes into the context, and what is scored is the rest of the sentence."""
    before, _, after = row["sentence"].partition("_")
    return [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]


def winogrande_metrics(row: Row, answers: list) -> dict[str, float]:
    return {"acc": accuracy(answers, ["-", "-"], [int(row["answer"]) - 1])["acc"]}


TRUTHFULQA_PRIMER = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


def truthfulqa_requests(row: Row) -> list:
    context = f"{TRUTHFULQA_PRIMER}\n\nQ: {row['question']}\nA:"
    return [(context, " " + choice) for choice in row["mc2_targets"]["choices"]]


def truthfulqa_metrics(row: Row, answers: list) -> dict[str, float]:
    """MC2: the share of the choices' total probability that is on the true ones."""
    log_p = np.array([log_p for log_p, _ in answers])
    probability = np.exp(log_p - log_p.max())  # so that not all of them are too small to be told from zero
    return {"acc": float((probability / probability.sum())[np.array(row["mc2_targets"]["labels"]) == 1].sum())}


MMLU_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions
""".split()


def mmlu(subject: str, shots: int = 5) -> Task:
    def question(row):
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{choices}Answer:"

    def rows(load, tokenizer):
        examples = load("dev")[:shots]
        if len(examples) < shots:
            raise UserError(f"the dev split has {len(examples)} rows, {shots} examples are needed")
        about = subject.replace("_", " ")
        prefix = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        prefix += "".join(f"{question(row)} {'ABCD'[row['answer']]}\n\n" for row in examples)
        return [row | {"prefix": prefix} for row in load("test")]

    return multiple_choice(
        f"mmlu/{subject}",
        ("cais/mmlu", subject),
        rows,
        context=lambda row: row["prefix"] + question(row),
        choices=lambda row: list("ABCD"),
        gold=lambda row: [row["answer"]],
        metrics=("acc",),
    )


# --------------------------------------------------------------------------------------------------- written answers


def triviaqa_metrics(row: Row, answers: list[str]) -> dict[str, float]:
    """Is the answer one of the aliases, but for case and punctuation?"""

    def plain(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation))

    answer = plain(answers[0].strip())
    return {"exact_match": float(any(plain(alias) == answer for alias in row["answer"]["aliases"]))}


def overlap(prediction: str, answers: list[str], normalize: Callable[[str], str]) -> dict[str, float]:
    """SQuAD's exact match, and F1 of the words in common, with whichever of the right answers is nearest."""

    def f1(predicted, truth):
        if not (same := sum((Counter(predicted) & Counter(truth)).values())):
            return 0.0
        precision, recall = same / len(predicted), same / len(truth)
        return 2 * precision * recall / (precision + recall)

    predicted, right = normalize(prediction).split(), [normalize(answer).split() for answer in answers]
    return {
        "exact_match": max(float(predicted == words) for words in right),
        "f1": max(f1(predicted, words) for words in right),
    }


def without_punctuation(text: str) -> str:
    return "".join(c for c in text if not unicodedata.category(c).startswith("P") and c not in string.punctuation)


# code: the language as ids spell it, and what lm-eval calls context, question and answer in it
TYDIQA = {
    "ar": ("arabic", "السياق", "السؤال", "الإجابة"),
    "bn": ("bengali", "প্রসঙ্গ", "প্রশ্ন", "উত্তর"),
    "en": ("english", "Context", "Question", "Answer"),
    "fi": ("finnish", "Konteksti", "Kysymys", "Vastaus"),
    "id": ("indonesian", "Konteks", "Pertanyaan", "Jawaban"),
    "ko": ("korean", "맥락", "질문", "답변"),
    "ru": ("russian", "Контекст", "Вопрос", "Ответ"),
    "sw": ("swahili", "Muktadha", "Swali", "Jibu"),
    "te": ("telugu", "సందర్భం", "ప్రశ్న", "సమాధానం"),
}
TYDIQA_HUB = ("google-research-datasets/tydiqa", "secondary_task")


def of_language(rows: list[Row], language: str) -> list[Row]:
    found = [row for row in rows if row["id"].startswith(language + "-")]
    if not found:
        raise UserError(f"no row's id starts with {language}-")
    return found


def tydiqa(code: str) -> Task:
    """TyDiQA's gold passages in one language, 1-shot: each row's example is drawn by a sampler that goes on."""
    language, *labels = TYDIQA[code]

    def rows(load, tokenizer):
        sampler, examples = random.Random(1234), of_language(load("train"), language)
        return [row | {"example": sampler.sample(examples, 1)[0]} for row in of_language(load("validation"), language)]

    def question(row):
        context, question, answer = labels
        return f"{context}: {row['context']}\n\n{question}: {row['question']}\n\n{answer}:"

    def requests(row):
        example = row["example"]
        context = f"{question(example)} {example['answers']['text'][0]}\n\n{question(row)}"
        return [(context, {"until": ["\n"]})]

    def normalize(text):
        articles = {"en": r"\b(a|an|the)\b", "ar": r"(?:^|\s)ال"}.get(code)
        text = without_punctuation(text.lower())
        return re.sub(articles, " ", text) if articles else text

    def metrics(row, answers):
        return overlap(answers[0].strip(), row["answers"]["text"], normalize)

    return {"hub": TYDIQA_HUB, "file": "tydiqa", "rows": rows, "requests": requests, "metrics": metrics}


# the word for passage, and the instruction, in the prompts of open-instruct, which the authors' release runs
TYDIQA_RELEASE = {
    "ar": ("المقطع", "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى."),
    "bn": ("অধ্যায়", "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।"),
    "en": ("Passage", "Answer the following question based on the information in the given passage."),
    "fi": ("Kappale", "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella."),
    "id": ("Bagian", "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan."),
    "ko": ("문단", "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오."),
    "ru": ("Отрывок", "Ответьте на следующий вопрос на основе информации в данном отрывке."),
    "sw": ("Kifungu", "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa."),
    "te": ("పేరా", "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి."),
}


def cut(text: str, tokenizer, tokens: int) -> str:
    ids = tokenizer.encode(text)[0]
    return tokenizer.decode(ids[:tokens]) if len(ids) > tokens else text


def release_example(rows: list[Row], language: str) -> Row:
    """The release's example of a language: one generator draws one for each, the languages in alphabetical order."""
    sampler, names = random.Random(42), sorted(names[0] for names in TYDIQA.values())
    drawn = [sampler.sample(of_language(rows, name), 1)[0] for name in names[: names.index(language) + 1]]
    return drawn[-1]


def squad_words(text: str) -> str:
    return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation))


def tydiqa_release(code: str) -> Task:
    """TyDiQA as the authors' release asks it: the same example for all, passages of at most 512 tokens, SQuAD's F1."""
    language, _, question, answer = TYDIQA[code]
    passage, instruction = TYDIQA_RELEASE[code]

    def prompt(row, tokenizer):
        context = cut(row["context"], tokenizer, 512)
        return f"{passage}: {context}\n{question}: {row['question']}\n{answer}:"

    def rows(load, tokenizer):
        shot = release_example(load("train"), language)
        start = f"{instruction}\n\n{prompt(shot, tokenizer)} {shot['answers']['text'][0]}\n\n"
        return [row | {"prompt": start + prompt(row, tokenizer)} for row in of_language(load("validation"), language)]

    return tydiqa(code) | {
        "rows": rows,
        "requests": lambda row: [(row["prompt"], {"until": ["\n"], "max_gen_toks": 50})],
        "metrics": lambda row, answers: overlap(answers[0].strip(), row["answers"]["text"], squad_words),
    }


# ------------------------------------------------------------------------------------------------------- AGIEval

AGIEVAL_SETS = """
gaokao-biology gaokao-chemistry gaokao-chinese gaokao-geography gaokao-history gaokao-mathcloze gaokao-mathqa
gaokao-physics jec-qa-ca jec-qa-kd logiqa-zh aqua-rat gaokao-english logiqa-en lsat-ar lsat-lr lsat-rc math
sat-en-without-passage sat-en sat-math
""".split()


def agieval(name: str) -> Task:
    file, hub, rows = f"agieval/{name}", (f"hails/agieval-{name}", None), split("test")
    if name not in ("gaokao-mathcloze", "math"):
        context, choices, gold = (lambda row, key=key: row[key] for key in ("query", "choices", "gold"))
        return multiple_choice(file, hub, rows, context, choices, gold)
    return {
        "hub": hub,
        "file": file,
        "rows": rows,
        "requests": lambda row: [(row["query"], {"until": ["Q:"], "max_gen_toks": 32})],
        "metrics": lambda row, answers: {"acc": float(same_number(answers[0], str(row["answer"])))},
    }


def same_number(text: str, gold: str) -> bool:
    """Do two texts end in the same mathematical answer, in AGIEval's reading of both?"""
    found = [final_answer(text), final_answer(gold)]
    try:
        return plain_latex(found[0]) == plain_latex(found[1])
    except (AttributeError, IndexError, ValueError):  # one holds no answer, or LaTeX that cannot be read
        return found[0] == found[1]


def final_answer(text: str) -> str | None:
    """What stands in the last \\boxed{}, else in the last $...$, else after the last =, else the last number."""

    def right_side(formula):
        return formula.split("=")[-1].lstrip(" ") if "=" in formula else formula

    if "\\boxed" in text:
        box, depth = text[text.rfind("\\boxed") :], 0
        for end, character in enumerate(box):
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return right_side(box[7:end]) if box.startswith("\\boxed{") else None
        return None
    if (formulas := re.findall(r"\$(.*)\$", text)) and (answer := right_side(formulas[-1])):
        return answer
    if "=" in text:
        return right_side(text).rstrip(".").split("\\n")[0]
    numbers = re.findall(r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])", text)
    return numbers[-1] if numbers else None


def plain_latex(text: str) -> str:
    """One spelling for formulas that mean the same. Raises ValueError or IndexError for what it cannot read."""
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
        ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    if "\\text{ " in text:  # a unit, on the right
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    if text.count("=") == 1 and text.index("=") <= 2:  # "k = 3"
        text = text.split("=")[1]
    head, *roots = text.split("\\sqrt")
    text = head + "".join("\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots)
    text = braced_fractions(text.replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    if re.fullmatch(r"-?\d+/-?\d+", text):
        above, below = (int(number) for number in text.split("/"))
        return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
    return text


def braced_fractions(text: str) -> str:
    """\\frac12 and \\frac1{2} as \\frac{1}{2}; the text as it is where a numerator stands alone."""
    head, *fractions = text.split("\\frac")
    for fraction in fractions:
        head += "\\frac"
        if fraction[0] == "{":
            head += fraction
        elif len(fraction) < 2:
            return text
        else:
            above, below, rest = fraction[0], fraction[1], fraction[2:]
            head += f"{{{above}}}{below}{rest}" if below == "{" else f"{{{above}}}{{{below}}}{rest}"
    return head


# -------------------------------------------------------------------------------------------------- your own rows


def instructions_rows(load: Callable, tokenizer) -> list[Row]:
    """Rows of any schema that train.py reads, each as a prompt in its template and what should follow.

    A row may have a column "answer", the part of the output that counts; otherwise all of it does.
    """
    rows = load("test")
    found = conversations(rows, "instructions")
    if len(found) != len(rows) or not all(turns and turns[-1]["role"] == "assistant" for turns in found):
        raise UserError("every row must be one conversation that ends with the answer that is asked for")
    graded = []
    for number, (row, turns) in enumerate(zip(rows, found, strict=True), 1):
        output, answer = turns[-1]["content"], row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise UserError(f"row {number}: its answer is {type(answer).__name__}, no text or number")
        answer = None if answer is None else str(answer).strip()
        if not (output.strip() if answer is None else answer):
            raise UserError(f"row {number}: its answer is empty, which anything would match")
        whole = {"whole": True} if tokenizer.template else {}  # the checkpoint's own template says itself where BOS is
        graded.append({"prompt": prompt_text(turns[:-1], tokenizer), "output": output, "answer": answer} | whole)
    return graded


# Scripts that are written without spaces, or whose words carry endings: kana, Han, Hangul, Thai, Lao, Burmese, Khmer
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def of_a_word(character: str) -> bool:
    """Whether a character belongs to a word or a number, of a script that has spaces between them."""
    kind = unicodedata.category(character)[0]
    return kind in "LNM" and not SPACELESS.match(character)


def go_on(left: str, right: str) -> bool:
    """Whether a word or a number goes on from one text to the next: from "7" to "2", from "3." to "5"."""
    if left and right and of_a_word(left[-1]) and of_a_word(right[0]):
        return True
    number = re.search(r"\d[.,]$", left) and re.match(r"\d", right)
    return bool(number or re.search(r"\d$", left) and re.match(r"[.,]\d", right))


def stands_in(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text` as whole words or numbers, whatever punctuation is around it.

    "7" is no part of "72", nor "3.5" of "3.50", nor "5" of "-5", and a list, such as "1, 2", does not stand in a longer
    one. Between characters of scripts without spaces, such as Chinese, any place counts.
    """
    place = text.find(answer)
    while place >= 0:
        before, after = text[:place], text[place + len(answer) :]
        signed = re.search(r"(?<![\w)])[-\u2212]$", before) and re.match(r"\d", answer)
        signed = signed or re.search(r"\w$", before) and re.match(r"[-\u2212]\d", answer)
        longer = "," in answer and (re.match(r",\s?[\w-]+([.,;:!?]|$)", after) or re.search(r",\s?$", before))
        if not (signed or longer or go_on(before, answer) or go_on(answer, after)):
            return True
        place = text.find(answer, place + 1)
    return False


def instructions_metrics(row: Row, answers: list[str]) -> dict[str, float]:
    """Is what was written the row's output? Or, where the row names an answer, does that stand in it (`stands_in`)?"""
    written, answer = answers[0].strip(), row["answer"]
    right = written == row["output"].strip() if answer is None else stands_in(answer, written)
    return {"exact_match": float(right)}


INSTRUCTIONS: Task = {
    "hub": None,
    "file": "instructions",
    "rows": instructions_rows,
    "requests": lambda row: [(row["prompt"], {"until": []} | ({"whole": True} if "whole" in row else {}))],
    "metrics": instructions_metrics,
}


# --------------------------------------------------------------------------------------------------- all of them

TASKS: dict[str, Task] = {
    "triviaqa": {
        "hub": ("mandarjoshi/trivia_qa", "rc.nocontext"),
        "file": "triviaqa",
        "rows": split("validation"),
        "requests": lambda row: [(f"Question: {row['question']}?\nAnswer:", {"until": ["\n", ".", ","]})],
        "metrics": triviaqa_metrics,
    },
    "truthfulqa_mc2": {
        "hub": ("truthfulqa/truthful_qa", "multiple_choice"),
        "file": "truthfulqa_mc2",
        "rows": split("validation"),
        "requests": truthfulqa_requests,
        "metrics": truthfulqa_metrics,
    },
    **{f"mmlu_{subject}": mmlu(subject) for subject in MMLU_SUBJECTS},
    "arc_challenge": arc("arc_challenge", "ARC-Challenge"),
    "arc_easy": arc("arc_easy", "ARC-Easy"),
    **{f"tydiqa_goldp_{code}": tydiqa(code) for code in TYDIQA},
    "winogrande": {
        "hub": ("allenai/winogrande", "winogrande_xl"),
        "file": "winogrande",
        "rows": split("validation"),
        "requests": winogrande_requests,
        "metrics": winogrande_metrics,
    },
    "hellaswag": HELLASWAG,
    "logiqa": LOGIQA,
    **{f"agieval_{name.replace('-', '_')}": agieval(name) for name in AGIEVAL_SETS},
    **{f"tydiqa_release_{code}": tydiqa_release(code) for code in TYDIQA},
    "instructions": INSTRUCTIONS,
}


def _names(prefix: str) -> list[str]:
    return [name for name in TASKS if name.startswith(prefix)]


# group: its tasks, its metrics, and whether a task counts by its number of rows
GROUPS = {
    "mmlu": (_names("mmlu_"), ("acc",), True),
    "tydiqa": (_names("tydiqa_goldp_"), ("exact_match", "f1"), False),
    "agieval": (_names("agieval_"), ("acc",), True),
    "tydiqa_release": (_names("tydiqa_release_"), ("exact_match", "f1"), False),
}

# Table 1's columns: the name there, the task or group, the metric of Appendix A.2
TABLE = [
    ("TriviaQA", "triviaqa", "exact_match"),
    ("TruthfulQA", "truthfulqa_mc2", "acc"),
    ("MMLU", "mmlu", "acc"),
    ("ARC-C", "arc_challenge", "acc"),
    ("ARC-E", "arc_easy", "acc"),
    ("TyDiQA", "tydiqa", "f1"),
    ("Wino", "winogrande", "acc"),
    ("HS", "hellaswag", "acc"),
    ("LogiQA", "logiqa", "acc"),
    ("AGIEval", "agieval", "acc"),
]
OWN = ("own rows", "instructions", "exact_match")  # a column beside those


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


# ------------------------------------------------------------------------------------------------- rows and names


def loader(name: str, folder: Path | None) -> Callable:
    """load(split) -> the rows of a task's split, from <file>.<split>.jsonl in a folder, or from the hub."""
    return functools.partial(_load, TASKS[name]["file"], TASKS[name]["hub"], folder)


@functools.cache
def _load(file: str, hub: tuple | None, folder: Path | None, split: str) -> list[dict]:
    if not (folder or hub):
        raise UserError(f"rows of your own are asked about: name the folder that holds {file}.{split}.jsonl by --data")
    paths = [folder / f"{file}.{split}.jsonl"] if folder else hub_files(hub[0], split, hub[1])
    rows = [row for path in paths for row in read_file(path)]
    if not rows:
        raise UserError(f"{paths[0]} has no rows")
    return rows


forget_rows = _load.cache_clear  # so that a command which is run again in one process reads its files again


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
