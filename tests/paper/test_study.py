"""The noise study: what is planted, what is measured of it, and a small study from its start to its tables."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_rows

import data

sys.path.insert(0, str(Path(__file__).parents[2] / "results" / "noise"))
import report
import study
from planted import KINDS, plant, plant_noise


def test_auroc_is_scikit_learn_s():
    from sklearn.metrics import roc_auc_score

    rng = random.Random(0)
    for _ in range(50):
        clean, noise = ([rng.randrange(6) / 2 for _ in range(rng.randrange(1, 30))] for _ in range(2))
        truth = [1] * len(clean) + [0] * len(noise)
        assert study.auroc(torch.tensor(clean), torch.tensor(noise)) == pytest.approx(
            roc_auc_score(truth, clean + noise)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_planted_where_it_says(llama, rows, kind):
    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(rows), tokenizer, 512)
    noisy, masks = plant_noise(examples, kind, tokenizer, seed=1)
    again, _ = plant_noise(examples, kind, tokenizer, seed=1)
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
    assert found["REL"] == {"auroc": 0.0, "noise_selected": 1 / 3}  # its loss fell most
    assert found["attention"] == {"auroc": 2 / 3, "noise_selected": 1 / 3}
    assert found["excess loss"]["auroc"] == pytest.approx(2.5 / 3)
    assert found["probability"]["auroc"] == pytest.approx(2 / 3)  # e^-3 - e^-9 is little, but more than nothing


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


@pytest.mark.slow  # 65 trainings
def test_a_study_of_objectives_reports_what_each_keeps(llama, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text() * 3)
    argv = ["study", "--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "out"), "--samples", "24"]
    argv += [
        "--objectives",
        "--only",
        "full,sstoken,surprise,dft,rho1,oracle,both-3-0,base-3-0,ranked,auto,own",
        "--lrs",
        "0.001",
        "--seeds",
        "1",
    ]
    monkeypatch.setattr(study, "STEPS", (1, 6))
    monkeypatch.setattr(sys, "argv", argv)
    for registry in (study.OBJECTIVES, study.baselines.METHODS):
        for name in study.VARIANTS:
            monkeypatch.setitem(registry, name, None)  # taken out again
    study.main()
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*-seed0.json")}
    assert len(found) == 6 * 11 - 1  # on clean data there is nothing that an oracle could know
    of = {(record["kind"], record["method"]): record for record in found.values()}
    for kind in ("vocabulary", "words", "faults", "typos", "half"):
        assert of[kind, "oracle"]["noise_kept"] == 0 == of[kind, "oracle"]["noise_weight"]
        assert of[kind, "oracle"]["kept"] == pytest.approx(1 - of[kind, "oracle"]["noise"])
        assert of[kind, "full"]["noise_weight"] == pytest.approx(of[kind, "full"]["noise"])
        assert 0.6 <= of[kind, "sstoken"]["kept"] < 0.65 and of[kind, "dft"]["kept"] == 1
        assert of[kind, "full"]["held_out_before"] == of[kind, "oracle"]["held_out_before"]
        assert of[kind, "ranked"]["kept"] <= of[kind, "base-3-0"]["kept"] >= of[kind, "both-3-0"]["kept"] > 0
        assert of[kind, "auto"]["kept"] <= of[kind, "surprise"]["kept"] and of[kind, "own"]["kept"] > 0.5
    assert of["clean", "full"]["noise_kept"] is None and of["clean", "full"]["noise"] == 0
    assert "kept" in capsys.readouterr().out
    table = (tmp_path / "out" / "tables.md").read_text()
    best = min((record["held_out_after"], name) for (kind, name), record in of.items() if kind == "words")[1]
    assert re.search(r"\| words \| 0.001 \| ([\w-]+) \|", table)[1] == best
    assert (tmp_path / "out" / "objectives.png").stat().st_size > 10_000


def test_what_a_method_alone_keeps_by_hand():
    weights = {"full": [[1] * 10, [1] * 2], "stm": [[1, 0, 1] + [0] * 7, [0, 1]], "profit": [[1, 1] + [0] * 8, [0, 0]]}
    weights["dft"] = [[0.1] * 9 + [0.0], [0.9, 0.1]]
    weights["surprise"] = [[1] * 9 + [0], [1, 1]]  # keeps eleven of twelve, and takes nothing from the others
    clean = {"kind": "clean", "seed": 0, "lr": 1}
    results = [clean | {"method": name, "weights": given} for name, given in weights.items()]
    results.append(clean | {"lr": 0.1, "method": "eaft", "weights": weights["full"]})  # at another rate
    results.append(clean | {"method": "own", "weights": weights["full"]})  # a variant
    text = report.only_kept(results, [["a", "b", "c", *"vvvvvv", "w"], ["d", "c"]])
    expected = {"stm": "'c' (2)", "profit": "'b' (1)", "dft": "'d' (1)", "surprise": "leaves out: 'w' (1)"}
    assert text.splitlines()[2:] == [f"| {name} | {found} |" for name, found in expected.items()]
