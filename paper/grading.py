"""How an answer is graded: by lm-evaluation-harness 0.4.13 and SQuAD, to the letter; last, in rows of one's own."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable

import numpy as np


def accuracy(answers: list, choices: list[str], gold: list[int]) -> dict[str, float]:
    """Is the likeliest choice in `gold`, the right ones (acc)? And the likeliest per character (acc_norm)?"""
    likelihood = np.array([log_p for log_p, _ in answers])
    with np.errstate(divide="ignore", invalid="ignore"):
        per_character = likelihood / np.array([float(len(choice)) for choice in choices])
    return {"acc": float(likelihood.argmax() in gold), "acc_norm": float(per_character.argmax() in gold)}


def true_share(answers: list, labels: list[int]) -> float:
    """MC2: the share of the choices' total probability that is on the true ones, those with label 1."""
    log_p = np.array([log_p for log_p, _ in answers])
    probability = np.exp(log_p - log_p.max())  # so that not all of them are too small to be told from zero
    return float((probability / probability.sum())[np.array(labels) == 1].sum())


def one_of(answer: str, right: list[str]) -> float:
    """Is the answer one of the right ones, but for case and punctuation?"""
    plain = [text.lower().translate(str.maketrans("", "", string.punctuation)) for text in (answer, *right)]
    return float(plain[0] in plain[1:])


def overlap(prediction: str, answers: list[str], normalize: Callable[[str], str]) -> dict[str, float]:
    """SQuAD's exact match, and F1 of the words in common, with whichever of the right answers is nearest."""
    predicted, exact, f1 = normalize(prediction).split(), [], []
    for words in (normalize(answer).split() for answer in answers):
        same = sum((Counter(predicted) & Counter(words)).values())
        precision, recall = (same / max(1, len(side)) for side in (predicted, words))
        exact.append(float(predicted == words))
        f1.append(2 * precision * recall / (precision + recall) if same else 0.0)
    return {"exact_match": max(exact), "f1": max(f1)}


def tydiqa_words(text: str, code: str) -> str:
    """What lm-eval compares of a TyDiQA answer in a language: no case, punctuation of any script, or article."""
    kept = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P" and c not in string.punctuation)
    articles = {"en": r"\b(a|an|the)\b", "ar": r"(?:^|\s)ال"}.get(code)
    return re.sub(articles, " ", kept) if articles else kept


def squad_words(text: str) -> str:
    """What SQuAD compares of an answer."""
    return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation))


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
    whole = "(0|-?[1-9][0-9]*)"
    return "\\frac{1}{2}" if text == "0.5" else re.sub(rf"\A{whole}/{whole}\Z", r"\\frac{\1}{\2}", text)


def braced_fractions(text: str) -> str:
    """\\frac12 and \\frac1{2} as \\frac{1}{2}; the text as it is where a numerator stands alone."""
    head, *fractions = text.split("\\frac")
    for fraction in fractions:
        if fraction[0] != "{":
            if len(fraction) < 2:
                return text
            below = fraction[1:] if fraction[1] == "{" else f"{{{fraction[1]}}}{fraction[2:]}"
            fraction = f"{{{fraction[0]}}}{below}"
        head += "\\frac" + fraction
    return head


# Scripts that are written without spaces, or whose words carry endings: kana, Han, Hangul, Thai, Lao, Burmese, Khmer
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def go_on(left: str, right: str) -> bool:
    """Whether a word or a number goes on from one text to the next: from "7" to "2", from "3." to "5"."""
    edge = left[-1:] + right[:1]
    word = all(unicodedata.category(c)[0] in "LNM" and not SPACELESS.match(c) for c in edge)
    number = re.search(r"\d\|[.,]\d|\d[.,]\|\d", f"{left[-2:]}|{right[:2]}")
    return bool(len(edge) == 2 and word or number)


def stands_in(answer: str, text: str) -> bool:
    """Whether `answer` stands in `text` as whole words or numbers, whatever punctuation is around it.

    "7" is no part of "72", nor "3.5" of "3.50", nor "5" of "-5", and a list, such as "1, 2", does not stand in a longer
    one. Between characters of scripts without spaces, such as Chinese, any place counts.
    """
    for found in re.finditer(f"(?={re.escape(answer)})", text):  # also where one begins within another
        before, after = text[: found.start()], text[found.start() + len(answer) :]
        signed = re.search(r"(?<![\w)])[-\u2212]$", before) and re.match(r"\d", answer)
        signed = signed or re.search(r"\w$", before) and re.match(r"[-\u2212]\d", answer)
        longer = "," in answer and (re.match(r",\s?[\w-]+([.,;:!?]|$)", after) or re.search(r",\s?$", before))
        if not (signed or longer or go_on(before, answer) or go_on(answer, after)):
            return True
    return False
