"""DS2 (Pang et al., arXiv 2410.10877): the subset that Sec. 4.1 trains its reference on, from nothing but a model.

    python -m paper.ds2 --model NAME|DIR --data SOURCE[,SOURCE...] --top 10000 --out rated.jsonl

Four steps, a section each. A model rates each sample from 0 to 5. Each sample gets an embedding. Ratings that the
neighbours contradict are corrected. The best rated samples are selected, and among equals those that lie farthest from
all others. paper/README.md lists what differs from the authors' release. N samples, D the size of an embedding, R = 6.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import Transformer, load_model
from paper.frozen import scoring_passes
from support import checkpoint, command, machine, ranks, sources, templates
from support.decoding import check_numbers
from support.files import UserError, check, check_writable, write_lines
from support.losses import digest, kept_losses, losses_key
from support.schemas import Message, conversations
from support.start import run_script

RATINGS = range(6)

# --------------------------------------------------------------------------------------------------- 1. rate

QUESTION = """\
Below is a sample that an assistant could be trained on. Rate it with a whole number from 0 to 5, where 0 means that \
nothing can be learned from it and 5 that it is excellent. Three things count: that it is rare, that it is complex, \
and that it informs.

{sample}

Rating, from 0 to 5:"""


def question(messages: list[Message], tokenizer: data.Tokenizer, max_length: int) -> str:
    """What a model is asked about a conversation, which is cut at its end to `max_length` tokens."""
    text = "\n".join(f"{message['role']}: {message['content'].strip()}" for message in messages)
    _, starts = tokenizer.encode(text)
    text = text[: starts[max_length]] if len(starts) > max_length else text
    return data.prompt_text([{"role": "user", "content": QUESTION.format(sample=text)}], tokenizer)


def rate(model: Transformer, tokenizer: data.Tokenizer, questions: list[str]) -> Tensor:
    """The likeliest of the six digits as the answer to each question: (N,) int64. Their mean would hardly move."""
    pairs = [(asked, str(rating)) for asked in questions for rating in RATINGS]
    found = evaluate.loglikelihoods(model, tokenizer, pairs)
    return torch.tensor([log_p for log_p, _ in found]).view(-1, len(RATINGS)).argmax(dim=1)


# -------------------------------------------------------------------------------------------------- 2. embed


@torch.no_grad()
def embed(model: Transformer, examples: list[data.Example]) -> Tensor:
    """The mean of each sample's last hidden states: (N, D) float32. UserError if it is not finite."""
    device, found = model.lm_head.weight.device, {}
    for samples in ranks.share_passes(scoring_passes(examples)):
        ids, _ = data.collate([examples[i] for i in samples], device)
        for i, hidden in zip(samples, model(ids).float(), strict=False):  # a pass without samples has one row
            found[i] = hidden[: len(examples[i].ids)].mean(dim=0).cpu()
    embeddings = torch.stack(evaluate.gather(found))
    check_numbers(embeddings, model)
    return embeddings


SIMILARITIES = 2**24  # that exist at a time, 64 MiB
TIE = 1e-6  # similarities that differ by less are equal but for rounding


def nearest(embeddings: Tensor, k: int, of: Tensor | None = None, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of the samples `of`, in the samples `among` (each by default: all).

    embeddings (N, D) of length 1 -> index and cosine distance, the nearest first, (n, k) each. Nobody is its own
    neighbour. If all k are equally near, they are drawn from all samples that are as near.
    """
    everyone, generator = torch.arange(len(embeddings)), torch.Generator().manual_seed(len(embeddings))
    of, among = everyone if of is None else of, everyone if among is None else among
    candidates, parts = embeddings[among], []
    place = torch.full_like(everyone, -1).index_copy(0, among, torch.arange(len(among)))
    for rows in of.split(max(1, SIMILARITIES // len(among))):
        similarity = embeddings[rows] @ candidates.T
        own = (place[rows] >= 0).nonzero().squeeze(1)
        similarity[own, place[rows[own]]] = -torch.inf
        values, indices = similarity.topk(k, dim=1)
        if len(tied := (values[:, 0] - values[:, -1] < TIE).nonzero().squeeze(1)):
            equal = similarity[tied] > values[tied, :1] - TIE
            indices[tied] = (equal + torch.rand(equal.shape, generator=generator)).topk(k, dim=1).indices
        parts.append((among[indices], (1 - values).clamp_(min=0)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def nearest_in(subset: Tensor, k: int, embeddings: Tensor, lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`nearest` of a subset among itself, from longer `lists`: `nearest` of all samples among all.

    The first k of a list that are in the subset are the nearest. A sample with fewer than k is searched for again.
    """
    member = torch.zeros(len(embeddings), dtype=torch.bool).index_fill(0, subset, True)
    index, distance = (x[subset] for x in lists)
    inside = member[index]
    order = inside.byte().sort(dim=1, descending=True, stable=True).indices[:, :k]
    index, distance = index.gather(1, order), distance.gather(1, order)
    if len(short := (inside.sum(dim=1) < k).nonzero().squeeze(1)):
        index[short], distance[short] = nearest(embeddings, k, subset[short], subset)
    return index, distance


# ------------------------------------------------------------------------------------------------- 3. curate

SUBSET, SHARE = 50_000, 0.9  # samples of a random subset, and the share of all that it has at most
ROUNDS = 50  # subsets whose consensus is averaged
STEPS, LEARNING_RATE = 1_500, 0.1  # of the descent to T and p
EPOCHS, VOTERS = 51, 10  # subsets in which each sample's neighbours vote, and how many of them do
CONFIDENCE = 0.5  # from which on the neighbours' rating replaces a sample's own


def consensus(ratings: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """How often a sample is rated a and its two nearest neighbours b and c: three (n,) -> shares (R, R, R), float64.

    Its margins are the consensus of first and second order (Zhu et al., ICML 2021).
    """
    R = len(RATINGS)
    return torch.bincount((ratings * R + first) * R + second, minlength=R**3).view(R, R, R).double() / len(ratings)


def expected_consensus(T: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The consensus of each order, if a sample and its neighbours have the same true rating, and each errs by T.

    T (R, R): P(rated j | truly i); p (R,): P(truly i) -> (R,), (R, R), (R, R, R).
    """
    return p @ T, torch.einsum("i,ia,ib->ab", p, T, T), torch.einsum("i,ia,ib,ic->abc", p, T, T, T)


def estimate(third: Tensor) -> tuple[Tensor, Tensor]:
    """The transition matrix T (R, R) and the prior p (R,) that explain a consensus (R, R, R) best.

    They minimize the sum of the norms of the errors of the three orders. T starts near the identity.
    """
    seen = third.sum(dim=(1, 2)), third.sum(dim=2), third
    T = (5 * torch.eye(len(RATINGS), dtype=third.dtype)).requires_grad_()
    p = torch.zeros(len(RATINGS), dtype=third.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([T, p], lr=LEARNING_RATE)
    for _ in range(STEPS):
        expected = expected_consensus(T.softmax(dim=1), p.softmax(dim=0))
        loss = sum((a - b).norm() for a, b in zip(expected, seen, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return T.detach().softmax(dim=1), p.detach().softmax(dim=0)


def votes(ratings: Tensor, index: Tensor, distance: Tensor, own: Tensor) -> Tensor:
    """The votes of a sample's neighbours and of itself for each rating: (n, R), rows of length 1.

    ratings (N,); index, distance (n, k): the neighbours; own (n,): the samples' ratings. A vote counts 1 - distance. A
    sample's distance to itself is extrapolated from those of its first two neighbours.
    """
    found = torch.zeros(len(own), len(RATINGS)).scatter_add_(1, ratings[index], 1 - distance)
    found.scatter_add_(1, own.unsqueeze(1), 1 - (2 * distance[:, :1] - distance[:, 1:2]))
    return F.normalize(found.clamp(min=0), dim=1)


def called_wrong(found: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """SimiFeat (Zhu et al., ICML 2022): of each rating the share `wrong` that has the fewest votes, (n,) bool.

    found (n, R): `votes`; a sample without votes is not called wrong. own (n,): ratings; wrong (R,): P(wrong | rating).
    """
    doubt = -(found.gather(1, own.unsqueeze(1)).squeeze(1).double() + 1e-8).log()
    called = torch.zeros_like(own, dtype=torch.bool)
    for rating in own.unique().tolist():
        of_it = own == rating
        called |= of_it & (doubt >= torch.quantile(doubt[of_it], 1 - wrong[rating].item()))
    return called & found.any(dim=1)


def correct(ratings: Tensor, times: Tensor, calls: Tensor, suggested: Tensor) -> tuple[Tensor, Tensor]:
    """Ratings (N,) with errors replaced, and the confidence of each correction, (N,), 0 where there is no error.

    times, calls (N,): in how many epochs a sample was there, and was called wrong; suggested (N, R): how often its
    neighbours then suggested each rating. What was called wrong in half of its epochs is an error. It takes the other
    rating that was suggested most, if its share of the suggestions times the share of the calls reaches CONFIDENCE.
    """
    called_share = (calls + 1) / (times + 2)
    share = (suggested + 1) / (suggested.sum(dim=1, keepdim=True) + len(RATINGS))
    share = share.scatter(1, ratings.unsqueeze(1), -1)
    confidence = torch.where(called_share >= 0.5, share.amax(dim=1) * called_share, 0)
    return torch.where(confidence >= CONFIDENCE, share.argmax(dim=1), ratings), confidence


def curate(ratings: Tensor, embeddings: Tensor, seed: int = 42) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratings (N,) with probable errors corrected; confidence (N,), T (R, R), p (R,).

    embeddings (N, D) of length 1. Raises UserError for fewer samples than the neighbours of one need.
    """
    N, R, generator = len(ratings), len(RATINGS), torch.Generator().manual_seed(seed)
    size = min(SUBSET, int(SHARE * N))
    check(size > VOTERS, f"{N} samples are too few: in a subset of {SHARE:.0%} each must have {VOTERS} neighbours")
    lists = nearest(embeddings, min(N - 1, 10 + math.ceil(1.5 * VOTERS * N / size)))

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        subset = torch.randperm(N, generator=generator)[:size].sort().values
        return subset, *nearest_in(subset, VOTERS, embeddings, lists)

    third = torch.zeros(R, R, R, dtype=torch.float64)
    for _ in tqdm(range(ROUNDS), "consensus", leave=False):
        subset, index, _ = draw()
        third += consensus(ratings[subset], *ratings[index[:, :2]].T) / ROUNDS
    T, p = estimate(third)

    wrong = 1 - T.diag() * p / third.sum(dim=(1, 2)).clamp(min=1e-12)  # 1 - P(truly j | rated j)
    wrong = torch.where(wrong <= 0, 0.05, torch.where(wrong >= 1, 0.95, wrong))
    times, calls, suggested = torch.zeros(N), torch.zeros(N), torch.zeros(N, R)
    for _ in tqdm(range(EPOCHS), "votes", leave=False):
        subset, index, distance = draw()
        own = ratings[subset]
        found = votes(ratings, index, distance, own)
        called = called_wrong(found, own, wrong)
        times[subset] += 1
        calls[subset] += called
        suggested[subset[called], found[called].argmax(dim=1)] += 1
    return *correct(ratings, times, calls, suggested), T, p


# ------------------------------------------------------------------------------------------------- 4. select


def long_tail(embeddings: Tensor) -> Tensor:
    """How far a sample lies from all others: the mean cosine distance to its 10 nearest neighbours, (N,)."""
    return nearest(embeddings, min(VOTERS, len(embeddings) - 1))[1].mean(dim=1)


def select(curated: Tensor, distance: Tensor, top: int) -> Tensor:
    """The `top` samples by curated rating, and among equals by long-tail score, the highest first: (top,) indices."""
    by_distance = distance.sort(descending=True, stable=True).indices
    return by_distance[curated[by_distance].sort(descending=True, stable=True).indices][:top]


def parse_arguments(argv: list[str] | None = None):
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = command.ArgumentParser("Rate samples by a model, correct the ratings, select the best (DS2).")
    add = parser.group("model and data")
    # fmt: off
    add("--model", required=True, help="what rates and embeds: a folder in Hugging Face layout, or a name on the hub")
    add("--revision", help="branch, tag or commit of --model on the hub")
    add("--data", required=True, metavar="SOURCE[,SOURCE...]", help="rows as train.py reads them, a conversation each")
    add("--limit", type=int, bound="at least 1", metavar="N", help="read the first N rows of each source")
    add("--max-length", type=int, bound="at least 2", default=1024, help="tokens of a sample; the rest is cut")
    add("--out", required=True, metavar="FILE", help="JSON lines, the best first: messages, rating, curated, "
        "long_tail, selected, and the row itself. OUT.kept has what a stopped run goes on from")
    add = parser.group("selection")
    add("--top", type=int, bound="at least 1", default=10_000, metavar="K", help="how many samples to select")
    add("--rating-field", metavar="COLUMN", help="read the ratings, 0 to 5, from this column")
    add("--seed", type=int, default=42, bound="from 0 to 2^63 - 1", help="of the random subsets")
    # fmt: on
    for module in (sources, templates, command):
        module.add_flags(parser)
    return parser.parse_args(argv)


def read_samples(names: str, limit: int | None, field: str | None, account: sources.Account) -> list[tuple]:
    """Each row with its one conversation. With `field`, a row must have a rating from 0 to 5 in this column."""
    found = []
    for source in sources.source_names(names):
        check(source != "pool", "pool is conversations without their rows: name its sources")
        for number, row in enumerate(sources.load_rows(source, limit, account), 1):
            try:
                several = conversations([row], source)
                check(len(several) == 1, f"{len(several)} conversations, not one")
                rated = field is None or sources.rating(row, field) in RATINGS
                check(rated, f"column {field} holds {row.get(field)!r:.60}, not a whole number from 0 to 5")
                found.append((row, several[0]))
            except UserError as reason:
                account.refuse(f"{source}, row {number}", str(reason).removeprefix(f"{source}, row 1: "))
    return found


PART = 128  # samples whose ratings or embeddings are kept as soon as they are there


def in_parts(cache: Path, key: str, samples: list, compute: Callable[[list], Tensor]) -> Tensor:
    """compute(samples), PART of them at a time. A part that `cache` keeps is not computed again."""
    parts = []
    for start in tqdm(range(0, len(samples), PART), "parts", leave=False, disable=not ranks.first_rank()):
        part = samples[start : start + PART]
        parts.append(kept_losses(cache, f"{key}-{start}", lambda part=part: compute(part).float())[0])
    return torch.cat(parts)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    device, out = ranks.start_ranks(args.device), Path(args.out)
    machine.compute_exactly(device)
    check_writable(out)
    account = sources.Account(args.skip_bad_rows)
    tokenizer = data.load_tokenizer(args.model, args.revision, args.template)
    samples = read_samples(args.data, args.limit, args.rating_field, account)
    check(len(samples) >= args.top, f"--top {args.top} of {len(samples)} samples: there are not so many")
    for line in account.lines():
        ranks.say(line)
    model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)
    examples = [data.encode(messages, tokenizer, args.max_length) for _, messages in samples]
    checkpoint.check_fits(model, args.model, examples)
    asked = [question(messages, tokenizer, args.max_length) for _, messages in samples]
    cache, kind = Path(f"{out}.kept"), f"{args.dtype} {device.type}"
    key = losses_key(model.folder, None, examples, kind, digest(PART, args.template, *asked))
    if args.rating_field:
        ratings = torch.tensor([sources.rating(row, args.rating_field) for row, _ in samples]).long()
    else:
        ratings = in_parts(cache, f"{key}-ratings", asked, lambda part: rate(model, tokenizer, part)).long()
    embeddings = F.normalize(in_parts(cache, f"{key}-embeddings", examples, lambda part: embed(model, part)), dim=1)

    if not ranks.first_rank():
        return
    curated, *_ = curate(ratings, embeddings, args.seed)
    distance = long_tail(embeddings)
    best_first = select(curated, distance, len(samples))
    rows = []
    for place, i in enumerate(best_first.tolist()):  # so --reference-top, which takes the first of equals, takes these
        scores = {"rating": ratings[i].item(), "curated": curated[i].item(), "long_tail": distance[i].item()}
        rows.append({"messages": samples[i][1], **scores, "selected": place < args.top, "row": samples[i][0]})
    write_lines(out, rows)
    for name, found in {"rated": ratings, "curated": curated, "selected": curated[best_first[: args.top]]}.items():
        counts = enumerate(found.bincount(minlength=len(RATINGS)).tolist())
        print(f"{name:8} " + ", ".join(f"{rating}: {n:,}" for rating, n in counts))
    print(f"{int((curated != ratings).sum()):,} ratings changed")
    print(f"wrote {out}; train.py: --reference-data {out} --reference-top {args.top} --rating-field curated")


if __name__ == "__main__":
    run_script(main)
