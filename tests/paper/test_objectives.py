"""The objectives by hand, what they ask for, and a step of the loop with each beside the same step written out."""

import math

import pytest
import torch
from conftest import write_rows
from test_train import arguments, prepare

import data
import sstoken
import train
from model import token_nll
from paper import baselines
from paper.objectives import OBJECTIVES, asks, own_prompt, under_other_prompts, weigh
from support.files import UserError
from support.kernels import Watch, entropy, spread, top_entropy

LN = [math.log(p) for p in (0.5, 0.05, 0.2, 0.9)]
NLL = torch.tensor([-x for x in LN])  # probabilities 0.5, 0.05, 0.2, 0.9
BY_HAND = {  # method -> what it is given beside NLL, and the weights
    "dft": ({}, [0.5, 0.05, 0.2, 0.9]),
    "eaft": ({"top_entropy": torch.tensor([0.0, math.log(20), math.log(20) / 2, 1.0])}, [0, 1, 0.5, 1 / math.log(20)]),
    "stm": ({"history_nll": torch.tensor([0.0, 0.9, 0.92, 5.0])}, [1, 1, 0, 0]),  # ln 2.5 = 0.916
    "profit": ({}, [1, 0, 1, 1]),
    "rel-reversed": ({"history_nll": NLL + torch.tensor([1.0, -1.0, 2.0, 0.0]), "rho": 0.5}, [0, 1, 0, 1]),
    "low-loss": ({"rho": 0.5}, [1, 0, 0, 1]),
    "surprise": (
        {
            "nll": torch.tensor([1.0, 3.9, 4.1, 9.0]),
            "entropy": torch.tensor([1.0, 1.0, 1.0, 4.0]),
            "spread": torch.tensor([0.0, 1.0, 1.0, 1.7]),
        },
        [1, 1, 0, 1],  # 0 <= 0, 2.9 <= 3, 3.1 > 3, 5 <= 5.1
    ),
}


def of_the_base(history_nll, history_entropy, history_spread):
    return history_nll - history_entropy <= history_spread


@pytest.fixture
def with_one_of_the_base(monkeypatch):
    """An objective that asks for everything there is of the base model, and for nothing else."""
    for registry in (OBJECTIVES, baselines.METHODS):
        monkeypatch.setitem(registry, "of-the-base", of_the_base)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_weights_by_hand(method):
    given, expected = BY_HAND[method]
    weights = weigh(method, {"nll": NLL} | given)
    assert weights.tolist() == pytest.approx(expected)
    assert (weights.dtype == torch.bool) == all(value in (0, 1) for value in expected)


def test_no_sample_loses_all_of_its_tokens():
    assert weigh("profit", {"nll": torch.full((3,), 9.0)}).tolist() == [True, False, False]


def test_what_is_asked_of_a_distribution_is_its_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(50, 1000, generator=generator)).log_softmax(1)
    p = log_p.double().exp()
    p /= p.sum(1, keepdim=True)
    H = -(p * p.log()).sum(1)
    sigma = ((p * p.log() ** 2).sum(1) - H**2).sqrt()
    best = p.sort(1, descending=True).values[:, :20]
    best /= best.sum(1, keepdim=True)
    for ours, formula in ((entropy, H), (spread, sigma), (top_entropy, -(best * best.log()).sum(1))):
        assert torch.allclose(ours(log_p).double(), formula, rtol=1e-5)
    certain = torch.tensor([[0.0, -200.0, -300.0]]).log_softmax(1)
    assert [float(f(certain)) for f in (entropy, spread)] == [0, 0]
    assert float(top_entropy(torch.zeros(1, 3).log_softmax(1))) == pytest.approx(math.log(3))  # a vocabulary of three


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_what_is_watched_belongs_to_its_token_and_changes_no_loss(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(23, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (23,), generator=generator)
    plain = token_nll(hidden.requires_grad_(), weight, targets, chunk)
    (gradient,) = torch.autograd.grad(plain.sum(), hidden)
    watch = Watch(["entropy", "spread"])
    watched = token_nll(hidden, weight, targets, chunk, watch)
    (same,) = torch.autograd.grad(watched.sum(), hidden)
    assert torch.equal(watched, plain) and torch.equal(gradient, same)
    log_p = (hidden.double() @ weight.double().T).log_softmax(1)
    H = -(log_p.exp() * log_p).sum(1)
    found = watch.take(plain.detach())
    assert torch.allclose(found["entropy"].double(), H, rtol=1e-4)
    assert not found["entropy"].requires_grad and watch.take(plain[:0])["entropy"].numel() == 0


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_step_of_the_loop_is_the_step_written_out(llama, tmp_path, method):
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = ["--method", method, "--max-steps", "1", "--lr", "0.01", "--micro-batch-size", "2"]
    model, examples, args = prepare(llama, rows, *flags)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    base = None
    if any(name.startswith("history") for name in asks(method)):
        with train.lora.disabled(model):
            base = baselines.response_losses(model, examples)

    losses = []
    steps = train.plan_steps([len(e.ids) for e in examples], args, torch.device("cpu"))
    samples = [i for micro_batch in steps[0] for i in micro_batch]
    for i in samples:
        ids, response = examples[i].ids[None], examples[i].response[None]
        hidden = model(ids)[0]
        logits = model.lm_head(hidden[:-1])[response[0, 1:]]
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(1, ids[0, 1:][response[0, 1:]].unsqueeze(1)).squeeze(1)
        p = log_p.detach().double().exp()
        best = p.topk(20).values / p.topk(20).values.sum(1, keepdim=True)
        H = -(p * p.log()).sum(1)
        sigma = ((p * p.log() ** 2).sum(1) - H**2).sqrt()
        known = {"nll": nll.detach(), "rho": args.rho, "top_entropy": -(best * best.log()).sum(1).float()}
        known |= {"entropy": H.float(), "spread": sigma.float()}
        if base:
            known["history_nll"] = base[i]
        weights = weigh(method, known)
        losses.append((weights * nll).sum() / (weights != 0).sum())
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    log = []
    train.train(model, examples, args, log.append, frozen=baselines.Frozen(base))
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    moved = [p.detach() - before[name] for name, p in model.named_parameters() if name in before]
    agree = [
        (torch.sign(-g) == torch.sign(step))[g.abs() > 1e-6].float().mean()
        for g, step in zip(gradients, moved, strict=True)
    ]
    assert torch.stack(agree).nanmean() > 0.99  # AdamW's first step goes against each gradient's sign


def test_an_objective_of_the_base_model_alone_is_made_once(llama, tmp_path, with_one_of_the_base):
    rows = write_rows(tmp_path / "rows.jsonl")
    model, examples, args = prepare(llama, rows, "--method", "of-the-base", active=False)
    base = baselines.response_losses(model, examples, described=True)
    sizes = [int(e.response.sum()) for e in examples]
    selection = baselines.make_selection(model, sizes, args, baselines.Frozen(base))
    assert isinstance(selection, baselines.Fixed) and selection.watch is None
    for mask, (nll, H, sigma) in zip(selection.masks, base, strict=True):
        assert torch.equal(mask, nll - H <= sigma) and 0 < mask.sum() < len(mask)


def test_what_a_cache_keeps_of_the_base_model_is_what_is_computed(llama, tmp_path, with_one_of_the_base):
    rows, ends = write_rows(tmp_path / "rows.jsonl"), []
    argv = [
        "--model",
        str(llama),
        "--data",
        str(rows),
        "--method",
        "of-the-base",
        "--device",
        "cpu",
        "--lora-rank",
        "4",
    ]
    for name in ("none", "first", "second"):
        cache = [] if name == "none" else ["--cache", str(tmp_path / "cache")]
        train.main([*argv, "--out", str(tmp_path / name), *cache, "--dtype", "float32"])
        ends.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2] and len(list((tmp_path / "cache").iterdir())) == 1
    train.main([*argv[:5], "stm", *argv[6:], "--out", str(tmp_path / "stm"), "--cache", str(tmp_path / "cache")])
    assert (
        len(list((tmp_path / "cache").iterdir())) == 2
    )  # losses alone are another file than losses and what is around


def test_a_mean_over_a_batch_counts_the_tokens_that_are_kept(llama, rows, with_one_of_the_base):
    sizes, kept = [4, 10], [torch.rand(3, 4), torch.rand(3, 10)]
    for method, expected in {"dft": sizes, "low-loss": [3, 6], "profit": sizes}.items():
        args = arguments(llama, rows, "--method", method, "--loss-mean", "batch")
        assert baselines.make_selection(None, sizes, args, baselines.Frozen(kept)).counts == expected
    args = arguments(llama, rows, "--method", "of-the-base", "--loss-mean", "batch")
    selection = baselines.make_selection(None, sizes, args, baselines.Frozen(kept))
    assert selection.counts == [int(mask.sum()) for mask in selection.masks]


def test_eq_10_with_weights_is_the_mean_over_the_tokens_that_have_one():
    nll, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 0.25])
    assert sstoken.selected_loss(nll, weights).item() == (0.5 + 1.0) / 2
    mask = torch.tensor([True, False, True])
    assert sstoken.selected_loss(nll, mask).item() == 2.5


# ---------------------------------------------------------------------------------------------------- --rho auto


def knockoff(gains: list[float], level: float) -> list[bool]:
    """The least threshold among the gains' sizes whose false discoveries, counted one by one, are at most `level`."""
    for bar in sorted(abs(x) for x in gains):
        false, kept = sum(x <= -bar for x in gains), sum(x >= bar for x in gains)
        if 1 + false <= level * kept:
            return [x >= bar for x in gains]
    return [True] * len(gains)


def test_which_answers_belong_to_their_prompt_by_hand():
    # 39 good answers and one that is as likely under the other prompt: 1 + 0 of 20 is 5 %, so the bar is the least gain
    gains = torch.tensor([-3.0, *range(10, 49)])
    assert own_prompt(gains).tolist() == [False] + [True] * 39
    # three of minus 3: with a bar up to 3 they count 1 + 3 of 42, more than 5 %; above, none is left, and 3.5 stays
    gains = torch.tensor([-3.0, -3.0, -3.0, 1.0, 2.0, 3.0, 3.5, *range(10, 49)])
    assert own_prompt(gains).tolist() == [False] * 6 + [True] * 40
    assert own_prompt(torch.tensor([5.0, -5.0, 4.0, -4.0])).all()  # of these nothing can be told
    assert own_prompt(gains, level=0.2)[3:6].tolist() == [True] * 3
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 20, 50, 100) * 20:  # with many that are equal, and zeros of either sign
        gains = (torch.randint(-3, 20, (size,), generator=generator) / 4).mul(
            torch.randn(1, generator=generator).sign()
        )
        assert own_prompt(gains).tolist() == knockoff(gains.tolist(), 0.05)


def test_a_million_answers_are_told_too():  # looked at for each threshold anew they would take half an hour
    gains = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) + 1
    mask = own_prompt(gains)
    bar = gains[mask].min()
    assert (gains <= -bar).sum() + 1 <= 0.05 * mask.sum() < 1.01 * (gains <= -bar).sum() + 2


def test_few_answers_to_something_else_are_kept_and_it_is_the_knockoff_filter():
    generator, rates, kept = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        wrong = 6 * torch.randn(60, generator=generator)  # no more likely under the one prompt than under the other
        gains = torch.cat([wrong, 20 + 8 * torch.randn(240, generator=generator)])
        mask = own_prompt(gains)
        assert mask.tolist() == knockoff(gains.tolist(), 0.05)
        rates.append(float(mask[:60].sum() / mask.sum()))
        kept.append(float(mask[60:].float().mean()))
    assert sum(rates) / len(rates) < 0.05 and sum(kept) / len(kept) > 0.9


def example(prompt: list[int], *rest: tuple[int, bool]) -> data.Example:
    ids, response = zip(*((token, False) for token in prompt), *rest, strict=True)
    return data.Example(torch.tensor(ids), torch.tensor(response))


def test_each_answer_stands_behind_the_prompt_of_another_row():
    turns = ((50, True), (51, True), (60, False), (52, True))  # a conversation of two turns, after its first prompt
    samples = [example([1, 2, n], (10 + n, True), *turns) for n in range(7)]
    samples += [example([1, 2, 3], (17, True)), example([1, 2, 3], (18, True))]  # the prompt of the fourth again
    for seed in range(20):
        found, others = under_other_prompts(samples, seed), []
        for ours, theirs in zip(samples, found, strict=True):
            assert theirs.ids[3:].tolist() == ours.ids[3:].tolist() and torch.equal(theirs.response, ours.response)
            assert theirs.ids[:3].tolist() != ours.ids[:3].tolist()
            others.append(tuple(theirs.ids[:3].tolist()))
        assert sorted(others) == sorted(tuple(ours.ids[:3].tolist()) for ours in samples)
    assert under_other_prompts(samples, 0)[0].ids.tolist() != under_other_prompts(samples, 1)[0].ids.tolist()
    assert under_other_prompts(samples[6:], 0) == []  # two prompts of three are one: nothing to compare with
    assert under_other_prompts(samples[:1], 0) == []


def test_another_prompt_makes_no_sample_longer_than_the_longest():
    samples = [example([*range(20)], (50, True)), example([30], *((n, True) for n in range(60, 79)))]
    found = under_other_prompts(samples, 0)
    assert found[0].ids.tolist() == [30, 50]
    assert found[1].ids.tolist() == [18, 19, *range(60, 79)] and int(found[1].response.sum()) == 19


def test_rho_auto_trains_on_what_the_model_can_account_for_in_answers_to_their_prompt(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    model, examples, args = prepare(llama, rows, "--rho", "auto", "--micro-batch-size", "2", "--max-steps", "1")
    with train.lora.disabled(model):
        base = baselines.response_losses(model, examples)
    gains = [30.0] * len(examples)
    gains[1] = gains[4] = -1.0  # and so the other prompt's loss is less
    gains = gains * 4  # enough of them
    elsewhere = [nll + gain / len(nll) for nll, gain in zip(base * 4, gains, strict=True)]
    selection = baselines.make_selection(
        model, [len(nll) for nll in base * 4], args, baselines.Frozen(base * 4, None, elsewhere)
    )
    assert [count == 0 for count in selection.counts] == [gain < 0 for gain in gains]

    ids, response = data.collate([examples[i] for i in (0, 1, 2)])
    selection.look_back([0, 1, 2], ids, response)
    nll = train.response_nll(model, ids, response, selection.watch).detach()
    masks = selection.choose([0, 1, 2], response, nll)
    log_p = model.lm_head(model(ids)[:, :-1])[response[:, 1:]].log_softmax(-1).double()
    H = -(log_p.exp() * log_p).sum(1)
    sigma = ((log_p.exp() * log_p**2).sum(1) - H**2).sqrt()
    expected = (nll - H <= 3 * sigma).split([len(values) for values in base[:3]])
    assert masks[1].dtype == torch.bool and not masks[1].any()
    for mine, theirs in ((masks[0], expected[0]), (masks[2], expected[2])):
        assert torch.equal(mine, theirs) and mine.any()


def test_rho_auto_asks_the_base_model_by_way_of_the_cache(llama, tmp_path, capsys):
    rows, ends = write_rows(tmp_path / "rows.jsonl"), []
    argv = ["--model", str(llama), "--data", str(rows), "--rho", "auto", "--device", "cpu", "--lora-rank", "4"]
    for name in ("none", "first", "second"):
        cache = [] if name == "none" else ["--cache", str(tmp_path / "cache")]
        train.main([*argv, "--out", str(tmp_path / name), *cache, "--dtype", "float32", "--batch-size", "4"])
        ends.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2] and len(list((tmp_path / "cache").iterdir())) == 2
    kept = [*argv, "--cache", str(tmp_path / "cache"), "--rho"]
    reads = [baselines.reads_kept_history(train.parse_arguments([*kept, rho])) for rho in ("0.6", "auto", "1")]
    assert reads == [True, False, False]  # no history where no score is made
    for method in ("full", "random", "low-loss"):
        with pytest.raises(UserError, match="--rho auto is for --method sstoken"):
            train.parse_arguments([*argv, "--method", method])
    with pytest.raises(UserError, match=r"--rho is 1.5; it must be in \(0, 1\], or auto"):
        train.parse_arguments([*argv, "--rho", "1.5"])
    with pytest.raises(UserError, match="--rho: invalid share value: 'most'"):
        train.parse_arguments([*argv, "--rho", "most"])
