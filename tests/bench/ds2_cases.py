"""DS2's curation where it is easy and where it is hard: planted errors of 20,000 synthetic ratings, as a table.

    python tests/bench/ds2_cases.py

Half a minute on one CPU core. Clusters of embeddings have one true rating each; what is rated errs by a matrix T.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from paper import ds2

N, R, CLUSTERS, SIZE = 20_000, len(ds2.RATINGS), 200, 16
EVEN = [0.1, 0.1, 0.15, 0.25, 0.25, 0.15]
RARE = [0.02, 0.03, 0.1, 0.3, 0.54, 0.01]


def erring(right: float, up: float = 0.5) -> torch.Tensor:
    """T (R, R): right with this probability, else one too high with the share `up`, else one too low."""
    higher = torch.eye(R)[[*range(1, R), R - 2]]
    lower = torch.eye(R)[[1, *range(R - 1)]]
    return right * torch.eye(R) + (1 - right) * (up * higher + (1 - up) * lower)


SPREAD = 0.65 * torch.eye(R) + 0.35 / R  # any wrong rating is as likely
# prior, T, width of a cluster, share of the samples that lie in a cluster of any rating
CASES = {
    "tight clusters": (EVEN, SPREAD, 0.1, 0),
    "rare ratings, 1 to 3 % each": (RARE, SPREAD, 0.1, 0),
    "a tenth of the samples in any cluster": (EVEN, SPREAD, 0.1, 0.1),
    "a third of the samples in any cluster": (EVEN, SPREAD, 0.1, 1 / 3),
    "wide clusters": (EVEN, SPREAD, 0.6, 0),
    "errors mostly one too high": (EVEN, erring(0.7, 0.8), 0.1, 0),
    "rare ratings, errors mostly one too high": (RARE, erring(0.7, 0.8), 0.1, 0),
    "half of the ratings wrong": (EVEN, 0.4 * torch.eye(R) + 0.6 / R, 0.1, 0),
    "no clusters at all": (EVEN, SPREAD, 100, 0),
}


def measure(prior: list[float], T: torch.Tensor, width: float, elsewhere: float) -> list[float]:
    """Precision and recall of the corrections, the largest error of T, the share of wrong ratings before and after."""
    generator = torch.Generator().manual_seed(0)
    truth, strangers = (
        torch.multinomial(torch.tensor(prior), n, replacement=True, generator=generator) for n in (CLUSTERS, N)
    )
    cluster = torch.randint(0, CLUSTERS, (N,), generator=generator)
    true = torch.where(torch.rand(N, generator=generator) < elsewhere, strangers, truth[cluster])
    centres = torch.randn(CLUSTERS, SIZE, generator=generator)
    embeddings = F.normalize(centres[cluster] + width * torch.randn(N, SIZE, generator=generator), dim=1)
    rated = torch.multinomial(T[true], 1, generator=generator).squeeze(1)

    curated, _, found, _ = ds2.curate(rated, embeddings)
    wrong, changed, left = rated != true, curated != rated, curated != true
    fixed = (changed & ~left).sum()
    values = fixed / changed.sum(), fixed / wrong.sum(), (found - T).abs().max(), wrong.sum() / N, left.sum() / N
    return [value.item() for value in values]


def main():
    print("| | precision | recall | largest error of T | wrong before | wrong after |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        precision, recall, error, before, after = measure(*case)
        print(f"| {name} | {precision:.0%} | {recall:.0%} | {error:.2f} | {before:.0%} | {after:.0%} |", flush=True)


if __name__ == "__main__":
    main()
