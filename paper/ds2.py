"""DS2 (Pang et al., arXiv 2410.10877): the subset that Sec. 4.1 trains its reference on, from nothing but a model.

    python -m paper.ds2 --model NAME|DIR --data SOURCE[,SOURCE...] --top 10000 --out rated.jsonl

Four steps, a section each: a model rates each sample from 0 to 5; each sample gets an embedding; ratings that their
neighbours contradict are corrected, as often as a transition matrix says that they are wrong; the best rated are
selected, and among equals those that lie farthest from all others. Numbers that the paper leaves open are those of the
authors' release (github.com/UCSC-REAL/DS2). N samples, D the size of an embedding, R = 6 ratings.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

from support.start import run_script

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import Transformer, load_model
from paper.baselines import scoring_passes
from support import checkpoint, command, machine, ranks, sources, templates
from support.files import UserError, check_writable, write_lines
from support.losses import digest, kept_losses, losses_key
from support.schemas import Message, conversations

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


def rate(model: Transformer, tokenizer: data.Tokenizer, questions: list[str], batch_tokens: int = 1024) -> Tensor:
    """The likeliest of the six digits as the answer to each question: (N,) int64.

    It is what greedy decoding would write if it had to write a rating, which is what the release parses out of a text.
    The mean of the six by their probabilities would hardly leave the middle with a model that is unsure.
    """
    pairs = [(asked, str(rating)) for asked in questions for rating in RATINGS]
    with tqdm(total=len(pairs), desc="ratings", leave=False, disable=not ranks.first_rank()) as bar:
        found = evaluate.loglikelihoods(model, tokenizer, pairs, batch_tokens, lambda i: bar.update())
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
            raise UserError(f"{where}: column {field} holds {row.get(field)!r}, not a whole number from 0 to 5")
    return torch.tensor(found).long()


# -------------------------------------------------------------------------------------------------- 2. embed


@torch.no_grad()
def embed(model: Transformer, examples: list[data.Example]) -> Tensor:
    """The mean of a sample's last hidden states, of length 1: (N, D) float32. The release asks a sentence encoder."""
    device, found = model.lm_head.weight.device, {}
    passes = ranks.share_passes(scoring_passes(examples))
    for samples in tqdm(passes, "embeddings", leave=False, disable=not ranks.first_rank()):
        ids, _ = data.collate([examples[i] for i in samples], device)
        for i, hidden in zip(samples, model(ids).float(), strict=False):  # a pass without samples has one row
            found[i] = F.normalize(hidden[: len(examples[i].ids)].mean(dim=0), dim=0).cpu()
    found = {i: embedding for part in ranks.gather(found) for i, embedding in part.items()}
    return torch.stack([found[i] for i in range(len(examples))])


def read_embeddings(path: Path, n: int) -> Tensor:
    """The one tensor (n, D) of a safetensors file, its rows scaled to length 1."""
    file = checkpoint.open_safetensors(path)
    found = [file.get_tensor(name).float() for name in list(file.keys())]
    if len(found) != 1 or found[0].dim() != 2 or len(found[0]) != n:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        raise UserError(f"--embeddings {path} holds {shapes}: it is to hold one tensor, a row for each of {n} samples")
    if not found[0].isfinite().all():
        raise UserError(f"--embeddings {path} holds numbers that are not finite")
    return F.normalize(found[0], dim=1)


class Neighbours(NamedTuple):
    """Of each of some samples, others by their cosine distance, the nearest first: index and distance, (n, k) each."""

    index: Tensor
    distance: Tensor


SIMILARITIES = 2**24  # that exist at a time, 64 MiB


def nearest(embeddings: Tensor, k: int, of: Tensor | None = None, among: Tensor | None = None) -> Neighbours:
    """The k nearest neighbours, exactly, of the samples `of`, in the samples `among` (each by default: all).

    embeddings (N, D) of length 1. Nobody is its own neighbour. In memory are SIMILARITIES at a time, beside a copy of
    the candidates and the result.
    """
    everyone = torch.arange(len(embeddings))
    of, among = everyone if of is None else of, everyone if among is None else among
    candidates, parts = embeddings[among], []
    place = torch.full_like(everyone, -1).index_copy(0, among, torch.arange(len(among)))
    for rows in of.split(max(1, SIMILARITIES // len(among))):
        similarity = embeddings[rows] @ candidates.T
        own = (place[rows] >= 0).nonzero().squeeze(1)
        similarity[own, place[rows[own]]] = -torch.inf
        best = similarity.topk(k, dim=1)
        parts.append((among[best.indices], (1 - best.values).clamp_(min=0)))
    return Neighbours(*(torch.cat(part) for part in zip(*parts, strict=True)))


class Subsets:
    """The k nearest neighbours of samples among random subsets of all, without a new search for each subset.

    Of each sample a longer list is kept. The first k of it that are in a subset are the nearest there; only a sample
    with fewer of them is searched for again.
    """

    def __init__(self, embeddings: Tensor, size: int, k: int):
        """size: of a subset, which is to be larger than k."""
        self.embeddings, self.size, self.k = embeddings, size, k
        length = min(len(embeddings) - 1, 10 + math.ceil(1.5 * k * len(embeddings) / size))
        self.lists = nearest(embeddings, length)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Neighbours]:
        """A subset, (size,) indices in rising order, and the neighbours of each of its samples in it."""
        subset = torch.randperm(len(self.embeddings), generator=generator)[: self.size].sort().values
        member = torch.zeros(len(self.embeddings), dtype=torch.bool).index_fill(0, subset, True)
        index, distance = (x[subset] for x in self.lists)
        inside = member[index]
        order = inside.byte().sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        index, distance = index.gather(1, order), distance.gather(1, order)
        if len(short := (inside.sum(dim=1) < self.k).nonzero().squeeze(1)):
            index[short], distance[short] = nearest(self.embeddings, self.k, subset[short], subset)
        return subset, Neighbours(index, distance)


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
    """The transition matrix T (R, R) and the prior p (R,) that explain a consensus (R, R, R) best, by least squares.

    Both by softmax, so that rows sum to 1; from near the identity, which says which of the six is which.
    """
    seen = third.sum(dim=(1, 2)), third.sum(dim=2), third
    T = (5 * torch.eye(len(RATINGS), dtype=third.dtype)).requires_grad_()
    p = torch.zeros(len(RATINGS), dtype=third.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([T, p], lr=LEARNING_RATE)
    for _ in range(STEPS):
        expected = expected_consensus(T.softmax(dim=1), p.softmax(dim=0))
        loss = sum((a - b).square().sum() for a, b in zip(expected, seen, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return T.detach().softmax(dim=1), p.detach().softmax(dim=0)


def votes(ratings: Tensor, neighbours: Neighbours, own: Tensor) -> Tensor:
    """What a sample's neighbours and itself say of its rating, each by its similarity: (n, R), rows of length 1.

    ratings (N,); own (n,): the samples' own ratings. A sample is 0 from itself; its own vote counts as if it lay as
    far before its first neighbour as that lies before the second.
    """
    d = neighbours.distance
    found = torch.zeros(len(own), len(RATINGS)).scatter_add_(1, ratings[neighbours.index], 1 - d)
    found.scatter_add_(1, own.unsqueeze(1), (1 - (2 * d[:, 0] - d[:, 1])).unsqueeze(1))
    return F.normalize(found.clamp(min=0), dim=1)


def called_wrong(found: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """SimiFeat by ranks (Zhu et al., ICML 2022): within each rating, the share `wrong` that its neighbours back least.

    found (n, R): `votes`; own (n,): ratings; wrong (R,): P(truly another | rated so) -> (n,) bool.
    """
    doubt = -(found.gather(1, own.unsqueeze(1)).squeeze(1).double() + 1e-8).log()
    called = torch.zeros_like(own, dtype=torch.bool)
    for rating in own.unique().tolist():
        of_it = own == rating
        called |= of_it & (doubt >= torch.quantile(doubt[of_it], 1 - wrong[rating].item()))
    return called


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


class Curated(NamedTuple):
    """Ratings after curation (N,), and what they came from: T (R, R), p (R,) and how sure a correction is (N,)."""

    ratings: Tensor
    T: Tensor
    p: Tensor
    confidence: Tensor


def curate(ratings: Tensor, embeddings: Tensor, seed: int = 42) -> Curated:
    """Ratings (N,) in which those that are probably errors have become what their neighbours are rated.

    embeddings (N, D) of length 1. Raises UserError for fewer samples than the neighbours of one need.
    """
    N, R, generator = len(ratings), len(RATINGS), torch.Generator().manual_seed(seed)
    size = min(SUBSET, int(SHARE * N))
    if size <= VOTERS:
        raise UserError(f"{N} samples are too few: in a subset of {SHARE:.0%} each is to have {VOTERS} neighbours")
    subsets, third = Subsets(embeddings, size, VOTERS), torch.zeros(R, R, R, dtype=torch.float64)
    for _ in tqdm(range(ROUNDS), "consensus", leave=False, disable=not ranks.first_rank()):
        subset, neighbours = subsets.draw(generator)
        third += consensus(ratings[subset], *ratings[neighbours.index[:, :2]].T) / ROUNDS
    T, p = estimate(third)

    right = T.diag() * p / third.sum(dim=(1, 2)).clamp(min=1e-12)  # P(truly j | rated j)
    wrong = (1 - right.clamp(max=1)).clamp(min=0)
    wrong = torch.where(wrong <= 0, 0.05, torch.where(wrong >= 1, 0.95, wrong))
    times, calls, suggested = torch.zeros(N), torch.zeros(N), torch.zeros(N, R)
    for _ in tqdm(range(EPOCHS), "votes", leave=False, disable=not ranks.first_rank()):
        subset, neighbours = subsets.draw(generator)
        own = ratings[subset]
        found = votes(ratings, neighbours, own)
        called = called_wrong(found, own, wrong)
        times[subset] += 1
        calls[subset] += called
        suggested[subset[called], found[called].argmax(dim=1)] += 1

    corrected, confidence = correct(ratings, times, calls, suggested)
    return Curated(corrected, T, p, confidence)


# ------------------------------------------------------------------------------------------------- 4. select


def long_tail(embeddings: Tensor) -> Tensor:
    """How far a sample lies from all others: the mean cosine distance to its 10 nearest neighbours, (N,)."""
    return nearest(embeddings, min(VOTERS, len(embeddings) - 1)).distance.mean(dim=1)


def select(curated: Tensor, distance: Tensor, top: int) -> Tensor:
    """The `top` samples by curated rating, and among equals by long-tail score, the highest first: (top,) indices.

    So every rating that fits is there whole, and the one that does not is filled with what lies farthest out.
    """
    by_distance = distance.sort(descending=True, stable=True).indices
    return by_distance[curated[by_distance].sort(descending=True, stable=True).indices][:top]


# --------------------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None = None):
    """The command line, checked: a value that cannot work is a UserError that names its flag."""
    parser = command.ArgumentParser("Rate samples by a model, correct the ratings, select the best (DS2).")
    add = parser.group("model and data")
    # fmt: off
    add("--model", required=True, help="what rates and embeds: a checkpoint's folder in Hugging Face layout, or "
        "a name on the hub")
    add("--revision", help="branch, tag or commit of a --model on the hub")
    add("--data", required=True, metavar="SOURCE[,SOURCE...]", help="rows of one conversation each, as train.py reads "
        "them")
    add("--limit", type=int, bound="at least 1", metavar="N", help="take the first N rows of each source")
    add("--max-length", type=int, bound="at least 2", default=1024, help="cut samples to this many tokens")
    add("--out", required=True, metavar="FILE", help="JSON lines: the rows, the best first, with the columns rating, "
        "curated, long_tail and selected")
    add("--cache", metavar="DIR", help="where ratings and embeddings are kept, so that a run that was stopped goes on; "
        "default: OUT.kept")
    add = parser.group("selection")
    add("--top", type=int, bound="at least 1", default=10_000, metavar="K", help="how many samples to select")
    add("--rating-field", metavar="COLUMN", help="take the ratings, 0, 1, 2, 3, 4 or 5, from this column instead")
    add("--embeddings", metavar="FILE", help="a safetensors file with one tensor (samples, size) to take instead")
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
            except UserError as reason:
                account.refuse(where, str(reason).removeprefix(f"{source}, row 1: "))
                continue
            if len(several) == 1:
                found.append((where, row, several[0]))
            else:
                account.refuse(where, f"{len(several)} conversations, it is to hold one")
    return found


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
    ratings = read_ratings([sample[:2] for sample in samples], args.rating_field) if args.rating_field else None
    embeddings = read_embeddings(Path(args.embeddings), len(samples)) if args.embeddings else None

    if ratings is None or embeddings is None:
        model = load_model(args.model, getattr(torch, args.dtype), device, args.revision)
        examples = [data.encode(messages, tokenizer, args.max_length) for _, _, messages in samples]
        checkpoint.check_fits(model, args.model, examples)
        cache, kind = Path(args.cache or f"{out}.kept"), f"{args.dtype} {device.type}"

        def kept(what: str, compute, *parts) -> Tensor:
            key = losses_key(model.folder, None, examples, kind, digest(what, args.template, *parts))
            return kept_losses(cache, f"{key}-{what}", lambda: compute().float().flatten())[0]

        if ratings is None:
            asked = [question(messages, tokenizer, args.max_length) for _, _, messages in samples]
            ratings = kept("ratings", lambda: rate(model, tokenizer, asked), *asked).long()
        if embeddings is None:
            embeddings = kept("embeddings", lambda: embed(model, examples)).view(len(samples), -1)

    if not ranks.first_rank():
        return
    curated, distance = curate(ratings, embeddings, args.seed), long_tail(embeddings)
    best_first = select(curated.ratings, distance, len(samples))
    rows, columns = [], (ratings, curated.ratings, distance)
    for place, i in enumerate(best_first.tolist()):
        values = dict(zip(("rating", "curated", "long_tail"), (column[i].item() for column in columns), strict=True))
        rows.append(samples[i][1] | values | {"selected": place < args.top})
    write_lines(out, rows)  # the best first, so that --reference-top, which takes the first of equals, takes these
    print(f"rated    {counts(ratings)}")
    print(f"curated  {counts(curated.ratings)}; {int((curated.ratings != ratings).sum()):,} changed")
    print(f"selected {counts(curated.ratings[best_first[: args.top]])}")
    print("P(rated | truly), a row for each true rating, and how many are it:")
    for row, share in zip(curated.T.tolist(), curated.p.tolist(), strict=True):
        print("  " + " ".join(f"{x:.2f}" for x in row) + f"   {share:.2f}")
    print(f"wrote {out}; train.py: --reference-data {out} --reference-top {args.top} --rating-field curated")


if __name__ == "__main__":
    run_script(main)
