"""Algorithm 1 against the same step written naively, and what the loop promises around it."""

import functools
import itertools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bench_memory import adapter_parameters, frozen_parameters, kept_by_a_layer
from memory import peak_allocated
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import data
import lora
import sstoken
import train as train_module
from lora import History, add_lora, lora_layers, save_adapter
from model import load_model, response_nll
from paper import objectives
from paper.baselines import select_at_random
from paper.frozen import response_losses
from support import machine, runs, start
from support.files import UserError
from train import SSToken, learning_rate, parse_arguments, plan_steps, sample_weights, train, weighted_loss

ROOT = train_module.__file__.removesuffix("train.py")


def arguments(checkpoint, rows, *flags):
    defaults = ["--batch-size", "8", "--lora-rank", "4", "--lora-dropout", "0", "--dtype", "float32"]
    return parse_arguments(["--model", str(checkpoint), "--data", str(rows), *defaults, *flags])


def prepare(checkpoint, rows, *flags, active=True):
    """(model with adapters, examples, arguments); with `active`, adapters that already do something: B is not zero."""
    args = arguments(checkpoint, rows, *flags)
    examples, _ = data.load_examples(args.data, data.load_tokenizer(args.model), args.max_length)
    torch.manual_seed(args.seed)
    model = load_model(args.model, getattr(torch, args.dtype))
    add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if active:
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.05)
    return model, examples, args


class RecordingSGD(torch.optim.SGD):
    """Stands in for AdamW, whose first step has the same size whatever the gradient's: keeps gradients and rates."""

    gradients: list
    rates: list

    def __init__(self, parameters, lr, weight_decay):
        assert weight_decay == 0
        super().__init__(parameters, lr=lr)
        RecordingSGD.gradients, RecordingSGD.rates = [], []

    def step(self):
        self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        self.rates.append(self.param_groups[0]["lr"])
        super().step()


def naive_step(checkpoint, adapter, examples, rho, gamma, layer, loss_mean):
    """Lines 4 to 10 of Algorithm 1 for one batch, sample by sample, from transformers' and peft's own float64 models.

    Full logits, full attention matrices, Python loops over tokens; returns the loss and the adapter's gradients.
    """
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).double()
    terms, selected_tokens = [], 0
    for ids, response in examples:
        tokens = [i for i in range(len(ids)) if response[i]]
        losses = []
        for context in (model.disable_adapter(), None):
            if context is not None:
                with context, torch.no_grad():
                    out = model(ids[None])
            else:
                out = model(ids[None], output_attentions=True)
            log_p = out.logits[0].log_softmax(-1)
            losses.append([-log_p[i - 1, ids[i]] for i in tokens])
        history, current = losses
        rel = [h.item() - c.item() for h, c in zip(history, current, strict=True)]  # line 5
        matrix = out.attentions[layer][0].mean(0).tolist()
        attention = [sum(matrix[i][j] for j in range(i) if not response[j]) for i in tokens]  # line 6
        low, high = min(rel), max(rel)
        normalized = [(r - low) / (high - low) if high > low else 0.0 for r in rel]  # line 7
        scores = [gamma * n + (1 - gamma) * a for n, a in zip(normalized, attention, strict=True)]  # line 8
        k = math.ceil(round(rho * len(tokens), 9))
        best = sorted(range(len(tokens)), key=lambda t: -scores[t])[:k]  # line 9
        selected_tokens += k
        total = sum(current[t] for t in best)
        terms.append(total / k if loss_mean == "sample" else total)
    loss = sum(terms) / (len(terms) if loss_mean == "sample" else selected_tokens)
    loss.backward()  # line 10
    gradients = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return loss.item(), gradients


@pytest.mark.parametrize(
    "rho, gamma, layer, loss_mean, micro",
    [
        (0.6, 0.5, -1, "sample", 2),
        (0.3, 0.25, 0, "batch", 4),
        (0.6, 0.0, 1, "sample", 8),
        (0.6, 1.0, -1, "sample", 1),
        (1.0, 0.5, -1, "sample", 4),
    ],
)
def test_algorithm_1_step_against_a_naive_one(
    checkpoint, rows, tmp_path, monkeypatch, rho, gamma, layer, loss_mean, micro
):
    flags = ["--rho", rho, "--gamma", gamma, "--layer", layer, "--loss-mean", loss_mean, "--micro-batch-size", micro]
    # two epochs at a learning rate of nothing: the second step repeats the first, if the first left nothing behind
    model, examples, args = prepare(checkpoint, rows, *map(str, flags), "--epochs", "2", "--lr", "1e-12")
    examples = examples[3:11]
    save_adapter(model, tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", RecordingSGD)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    log = []
    train(model, examples, args, log.append)

    loss, gradients = naive_step(checkpoint, tmp_path, examples, rho, gamma, layer, loss_mean)
    assert [line["loss"] for line in log] == pytest.approx([loss, loss], rel=1e-5)
    assert gradients.keys() == set(names)
    for step in RecordingSGD.gradients:
        for name, gradient in zip(names, step, strict=True):
            assert (gradient - gradients[name]).abs().max() < 1e-4 * gradients[name].abs().max() + 1e-9, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_first_step_rel_is_exactly_zero(checkpoint, rows, monkeypatch, dtype):
    model, examples, args = prepare(
        checkpoint, rows, "--dtype", dtype, "--lora-dropout", "0.1", "--max-steps", "1", active=False
    )
    seen, real = [], objectives.GAINS["log"]
    spy = lambda nll, history: seen.append(real(nll, history)) or seen[-1]
    monkeypatch.setitem(objectives.GAINS, "log", spy)
    train(model, examples, args, lambda line: None)
    assert seen and all(rel.eq(0).all() for rel in seen)


def test_random_trains_on_the_tokens_that_it_drew(llama, rows):
    model, examples, args = prepare(llama, rows, "--method", "random", "--rho", "0.31", "--batch-size", "20")
    sizes = [int(e.response.sum()) for e in examples]
    drawn = select_at_random(sizes, 0.31, args.seed)
    with torch.no_grad():
        nll = [response_nll(model, *data.collate([e])) for e in examples]
    expected = torch.stack([losses[s].mean() for losses, s in zip(nll, drawn, strict=True) if s.any()]).mean().item()
    log = []
    train(model, examples, args, log.append)
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[0]["selected_tokens"] == math.ceil(0.31 * sum(sizes))


@pytest.mark.parametrize("method", ["sstoken", "random"])
def test_the_micro_batch_size_changes_nothing_but_rounding(checkpoint, rows, method):
    results = []
    for micro in ("1", "4", "8"):
        model, examples, args = prepare(
            checkpoint, rows, "--micro-batch-size", micro, "--method", method, "--rho", "0.3"
        )
        log = []
        train(model, examples, args, log.append)
        results.append(([line["loss"] for line in log], [p for p in model.parameters() if p.requires_grad]))
    for losses, adapters in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        for a, b in zip(adapters, results[0][1], strict=True):
            assert (a - b).abs().max() < 1e-5


def test_the_log_counts_every_token_once_and_the_share_selected_is_rho(checkpoint, rows):
    model, examples, args = prepare(checkpoint, rows, "--epochs", "2")
    log = []
    train(model, examples, args, log.append)
    assert [line["step"] for line in log] == list(range(1, 7))
    assert sum(line["tokens"] for line in log) == 2 * sum(len(e.ids) for e in examples)
    sizes = [int(e.response.sum()) for e in examples]
    assert sum(line["response_tokens"] for line in log) == 2 * sum(sizes)
    assert sum(line["selected_tokens"] for line in log) == 2 * sum(math.ceil(round(0.6 * n, 9)) for n in sizes)
    assert log[0].keys() == {
        *("step", "loss", "lr", "tokens", "response_tokens", "selected_tokens", "seconds", "peak_memory_mb")
    }
    assert all(line["seconds"] > 0 and line["peak_memory_mb"] > 100 for line in log)


@pytest.mark.parametrize(
    "flags, history_passes, probes",
    [
        ([], 5, 5),
        (["--gamma", "0"], 0, 5),
        (["--gamma", "1"], 5, 0),
        (["--rho", "1"], 0, 0),
        (["--method", "full"], 0, 0),
    ],
)
def test_what_has_no_weight_is_not_computed(llama, rows, monkeypatch, flags, history_passes, probes):
    model, examples, args = prepare(llama, rows, "--micro-batch-size", "4", *flags)
    monkeypatch.setitem(data.PASS_COST, "cpu", 1000)  # so that micro-batches are full: 2, 2 and 1
    calls = {"nll": 0, "scores": 0}
    for cls, name in ((History, "nll"), (sstoken.AttentionProbe, "scores")):

        def count(self, *given, real, name=name):
            calls[name] += 1
            return real(self, *given)

        monkeypatch.setattr(cls, name, functools.partialmethod(count, real=getattr(cls, name)))
    train(model, examples, args, lambda line: None)
    assert calls == {"nll": history_passes, "scores": probes}


def test_full_and_rho_one_are_the_same_training(llama, rows):
    results = []
    for flags in (["--method", "full"], ["--rho", "1"]):
        model, examples, args = prepare(llama, rows, *flags)
        log = []
        train(model, examples, args, log.append)
        results.append([line["loss"] for line in log])
    assert results[0] == results[1]
    assert all(line["selected_tokens"] == line["response_tokens"] for line in log)


def test_attention_only_sets_gamma_to_zero_for_the_first_samples(llama, rows, monkeypatch):
    gammas, real = [], sstoken.score
    monkeypatch.setattr(train_module, "score", lambda rel, att, gamma: gammas.append(gamma) or real(rel, att, gamma))
    model, examples, args = prepare(llama, rows, "--attention-only", "9")
    train(model, examples, args, lambda line: None)
    assert gammas == [0.0] * 16 + [0.5] * 4  # batches of 8, 8 and 4 samples


@pytest.mark.parametrize("gain, best", [("log", 1), ("probability", 0)])
def test_tokens_are_ranked_by_the_gain_that_is_asked_for(llama, rows, gain, best):
    model, _, args = prepare(llama, rows, "--gain", gain, "--gamma", "1", "--rho", "0.5")
    selection, ids = SSToken(model, [2], args), torch.tensor([[5, 6, 7]])
    selection.start(2, 0)
    selection.look_back([0], ids, response := torch.tensor([[False, True, True]]))
    selection.history_nll = torch.tensor([0.7, 12.0])
    (mask,) = selection.choose([0], response, torch.tensor([0.1, 5.0]))  # 0.6 and 7 nats; 0.41 and 0.007
    assert mask.nonzero().flatten().tolist() == [best]


def test_dropout_is_on_in_training_and_off_for_held_out_rows(llama, rows):
    losses = []
    for dropout in ("0", "0.5"):
        model, examples, args = prepare(llama, rows, "--max-steps", "1", "--lora-dropout", dropout)
        train(model, examples, args, lambda line: losses.append(line["loss"]))
    assert losses[0] != losses[1]
    model, examples, args = prepare(llama, rows, "--lora-dropout", "0.5")
    exact = torch.cat([response_nll(model.eval(), *data.collate([e])) for e in examples]).double().mean().item()
    assert torch.cat(response_losses(model.train(), examples)).mean().item() == pytest.approx(exact, rel=1e-5)
    assert model.training  # as it was


def test_the_gradient_is_clipped_only_when_asked(llama, rows, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", RecordingSGD)
    norms = []
    for flags in ([], ["--max-grad-norm", "0.001"]):
        model, examples, args = prepare(llama, rows, "--max-steps", "1", *flags)
        train(model, examples, args, lambda line: None)
        norms.append(torch.stack([g.norm() for g in RecordingSGD.gradients[0]]).norm().item())
    assert norms[0] > 0.01 and norms[1] == pytest.approx(0.001, rel=1e-3)


def test_sample_weights_are_zero_for_samples_without_a_selected_token():
    batch, counts = [[0, 3], [2]], {0: 2, 2: 0, 3: 6}
    assert sample_weights(batch, counts, "sample") == {0: 1 / 2, 2: 0, 3: 1 / 2}
    assert sample_weights(batch, counts, "batch") == {0: 2 / 8, 2: 0, 3: 6 / 8}


@pytest.mark.parametrize("flags", [[], ["--gradient-checkpointing"]], ids=str)
def test_samples_in_one_row_are_what_they_are_one_by_one(checkpoint, rows, flags):
    found = []
    for packed in (False, True):
        model, examples, args = prepare(checkpoint, rows, *flags)
        some = sorted(examples[:7], key=lambda e: -len(e.ids))
        last = some[3].response.nonzero()[-1]
        some[3] = data.Example(
            some[3].ids, some[3].response.index_fill(0, last, False)
        )  # a token that nothing asks for
        model.packed, model.gradient_checkpointing = packed, args.gradient_checkpointing
        probe, seen = sstoken.AttentionProbe(model, 1), []
        model.model.layers[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[:2]))
        ids, response = data.collate(some)
        nll = response_nll(model, ids, response)
        (nll * torch.arange(1.0, len(nll) + 1)).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([nll.detach(), probe.scores(response), *(g / gradients[0].abs().max() for g in gradients)])
        tokens = sum(int(e.response.nonzero().max()) + 1 for e in some)
        assert seen[0] == ((1, tokens) if packed else ids.shape) and tokens < ids.numel()
    for apart, together in zip(*found, strict=True):
        assert (apart - together).abs().max() < 1e-5 * max(1, apart.abs().max())


def test_a_run_with_pack_selects_what_a_run_without_it_does(llama, rows, monkeypatch):
    logs, shapes = [], []
    for flags in ([], ["--pack"]):
        model, examples, args = prepare(llama, rows, *flags, "--gamma", "0.4", "--epochs", "2", "--lr", "0.01")
        model.packed = args.pack
        model.model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
        logs.append([])
        train(model, examples, args, logs[-1].append)
    for apart, together in zip(*logs, strict=True):
        assert together["loss"] == pytest.approx(apart["loss"], rel=1e-5)
        assert together["selected_tokens"] == apart["selected_tokens"]
    assert args.micro_batch_size == args.batch_size and shapes[-1][0] == 1


@pytest.mark.slow  # torch traces the layers for training, the history pass and the probe
def test_compiled_layers_train_as_they_are_and_twice_the_same(llama, rows, monkeypatch):
    monkeypatch.setattr(machine, "COMPILER", "aot_eager")  # traced as for a GPU, without a C++ compiler
    found = []
    for compiled in (False, True, True):
        model, examples, args = prepare(llama, rows, "--lora-dropout", "0.1", "--lr", "0.01", "--batch-size", "2")
        same = [
            data.Example(e.ids[-30:], e.response[-30:]) for e in examples if len(e.ids) > 30 and e.response[-9:].all()
        ]
        layer = model.model.layers[0]
        if compiled:
            machine.compile_layers(model)
            assert layer.forward != type(layer).forward.__get__(layer)
        torch.manual_seed(0)
        found.append([])
        train(model, same[:6], args, found[-1].append)
        found[-1] = [line["loss"] for line in found[-1]] + [p.detach() for p in model.parameters() if p.requires_grad]
    assert len(found[0]) > 10 and all(map(torch.equal, *(map(torch.as_tensor, one) for one in found[1:])))
    for plain, traced in zip(*found[:2], strict=True):
        assert torch.allclose(torch.as_tensor(plain), torch.as_tensor(traced), atol=1e-4)


def test_compiled_layers_are_not_sharded():
    with pytest.raises(UserError, match="--compile does not go with --shard"):
        parse_arguments(["--model", "x", "--compile", "--shard"])


def test_a_pass_in_one_row_has_as_many_tokens_as_its_samples():
    lengths = [9, 8, 4, 3, 3, 2, 1]
    plan = lambda *limit: next(data.plan_batches(lengths, 7, 7, 0, *limit))
    sizes = [[sum(lengths[i] for i in some) for some in plan(3, 12, padded)] for padded in (False, True)]
    assert sizes[0] == [9, 12, 9] and sum(map(len, plan(3, 12, False))) == 7
    assert all(len(some) * lengths[some[0]] <= 12 for some in plan(3, 12, True)) and len(sizes[1]) > 3


def test_the_loss_of_a_micro_batch_is_the_weighted_sum_of_its_samples_means_by_hand():
    nll = torch.tensor([1.0, 3.0, 7.0, 2.0, 4.0, 5.0], requires_grad=True)
    selected = [torch.tensor([True, True, False]), torch.tensor([False]), torch.tensor([True, False])]
    loss = weighted_loss(nll, selected, [0.5, 0, 0.25])
    assert loss.item() == 0.5 * (1 + 3) / 2 + 0.25 * 4
    loss.backward()
    assert nll.grad.tolist() == [0.25, 0.25, 0, 0, 0.25, 0]
    nothing = weighted_loss(nll, selected, [0, 0, 0])  # still goes backward, as other ranks do
    nothing.backward()
    assert nothing.item() == 0 and nll.grad.tolist() == [0.25, 0.25, 0, 0, 0.25, 0]


def test_learning_rate_by_hand():
    schedule = [learning_rate(s, 10, 1.0, 0.2) for s in range(1, 11)]
    assert schedule == pytest.approx([0.5, 1.0, *(k / 9 for k in range(8, 0, -1))])
    assert learning_rate(1, 100, 2.0, 0.03) == pytest.approx(2 / 3)
    assert [learning_rate(s, 3, 1.0, 0.0) for s in (1, 2, 3)] == pytest.approx([0.75, 0.5, 0.25])


def test_the_optimizer_gets_the_schedule_and_the_log_says_so(llama, rows, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", RecordingSGD)
    model, examples, args = prepare(llama, rows, "--epochs", "3", "--lr", "0.002", "--warmup-ratio", "0.3")
    log = []
    train(model, examples, args, log.append)
    expected = [learning_rate(step, 9, 0.002, 0.3) for step in range(1, 10)]
    assert RecordingSGD.rates == [line["lr"] for line in log] == expected and len(set(expected)) > 5


def test_base_weights_stay_as_they_are(llama, rows):
    model, examples, args = prepare(llama, rows, "--lr", "0.01")
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, examples, args, lambda line: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    assert not model._forward_pre_hooks and not model.model.layers[-1]._forward_pre_hooks  # nor does the probe


def test_the_order_follows_the_seed_and_changes_with_the_epoch(llama, rows):
    plan = lambda *flags: plan_steps(list(range(1, 21)), arguments(llama, rows, *flags), torch.device("cpu"))
    two = plan("--epochs", "2")
    assert two[:3] == plan() and two[3:] != two[:3]
    assert plan("--seed", "1") != plan() == plan("--seed", "42")


def test_history_ema_is_eq_4_on_the_merged_weights(checkpoint, rows, monkeypatch):
    model, examples, args = prepare(
        checkpoint, rows, "--history", "ema", "--ema-alpha", "0.7", "--lr", "0.01", active=False
    )
    merged = lambda: {n: (x.weight + 4 * x.product()).double() for n, x in lora_layers(model).items()}
    expected, histories, real = merged(), [], History
    monkeypatch.setattr(lora, "History", lambda *a: histories.append(real(*a)) or histories[0])
    seen = []

    def log(line):  # called after each optimizer step: line 11 once more, on whole weights in float64
        for name, theta in merged().items():
            expected[name] = 0.7 * expected[name] + 0.3 * theta
        seen.append(line["step"])

    train(model, examples, args, log)
    assert seen == [1, 2, 3]
    ids, response = data.collate(examples[:4])
    history_nll = histories[0].nll(ids, response)
    lora.remove_lora(model)
    for name, theta in expected.items():
        model.get_submodule(name).weight.data.copy_(theta)
    difference = (history_nll - response_nll(model, ids, response)).abs().max()
    assert difference < 1e-4
    base = response_nll(load_model(checkpoint), ids, response)
    assert (history_nll - base).abs().max() > 100 * difference  # it has moved away from the base model


def test_an_ema_of_a_bfloat16_model_moves_because_it_is_kept_in_float32(llama, rows):
    model, _, _ = prepare(llama, rows, "--dtype", "bfloat16")
    history = History(model, "ema", ema_alpha=0.999, every=1)
    for _ in range(100):
        history.update(1)
    for (average,), layer in zip(history.factors, lora_layers(model).values(), strict=True):
        assert torch.allclose(average, (1 - 0.999**100) * layer.product(), rtol=1e-3, atol=1e-7)


def test_no_history_is_kept_that_no_score_reads(llama, rows, monkeypatch):
    kinds, real = [], History
    monkeypatch.setattr(lora, "History", lambda model, kind, *a: kinds.append(kind) or real(model, kind, *a))
    ema = ["--history", "ema"]
    for flags in (["--gamma", "0", *ema], ["--method", "full"], ["--rho", "1", *ema], ema):
        model, examples, args = prepare(llama, rows, "--max-steps", "1", *flags)
        train(model, examples, args, lambda line: None)
    assert kinds == ["base", "base", "ema"]  # and none at all in full training


def test_training_refreshes_the_history_as_often_as_asked(llama, rows, monkeypatch):
    refreshed = []
    for every in ("1", "2", "5"):
        histories, real = [], History
        monkeypatch.setattr(lora, "History", lambda *a, h=histories, r=real: h.append(r(*a)) or h[0])
        model, examples, args = prepare(llama, rows, "--history", "checkpoint", "--history-every", every)
        train(model, examples, args, lambda line: None)
        monkeypatch.setattr(lora, "History", real)
        current = next(iter(lora_layers(model).values())).lora_B
        factors = histories[0].factors
        refreshed.append("never" if factors is None else "last" if torch.equal(factors[0][1], current) else "before")
    assert refreshed == ["last", "before", "never"]  # of three steps


def test_kept_losses_stand_for_the_base_model_and_for_no_other_history(llama, rows):
    model, _, _ = prepare(llama, rows)
    ids, response = torch.arange(2, 32)[None], torch.arange(30)[None] > 26
    kept = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    base, *others = (History(model, kind, 0.9, 1, kept) for kind in ("base", "ema", "checkpoint"))
    assert base.nll(ids, response, [1, 0]).tolist() == [3, 1, 2]
    assert base.nll(ids, response, []).shape == (0,)  # a rank may have no sample
    assert all(history.nll(ids, response, [1, 0]).min() > 3 for history in others)


def test_history_checkpoint_is_the_adapter_of_the_last_refresh(llama, rows):
    model, _, _ = prepare(llama, rows)
    history = History(model, "checkpoint", ema_alpha=0.0, every=2)
    ids, response = torch.arange(2, 32)[None], torch.arange(30)[None] > 9
    with lora.disabled(model), torch.no_grad():
        base = response_nll(model, ids, response)
    assert torch.equal(history.nll(ids, response), base)
    history.update(1)
    assert torch.equal(history.nll(ids, response), base)
    history.update(2)
    with torch.no_grad():
        at_step_2 = response_nll(model, ids, response)
        for layer in lora_layers(model).values():
            layer.lora_A.add_(0.1)
        assert torch.equal(history.nll(ids, response), at_step_2)
        assert not torch.equal(response_nll(model, ids, response), at_step_2)


@pytest.mark.parametrize("flags", [[], ["--method", "random"], ["--history", "ema", "--max-grad-norm", "1"]])
def test_a_step_asks_the_device_for_numbers_only_where_it_logs_them(llama, rows, monkeypatch, flags):
    """On the meta device no tensor has numbers, so whatever would have to wait for a GPU's raises here."""
    model, examples, args = prepare(llama, rows, "--lora-dropout", "0.1", *flags)
    model.to("meta").tie_weights()
    asked, real = [], torch.Tensor.tolist

    def answer(tensor):
        if not tensor.is_meta:
            return real(tensor)
        asked.append(len(tensor))
        return [0.0] * len(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", answer)
    train(model, examples, args, lambda line: None)
    assert asked == [4, 4, 4]  # loss, tokens selected, signals and the gradient's norm, once in each of three steps
    with pytest.raises(NotImplementedError):  # a mask on the device would have been such a question
        response_nll(model, torch.zeros(1, 4, dtype=torch.int64, device="meta"), torch.ones(1, 4, device="meta").bool())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_the_memory_and_no_bit_of_the_result(checkpoint, rows, dtype):
    results, peaks = [], []
    for flags in ([], ["--gradient-checkpointing"]):
        model, examples, args = prepare(checkpoint, rows, "--lora-dropout", "0.1", "--dtype", dtype, *flags)
        model.gradient_checkpointing = train_module.prepare(args, torch.device("cpu"), examples).gradient_checkpointing
        log, ids = [], torch.arange(2, 302)[None]
        peaks.append(peak_allocated(lambda m=model, i=ids: response_nll(m.train(), i, i > 5).sum().backward()))
        model.zero_grad()
        torch.manual_seed(1)
        train(model, examples, args, log.append)
        results.append(([line["loss"] for line in log], [p for p in model.parameters() if p.requires_grad]))
    assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1], results[1][1]))
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_table_is_what_a_pass_really_keeps(checkpoint, dtype, monkeypatch):
    """tests/bench/bench_memory.py counts from shapes; here every tensor that autograd saves is counted, once."""
    monkeypatch.setattr("support.kernels.SHORT", 0)  # the table is a GPU's
    rank, ids = 8, torch.arange(2, 302).view(3, 100)
    model = add_lora(load_model(checkpoint, dtype), rank=rank).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids)
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)
    layers, element = len(model.model.layers), dtype.itemsize
    expected = layers * sum(kept_by_a_layer(model.config, ids.numel(), rank, element).values())
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapters == layers * adapter_parameters(model.config, rank)
    expected += adapters * element if dtype != torch.float32 else 0  # cast to the activations' type
    # The final norm keeps its input too. The first does not, nor the mask behind it: nothing before them is trained.
    expected -= ids.numel() * model.config.hidden_size
    expected += 2 * ids.shape[1] * model.config.head_dim * element  # cos and sin
    assert found == pytest.approx(expected, rel=0.005) and out.requires_grad
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - adapters
    assert frozen_parameters(model.config) == weights


def test_training_really_takes_flash_attention(llama, rows, monkeypatch):
    monkeypatch.setattr("support.kernels.SHORT", 0)  # as on a GPU, and as of long sequences
    model, examples, args = prepare(llama, rows, "--max-steps", "1", "--dtype", "bfloat16")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where flash cannot take the call
        train(model, examples, args, lambda line: None)


# -------------------------------------------------------------------------------------------------- command line


def run(*flags):
    return subprocess.run(
        [sys.executable, ROOT + "train.py", *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


def test_the_defaults_are_those_of_the_paper_and_of_its_release():
    given = vars(parse_arguments(["--model", "x", "--device", "cpu"]))
    assert given == {
        **{"method": "sstoken", "rho": 0.6, "gamma": 0.5, "layer": -1, "loss_mean": "sample", "attention_only": 0},
        **{"history": "base", "ema_alpha": 0.999, "history_every": 100, "cache": None, "excess": "static"},
        **{"gain": "log"},
        **{"reference": None, "reference_data": None, "reference_top": None, "rating_field": "score"},
        **{"model": "x", "revision": None, "data": "jlpang888/DS2_50k", "eval_data": None, "limit": None},
        **{"max_length": 2048, "out": None, "overwrite": False, "merge": False, "merge_dtype": None},
        **{"skip_bad_rows": False, "pass_tokens": None, "template": "paper", "eval_every": None},
        **{
            "checkpoint_every": None,
            "snapshot_every": None,
            "resume": False,
            "gradient_checkpointing": False,
            "pack": False,
            "compile": False,
            "shard": False,
        },
        **{"batch_size": 48, "micro_batch_size": 4, "lr": 1e-4, "warmup_ratio": 0.03, "max_grad_norm": 0.0},
        **{"epochs": 1, "max_steps": None, "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.1, "seed": 42},
        **{"dtype": machine.usual_dtype(torch.device("cpu")), "device": "cpu"},
    }
    assert parse_arguments(["--model", "x", "--batch-size", "9"]).micro_batch_size == 3
    assert parse_arguments(["--batch-size", "24"]).micro_batch_size == 24  # of the demo's 48


def test_on_a_gpu_a_pass_has_more_samples_by_default_and_no_more_tokens(monkeypatch):
    monkeypatch.setattr(machine, "find_device", lambda name: torch.device("cuda"))
    given = parse_arguments(["--model", "x", "--max-length", "100"])
    assert (given.micro_batch_size, given.pass_tokens) == (16, 400)
    assert parse_arguments(["--model", "x", "--batch-size", "10"]).micro_batch_size == 10
    own = parse_arguments(["--model", "x", "--micro-batch-size", "24"])
    assert (own.micro_batch_size, own.pass_tokens) == (24, None)
    steps = plan_steps([100] * 48 + [20] * 48, given, torch.device("cpu"))
    sizes = {len(samples) * (100 if min(samples) < 48 else 20) for batch in steps for samples in batch}
    assert max(sizes) <= 400 and any(len(samples) > 4 for batch in steps for samples in batch)


@pytest.mark.parametrize("method", ["sstoken", "full"])
def test_a_step_that_may_leave_a_checkpoint_reads_from_its_device_once(llama, rows, tmp_path, monkeypatch, method):
    reads = []

    def note(name, shape):  # what our own lines read; AdamW has its steps on the host
        if "site-packages" not in sys._getframe(2).f_code.co_filename:
            reads.append((name, shape))

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, r=real, n=name: note(n, x.shape) or r(x, *a))
    args = parse_arguments(["--model", str(llama), "--data", "x", "--method", method, "--batch-size", "5"])
    examples, _ = data.load_examples(str(rows), data.load_tokenizer(llama), 128)
    model = add_lora(load_model(llama))
    checkpoints, marks = runs.Checkpoints(tmp_path, 4, every=9), [0]
    train(model, examples, args, lambda line: marks.append(len(reads)), checkpoints)
    of_steps = [reads[start:end] for start, end in itertools.pairwise(marks)]
    assert of_steps[1:] == [[("tolist", torch.Size([4]))]] * 3  # loss, selected, signal, norm: together


def test_help_gives_every_default(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("(default: 0.6)", "(default: 0)", "(default: 0.0)", "(default: jlpang888/DS2_50k)"):
        assert default in text
    assert "default: None" not in text and "default: False" not in text


def test_a_run_computes_float32_in_full_whatever_was_set_before(llama, rows, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        train_module.main(["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "a")])
        assert torch.get_float32_matmul_precision() == "highest"  # no TF32 on a GPU
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_a_run_from_the_command_line_writes_its_folder_and_repeats_bit_for_bit(llama, rows, tmp_path):
    with rows.open("a") as file:  # one row whose prompt alone is too long, and one beyond the limit
        for words in (500, 1):
            file.write(json.dumps({"instruction": "word " * words, "output": "lost"}) + "\n")
    flags = f"--model {llama} --data {rows} --eval-data {rows} --limit 21 --max-length 300".split()
    flags += ["--lr", "0.01", "--epochs", "4", "--batch-size", "8"]
    result = run(*flags, "--out", tmp_path / "a", "--merge")
    assert result.returncode == 0, result.stderr
    assert "20 samples" in result.stdout and "1 dropped" in result.stdout
    assert "loss " in result.stderr and "tokens/s" in result.stderr and "% selected" in result.stderr
    left = [runs.CHECKPOINT.format(step) for step in (10, 12)]
    handed_on = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*runs.FILES, *left, *handed_on}
    wrote, asked, *commands = result.stdout.splitlines()[-4:]
    these = f"--model {llama} --adapter {tmp_path / 'a'}"
    assert wrote.startswith("wrote ") and str(tmp_path / "a") in wrote
    assert asked == f"  python evaluate.py {these} --ask 'What is the capital of France?'"
    shown = f"{these} --data {rows} --max-length 300"
    assert commands == [f"  python evaluate.py {these}", f"  python -m paper.visualize {shown}"]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (record["samples"], record["dropped"]) == (20, 1)
    assert record["arguments"]["rho"] == 0.6 and record["arguments"]["seed"] == 42 and record["versions"]["torch"]
    assert record["held_out_loss_after"] < record["held_out_loss_before"] - 0.1
    steps = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, 13))

    adapter = lambda name: (tmp_path / name / "adapter_model.safetensors").read_bytes()
    for name, more in {"b": [], "c": ["--seed", "43"]}.items():
        assert run(*flags, *more, "--out", tmp_path / name).returncode == 0
    assert adapter("a") == adapter("b") != adapter("c")

    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama) and config["revision"] is None

    again = run(*flags, "--out", tmp_path / "a")
    assert again.returncode == 2 and "holds another run" in again.stderr
    assert run(*flags, "--max-steps", "1", "--out", tmp_path / "a", "--overwrite").returncode == 0
    assert not (tmp_path / "a" / "merged").exists()
    assert len((tmp_path / "a" / "log.jsonl").read_text().splitlines()) == 1


MISTAKES = {
    "--rho": ["--rho", "0"],
    "--gamma": ["--gamma", "1.5"],
    "layer 9": ["--layer", "9"],
    "--warmup-ratio": ["--warmup-ratio", "2"],
    "--micro-batch-size 5 does not divide": ["--micro-batch-size", "5"],
    "--method": ["--method", "best"],
    "--max-steps": ["--max-steps", "0"],
    "unrecognized": ["--rhoo", "1"],
    "nowhere.jsonl": ["--data", "nowhere.jsonl"],
    "no/where": ["--model", "no/where"],
    "--device gpu": ["--device", "gpu"],
    "--device meta": ["--device", "meta"],
    "--device cuda:99": ["--device", "cuda:99"],
    "--lr is inf": ["--lr", "inf"],
    "--seed": ["--seed", "99999999999999999999"],
    "--lora-alpha is nan": ["--lora-alpha", "nan"],
    "--data names no source": ["--data", " , "],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_line(llama, rows, tmp_path, capsys, message):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "out"), *MISTAKES[message]]
    with pytest.raises(SystemExit) as end:
        start.run_script(lambda: train_module.main(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) <= 3
    assert lines[-1].startswith("error:") and message in lines[-1]
    assert not (tmp_path / "out").exists()  # so the corrected command can be run at once


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_a_sample_longer_than_the_models_context_is_refused(llama, rows, tmp_path, flag):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x", "completion": "word " * 600}) + "\n")
    argv = ["--model", str(llama), "--out", str(tmp_path / "out"), flag, str(tmp_path / "long.jsonl")]
    with pytest.raises(UserError, match="lower --max-length to 512"):
        train_module.main([*argv, *(["--data", str(rows)] if flag == "--eval-data" else [])])
    assert not (tmp_path / "out").exists()


def test_self_evolving_needs_a_sample_for_each_of_its_parts(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--method", "self-evolving", "--device", "cpu"]
    with pytest.raises(UserError, match="cuts the data into 5 parts, but there are 4 samples"):
        train_module.main([*argv, "--limit", "4", "--out", str(tmp_path / "four")])
    train_module.main([*argv, "--limit", "5", "--out", str(tmp_path / "five")])


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        start.run_script(lambda: 1 / 0)


def test_new_runs_get_folders_of_their_own_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "time", SimpleNamespace(strftime=lambda form: "20000101-000000"))
    args = parse_arguments(["--model", "models/tiny"])
    assert runs.new_folder(args).as_posix() == "runs/tiny-sstoken-20000101-000000"


def test_attention_only_counts_the_samples_before_a_stop_too(llama, rows, tmp_path):
    """Three batches by attention alone, then three by both signals; stopped after the fourth."""

    def fine_tune(folder, stop_after=None):
        flags = ["--attention-only", "20", "--epochs", "2", "--lr", "0.01", "--lora-dropout", "0.1"]
        model, examples, args = prepare(llama, rows, *flags)
        folder.mkdir(exist_ok=True)
        checkpoints = runs.Checkpoints(folder, 6, 1, settings={})

        def log(line):
            if line["step"] == stop_after:
                raise KeyboardInterrupt

        train(model, examples, args, log, checkpoints)
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    whole = fine_tune(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path / "stopped", stop_after=5)
    assert all(map(torch.equal, fine_tune(tmp_path / "stopped"), whole))


def test_the_first_lines_tell_what_is_not_used_of_the_rows(llama, rows, tmp_path, capsys):
    lines = [json.loads(line) | {"id": i, "source": "a book"} for i, line in enumerate(rows.read_text().splitlines())]
    lines[3] = {"instruction": "Q", "output": ["A"]}
    lines[5]["messages"] = None  # not of this schema, so about the row
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{]\n")
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "out"), "--max-length", "60"]
    with pytest.raises(UserError, match=r"rows.jsonl, line 21: not JSON .*; --skip-bad-rows leaves such rows out"):
        train_module.main(argv)
    capsys.readouterr()
    train_module.main([*argv, "--skip-bad-rows", "--device", "cpu"])
    told = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert f"{record['cut']} cut there, their ends lost" in told[2] and record["cut"] > 5
    assert told[3] == "columns passed over: id, source, messages"
    assert told[4].startswith("skipped: 1 rows, the first ") and "rows.jsonl, line 21: not JSON (" in told[4]
    assert "rows.jsonl, row 4: a message is str, not an object with a role" in told[5]
    assert record["passed_over"] == {"columns": ["id", "source", "messages"]} and len(record["skipped"]) == 2


def test_before_anything_takes_long_it_is_said_what_is_waited_for(llama, rows, tmp_path, capsys, monkeypatch):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "out"), "--batch-size", "4"]
    real, told = data.load_tokenizer, {}

    def look(name, then):
        told[name] = capsys.readouterr()
        return then

    monkeypatch.setattr(data, "load_tokenizer", lambda *given: look("at first", real(*given)))
    monkeypatch.setattr(train_module, "train", lambda *given: look("in the first step", None))
    train_module.main(argv)
    assert told["at first"].out == f"reading {llama} and {rows}\n"
    assert (
        "| 0/5 [" in told["in the first step"].err and "at work on step 1, 4 samples]" in told["in the first step"].err
    )


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merging_says_what_rounding_loses_and_how_to_keep_it(llama, rows, tmp_path, capsys, dtype):
    argv = ["--model", str(llama), "--data", str(rows), "--out", str(tmp_path / "out"), "--max-steps", "1", "--merge"]
    argv += ["--dtype", "bfloat16", "--device", "cpu"]
    train_module.main([*argv, *(["--merge-dtype", dtype] if dtype else [])])
    told = capsys.readouterr().out
    lost = float(re.search(rf"merged into {dtype or 'bfloat16'}, whose rounding changes the update by (.*)%", told)[1])
    assert ("--merge-dtype float32 keeps all of it" in told) == (dtype is None) == (lost > 10)
    assert load_model(tmp_path / "out" / "merged").lm_head.weight.dtype == getattr(torch, dtype or "bfloat16")


def test_a_rate_of_dropout_that_rounds_to_nothing_drops_nothing(llama, rows, tmp_path):
    argv = ["--model", str(llama), "--data", str(rows), "--device", "cpu", "--max-steps", "2", "--lr", "0.01"]
    for name, rate in {"none": "0", "tiny": "7e-6", "half a part": "7.6e-6"}.items():
        train_module.main([*argv, "--lora-dropout", rate, "--out", str(tmp_path / name)])
    held = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("none", "tiny")}
    assert all(torch.equal(held["none"][key], held["tiny"][key]) for key in held["none"])


def test_eval_every_measures_held_out_rows_on_the_way_and_changes_nothing(llama, rows, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(rows.read_text().splitlines(keepends=True)[:5]))
    argv = ["--model", str(llama), "--data", str(rows), "--lora-rank", "4", "--batch-size", "4", "--lr", "0.01"]
    argv += ["--eval-data", str(held_out), "--dtype", "float32", "--device", "cpu", "--snapshot-every", "2"]
    train_module.main([*argv, "--out", str(tmp_path / "plain")])
    train_module.main([*argv, "--out", str(tmp_path / "run"), "--eval-every", "2"])
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("plain", "run")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "held_out_loss" in line] == [2, 4]

    tokenizer = data.load_tokenizer(llama)
    examples, _ = data.load_examples(str(held_out), tokenizer, 2048)
    for step in (2, 4):
        peer = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        peer = PeftModel.from_pretrained(peer, tmp_path / "run" / f"step-{step:08d}").eval()
        nll = []
        for example in examples:
            logits = peer(example.ids[None]).logits[0, :-1].detach()
            losses = torch.nn.functional.cross_entropy(logits, example.ids[1:], reduction="none")
            nll.append(losses[example.response[1:]])
        assert log[step - 1]["held_out_loss"] == pytest.approx(torch.cat(nll).mean().item(), abs=1e-5)
