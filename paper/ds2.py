"""DS2 (Pang et al., arXiv 2410.10877): the subset that Sec. 4.1 trains its reference on, from nothing but a model.

    python -m paper.ds2 --model NAME|DIR --data SOURCE[,SOURCE...] --top 10000 --out rated.jsonl

Four steps, a section each: a model rates each sample from 0 to 5; each sample gets an embedding; ratings that their
neighbours contradict are corrected, as often as a transition matrix says that they are wrong; the best rated are
selected, and among equals those that lie farthest from all others. paper/README.md lists what differs from the authors'
release (github.com/UCSC-REAL/DS2, on top of Docta). N samples, D the size of an embedding, R = 6 ratings.
"""

import math
import sys
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
from support.files import UserError, check_writable, write_lines
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


def read_ratings(rows: list[tuple[str, dict]], field: str) -> Tensor:
    """The ratings that rows carry in a column, as from a stronger model: (N,) int64. rows: where each is, and it."""
    found = []
    for where, row in rows:
        try:  # .csv has text only
            found.append(float(row[field]))
        except (KeyError, ValueError, TypeError, OverflowError):
            found.append(math.nan)
        if found[-1] not in RATINGS or isinstance(row[field], bool):
            raise UserError(f"{where}: column {field} holds {row.get(field)!r:.60}, not a whole number from 0 to 5")
    return torch.tensor(found).long()


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
    """The k nearest neighbours, exactly, of the samples `of`, in the samples `among` (each by default: all).

    embeddings (N, D) of length 1 -> index and cosine distance, the nearest first, (n, k) each. Nobody is its own
    neighbour. Where all k are equally near, they are drawn from all that are; otherwise the same k would speak for
    everyone. In memory are SIMILARITIES at a time, beside a copy of the candidates and the result.
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
    """`nearest` of a subset's samples among themselves, read off longer `lists`: `nearest` of all among all.

    The first k of a list that are in the subset are the nearest there. A sample with fewer is searched for again.
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
    """The consensus of each order, if a sample and its neighbours have one true rating, and each errs by T on its own.

    T (R, R): P(rated j | truly i); p (R,): P(truly i) -> (R,), (R, R), (R, R, R).
    """
    return p @ T, torch.einsum("i,ia,ib->ab", p, T, T), torch.einsum("i,ia,ib,ic->abc", p, T, T, T)


def estimate(third: Tensor) -> tuple[Tensor, Tensor]:
    """The transition matrix T (R, R) and the prior p (R,) that explain a consensus (R, R, R) best.

    That is, with the least sum of the norms of the three orders' errors; squares would hardly see what is rare. T and p
    by softmax, so that rows sum to 1; from near the identity, which says which of the six is which.
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
    """What a sample's neighbours and itself say of its rating, each by its similarity: (n, R), rows of length 1.

    ratings (N,); index, distance (n, k): the neighbours; own (n,): the samples' own ratings. A sample is 0 from itself;
    its own vote counts as if it lay as far before its first neighbour as that lies before the second.
    """
    found = torch.zeros(len(own), len(RATINGS)).scatter_add_(1, ratings[index], 1 - distance)
    found.scatter_add_(1, own.unsqueeze(1), 1 - (2 * distance[:, :1] - distance[:, 1:2]))
    return F.normalize(found.clamp(min=0), dim=1)


def called_wrong(found: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """SimiFeat by ranks (Zhu et al., ICML 2022): within each rating, the share `wrong` that its neighbours back least.

    found (n, R): `votes`, a row of zeros where nobody votes, which calls nothing wrong; own (n,): ratings; wrong (R,):
    P(truly another | rated so) -> (n,) bool.
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
    neighbours then voted for each rating. An error is what was called wrong in at least half of the epochs. It takes
    the rating that was suggested most, its own left out, where the share of that among all, times the share of the
    calls, reaches CONFIDENCE. Both shares are smoothed: one more for each that there can be.
    """
    called_share = (calls + 1) / (times + 2)
    share = (suggested + 1) / (suggested.sum(dim=1, keepdim=True) + len(RATINGS))
    share = share.scatter(1, ratings.unsqueeze(1), -1)
    confidence = torch.where(called_share >= 0.5, share.amax(dim=1) * called_share, 0)
    return torch.where(confidence >= CONFIDENCE, share.argmax(dim=1), ratings), confidence


def curate(ratings: Tensor, embeddings: Tensor, seed: int = 42) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratings (N,) in which probable errors have become what their neighbours are rated; confidence (N,), T, p.

    embeddings (N, D) of length 1. Raises UserError for fewer samples than the neighbours of one need.
    """
    N, R, generator = len(ratings), len(RATINGS), torch.Generator().manual_seed(seed)
    size = min(SUBSET, int(SHARE * N))
    if size <= VOTERS:
        raise UserError(f"{N} samples are too few: in a subset of {SHARE:.0%} each is to have {VOTERS} neighbours")
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


# --------------------------------------------------------------------------------------------------- the command


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


def read_samples(names: str, limit: int | None, account: sources.Account) -> list[tuple[str, dict, list[Message]]]:
    """Where each row that can be used stands, the row, and its one conversation."""
    found = []
    for source in sources.source_names(names):
        if source == "pool":
            raise UserError("pool is conversations without their rows: name its sources")
        for number, row in enumerate(sources.load_rows(source, limit, account), 1):
            where = f"{source}, row {number}"
            try:
                several = conversations([row], source)
                if len(several) != 1:
                    raise UserError(f"{len(several)} conversations, it is to hold one")
                found.append((where, row, *several))
            except UserError as reason:
                account.refuse(where, str(reason).removeprefix(f"{source}, row 1: "))
    return found


PART = 128  # samples whose ratings or embeddings are kept as soon as they are there


def in_parts(cache: Path, key: str, samples: list, compute: Callable[[list], Tensor]) -> Tensor:
    """compute(samples), a row for each of them, PART of them at a time; a part that `cache` keeps is read from there.

    Each part is computed by itself, so a run that was stopped gets the same bits as one that was not.
    """
    parts = []
    for start in tqdm(range(0, len(samples), PART), "parts", leave=False, disable=not ranks.first_rank()):
        part = samples[start : start + PART]
        parts.append(kept_losses(cache, f"{key}-{start}", lambda part=part: compute(part).float())[0])
    return torch.cat(parts)


def counts(ratings: Tensor) -> str:
    """How many samples have each rating."""
    return ", ".join(f"{rating}: {n:,}" for rating, n in enumerate(ratings.bincount(minlength=len(RATINGS)).tolist()))


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    device, out = ranks.start_ranks(args.device), Path(args.out)
    machine.compute_exactly(device)
    check_writable(out)
    account = sources.Account(args.skip_bad_rows)
    tokenizer = data.load_tokenizer(args.model, args.revision, args.template)
    samples = read_samples(args.data, args.limit, account)
    if len(samples) < args.top:
        raise UserError(f"--top {args.top} of {len(samples)} samples: there are not so many")
    for line in account.lines() if ranks.first_rank() else ():
        print(line, file=sys.stderr)
    if args.rating_field:
        ratings = read_ratings([sample[:2] for sample in samples], args.rating_field)

    model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)
    examples = [data.encode(messages, tokenizer, args.max_length) for _, _, messages in samples]
    checkpoint.check_fits(model, args.model, examples)
    asked = [question(messages, tokenizer, args.max_length) for _, _, messages in samples]
    cache, kind = Path(f"{out}.kept"), f"{args.dtype} {device.type}"
    key = losses_key(model.folder, None, examples, kind, digest(PART, args.template, *asked))
    if not args.rating_field:
        ratings = in_parts(cache, f"{key}-ratings", asked, lambda part: rate(model, tokenizer, part)).long()
    embeddings = in_parts(cache, f"{key}-embeddings", examples, lambda part: embed(model, part))
    embeddings = F.normalize(embeddings, dim=1)

    if not ranks.first_rank():
        return
    curated, _, T, p = curate(ratings, embeddings, args.seed)
    distance = long_tail(embeddings)
    best_first = select(curated, distance, len(samples))
    rows, columns = [], {"rating": ratings, "curated": curated, "long_tail": distance}
    for place, i in enumerate(best_first.tolist()):
        values = {name: column[i].item() for name, column in columns.items()}
        rows.append({"messages": samples[i][2], **values, "selected": place < args.top, "row": samples[i][1]})
    write_lines(out, rows)  # the best first, so that --reference-top, which takes the first of equals, takes these
    print(f"rated    {counts(ratings)}")
    print(f"curated  {counts(curated)}; {int((curated != ratings).sum()):,} changed")
    print(f"selected {counts(curated[best_first[: args.top]])}")
    print("P(rated | truly), a row for each true rating, and how many are it:")
    for row, share in zip(T.tolist(), p.tolist(), strict=True):
        print("  " + " ".join(f"{x:.2f}" for x in row) + f"   {share:.2f}")
    print(f"wrote {out}; train.py: --reference-data {out} --reference-top {args.top} --rating-field curated")


if __name__ == "__main__":
    run_script(main)
