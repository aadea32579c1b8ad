"""DS2's four steps: each against brute force, numpy, planted errors, or a case by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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
        found = ds2.nearest(embeddings, 7)
        assert np.abs(found.distance.numpy() - np.sort(distance, axis=1)[:, :7]).max() < 1e-6
        assert np.abs(np.take_along_axis(distance, found.index.numpy(), 1) - found.distance.numpy()).max() < 1e-6
        some, among = torch.tensor([3, 250, 8]), torch.arange(0, 300, 3)
        found = ds2.nearest(embeddings, 5, some, among)
        assert np.abs(found.distance.numpy() - np.sort(distance[some][:, among], axis=1)[:, :5]).max() < 1e-6
        assert set(found.index.flatten().tolist()) <= set(among.tolist())
    assert np.abs(ds2.long_tail(embeddings).numpy() - np.sort(distance, axis=1)[:, :10].mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize("size", [270, 40])  # 40 of 300: lists that often hold too few of the subset
def test_neighbours_in_a_subset_are_those_of_a_search_in_it(size):
    embeddings, _, _ = planted(300)
    subsets, generator = ds2.Subsets(embeddings, size, 10), torch.Generator().manual_seed(1)
    subsets.lists = ds2.Neighbours(*(x[:, :25] for x in subsets.lists))
    for _ in range(3):
        subset, found = subsets.draw(generator)
        assert len(subset.unique()) == size
        plain = ds2.nearest(embeddings, 10, subset, subset)
        assert torch.allclose(found.distance, plain.distance, atol=1e-6)


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
    found = ds2.curate(rated, embeddings)
    assert (found.T - T).abs().max() < 0.05
    assert (found.p - true.bincount(minlength=R) / len(true)).abs().max() < 0.03
    wrong, changed = rated != true, found.ratings != rated
    precision = (changed & (found.ratings == true)).sum() / changed.sum()
    recall = (changed & wrong).sum() / wrong.sum()
    print(f"[DS2: precision {precision:.3f}, recall {recall:.3f}]", end=" ")
    assert precision > 0.95 and recall > 0.9
    assert not found.confidence[~changed].ge(ds2.CONFIDENCE).any()


def test_votes_and_who_is_called_wrong_by_hand():
    ratings = torch.tensor([5, 1, 1, 5])
    near = ds2.Neighbours(torch.tensor([[1, 2], [2, 0]]), torch.tensor([[0.2, 0.3], [0.1, 0.5]]))
    found = ds2.votes(ratings, near, ratings[:2])
    # 0: 1 with 0.8 + 0.7, itself with 1 - (2 * 0.2 - 0.3); 1: 1 with 0.9 and 1 - (0.2 - 0.5), 5 with 0.5
    exact = torch.tensor([[0, 1.5, 0, 0, 0, 0.9], [0, 2.2, 0, 0, 0, 0.5]])
    assert torch.allclose(found, F.normalize(exact, dim=1))
    backed = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.5, 0.3])
    own = torch.tensor([0, 0, 0, 1, 1, 1])
    found = torch.zeros(6, R).scatter(1, own.unsqueeze(1), backed.unsqueeze(1))
    called = ds2.called_wrong(found, own, torch.tensor([0.4, 0.6, 0, 0, 0, 0]))
    assert called.tolist() == [False, False, True, True, False, True]


def test_an_error_is_called_wrong_in_half_of_the_epochs_and_corrected_where_that_is_sure():
    suggested = torch.zeros(5, R)
    suggested[0, 3] = suggested[1, 3] = 40
    suggested[2, 3:5] = 20
    suggested[3, 1], suggested[3, 3] = 30, 10
    suggested[4, 3] = 23
    calls = torch.tensor([40.0, 10, 40, 40, 23])
    ratings, sure = ds2.correct(torch.ones(5).long(), torch.full((5,), 46.0), calls, suggested)
    assert ratings.tolist() == [3, 1, 1, 1, 1]  # sure; seldom called; two suggestions; mostly its own; half of 24 / 29
    assert sure.tolist() == pytest.approx([41 / 46 * 41 / 48, 0, 21 / 46 * 41 / 48, 11 / 46 * 41 / 48, 24 / 29 * 0.5])


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
    samples = ds2.read_samples(str(rows), 6, Account())
    asked = [ds2.question(messages, tokenizer, 40) for _, _, messages in samples]
    digits = [tokenizer.encode_prompts([str(rating)], with_prefix=False)[0] for rating in ds2.RATINGS]
    exact, examples = [], [data.encode(messages, tokenizer, 60) for _, _, messages in samples]
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
    assert torch.allclose(ds2.embed(model, examples), F.normalize(torch.stack(means), dim=1), atol=1e-4)


def test_the_demo_from_rows_to_a_reference_and_again_without_a_model(tmp_path, monkeypatch, capsys):
    lines = [json.loads(line) for line in (DEMO / "sft.jsonl").read_text().splitlines()[:60]]
    pool, out = tmp_path / "pool.jsonl", tmp_path / "rated.jsonl"
    pool.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n, row in enumerate(lines)))
    argv = ["--model", str(DEMO / "model"), "--data", str(pool), "--top", "5", "--out", str(out), "--dtype", "float32"]
    ds2.main([*argv, "--max-length", "64", "--device", "cpu"])
    told, first = capsys.readouterr().out, out.read_text()
    found = [json.loads(line) for line in first.splitlines()]
    assert sorted(row["n"] for row in found) == list(range(60))
    assert [row["selected"] for row in found] == [True] * 5 + [False] * (len(found) - 5)
    assert found == sorted(found, key=lambda row: (-row["curated"], -row["long_tail"]))
    assert "wrote" in told and "changed" in told
    monkeypatch.setattr(ds2, "rate", None)  # a second run asks nobody
    monkeypatch.setattr(ds2, "embed", None)
    ds2.main([*argv, "--max-length", "64", "--device", "cpu"])
    assert out.read_text() == first

    taken = ["--reference-data", str(out), "--reference-top", "5", "--rating-field", "curated"]
    best = data.load_conversations(str(out), top=5, rating_field="curated")
    assert best == [messages for _, _, messages in ds2.read_samples(str(out), 5, Account())]
    run = [
        "--model",
        str(DEMO / "model"),
        "--data",
        str(pool),
        "--out",
        str(tmp_path / "run"),
        "--method",
        "tokencleaning",
    ]
    train.main([*run, *taken, "--max-steps", "1", "--lora-rank", "2", "--device", "cpu", "--dtype", "float32"])
    assert (tmp_path / "run" / "reference" / "adapter_model.safetensors").exists()

    ratings, embeddings = torch.tensor([row["n"] % R for row in found]), torch.randn(len(found), 8)
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row | {"stars": row["n"] % R}) + "\n" for row in found))
    save_file({"embeddings": embeddings}, tmp_path / "e.safetensors")
    argv = [
        "--model",
        str(DEMO / "model"),
        "--data",
        str(given),
        "--top",
        "5",
        "--out",
        str(out),
        "--rating-field",
        "stars",
    ]
    ds2.main([*argv, "--embeddings", str(tmp_path / "e.safetensors"), "--device", "cpu"])
    assert [json.loads(line)["rating"] for line in out.read_text().splitlines()].count(5) == int((ratings == 5).sum())


def test_mistakes_are_named(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "o.jsonl"), "--device", "cpu"]
    for flags, reason in {
        ("--top", "9999"): "--top 9999 of",
        ("--top", "2", "--rating-field", "stars"): "row 1: column stars holds None, not a whole number from 0 to 5",
    }.items():
        with pytest.raises(UserError, match=reason):
            ds2.main([*argv, *flags])
    save_file({"a": torch.ones(2, 3)}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=r"holds \(2, 3\): it is to hold one tensor"):
        ds2.main([*argv, "--top", "2", "--embeddings", str(tmp_path / "e.safetensors")])
    with pytest.raises(UserError, match="samples are too few"):
        ds2.curate(torch.zeros(11).long(), torch.randn(11, 4))
