"""The objectives by hand, a step of the loop with each beside the step written out, and which flag is for whom."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows
from test_train import arguments, prepare

import sstoken
import train
from model import token_nll
from paper import baselines
from paper.frozen import FrozenLosses, response_losses
from paper.objectives import OBJECTIVES, inputs_of, token_weights
from support.files import UserError
from support.kernels import PredictionStatistics, entropy, spread, top_entropy

DEMO = Path(__file__).parents[2] / "demo"
LN = [math.log(p) for p in (0.5, 0.05, 0.2, 0.9)]
NLL = torch.tensor([-x for x in LN])  # probabilities 0.5, 0.05, 0.2, 0.9
BY_HAND = {  # method -> what it is given beside NLL, and the weights
    "dft": ({}, [0.5, 0.05, 0.2, 0.9]),
    "eaft": ({"top_entropy": torch.tensor([0.0, math.log(20), math.log(20) / 2, 1.0])}, [0, 1, 0.5, 1 / math.log(20)]),
    "stm": ({"history_nll": torch.tensor([0.0, 0.9, 0.92, 5.0])}, [1, 1, 0, 0]),  # ln 2.5 = 0.916
    "profit": (  # three of four, so the mean over three is that over four
        {"nll": -torch.tensor([0.5, 0.099, 0.101, 0.9]).log()},
        [0.75, 0, 0.75, 0.75],
    ),
    "rel-reversed": ({"history_nll": NLL + torch.tensor([1.0, -1.0, 2.0, 0.0]), "rho": 0.5}, [0, 1, 0, 1]),
    "low-loss": ({"rho": 0.5}, [1, 0, 0, 1]),
    "surprise": (
        {
            "nll": torch.tensor([1.0, 3.9, 4.1, 9.0, 3.1]),
            "entropy": torch.tensor([1.0, 1.0, 1.0, 4.0, 1.0]),
            "spread": torch.tensor([0.0, 1.0, 1.0, 1.7, 0.1]),
            "vocabulary": 20 * math.exp(3.2),
        },
        [1, 1, 0, 1, 1],  # 0 <= 0, 2.9 <= 3, 3.1 > 3, 5 <= 5.1; 2.1 > 0.3, but 3.1 <= 3.2
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
    weights = token_weights(method, {"nll": NLL} | given)
    assert weights.tolist() == pytest.approx(expected)
    assert (weights.dtype == torch.bool) == all(value in (0, 1) for value in expected)


def test_a_sample_of_which_nothing_but_its_end_is_kept_is_worth_nothing():
    assert token_weights("profit", {"nll": torch.full((3,), 9.0)}).tolist() == [0, 0, 0]
    assert token_weights("profit", {"nll": torch.tensor([9.0, 9.0, 0.1])}).tolist() == [0, 0, 0]
    assert token_weights("dft", {"nll": torch.tensor([0.0])}).tolist() == [0]  # an end token alone
    known = {"history_nll": torch.tensor([9.0, 0.0, 0.0]), "answers": torch.tensor([True, False, True])}
    found = token_weights("stm", known)
    assert found.tolist() == [False, False, False] and found.dtype == torch.bool


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
    statistics = PredictionStatistics(["entropy", "spread"])
    watched = token_nll(hidden, weight, targets, chunk, statistics)
    (same,) = torch.autograd.grad(watched.sum(), hidden)
    assert torch.equal(watched, plain) and torch.equal(gradient, same)
    log_p = (hidden.double() @ weight.double().T).log_softmax(1)
    H = -(log_p.exp() * log_p).sum(1)
    found = statistics.collect(plain.detach())
    assert torch.allclose(found["entropy"].double(), H, rtol=1e-4)
    assert not found["entropy"].requires_grad and statistics.collect(plain[:0])["entropy"].numel() == 0


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_step_of_the_loop_is_the_step_written_out(tmp_path, method):
    rows = tmp_path / "rows.jsonl"  # the demo's, since random weights find no token likely, as stm and profit ask
    rows.write_text("".join((DEMO / "sft.jsonl").read_text().splitlines(keepends=True)[:20]))
    flags = ["--method", method, "--max-steps", "1", "--lr", "0.01", "--micro-batch-size", "2"]
    model, examples, args = prepare(DEMO / "model", rows, *flags)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    base = None
    if any(name.startswith("history") for name in inputs_of(method)):
        with train.lora.disabled(model):
            base = response_losses(model, examples)

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
        known |= {"entropy": H.float(), "spread": sigma.float(), "vocabulary": p.shape[1]}
        if base:
            known["history_nll"] = base[i]
        weights = token_weights(method, known)
        if method == "profit":  # its release divides by all
            losses.append(nll[weights > 0].sum() / len(nll))
        else:
            losses.append((weights * nll).sum() / (weights != 0).sum().clamp(min=1))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    log = []
    train.train(model, examples, args, log.append, frozen=FrozenLosses(base))
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
    base = response_losses(model, examples, described=True)
    sizes = [int(e.response.sum()) for e in examples]
    selection = baselines.make_selection(model, sizes, args, FrozenLosses(base))
    assert isinstance(selection, baselines.PrecomputedSelection) and selection.statistics is None
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
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    sizes, kept = [4, 10], [torch.rand(3, 4), torch.rand(3, 10)]
    for method, expected in {"dft": sizes, "low-loss": [3, 6], "profit": sizes}.items():
        args = arguments(llama, rows, "--method", method, "--loss-mean", "batch")
        assert baselines.make_selection(model, sizes, args, FrozenLosses(kept)).counts == expected
    args = arguments(llama, rows, "--method", "of-the-base", "--loss-mean", "batch")
    selection = baselines.make_selection(model, sizes, args, FrozenLosses(kept))
    assert selection.counts == [int(mask.sum()) for mask in selection.masks]


def test_eq_10_with_weights_is_the_mean_over_the_tokens_that_have_one():
    nll, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.0, 0.25])
    assert sstoken.selected_loss(nll, weights).item() == (0.5 + 1.0) / 2
    mask = torch.tensor([True, False, True])
    assert sstoken.selected_loss(nll, mask).item() == 2.5


# ------------------------------------------------------------------------------------------- steps without any token


def test_a_step_without_a_token_changes_nothing_and_the_log_says_so(llama, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    model, examples, args = prepare(llama, rows, "--method", "surprise", "--batch-size", "4", "--micro-batch-size", "2")
    real, asked, kept, lines = OBJECTIVES["surprise"], [], [], []

    def some_steps(nll, entropy, spread, vocabulary):  # the second and the third step find no token
        asked.append(len(asked) // 4)
        return real(nll, entropy, spread, vocabulary) & (asked[-1] not in (1, 2))

    def log(line):
        lines.append(line)
        kept.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))

    monkeypatch.setitem(OBJECTIVES, "surprise", some_steps)
    train.train(model, examples, args, log)
    assert [bool(line["selected_tokens"]) for line in lines] == [True, False, False, True, True]
    assert (
        [line["loss"] == 0 for line in lines]
        == ["skipped" in line for line in lines]
        == [False, True, True, False, False]
    )
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])  # AdamW remembers the first step
    assert not torch.equal(kept[2], kept[3])


def test_a_run_whose_first_steps_have_no_token_goes_on(llama, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    argv = ["--model", str(llama), "--data", str(rows), "--method", "profit", "--device", "cpu", "--lora-rank", "4"]
    argv += ["--batch-size", "4", "--checkpoint-every", "1"]  # random weights find no token likely
    train.main([*argv, "--out", str(tmp_path / "whole")])
    train.main([*argv, "--out", str(tmp_path / "stopped")])
    checkpoints = sorted((tmp_path / "stopped").glob("checkpoint-*"))
    checkpoints[-1].unlink()
    train.main([*argv, "--out", str(tmp_path / "stopped"), "--resume"])
    ends = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert ends[0] == ends[1]
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(line["skipped"] for line in lines)


def test_a_noisy_row_weighs_no_more_than_the_tokens_that_it_keeps():
    good = torch.full((4,), 1.0)
    noise = torch.full((4,), 9.0)
    losses = [sstoken.selected_loss(nll, token_weights("profit", {"nll": nll})) for nll in (good, noise)]
    assert [loss.item() for loss in losses] == [1.0, 0.0]


# ------------------------------------------------------------------------------------------- which flag is for whom

VALUES = {
    **{
        "--rho": "0.5",
        "--gamma": "0.5",
        "--layer": "0",
        "--gain": "log",
        "--history": "base",
    },  # some are the defaults:
    **{"--ema-alpha": "0.9", "--history-every": "2", "--attention-only": "3", "--excess": "static"},  # given is given
    **{"--reference": "x", "--reference-data": "x", "--reference-top": "3", "--rating-field": "x"},
}
SCORE = set("--gamma --layer --gain --history --ema-alpha --history-every --attention-only".split())
REFERENCE = {"--reference", "--reference-data", "--reference-top", "--rating-field"}
READ_BY = {
    "sstoken": SCORE | {"--rho"},
    "auto": set(),
    "full": {"--reference-top", "--rating-field"},
    "random": {"--rho"},
    "rho1": {"--rho", "--excess"} | REFERENCE,
    "tokencleaning": {"--rho"} | REFERENCE,
    "self-evolving": {"--rho"},
    "rel-reversed": {"--rho"},
    "low-loss": {"--rho"},
    **dict.fromkeys(("dft", "eaft", "stm", "profit", "surprise"), set()),
}


@pytest.mark.parametrize("method", READ_BY)
def test_a_flag_that_a_method_does_not_read_is_refused_by_name(method):
    assert READ_BY.keys() == {*baselines.METHODS, "auto"}
    flags = ["--rho", "auto"] if method == "auto" else ["--method", method]
    for flag, value in VALUES.items():
        if (method, flag) == ("auto", "--rho"):
            continue
        needs = ["--reference", "y"] if {method} <= {"rho1", "tokencleaning"} and flag not in REFERENCE else []
        needs += ["--reference-top", "2"] if flag == "--rating-field" and method in ("rho1", "tokencleaning") else []
        needs += {"--ema-alpha": ["--history", "ema"], "--history-every": ["--history", "checkpoint"]}.get(flag, [])
        argv = ["--model", "m", *flags, *(needs if flag in READ_BY[method] else [])]
        for given in ([flag, value], [f"{flag}={value}"]):
            if flag in READ_BY[method]:
                train.parse_arguments([*argv, *given])
            else:
                name = "--rho auto" if method == "auto" else f"--method {method}"
                with pytest.raises(UserError, match=f"{flag} has no effect with {name}; it is for --method"):
                    train.parse_arguments([*argv, *given])
    others = {action.option_strings[0] for action in train.make_parser()._actions} - VALUES.keys()
    assert others & baselines.READS.keys() == set() and VALUES.keys() == baselines.READS.keys()


def test_a_flag_of_another_history_and_auto_of_another_method_are_refused():
    for flags, words in {
        ("--ema-alpha", "0.5"): "--ema-alpha has no effect with --history base; it is for ema",
        (
            "--history-every",
            "5",
            "--history",
            "ema",
        ): "--history-every has no effect with --history ema; it is for checkpoint",
        ("--rho", "auto", "--method", "full"): "--rho auto is for --method sstoken; full takes a share, or none",
        ("--rho", "auto", "--method", "low-loss"): "--rho auto is for --method sstoken",
        ("--rho", "1.5"): r"--rho is 1.5; it must be in \(0, 1\], or auto",
        ("--rho", "most"): "--rho: invalid share value: 'most'",
    }.items():
        with pytest.raises(UserError, match=words):
            train.parse_arguments(["--model", "m", *flags])
