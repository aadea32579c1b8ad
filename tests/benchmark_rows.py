"""Small rows for every benchmark, in the schemas of the hub's data sets, with what evaluators tend to trip over."""

import json
import random
from pathlib import Path

from paper.benchmarks import AGIEVAL_SETS, MMLU_SUBJECTS, TYDIQA

WORDS = (
    "the quick brown fox, colours: [x]  and 45 dogs é 日本 <|end_of_text|> jump; two plus two is four \U0001f44d".split(
        " "
    )
)
CLOZE = ("$x=3$", "\\boxed{\\frac12}", "7", "$\\sqrt3$", "(0, 1]")


def write_benchmarks(folder: Path, rows: int = 2):
    """Rows for each task that evaluate.py --data reads: sentences of random words, seeded."""
    rng = random.Random(7)

    def text(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    def write(name, made):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")

    def several(make, count=rows):
        return [make(i) for i in range(count)]

    def arc(i):
        labels = "1234" if i % 2 else "ABCDE"
        choices = {"text": [text(1, 4) for _ in labels], "label": list(labels)}
        return {"id": str(i), "question": text(4, 9), "choices": choices, "answerKey": rng.choice(labels)}

    write("arc_easy.test", several(arc, 4))
    write("arc_challenge.test", several(arc, 4))
    write(
        "hellaswag.validation",
        several(
            lambda i: {
                "activity_label": "Baking [step] cakes",
                "ctx_a": text(3, 8) + " [title]",
                "ctx_b": ["", "she"][i % 2],
                "endings": [f" [substeps] {text(2, 6)}  [title] end." for _ in range(4)],
                "label": str(rng.randrange(4)),
            },
            4,
        ),
    )
    write(
        "winogrande.validation",
        several(
            lambda i: {
                "sentence": ["_ " + text(3, 6) + ".", text(3, 6) + " _ " + text(2, 5) + " ."][i % 2],
                "option1": "Sarah",
                "option2": "the dog",
                "answer": rng.choice("12"),
            },
            4,
        ),
    )
    write(
        "logiqa.test",
        several(
            lambda i: {
                "label": " abcd"[1 + i % 4],
                "context": text(10, 20),
                "question": text(3, 6),
                "options": [text(1, 5) for _ in range(4)],
            },
            4,
        ),
    )
    write(
        "truthfulqa_mc2.validation",
        several(
            lambda i: {
                "question": text(3, 6),
                "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
                "mc2_targets": {"choices": [text(1, 5) for _ in range(3 + i)], "labels": [1, 0, 1, 0, 0, 1][: 3 + i]},
            },
            4,
        ),
    )
    write(
        "triviaqa.validation",
        several(lambda i: {"question": text(3, 9), "answer": {"aliases": [text(1, 1), "The Fox", "fox."]}}, 10),
    )
    for subject in MMLU_SUBJECTS:

        def question(i, subject=subject):
            choices = [text(1, 3) for _ in range(4)]
            return {"question": f" {text(3, 8)}\n", "subject": subject, "choices": choices, "answer": rng.randrange(4)}

        write(f"mmlu/{subject}.dev", several(question, 6))
        write(f"mmlu/{subject}.test", several(question, 1 + (len(subject) % 3)))
    for name in AGIEVAL_SETS:

        def exam(i, name=name):
            if name in ("gaokao-mathcloze", "math"):
                return {"query": f"Q: {text(5, 30)} A:", "answer": CLOZE[i % len(CLOZE)]}
            passage = "Passage: " + "the dog jumps over " * (i * 40)  # some are longer than the model reads
            gold = sorted(rng.sample(range(4), 1 + i % 2))
            return {
                "query": f"{passage}Q: {text(5, 9)} ",
                "choices": [f"({c}){text(1, 4)}" for c in "ABCD"],
                "gold": gold,
            }

        write(f"agieval/{name}.test", several(exam, 2 + len(name) % 3))

    def passage(language, i):
        answer = rng.choice(WORDS[:6])
        answers = {"text": [answer, answer + " " + text(1, 2)], "answer_start": [0, 0]}
        context = answer + " " + text(10, 40)
        return {"id": f"{language}-{i}", "title": "t", "context": context, "question": text(3, 6), "answers": answers}

    languages = [names[0] for names in TYDIQA.values()]
    write("tydiqa.train", [passage(language, i) for i in range(4) for language in languages])
    write("tydiqa.validation", [passage(language, i) for language in languages for i in range(3)])
