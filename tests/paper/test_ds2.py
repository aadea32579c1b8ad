"""DS2's four steps: each against brute force, numpy, planted errors, or a case by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import data
import evaluate
import train
from model import load_model
from paper import ds2
from support.files import UserError
from support.sources import Account

DEMO = Path(__file__).parents[2] / "demo"
R = len(ds2.RATINGS)
T = torch.eye(R) * 0.7 + 0.05 + torch.diag(torch.full((R - 1,), 0.1), 1) - torch.diag(torch.full((R - 1,), 0.05), -1)
T /= T.sum(dim=1, keepdim=True)
P = torch.tensor([0.1, 0.1, 0.15, 0.25, 0.25, 0.15])


def planted(n: int, seed: int = 0, size: int = 16, clusters: int = 200):
    """Embeddings in clusters of one true rating each, the true ratings, and ratings that err by T."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(0, clusters, (n,), generator=generator)
    true = torch.multinomial(P, clusters, replacement=True, generator=generator)[cluster]
    embeddings = torch.randn(clusters, size, generator=generator)[cluster]
    embeddings = F.normalize(embeddings + 0.1 * torch.randn(n, size, generator=generator), dim=1)
    rated = torch.multinomial(T[true], 1, generator=generator).squeeze(1)
    return embeddings, true, rated


def test_neighbours_are_those_of_a_plain_search_whatever_the_chunks(monkeypatch):
    embeddings, _, _ = planted(300)
    exact = embeddings.double().numpy()
    distance = 1 - exact @ exact.T
    np.fill_diagonal(distance, np.inf)
    for similarities in (2**24, 1000):
        monkeypatch.setattr(ds2, "SIMILARITIES", similarities)
        index, found = (x.numpy() for x in ds2.nearest(embeddings, 7))
        assert np.abs(found - np.sort(distance, axis=1)[:, :7]).max() < 1e-6
        assert np.abs(np.take_along_axis(distance, index, 1) - found).max() < 1e-6
        some, among = torch.tensor([3, 250, 8]), torch.arange(0, 300, 3)
        index, found = ds2.nearest(embeddings, 5, some, among)
        assert np.abs(found.numpy() - np.sort(distance[some][:, among], axis=1)[:, :5]).max() < 1e-6
        assert set(index.flatten().tolist()) <= set(among.tolist())
    assert np.abs(ds2.long_tail(embeddings).numpy() - np.sort(distance, axis=1)[:, :10].mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize("size", [270, 40])  # 40 of 300: lists that often hold too few of the subset
def test_neighbours_in_a_subset_are_those_of_a_search_in_it(size):
    embeddings, _, _ = planted(300)
    lists = ds2.nearest(embeddings, 25)
    for seed in range(3):
        subset = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:size].sort().values
        index, distance = ds2.nearest_in(subset, 10, embeddings, lists)
        assert torch.allclose(distance, ds2.nearest(embeddings, 10, subset, subset)[1], atol=1e-6)
        assert set(index.flatten().tolist()) <= set(subset.tolist())


def test_of_neighbours_that_are_equally_near_everyone_gets_others():
    alike = torch.ones(100, 4) / 2
    index, distance = ds2.nearest(alike, 10)
    assert not (index == torch.arange(100).unsqueeze(1)).any() and distance.max() < 1e-6
    assert all(len(set(row)) == 10 for row in index.tolist())
    assert index.flatten().bincount(minlength=100).max() < 30  # of 100, were the same ten everyone's
    halves = torch.where(torch.arange(100).unsqueeze(1) % 2 == 0, alike, -alike)
    assert (ds2.nearest(halves, 10)[0] % 2 == torch.arange(100).unsqueeze(1) % 2).all()


def test_consensus_is_what_three_loops_count():
    a, b, c = torch.randint(0, R, (3, 500))
    counted = torch.zeros(R, R, R)
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        counted[x, y, z] += 1 / 500
    assert torch.allclose(ds2.consensus(a, b, c).float(), counted)
    for order, found in enumerate(ds2.expected_consensus(T, P), start=1):
        exact = torch.zeros((R,) * order)
        for place in np.ndindex(*exact.shape):
            exact[place] = sum(P[i] * np.prod([T[i, j].item() for j in place]) for i in range(R))
        assert torch.allclose(found, exact, atol=1e-7)


def test_a_planted_transition_matrix_is_found_and_so_are_its_errors():
    embeddings, true, rated = planted(20_000)
    curated, confidence, found, p = ds2.curate(rated, embeddings)
    assert (found - T).abs().max() < 0.05
    assert (p - true.bincount(minlength=R) / len(true)).abs().max() < 0.03
    wrong, changed = rated != true, curated != rated
    precision = (changed & (curated == true)).sum() / changed.sum()
    recall = (changed & wrong).sum() / wrong.sum()
    print(f"[DS2: precision {precision:.3f}, recall {recall:.3f}]", end=" ")
    assert precision > 0.95 and recall > 0.9
    assert not confidence[~changed].ge(ds2.CONFIDENCE).any()


RARE = [0.02, 0.03, 0.10, 0.30, 0.54, 0.01]


@pytest.mark.parametrize(
    ("prior", "matrix", "most"),  # most: the largest error; by least squares it is 0.21 to 0.55
    [
        (RARE, 0.76 * torch.eye(R) + 0.04, 0.01),
        (RARE, 0.52 * torch.eye(R) + 0.08, 0.04),
        (RARE, T, 0.12),
        (RARE[::-1], 0.76 * torch.eye(R) + 0.04, 0.01),
        (RARE[::-1], T[range(R - 1, -1, -1)].flip(1), 0.12),
        ([0.54, 0.30, 0.10, 0.03, 0.02, 0.01], T, 0.02),
    ],
)
def test_rare_ratings_are_found_in_an_exact_consensus(prior, matrix, most):
    p, exact = np.array(prior), matrix.double().numpy()
    exact = exact / exact.sum(axis=1, keepdims=True)
    third = sum(p[i] * np.multiply.outer(np.multiply.outer(exact[i], exact[i]), exact[i]) for i in range(R))
    found, prior_found = ds2.estimate(torch.from_numpy(third))
    assert np.abs(found.numpy() - exact).max() < most
    assert np.abs(prior_found.numpy() - p).max() < 0.05


def test_votes_and_who_is_called_wrong_by_hand():
    ratings = torch.tensor([5, 1, 1, 5])
    index, distance = torch.tensor([[1, 2], [2, 0]]), torch.tensor([[0.2, 0.3], [0.1, 0.5]])
    found = ds2.votes(ratings, index, distance, ratings[:2])
    # 0: 1 with 0.8 + 0.7, itself with 1 - (2 * 0.2 - 0.3); 1: 1 with 0.9 and 1 - (0.2 - 0.5), 5 with 0.5
    exact = torch.tensor([[0, 1.5, 0, 0, 0, 0.9], [0, 2.2, 0, 0, 0, 0.5]])
    assert torch.allclose(found, F.normalize(exact, dim=1))
    backed = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.5, 0.3])
    own = torch.tensor([0, 0, 0, 1, 1, 1])
    found = torch.zeros(6, R).scatter(1, own.unsqueeze(1), backed.unsqueeze(1))
    called = ds2.called_wrong(found, own, torch.tensor([0.4, 0.6, 0, 0, 0, 0]))
    assert called.tolist() == [False, False, True, True, False, True]


def test_a_plain_loop_counts_the_same_epochs_calls_and_suggestions(monkeypatch):
    N, size, given = 120, 108, {}
    embeddings, _, rated = planted(N, clusters=12)
    p = torch.tensor([0, 0.1, 0.15, 0.25, 0.25, 0.6])  # so that all ratings of 0 are wrong, and less than none of 5
    monkeypatch.setattr(ds2, "estimate", lambda third: given.update(third=third) or (T.double(), p.double()))
    monkeypatch.setattr(ds2, "correct", lambda *counts: given.setdefault("counts", counts)[:2])
    ds2.curate(rated, embeddings, seed=3)

    generator, E, ratings = torch.Generator().manual_seed(3), embeddings.double().numpy(), rated.numpy()

    def draw():
        subset = np.sort(torch.randperm(N, generator=generator)[:size].numpy())
        distance = 1 - E[subset] @ E[subset].T
        np.fill_diagonal(distance, np.inf)
        return subset, [sorted(zip(line, subset, strict=True))[:10] for line in distance]

    third = np.zeros((R, R, R))
    for _ in range(50):
        for sample, near in zip(*draw(), strict=True):
            third[ratings[sample], ratings[near[0][1]], ratings[near[1][1]]] += 1 / size / 50
    assert np.abs(given["third"].numpy() - third).max() < 1e-12
    wrong = 1 - T.diag().numpy() * p.numpy() / third.sum(axis=(1, 2))
    wrong = np.where(wrong <= 0, 0.05, np.where(wrong >= 1, 0.95, wrong))
    times, calls, suggested = np.zeros(N), np.zeros(N), np.zeros((N, R))
    for _ in range(51):
        subset, near = draw()
        found = np.zeros((size, R))
        for i, line in enumerate(near):
            for distance, j in line:
                found[i, ratings[j]] += 1 - distance
            found[i, ratings[subset[i]]] += 1 - 2 * line[0][0] + line[1][0]
        found = np.maximum(found, 0)
        doubt = -np.log(found[range(size), ratings[subset]] / np.linalg.norm(found, axis=1) + 1e-8)
        for i, sample in enumerate(subset):
            times[sample] += 1
            of_it = doubt[ratings[subset] == ratings[sample]]
            if doubt[i] >= np.quantile(of_it, 1 - wrong[ratings[sample]]):
                calls[sample] += 1
                suggested[sample, found[i].argmax()] += 1
    assert len(set(times)) > 3 and 0 < calls.sum() < times.sum() / 2
    for counted, exact in zip(given["counts"][1:], (times, calls, suggested), strict=True):
        assert (counted.numpy() == exact).all()


def test_where_no_neighbour_votes_nothing_is_suggested():
    orthogonal, pairs = torch.eye(100), torch.cat([torch.eye(50), -torch.eye(50)])  # of pairs, each opposite to another
    for embeddings in (orthogonal, pairs):
        for ratings in (torch.full((100,), 4), torch.arange(100) % R):
            curated, confidence, _, _ = ds2.curate(ratings, embeddings)
            assert (curated == ratings).all() and confidence.max() == 0
    nobody = torch.zeros(3, R)
    assert not ds2.called_wrong(nobody, torch.tensor([1, 1, 2]), torch.full((R,), 0.95)).any()


def test_an_error_is_called_wrong_in_half_of_the_epochs_and_corrected_where_that_is_sure():
    suggested = torch.zeros(5, R)
    suggested[0, 3] = suggested[1, 3] = 40
    suggested[2, 3:5] = 20
    suggested[3, 1], suggested[3, 3] = 30, 10
    suggested[4, 3] = 23
    calls, times = torch.tensor([40.0, 10, 40, 40, 23]), torch.tensor([46.0, 46, 44, 46, 46])
    ratings, sure = ds2.correct(torch.ones(5).long(), times, calls, suggested)
    assert ratings.tolist() == [3, 1, 1, 1, 1]  # sure; seldom called; two suggestions; mostly its own; half of 24 / 29
    assert sure.tolist() == pytest.approx([41 / 46 * 41 / 48, 0, 21 / 46 * 41 / 46, 11 / 46 * 41 / 48, 24 / 29 * 0.5])


def test_the_likeliest_digit_is_the_rating(monkeypatch):
    likely = {"a": 5, "b": 0, "c": 3}
    answers = lambda model, tokenizer, pairs, *_: [(-abs(likely[text] - int(digit)), True) for text, digit in pairs]
    monkeypatch.setattr(evaluate, "loglikelihoods", answers)
    assert ds2.rate(None, None, ["a", "b", "c"]).tolist() == [5, 0, 3]


def test_selection_takes_ratings_whole_and_fills_the_rest_with_what_lies_farthest():
    curated, distance = torch.tensor([3, 5, 4, 4, 5, 4, 0]), torch.tensor([0.9, 0.1, 0.2, 0.4, 0.2, 0.3, 1.0])
    assert ds2.select(curated, distance, 4).tolist() == [4, 1, 3, 5]
    assert ds2.select(curated, distance, 7).tolist() == [4, 1, 3, 5, 2, 0, 6]


def test_ratings_and_embeddings_are_transformers_own(llama, rows):
    model, tokenizer = load_model(llama), data.load_tokenizer(llama)
    peer = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    samples = ds2.read_samples(str(rows), 6, None, Account())
    asked = [ds2.question(messages, tokenizer, 40) for _, messages in samples]
    digits = [tokenizer.encode_prompts([str(rating)], with_prefix=False)[0] for rating in ds2.RATINGS]
    exact, examples = [], [data.encode(messages, tokenizer, 60) for _, messages in samples]
    with torch.no_grad():
        for text in asked:
            (ids,) = tokenizer.encode_prompts([text])
            sums = []
            for digit in digits:
                log_p = peer(torch.tensor([ids + digit])).logits[0].log_softmax(dim=-1)
                sums.append(sum(log_p[len(ids) - 1 + n, token].item() for n, token in enumerate(digit)))
            exact.append(int(np.argmax(sums)))
        means = [peer(e.ids[None], output_hidden_states=True).hidden_states[-1][0].mean(dim=0) for e in examples]
    assert ds2.rate(model, tokenizer, asked).tolist() == exact
    assert torch.allclose(ds2.embed(model, examples), torch.stack(means), atol=1e-3)


DEMO_FLAGS = ["--model", str(DEMO / "model"), "--max-length", "64", "--device", "cpu", "--dtype", "float32"]


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_demo_from_rows_to_a_reference_and_again_without_a_model(tmp_path, monkeypatch, capsys):
    lines = [json.loads(line) for line in (DEMO / "sft.jsonl").read_text().splitlines()[:60]]
    pool, out = write_lines(tmp_path / "pool.jsonl", lines[:40]), tmp_path / "rated.jsonl"
    dolly = [{"instruction": row["instruction"], "response": row["output"]} for row in lines[40:]]
    sources = f"{pool},{write_lines(tmp_path / 'dolly.jsonl', dolly)}"
    argv = [*DEMO_FLAGS, "--data", sources, "--top", "5", "--out", str(out)]
    ds2.main(argv)
    told, first = capsys.readouterr().out, out.read_text()
    found = [json.loads(line) for line in first.splitlines()]
    assert sorted(map(str, (row["row"] for row in found))) == sorted(map(str, lines[:40] + dolly))
    assert [row["selected"] for row in found] == [True] * 5 + [False] * (len(found) - 5)
    assert found == sorted(found, key=lambda row: (-row["curated"], -row["long_tail"]))
    assert "changed" in told
    monkeypatch.setattr(ds2, "rate", None)  # a second run asks nobody
    monkeypatch.setattr(ds2, "embed", None)
    ds2.main(argv)
    assert out.read_text() == first
    with monkeypatch.context() as other, pytest.raises(TypeError):  # another question is asked
        other.setattr(ds2, "QUESTION", "Rate it: {sample}")
        ds2.main(argv)

    taken = told.splitlines()[-1].split("train.py: ")[1].split()
    assert taken == ["--reference-data", str(out), "--reference-top", "5", "--rating-field", "curated"]
    best = data.load_conversations(str(out), top=5, rating_field="curated")
    assert best == [row["messages"] for row in found[:5]]
    run = [*DEMO_FLAGS, "--data", pool, "--out", str(tmp_path / "run"), "--method", "tokencleaning", *taken]
    train.main([*run, "--max-steps", "1", "--lora-rank", "2"])
    assert (tmp_path / "run" / "reference" / "adapter_model.safetensors").exists()


def test_a_mixture_of_schemas_is_written_so_that_training_reads_the_same_samples(tmp_path, monkeypatch):
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "no", "weight": 0}]
    said += [{"role": "user", "content": "R"}, {"role": "assistant", "content": "yes", "train": True}]
    files = [
        [{"instruction": "I", "input": "x", "output": "O", "history": [["a", "b"]], "system": "S", "rating": "mine"}],
        [{"instruction": "I", "context": "x", "response": "O", "selected": 7, "row": 3}],
        [{"messages": said, "curated": [1], "long_tail": None}],
        [{"prompt": said[:3], "completion": said[3:]}],
        [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "O"}]}],
    ]
    for kind, rows in enumerate(files):
        rows[:] = [row | {"stars": (kind + n) % R, "n": f"{kind} {n}"} for row in rows for n in range(4)]
    paths = [write_lines(tmp_path / f"{kind}.jsonl", rows) for kind, rows in enumerate(files)]
    embeddings = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ds2, "embed", lambda model, examples: embeddings)
    out = tmp_path / "rated.jsonl"
    ds2.main([*DEMO_FLAGS, "--data", ",".join(paths), "--top", "3", "--out", str(out), "--rating-field", "stars"])

    found = [json.loads(line) for line in out.read_text().splitlines()]
    names = [row["n"] for rows in files for row in rows]
    rows = dict(zip(names, (row for rows in files for row in rows), strict=True))
    assert all(row["row"] == rows[row["row"]["n"]] and row["rating"] == row["row"]["stars"] for row in found)
    tokenizer = data.load_tokenizer(DEMO / "model")
    examples = dict(zip(names, data.load_examples(",".join(paths), tokenizer, 200)[0], strict=True))
    read, account = data.load_examples(str(out), tokenizer, 200)
    assert account.dropped == 0 and sorted(row["row"]["n"] for row in found) == sorted(names)
    for row, example in zip(found, read, strict=True):
        exact = examples[row["row"]["n"]]
        assert torch.equal(example.ids, exact.ids) and torch.equal(example.response, exact.response)


def test_a_run_that_was_stopped_goes_on_after_the_parts_that_it_had(tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (DEMO / "sft.jsonl").read_text().splitlines()[:40]]
    argv = [*DEMO_FLAGS, "--data", write_lines(tmp_path / "pool.jsonl", lines), "--top", "5", "--out"]
    monkeypatch.setattr(ds2, "PART", 16)
    ds2.main([*argv, str(tmp_path / "whole.jsonl")])
    rate, embed, asked, stops = ds2.rate, ds2.embed, [], iter([(1, 0), (3, 1), (9, 9)])

    def counted(step, compute):
        def wrapped(model, *given):
            if sum(name == step for name, _ in asked) == most[step]:
                raise KeyboardInterrupt
            asked.append((step, len(given[-1])))
            return compute(model, *given)

        return wrapped

    monkeypatch.setattr(ds2, "rate", counted("rate", rate))
    monkeypatch.setattr(ds2, "embed", counted("embed", embed))
    for rated, embedded in stops:
        most = {"rate": rated, "embed": embedded}
        try:
            ds2.main([*argv, str(tmp_path / "stopped.jsonl")])
        except KeyboardInterrupt:
            assert not (tmp_path / "stopped.jsonl").exists()
    assert asked == [(step, n) for step in ("rate", "embed") for n in (16, 16, 8)]
    assert (tmp_path / "stopped.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_mistakes_are_named(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "o.jsonl"), "--device", "cpu"]
    for flags, reason in {
        ("--top", "9999"): "--top 9999 of",
        ("--top", "2", "--rating-field", "stars"): "row 1: column stars holds None, not a whole number from 0 to 5",
    }.items():
        with pytest.raises(UserError, match=reason):
            ds2.main([*argv, *flags])
    lines = [{"prompt": "Q", "completion": "A", "stars": stars} for stars in ("3", int("9" * 400))]
    argv[3] = write_lines(tmp_path / "rated.jsonl", lines)
    with pytest.raises(
        UserError, match=r"rated.jsonl, row 2: column stars holds 9{60}, not a whole number from 0 to 5"
    ):
        ds2.main([*argv, "--rating-field", "stars"])
    with pytest.raises(UserError, match="samples are too few"):
        ds2.curate(torch.zeros(11).long(), torch.randn(11, 4))
