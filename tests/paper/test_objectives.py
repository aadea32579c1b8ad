"""The objectives by hand, what they ask for, and a step of the loop with each beside the same step written out."""

import math

import pytest
import torch
from conftest import write_rows
from test_train import arguments, prepare

import sstoken
import train
from model import token_nll
from paper import baselines
from paper.objectives import OBJECTIVES, asks, weigh
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
            "history_nll": torch.tensor([1.0, 3.4, 3.6, 9.0]),
            "history_entropy": torch.tensor([1.0, 1.0, 1.0, 4.0]),
            "history_spread": torch.tensor([0.0, 1.0, 1.0, 2.3]),
        },
        [1, 1, 0, 1],  # 0 <= 0.5, 2.4 <= 2.5, 2.6 > 2.5, 5 <= 5.1
    ),
}


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
    described = "history_entropy" in asks(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    base = None
    if any(name.startswith("history") for name in asks(method)):
        with train.lora.disabled(model):
            base = baselines.response_losses(model, examples, described)

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
        known = {"nll": nll.detach(), "rho": args.rho, "top_entropy": -(best * best.log()).sum(1).float()}
        if base:
            names = ("history_nll", "history_entropy", "history_spread")
            known |= dict(zip(names, base[i].view(-1, len(nll)), strict=False))
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


def test_an_objective_of_the_base_model_alone_is_made_once(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    model, examples, args = prepare(llama, rows, "--method", "surprise", active=False)
    base = baselines.response_losses(model, examples, described=True)
    sizes = [int(e.response.sum()) for e in examples]
    selection = baselines.make_selection(model, sizes, args, baselines.Frozen(base))
    assert isinstance(selection, baselines.Fixed) and selection.watch is None
    for mask, (nll, H, sigma) in zip(selection.masks, base, strict=True):
        assert torch.equal(mask, nll - H <= 2 * sigma + 0.5)


def test_what_a_cache_keeps_of_the_base_model_is_what_is_computed(llama, tmp_path):
    rows, ends = write_rows(tmp_path / "rows.jsonl"), []
    argv = ["--model", str(llama), "--data", str(rows), "--method", "surprise", "--device", "cpu", "--lora-rank", "4"]
    for name in ("none", "first", "second"):
        cache = [] if name == "none" else ["--cache", str(tmp_path / "cache")]
        train.main([*argv, "--out", str(tmp_path / name), *cache, "--dtype", "float32"])
        ends.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2] and len(list((tmp_path / "cache").iterdir())) == 1
    train.main([*argv[:5], "stm", *argv[6:], "--out", str(tmp_path / "stm"), "--cache", str(tmp_path / "cache")])
    assert (
        len(list((tmp_path / "cache").iterdir())) == 2
    )  # losses alone are another file than losses and what is around


def test_a_mean_over_a_batch_counts_the_tokens_that_are_kept(llama, rows):
    sizes, kept = [4, 10], [torch.rand(3, 4), torch.rand(3, 10)]
    for method, expected in {"dft": sizes, "low-loss": [3, 6], "profit": sizes}.items():
        args = arguments(llama, rows, "--method", method, "--loss-mean", "batch")
        assert baselines.make_selection(None, sizes, args, baselines.Frozen(kept)).counts == expected
    args = arguments(llama, rows, "--method", "surprise", "--loss-mean", "batch")
    selection = baselines.make_selection(None, sizes, args, baselines.Frozen(kept))
    assert selection.counts == [int(mask.sum()) for mask in selection.masks]


def test_eq_10_with_weights_is_the_mean_over_the_tokens_that_have_one():
    nll, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 0.25])
    assert sstoken.selected_loss(nll, weights).item() == (0.5 + 1.0) / 2
    mask = torch.tensor([True, False, True])
    assert sstoken.selected_loss(nll, mask).item() == 2.5
