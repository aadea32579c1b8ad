"""The noise study: what is planted, what is measured of it, and a small study from its start to its tables."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_rows

import data

sys.path.insert(0, str(Path(__file__).parents[2] / "results" / "noise"))
import report
import study
from planted import TOKENS, plant


def test_auroc_is_scikit_learn_s():
    from sklearn.metrics import roc_auc_score

    rng = random.Random(0)
    for _ in range(50):
        scores = torch.tensor([rng.randrange(6) / 2 for _ in range(rng.randrange(2, 60))])
        noise = torch.tensor([True, False] + [rng.random() < 0.3 for _ in scores[2:]])
        zeros = torch.zeros_like(scores)
        found = study.measure([zeros], [scores], [zeros], [zeros], [noise])["attention, auroc"]
        assert found == pytest.approx(roc_auc_score(~noise, scores))


@pytest.mark.parametrize("kind", TOKENS)
def test_noise_is_planted_where_it_says(llama, rows, kind):
    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(rows), tokenizer, 512)
    noisy, masks = plant(kind, examples, tokenizer, seed=1)
    again, _ = plant(kind, examples, tokenizer, seed=1)
    for (ids, response), (changed, same), (repeated, _), noise in zip(examples, noisy, again, masks, strict=True):
        assert torch.equal(changed, repeated) and torch.equal(response, same)
        assert torch.equal((ids != changed)[response], noise) and torch.equal(ids[~response], changed[~response])
        assert int(noise.sum()) == round(0.2 * (len(noise) - 1)) and not noise[-1]  # the end token stays
        assert not (changed[response][noise] == tokenizer.eos_id).any()
    if kind == "words":
        planted = [
            tokenizer.decode([i]) for e, n in zip(noisy, masks, strict=True) for i in e.ids[e.response][n].tolist()
        ]
        assert planted and all(text[0] == " " and text[1:].isalpha() for text in planted)


def test_what_is_measured_by_hand():
    found = study.measure(
        nll=[torch.tensor([1.0, 2.0, 3.0, 1.0])],
        attention=[torch.tensor([0.5, 0.4, 0.3, 0.2])],
        history=[torch.tensor([2.0, 2.0, 9.0, 2.0])],
        reference=[torch.tensor([1.0, 1.5, 9.5, 2.5])],
        noise=[torch.tensor([False, False, True, False])],
    )
    assert found["REL, auroc"] == 0  # its loss fell most
    assert found["attention, auroc"] == pytest.approx(2 / 3)
    assert found["excess loss, auroc"] == pytest.approx(2.5 / 3)
    assert found["probability, auroc"] == pytest.approx(2 / 3)  # e^-3 - e^-9 is little, but more than nothing


def test_planted_faults_are_those_of_real_data_and_marked(llama, tmp_path):
    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(write_rows(tmp_path / "rows.jsonl")), tokenizer, 256)
    faulty, masks = plant("faults", examples, tokenizer, seed=1)
    kinds = {"swapped": 0, "cut": 0, "wrapped": 0, "as it was": 0}
    answers = [e.ids[e.response].tolist() for e in examples]
    for before, after, noise in zip(examples, faulty, masks, strict=True):
        assert len(noise) == int(after.response.sum())
        old, new = before.ids[before.response].tolist(), after.ids[after.response].tolist()
        assert after.ids[~after.response].tolist() == before.ids[~before.response].tolist()
        if noise.all():
            kinds["swapped"] += 1
            assert new != old and new in answers
        elif noise.tolist() == [False] * (len(new) - 1) + [True]:
            kinds["cut"] += 1
            assert new[-1] == tokenizer.eos_id and new[:-1] == old[: len(new) - 1] and len(new) < len(old)
        elif noise.any():
            kinds["wrapped"] += 1
            assert new[int(noise.sum()) :] == old and tokenizer.decode(new).startswith(("As an AI", "Sure!"))
        else:
            kinds["as it was"] += 1
            assert new == old
    assert kinds == {"swapped": 4, "cut": 2, "wrapped": 4, "as it was": 10}


def test_half_of_the_answers_are_swapped_among_themselves(llama, tmp_path):
    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(write_rows(tmp_path / "rows.jsonl")), tokenizer, 256)
    swapped, masks = plant("half", examples, tokenizer, seed=1)
    answers = [e.ids[e.response].tolist() for e in examples]
    found = [e.ids[e.response].tolist() for e in swapped]
    wrong = [bool(noise.all()) for noise in masks]
    assert sum(wrong) == len(examples) // 2 and not any(m.any() for m, w in zip(masks, wrong, strict=True) if not w)
    assert [a != b for a, b in zip(answers, found, strict=True)] == wrong and sorted(answers) == sorted(found)


def test_a_typo_swaps_two_letters_of_a_longer_word(llama, rows):
    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(rows), tokenizer, 512)
    changed, masks = plant("typos", examples, tokenizer, seed=1)
    of_all = 0
    for before, after, noise in zip(examples, changed, masks, strict=True):
        assert torch.equal(before.ids[~before.response], after.ids[~after.response])
        ids = after.ids[after.response].tolist()
        old, new = (tokenizer.decode(e.ids[e.response].tolist()[:-1]) for e in (before, after))
        pairs = list(zip(re.findall(r"[^\W\d_]+|.", old), re.findall(r"[^\W\d_]+|.", new), strict=True))
        typos = [(a, b) for a, b in pairs if a != b]
        longer = [a for a, _ in pairs if len(a) >= 5 and a.isalpha() and len(set(a[1:-1])) > 1]
        assert len(typos) == round(0.2 * len(longer)) and ids[-1] == tokenizer.eos_id and not noise[-1]
        for a, b in typos:
            places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
            assert len(a) >= 5 and a[0] == b[0] and a[-1] == b[-1] and sorted(a) == sorted(b)
            assert places[1] == places[0] + 1 and len(places) == 2
        if not noise.any():
            assert not typos
        marked = "".join(tokenizer.decode([i]) for i, n in zip(ids, noise.tolist(), strict=True) if n)
        assert all(b in marked or len(tokenizer.encode(b)[0]) > 1 for _, b in typos) and bool(typos) == bool(marked)
        of_all += len(typos)
    assert of_all > 10


@pytest.mark.slow  # 41 trainings
def test_a_study_reports_what_each_method_keeps_and_trains_nothing_twice(llama, tmp_path, monkeypatch, capsys):
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    rows.write_text(rows.read_text() * 3)
    argv = ["study", "--model", str(llama), "--data", str(rows), "--out", str(out), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--only", "full,sstoken,surprise,dft,rho1,oracle,auto"])
    monkeypatch.setattr(study, "ROWS", 24)
    monkeypatch.setattr(report, "STEPS", (1, 6))
    study.main()
    found = [json.loads(line) for line in (out / "trainings.jsonl").read_text().splitlines()]
    assert len(found) == 6 * 7 - 1 and "rho1 held-out loss" in capsys.readouterr().out
    of = {(record["kind"], record["method"]): record for record in found}
    for kind in ("vocabulary", "words", "faults", "typos", "half"):
        assert of[kind, "oracle"]["noise kept"] == 0 == of[kind, "oracle"]["noise in weight"]
        assert of[kind, "oracle"]["kept"] == pytest.approx(1 - of[kind, "oracle"]["noise"])
        assert of[kind, "full"]["noise in weight"] == pytest.approx(of[kind, "full"]["noise"])
        assert 0.6 <= of[kind, "sstoken"]["kept"] < 0.65 and of[kind, "dft"]["kept"] == 1
        assert of[kind, "full"]["loss before"] == of[kind, "oracle"]["loss before"]
        assert of[kind, "auto"]["kept"] <= of[kind, "surprise"]["kept"]
        followed = [method for k, method in of if k == kind and "REL, auroc" in of[k, method]]
        assert followed == (["full", "sstoken", "auto"] if kind in TOKENS else [])
    assert len(of["words", "auto"]["attention, auroc"]) == 2 and "noise" not in of["clean", "full"]
    table = (out / "tables.md").read_text()
    best = min((record["loss after"], name) for (kind, name), record in of.items() if kind == "words")[1]
    assert re.search(r"\| words \| 0.001 \| ([\w-]+) \|", table)[1] == best
    for name in ("objectives", "auroc"):
        assert (out / f"{name}.png").stat().st_size > 10_000

    monkeypatch.setattr(study.Setting, "train", lambda *given: pytest.fail("trained again"))
    (out / "tables.md").unlink()
    study.main()
    assert (out / "tables.md").read_text() == table
    other = shutil.copytree(llama, tmp_path / "another")
    monkeypatch.setattr(sys, "argv", [*argv, "--only", "full", "--kinds", "clean,half", "--model", f"{llama},{other}"])
    monkeypatch.setattr(
        study.Setting, "train", lambda known, method: known.record | {"method": method, "loss after": 2.0}
    )
    study.main()
    assert (out / "trainings.jsonl").read_text().count('"another"') == 2
    assert "another, lr 0.001 |" in (out / "tables.md").read_text()


def test_the_lower_of_full_training_and_the_oracle_is_what_a_method_is_compared_with(tmp_path):
    losses = {"full": (2.0, 1.9), "oracle": (1.8, 1.95), "auto": (1.9, 1.91)}
    results = [
        {"model": "m", "kind": "half", "lr": 1e-3, "seed": seed, "method": name, "loss before": 3.0, "loss after": loss}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    report.write_report(results, ["full", "auto"], {}, tmp_path)
    assert "| half | 0.0550 (0.010 to 0.100), n = 2 |\n" in (tmp_path / "tables.md").read_text()


def test_what_a_method_alone_keeps_by_hand():
    weights = {"full": [1] * 12, "stm": [1, 0, 1, *[0] * 7, 0, 1], "profit": [1, 1, *[0] * 10]}
    weights["dft"] = [*[0.1] * 9, 0.0, 0.9, 0.1]
    weights["surprise"] = [*[1] * 9, 0, 1, 1]  # keeps eleven of twelve, and takes nothing from the others
    results = [{"method": name, "weights": given} for name, given in weights.items()]
    results.append({"method": "eaft"})  # with another seed
    text = report.only_kept(results, ["a", "b", "c", *"vvvvvv", "w", "d", "c"])
    expected = {"stm": "'c' (2)", "profit": "'b' (1)", "dft": "'d' (1)", "surprise": "leaves out: 'w' (1)"}
    assert text.splitlines()[2:] == [f"| {name} | {found} |" for name, found in expected.items()]
