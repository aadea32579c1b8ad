"""How often `--rho auto` is right about which answers belong to their prompt, for simulated gains.

    python tests/bench/auto_cases.py --out results/noise/answers.md      # a quarter of an hour on one core

Gains are drawn from normal distributions: of right answers with a mean of 2 to 20 and a deviation of 4 to 12, of wrong
ones with a mean of -4 to 2 and the deviation of chance. Each cell is the mean over draws.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from paper.auto import separate_answers

MEANS, SPREADS, CHANCES = (2, 5, 8, 10, 12, 15, 20), (4, 8, 12), (4, 8, 12)
SIZES = (16, 48, 100, 300, 1000, 5000)
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
# Right answers' mean and deviation, chance, wrong answers' mean
APART = [
    (12, 4, 4, -4),
    (12, 4, 4, 0),
    (12, 4, 4, 2),
    (15, 5, 4, 0),
    (20, 4, 4, 0),
    (20, 6.6, 6.6, -4),
    (20, 6.6, 6.6, 0),
]
APART += [(20, 6.6, 6.6, 2), (20, 4, 6, 2)]
WEAK = [(5, 8, 8, 0), (8, 8, 8, 0), (10, 8, 4, 0), (12, 12, 8, 0), (20, 12, 12, 0)]


def draw(n: int, share: float, right: tuple, chance: float, low: float, draws: int) -> tuple[float, float]:
    """The share of right answers kept, and of wrong ones gone: the means over draws."""
    rng, wrong, found = np.random.default_rng(n), round(share * n), []
    for _ in range(draws):
        gains = right[0] + right[1] * rng.standard_normal(n)
        gains[:wrong] = low + chance * rng.standard_normal(wrong)
        mask = separate_answers(torch.tensor(gains), torch.tensor(chance * rng.standard_normal(n))).mask.double()
        found.append((mask[wrong:].mean().item(), 1 - mask[:wrong].mean().item() if wrong else 0.0))
    kept, gone = np.mean(found, axis=0)
    return kept, gone


def table(heads: list, rows: list) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--draws", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = [f"Made by `python tests/bench/auto_cases.py --draws {args.draws}`. Answers: how many there are.\n"]
    text.append("**All answers are right**: the share kept, the least over chance of 4, 8 and 12.\n")
    rows = []
    for mean, spread in itertools.product(MEANS, SPREADS):
        cells = [min(draw(n, 0, (mean, spread), chance, 0, args.draws)[0] for chance in CHANCES) for n in SIZES]
        rows.append([f"{mean} ± {spread}", *(f"{kept:.3f}" for kept in cells)])
    text.append(table(["gains", *(f"{n:,} answers" for n in SIZES)], rows))
    for title, cases, sizes in (
        ("**Gains that lie apart** (the mean three times both deviations)", APART, (48, 100, 300, 2000)),
        ("**Gains that do not**", WEAK, (48, 300, 2000)),
    ):
        text.append(f"{title}: right ones kept / wrong ones gone.\n")
        rows = []
        for (*right, chance, low), n in itertools.product(cases, sizes):
            cells = [draw(n, share, right, chance, low, args.draws) for share in SHARES]
            case = f"{right[0]} ± {right[1]}, wrong {low} ± {chance}, {n:,} answers"
            rows.append([case, *(f"{kept:.2f} / {gone:.2f}" for kept, gone in cells)])
        text.append(table(["gains", *(f"{share:.0%} wrong" for share in SHARES)], rows))
    Path(args.out).write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
