"""`--rho auto`: which answers belong to their prompt, against scipy and simulated answers; what a run says of it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import write_rows
from scipy.optimize import minimize
from scipy.stats import norm
from test_train import prepare

import data
import train
from model import load_model
from paper import auto, baselines
from paper.frozen import FrozenLosses, response_losses

# ----------------------------------------------------------------------------------------------- two groups, or one


def simulated(n: int, wrong: float, right: tuple, chance: float, low: float, seed: int):
    """Gains of n answers, the wrong ones first, and gains that are chance. right: mean and deviation of their gains."""
    rng, count = np.random.default_rng(seed), round(wrong * n)
    gains = right[0] + right[1] * rng.standard_normal(n)
    gains[:count] = low + chance * rng.standard_normal(count)
    return torch.tensor(gains), torch.tensor(chance * rng.standard_normal(n)), count


def likeliest(gains: np.ndarray, chance: np.ndarray) -> tuple[float, float, float]:
    """Two groups by scipy: how much likelier they are than one (nats), how far apart, and the bar between them."""

    def unlikely(x):
        low, log_low, high, log_high, odds = x
        s0, s1, share = math.exp(log_low), max(math.exp(log_high), gains.std(ddof=1) / 5), 1 / (1 + math.exp(-odds))
        both = np.logaddexp(
            math.log(share) + norm.logpdf(gains, high, s1), math.log1p(-share) + norm.logpdf(gains, low, s0)
        )
        prior = (low / s0 / 0.3) ** 2 / 2 - math.log(share) - math.log(1 - share)  # an answer more in either group
        return prior - both.sum() - norm.logpdf(chance, 0, s0).sum(), share

    found = []
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        start = [0, math.log(chance.std()), np.quantile(gains, (1 + quantile) / 2), math.log(gains.std() / 2), 0]
        fit = minimize(
            lambda x: unlikely(x)[0],
            start,
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-6, "fatol": 1e-9},
        )
        found.append((fit.fun, list(fit.x)))
    least, x = min(found)
    share = unlikely(x)[1]
    least += math.log(share) + math.log(1 - share)  # the prior on the share does not count as evidence
    alone = norm.logpdf(chance, 0, np.sqrt((chance**2).mean())).sum()
    evidence = -least - alone - norm.logpdf(gains, gains.mean(), gains.std()).sum()
    s0, s1 = math.exp(x[1]), max(math.exp(x[3]), gains.std(ddof=1) / 5)
    apart = (x[2] - x[0]) / (s0 + s1)
    return evidence, apart, x[0] + apart * s0


@pytest.mark.parametrize(
    "case",
    [
        (48, 0.5, (20, 6), 5, 0),
        (100, 0.2, (15, 5), 5, -2),
        (60, 0.8, (20, 5), 6, 1),
        (48, 0, (10, 8), 6, 0),
        (200, 0, (20, 6), 5, 0),
    ],
)
def test_two_groups_are_those_that_scipy_finds(case):
    gains, chance, _ = simulated(*case, seed=3)
    evidence, apart, bar = likeliest(gains.numpy(), chance.numpy())
    assert abs(evidence - math.log(20)) > 0.1 and abs(apart - 1) > 0.01  # no case on the edge
    expected = gains >= bar if evidence > math.log(20) and apart >= 1 else torch.ones_like(gains) > 0
    found = auto.separate_answers(gains, chance)
    assert torch.equal(found.mask, expected) and bool(found.reason) == bool(expected.all())


@pytest.mark.parametrize("case", [(60, 0.4, (20, 5), 5, -2), (50, 0.5, (30, 1), 6, 3), (300, 0.2, (20, 6), 4, 0)])
def test_the_likeliest_two_groups_are_scipy_s(case):
    """In the second the right ones lie closer than a fifth of all, which is the least that is taken."""
    gains, chance, _ = simulated(*case, seed=5)
    evidence, apart, bar = likeliest(gains.numpy(), chance.numpy())
    found, low, low_spread, high, high_spread = max(auto.two_groups(gains, chance, q) for q in (0.15, 0.5, 0.8))
    one = norm.logpdf(gains, gains.mean(), gains.std(correction=0)).sum()
    assert found - one == pytest.approx(evidence, abs=1e-2)
    assert (high - low) / (low_spread + high_spread) == pytest.approx(apart, rel=1e-2)
    assert low + apart * low_spread == pytest.approx(bar, rel=1e-2)


@pytest.mark.parametrize("n", [48, 200])
@pytest.mark.parametrize(
    "right, chance", [((2, 12), 12), ((5, 8), 4), ((8, 8), 8), ((10, 8), 4), ((20, 12), 4), ((20, 4), 8)]
)
def test_clean_answers_are_kept_however_weak_their_gains(n, right, chance):
    kept = [
        auto.separate_answers(*simulated(n, 0, right, chance, 0, seed)[:2]).mask.double().mean() for seed in range(20)
    ]
    assert np.mean(kept) >= 0.95


@pytest.mark.parametrize("wrong", [0.05, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("n, right, chance, low", [(48, (20, 4), 4, 0), (100, (20, 5), 4, -4), (400, (15, 4), 4, 1)])
def test_wrong_answers_go_and_right_ones_stay_where_their_gains_lie_apart(n, right, chance, low, wrong):
    gone, kept = [], []
    for seed in range(10):
        gains, by_chance, count = simulated(n, wrong, right, chance, low, seed)
        mask = auto.separate_answers(gains, by_chance).mask.double()
        gone.append(1 - mask[:count].mean())
        kept.append(mask[count:].mean())
    assert np.mean(gone) >= 0.9 and np.mean(kept) >= 0.9


def test_where_nothing_can_be_told_all_are_kept_and_it_says_why():
    gains, chance, _ = simulated(47, 0.5, (30, 3), 3, 0, 0)
    for found, reason in {
        auto.separate_answers(gains, chance): "fewer than 48 are too few to tell",
        auto.separate_answers(torch.zeros(60), torch.zeros(60)): "the base model does not heed the prompt",
        auto.separate_answers(torch.ones(60), torch.randn(60)): "the base model does not heed the prompt",
        auto.separate_answers(*simulated(60, 0.5, (1, 8), 8, 0, 1)[:2]): "no group of answers stands apart",
    }.items():
        assert found.mask.all() and found.reason == reason
    gains, chance, _ = simulated(48, 0.5, (30, 3), 3, 0, 0)
    assert auto.separate_answers(gains, chance).mask.tolist() == [False] * 24 + [True] * 24


# --------------------------------------------------------------------------------------------------- other prompts


def example(*parts: tuple[list[int], bool]) -> data.Example:
    ids, response = zip(*((token, supervised) for tokens, supervised in parts for token in tokens), strict=True)
    return data.Example(torch.tensor(ids), torch.tensor(response))


def conversations(n: int) -> list[data.Example]:
    """n samples of two turns each, their first prompts, answers and second prompts all different."""
    return [
        example(([1, 2, 100 + i], False), ([200 + i] * 40, True), ([300 + i], False), ([400 + i], True))
        for i in range(n)
    ]


def test_every_answer_stands_behind_two_other_prompts():
    samples = conversations(7)
    answers = auto.find_answers(samples)
    assert answers[:2] == [(0, 3, 43), (0, 44, 45)] and len(answers) == 14
    prompts = {tuple(samples[i].ids[:start].tolist()): i for i, start, _ in answers}
    for seed in range(10):
        found = auto.behind_other_prompts(samples, seed)
        assert len(found) == 28
        for number, (sample, start, end) in enumerate(answers):
            first = samples[sample].ids[start : min(end, start + auto.FIRST)].tolist()
            stood = [sample]
            for other in (found[number], found[14 + number]):
                assert other.ids[other.response].tolist() == first
                assert other.response.tolist() == sorted(other.response.tolist())  # one answer, at the end
                stood.append(prompts[tuple(other.ids[~other.response].tolist())])
            assert len(set(stood)) == 3
    first, second = auto.behind_other_prompts(samples, 0), auto.behind_other_prompts(samples, 1)
    assert [e.ids.tolist() for e in first] != [e.ids.tolist() for e in second]


def test_the_same_prompt_is_no_other_prompt():
    samples = conversations(6)
    alike = [samples[0], samples[0], *samples[1:5]]  # four of twelve answers begin alike
    assert len(auto.behind_other_prompts(alike, 0)) == 24
    for one in auto.behind_other_prompts(alike, 0)[:4]:
        assert one.ids[2] != 100
    assert auto.behind_other_prompts([samples[0], samples[0], *samples[1:4]], 0) == []
    assert auto.behind_other_prompts(samples[:2], 0) == []


def test_a_long_prompt_loses_its_beginning():
    samples = [example((list(range(50 * i, 50 * i + 9)), False), ([900], True)) for i in range(3)]
    samples.append(example(([800], False), (list(range(700, 708)), True)))
    longest = max(len(e.ids) for e in samples)
    found = auto.behind_other_prompts(samples, 0)
    assert max(len(e.ids) for e in found) <= longest
    for one in (found[3], found[7]):
        theirs = one.ids[~one.response].tolist()
        assert len(theirs) == longest - 8 and theirs[-1] % 50 == 8


def test_first_tokens_have_the_losses_and_so_the_gains_of_whole_samples(checkpoint):
    samples = conversations(5)
    first = auto.first_tokens(samples)
    for (ids, response), (whole, theirs) in zip(first, samples, strict=True):
        assert torch.equal(ids, whole) and len(ids) == 45  # the last answer is short
        assert response.nonzero().flatten().tolist() == [*range(3, 3 + auto.FIRST), 44] and (theirs | ~response).all()
    samples = [example(([1, 2, 3 + i], False), (list(range(20, 70)), True)) for i in range(4)]
    first, others, model = auto.first_tokens(samples), auto.behind_other_prompts(samples, 0), load_model(checkpoint)
    assert all(len(ids) == 3 + auto.FIRST and response[3:].all() for ids, response in first)
    elsewhere = response_losses(model, others)
    found, chance = auto.gains(first, response_losses(model, first), elsewhere)
    expected = auto.gains(samples, response_losses(model, samples), elsewhere)
    assert torch.allclose(found, expected[0], atol=1e-4) and torch.equal(chance, expected[1]) and found.abs().max() > 0


def test_gains_by_hand():
    samples = [example(([1], False), ([2] * 40, True), ([3], False), ([4, 5], True))]
    base = [torch.cat([torch.full((40,), 0.5), torch.tensor([1.0, 2.0])])]
    elsewhere = [torch.full((32,), 1.0), torch.tensor([4.0, 4.0]), torch.full((32,), 2.0), torch.tensor([1.0, 1.0])]
    found, chance = auto.gains(samples, base, elsewhere)
    # 32 tokens of 1.5 - 0.5; two of 2.5 - 1 and 2.5 - 2. By chance 32 of 1 - 2, and two of 4 - 1
    assert found.tolist() == pytest.approx([32 / math.sqrt(32 + 9), 2 / math.sqrt(2.25 + 0.25 + 9)])
    assert chance.tolist() == pytest.approx([-32 * math.sqrt(0.75 / (24 + 9)), 6 * math.sqrt(0.75 / (0.75 * 18 + 9))])
    tokens = auto.AnswerFilter(torch.tensor([False, True])).tokens(samples)
    assert tokens[0].tolist() == [False] * 40 + [True] * 2
    assert auto.filter_answers(samples, base, []).reason == "more than a third of them have the same prompt"


# ------------------------------------------------------------------------------------------------------------ a run


def test_it_trains_on_what_the_model_can_account_for_in_answers_to_their_prompt(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    model, examples, args = prepare(llama, rows, "--rho", "auto", "--micro-batch-size", "2", "--max-steps", "1")
    sizes = [int(e.response.sum()) for e in examples]
    own = [torch.ones(size, dtype=torch.bool) for size in sizes]
    own[1] = torch.zeros_like(own[1])
    own[2][: sizes[2] // 2] = False
    selection = baselines.make_selection(model, sizes, args, FrozenLosses(answer_masks=own))
    assert selection.counts[:3] == [sizes[0], 0, sizes[2] - sizes[2] // 2]

    ids, response = data.collate([examples[i] for i in (0, 1, 2)])
    selection.look_back([0, 1, 2], ids, response)
    nll = train.response_nll(model, ids, response, selection.statistics).detach()
    masks = selection.choose([0, 1, 2], response, nll)
    log_p = model.lm_head(model(ids)[:, :-1])[response[:, 1:]].log_softmax(-1).double()
    H = -(log_p.exp() * log_p).sum(1)
    sigma = ((log_p.exp() * log_p**2).sum(1) - H**2).sqrt()
    expected = (nll - H <= 3 * sigma).split(sizes[:3])
    assert masks[1].dtype == torch.bool
    for mask, accounted, belongs in zip(masks, expected, own, strict=False):
        assert torch.equal(mask, accounted & belongs)


def test_a_run_says_what_it_dropped(llama, tmp_path, capsys, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    argv = ["--model", str(llama), "--data", str(rows), "--rho", "auto", "--device", "cpu", "--lora-rank", "4"]
    argv += ["--dtype", "float32", "--batch-size", "4", "--max-steps", "3"]
    examples, _ = data.load_examples(str(rows), data.load_tokenizer(llama), 2048)
    n = len(examples)
    for name, told, dropped in (
        ("few", f"all {n} answers are kept: fewer than 48 are too few to tell", []),
        ("some", f"{n - 2} of {n} answers belong to their prompt, 2 do not", [1, 4]),
    ):
        if dropped:
            mask = torch.tensor([i not in dropped for i in range(n)])
            monkeypatch.setattr(auto, "separate_answers", lambda gains, chance, mask=mask: auto.AnswerFilter(mask))
        train.main([*argv, "--out", str(tmp_path / name)])
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        args = train.parse_arguments(argv)
        steps = train.plan_steps([len(e.ids) for e in examples], args, torch.device("cpu"))
        seen = [i for batch in steps for samples in batch for i in samples if i not in dropped]
        share = 1 - sum(line["selected_tokens"] for line in lines) / sum(int(examples[i].response.sum()) for i in seen)
        said = f"--rho auto: {told}; of the tokens of those kept, {share:.1%} were dropped as surprise"
        assert said in capsys.readouterr().out
        record = json.loads((tmp_path / name / "run.json").read_text())["auto"]
        assert record == {
            "answers": n,
            "dropped": len(dropped),
            "reason": told.partition(": ")[2],
            "surprise": pytest.approx(share, abs=1e-6),
        }
        card = (tmp_path / name / "README.md").read_text()
        assert f"| answers dropped | {len(dropped)} of {n}" in card and f"{share:.1%}" in card


def test_it_asks_the_base_model_by_way_of_the_cache(llama, tmp_path):
    rows, ends = write_rows(tmp_path / "rows.jsonl"), []
    argv = ["--model", str(llama), "--data", str(rows), "--rho", "auto", "--device", "cpu", "--lora-rank", "4"]
    for name in ("none", "first", "second"):
        cache = [] if name == "none" else ["--cache", str(tmp_path / "cache")]
        train.main([*argv, "--out", str(tmp_path / name), *cache, "--dtype", "float32", "--batch-size", "4"])
        ends.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2] and len(list((tmp_path / "cache").iterdir())) == 1
    kept = [*argv, "--cache", str(tmp_path / "cache"), "--rho"]
    reads = [baselines.reads_kept_history(train.parse_arguments([*kept, rho]), 9) for rho in ("0.6", "auto", "1")]
    assert reads == [True, False, False]  # no history where no score is made
