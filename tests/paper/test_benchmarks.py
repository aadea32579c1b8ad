"""What the benchmarks ask and how they grade, by hand."""

import random
import re
from pathlib import Path

import pytest
from lm_eval.api.metrics import exact_match_fn
from lm_eval.tasks.agieval import utils as agieval_utils
from lm_eval.tasks.tydiqa import utils as tydiqa_utils

from paper import benchmarks
from paper.benchmarks import TASKS, task_names
from paper.grading import final_answer, overlap, same_number, squad_words, stands_in
from support.files import UserError
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_task_names():
    everything = task_names("all")
    assert len(everything) == 2 + 57 + 2 + 9 + 3 + 21 and everything[0] == "triviaqa"
    assert task_names("agieval_lsat_ar, mmlu_anatomy,agieval_lsat_ar") == ["agieval_lsat_ar", "mmlu_anatomy"]
    assert len(task_names("tydiqa_release")) == 9
    with pytest.raises(UserError, match="'mmul' is not one of all, triviaqa"):
        task_names("mmul")


def test_tydiqa_release_by_hand(llama):
    tokenizer = load_tokenizer(llama)
    long = "fox " * 900

    def row(language, n, context):
        answers = {"text": [f"the answer {n}"], "answer_start": [0]}
        return {"id": f"{language}-{n}", "context": context, "question": f"Mikä {n}?", "answers": answers}

    languages = sorted(names[0] for names in benchmarks.TYDIQA.values())
    rows = {
        "train": [row(language, n, f"Passage {n}.") for language in languages for n in range(5)],
        "validation": [row("finnish", 8, "Lyhyt."), row("finnish", 9, long)],
    }
    task, sampler = TASKS["tydiqa_release_fi"], random.Random(42)
    drawn = {language: sampler.sample(range(5), 1)[0] for language in languages}["finnish"]
    short, cut = (task["requests"](row)[0] for row in task["rows"](rows.get, tokenizer))
    assert short == (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.\n\n"
        f"Kappale: Passage {drawn}.\nKysymys: Mikä {drawn}?\nVastaus: the answer {drawn}\n\n"
        "Kappale: Lyhyt.\nKysymys: Mikä 8?\nVastaus:",
        {"until": ["\n"], "max_gen_toks": 50},
    )
    passage = re.search(r"Kappale: (fox .*)\nKysymys: Mikä 9", cut[0])[1]
    assert long.startswith(passage) and len(tokenizer.encode(passage)[0]) == 512
    assert task["metrics"](rows["validation"][0], ["  An answer: 8. "]) == {"exact_match": 1.0, "f1": 1.0}
    assert overlap("a quick fox", ["fox", "the slow fox jumps"], squad_words)["f1"] == pytest.approx(2 / 3)


def test_the_readme_s_eleventh_benchmark_is_the_code():
    readme, code = ((ROOT / "paper" / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks.py"))
    (block,) = re.findall(r"def tydiqa_release\(.*?\n\n(?=\S)", code, re.DOTALL)
    assert "\n".join("    " + line if line else "" for line in block.strip().splitlines()) in readme


def test_options_have_the_letters_a_to_d():
    five = ["v", "w", "x", "y", "z"]
    mmlu, logiqa = TASKS["mmlu_anatomy"], TASKS["logiqa"]
    row = {"prefix": "", "question": "Which?", "choices": five[:4], "answer": 1}
    assert mmlu["requests"](row)[1] == ("Which?\nA. v\nB. w\nC. x\nD. y\nAnswer:", " B")
    for choices in (five, five[:3]):
        with pytest.raises(ValueError):
            mmlu["requests"](row | {"choices": choices})
    asked = logiqa["requests"]({"context": "c", "question": "q", "options": five})
    assert asked[4] == ("Passage: c\nQuestion: q\nChoices:\nA. v\nB. w\nC. x\nD. y\nAnswer:", " z")


LATEX = (
    r"""
7|x=7|$x = 7$|\boxed{7}|the answer is 7.|\boxed{x=7}|\fbox{7}|$\frac12$|\frac{1}{2}|$1/2$|0.5|$.5$
\boxed{\dfrac{1}{2}}|\boxed{\tfrac1{2}}|$\frac1$|$\frac$|$\sqrt3$|$\sqrt{3}$|$\sqrt$|$5\text{ cm}$|$5$
$5\text{ a}\text{ b}$|$50\%$|$50$|no answer here|none either||$$|$90^\circ$|$90^{\circ}$|$\left(1, 2\right)$
$(1,2)$|\boxed {7}|\boxed{7|\boxed{{7}}|$k = 3$|$3$|$abc = 3$|$a=b=3$|= 4.|= 4\n5|$5\$12|\$12.50|$ 12.50
x = $3|3 apples and 4|$-1/2$|$-\frac{1}{2}$|1/2/3|$a/b$
$\frac{-1}{2}$|$03/4$|$\frac{03}{4}$|$0/5$|$\frac05$|$1/23x$|$\frac{1}{23}x$|$\dfrac1$
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


def test_agieval_s_answers_are_read_as_the_harness_reads_them():
    equal = sum(same_number(one, other) for one in LATEX for other in LATEX)
    assert len(LATEX) < equal < len(LATEX) ** 2 / 2
    for one in LATEX:
        assert final_answer(one) == agieval_utils.parse_math_answer(one), one
        for other in LATEX:
            assert same_number(one, other) == agieval_utils.is_equiv(one, other), (one, other)


def test_metrics_of_written_answers_are_the_harness_s():
    texts = [
        "The Fox!",
        " the  fox",
        "Fox, the",
        "a quick brown fox",
        "THE QUICK-brown",
        "",
        "¿Quién? «fox»",
        "الكتاب كتاب",
        "كتاب الكتاب",
        "«الكتاب»",
    ]
    for code in ("en", "ar", "fi"):
        task = TASKS[f"tydiqa_goldp_{code}"]
        for text in texts:
            for gold in ([one, other] for one in texts for other in texts[:2]):
                theirs = tydiqa_utils.process_results_lang({"answers": gold}, [text], code)
                assert task["metrics"]({"answers": {"text": gold}}, [text]) == theirs
    for text in texts:
        for gold in texts:
            theirs = exact_match_fn(
                predictions=[text.strip()], references=[gold], ignore_case=True, ignore_punctuation=True
            )
            ours = TASKS["triviaqa"]["metrics"]({"answer": {"aliases": ["-", gold] if gold else [gold]}}, [text])
            assert (ours["exact_match"] == 1) == (theirs["exact_match"] == 1 or (bool(gold) and text == "")), (
                text,
                gold,
            )


# ---------------------------------------------------------------------------------------------------------- own rows

# an answer, and texts in which it does and does not stand
STANDS = {
    "72": (
        ["72", "72.", "It is 72, in total.", "(72)", "72%", "$72", "=72;", "72\nbecause"],
        ["172", "720", "7 2", "72nd"],
    ),
    "7": (["7", "7: so"], ["72", "3.7", "7.5", "7,000", "-7"]),
    "3.5": (["3.5", "about 3.5."], ["3.50", "13.5", "3,5"]),
    "-5": (["it is -5.", "x = -5"], ["3-5", "-55"]),
    "1,000": (["1,000 men"], ["11,000", "1,000.5"]),
    "Paris": (["Paris, France", "It is, of course, Paris.", "\u201cParis\u201d"], ["Parisian", "paris", "comParis"]),
    "New York": (["in New York, USA", "New York!"], ["New Yorker", "New\tYork"]),
    "caf\u00e9": (["le caf\u00e9!"], ["caf\u00e9s", "caf\u00e9t\u00e9ria"]),
    "C++": (["in C++11", "C++."], ["C+"]),
    "\u0440\u0430\u043c": (["\u0440\u0430\u043c."], ["\u0440\u0430\u043c\u0430"]),
    "\u0930\u093e\u092e": (
        ["\u0930\u093e\u092e \u0939\u0948"],
        ["\u0930\u093e\u092e\u093e"],
    ),  # the vowel sign is no letter
    "\u6771\u4eac": (
        ["\u7b54\u3048\u306f\u6771\u4eac\u3067\u3059", "\u6771\u4eac"],
        ["\u6771"],
    ),  # no spaces: any place
    "\u0e01\u0e23\u0e38\u0e07": (["\u0e04\u0e37\u0e2d\u0e01\u0e23\u0e38\u0e07\u0e04\u0e48\u0e30"], []),
    "\ud30c\ub9ac": (["\ud30c\ub9ac\uc785\ub2c8\ub2e4"], []),
    "5": (["\u51715\u4e2a"], ["\u517115\u4e2a"]),  # a number among Chinese
    "1, 2": (["1, 2.", "1, 2, of course"], ["1, 2, 3", "0, 1, 2", "1, 2, 3.", "so, 1, 2"]),
    "cold, down": (["makes cold, down. Anything", "cold, down, as you asked"], ["cold, down, up."]),
}


@pytest.mark.parametrize("answer", STANDS)
def test_an_answer_stands_in_a_text_as_whole_words_and_numbers(answer):
    right, wrong = STANDS[answer]
    assert [text for text in right if not stands_in(answer, text)] == []
    assert [text for text in wrong if stands_in(answer, text)] == []


def graded(row, written, tokenizer):
    task = TASKS["instructions"]
    (asked,) = task["rows"](lambda split: [row], tokenizer)
    return task["metrics"](asked, [written])["exact_match"]


def test_own_rows_name_their_answer_as_text_or_number_or_not_at_all(llama):
    tokenizer, row = load_tokenizer(llama), {"instruction": "2 + 2", "output": "It is 4."}
    assert graded(row, " It is 4. ", tokenizer) == 1 and graded(row, "4", tokenizer) == 0
    for answer in ("4", 4, " 4 "):
        assert graded(row | {"answer": answer}, "so 4, I think", tokenizer) == 1
        assert graded(row | {"answer": answer}, "so 4.5, I think", tokenizer) == 0
    assert graded(row | {"answer": 0.5}, "0.5", tokenizer) == 1
    for answer, words in {"": "is empty", "  ": "is empty", True: "True is no text", ("4",): ".* is no text"}.items():
        with pytest.raises(UserError, match=f"row 1: its answer {words}"):
            graded(row | {"answer": answer}, "4", tokenizer)
    with pytest.raises(UserError, match="row 1: its answer is empty"):
        graded(row | {"output": " "}, "4", tokenizer)
