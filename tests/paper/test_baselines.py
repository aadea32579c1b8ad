"""RHO-1 and TokenCleaning against the same selections made from transformers' and peft's models, and the loss cache."""

import json
import math
import multiprocessing
import random
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, edit_json, make_checkpoint, write_rows
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import data
import lora
import train as train_module
from model import load_model
from paper import baselines, frozen, objectives, self_evolving
from paper.baselines import select_at_random, select_in_each_sample, select_in_the_pool
from paper.frozen import response_losses
from support import files, losses
from support.files import UserError
from train import learning_rate, parse_arguments

SETTINGS = "--batch-size 20 --lora-rank 4 --lora-dropout 0 --dtype float32 --lr 0.01 --max-length 128".split()


def main(model, rows, out, *more) -> list[dict]:
    """A run in this process; returns its log."""
    train_module.main(["--model", str(model), "--data", str(rows), "--out", str(out), *SETTINGS, *map(str, more)])
    return files.read_log(Path(out))


def examples_of(model, rows) -> list[data.Example]:
    return data.load_examples(str(rows), data.load_tokenizer(model), 128)[0]


@torch.no_grad()
def losses_by_transformers(model, examples) -> list[torch.Tensor]:
    """Each sample's response losses, in float64, one sample at a time, from full logits."""
    found = []
    for ids, response in examples:
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        found.append(torch.stack([-log_p[i - 1, ids[i]] for i in range(len(ids)) if response[i]]))
    return found


def in_float64(checkpoint, *adapters) -> torch.nn.Module:
    """transformers' model with peft's adapters merged in, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    return model


def best_of_sample(excess: list[torch.Tensor], rho: float) -> list[set[int]]:
    counts = [math.ceil(Fraction(str(rho)) * len(values)) for values in excess]
    orders = [sorted(range(len(values)), key=lambda t: -values[t]) for values in excess]
    return [set(order[:count]) for order, count in zip(orders, counts, strict=True)]


def best_of_pool(excess: list[torch.Tensor], rho: float) -> list[set[int]]:
    places = [(float(value), i, t) for i, values in enumerate(excess) for t, value in enumerate(values)]
    best = sorted(places, key=lambda place: -place[0])[: math.floor(Fraction(str(rho)) * len(places))]
    return [{t for _, sample, t in best if sample == i} for i in range(len(excess))]


def loss_of(nll: list[torch.Tensor], chosen: list[set[int]], loss_mean: str) -> float:
    """The loss of a step that trains on the `chosen` tokens of all samples."""
    sums = [sum(values[t].item() for t in best) for values, best in zip(nll, chosen, strict=True)]
    if loss_mean == "batch":
        return sum(sums) / sum(map(len, chosen))
    means = [total / len(best) for total, best in zip(sums, chosen, strict=True) if best]
    return sum(means) / len(means)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: the folder of a reference adapter for a checkpoint, trained by --method full on rows of its own."""
    made = {}

    def make(checkpoint) -> Path:
        if checkpoint not in made:
            folder = tmp_path_factory.mktemp("reference")
            main(checkpoint, write_rows(folder / "rows.jsonl"), folder / "run", *"--method full --limit 6".split())
            made[checkpoint] = folder / "run"
        return made[checkpoint]

    return make


# ------------------------------------------------------------------------------------------------------ selections


@pytest.mark.parametrize("method, rho, best", [("rho1", 0.6, best_of_sample), ("tokencleaning", 0.02, best_of_pool)])
def test_a_static_method_trains_on_the_tokens_that_a_reference_improves_most(
    checkpoint, rows, reference, tmp_path, method, rho, best
):
    adapter, examples = reference(checkpoint), examples_of(checkpoint, rows)
    base = losses_by_transformers(in_float64(checkpoint), examples)
    better = losses_by_transformers(in_float64(checkpoint, adapter), examples)
    chosen = best([b - r for b, r in zip(base, better, strict=True)], rho)
    if method == "tokencleaning":
        assert any(not tokens for tokens in chosen), "no sample lost all its tokens: a lower rho would show it"
    (line,) = main(checkpoint, rows, tmp_path / "a", "--method", method, "--rho", rho, "--reference", adapter)
    loss_mean = "batch" if method == "tokencleaning" else "sample"
    assert line["loss"] == pytest.approx(loss_of(base, chosen, loss_mean), rel=1e-5)  # B is zero: the base's losses
    assert line["selected_tokens"] == sum(map(len, chosen)) < line["response_tokens"]


def test_a_whole_model_is_a_reference_too(llama, rows, reference, tmp_path):
    lora.merge(lora.load_adapter(load_model(llama, torch.float32), reference(llama)), tmp_path / "whole")
    logs = [
        main(llama, rows, tmp_path / name, "--method", "rho1", "--reference", path)
        for name, path in {"a": reference(llama), "b": tmp_path / "whole"}.items()
    ]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-6)


def test_rho_1_of_the_current_model_ranks_by_eq_2_anew(llama, rows, reference, tmp_path):
    flags = ["--method", "rho1", "--reference", reference(llama), "--epochs", "2", "--warmup-ratio", "0"]
    static = main(llama, rows, tmp_path / "static", *flags)
    log = main(llama, rows, tmp_path / "current", *flags, "--excess", "current")
    assert log[0]["loss"] == static[0]["loss"] and log[1]["loss"] != static[1]["loss"]

    # the model after the first of the two steps, and what it makes of the tokens
    rate = 0.01 * learning_rate(1, 2, 1.0, 0) / learning_rate(1, 1, 1.0, 0)
    main(llama, rows, tmp_path / "after", *flags, "--max-steps", "1", "--lr", rate)
    examples = examples_of(llama, rows)
    current = losses_by_transformers(in_float64(llama, tmp_path / "after"), examples)
    better = losses_by_transformers(in_float64(llama, reference(llama)), examples)
    chosen = best_of_sample([c - r for c, r in zip(current, better, strict=True)], 0.6)
    assert log[1]["loss"] == pytest.approx(loss_of(current, chosen, "sample"), rel=1e-4)


def test_ties_and_floors_by_hand():
    excess = [torch.tensor([0.0, 2.0, 1.0, 2.0]), torch.tensor([-1.0]), torch.tensor([2.0, 0.5])]
    sizes = [4, 1, 2]
    as_lists = lambda selected: [s.int().tolist() for s in selected]
    assert as_lists(select_in_each_sample(sizes, 0.5, 0, excess)) == [[0, 1, 0, 1], [1], [1, 0]]
    assert as_lists(select_in_the_pool(sizes, 0.3, 0, excess)) == [[0, 1, 0, 1], [0], [0, 0]]  # floor(2.1), ties: first
    assert as_lists(select_in_the_pool(sizes, 0.6, 0, excess)) == [[0, 1, 1, 1], [0], [1, 0]]  # floor(4.2)
    tenths = [torch.arange(30.0)]
    assert int(select_in_the_pool([30], 0.1, 0, tenths)[0].sum()) == 3  # 0.1 as written, not what it is in binary
    assert as_lists(select_in_the_pool(sizes, 0.3, 0, None)) == [[1, 1, 1, 1], [1], [1, 1]]


def test_self_evolving_is_tokencleaning_part_by_part(checkpoint, rows, tmp_path):
    """Each part's first step against the base with the parts before merged in, by transformers and peft."""
    flags = "--method self-evolving --rho 0.5 --batch-size 4 --epochs 2 --merge".split()
    log = main(checkpoint, rows, tmp_path / "a", *flags)
    assert [line["step"] for line in log] == list(range(1, 11))
    assert [line["part"] for line in log] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    examples = examples_of(checkpoint, rows)
    order, base = random.Random("42 parts").sample(range(20), 20), in_float64(checkpoint)
    seen = []
    for number in range(1, 6):
        members = order[number - 1 :: 5]
        part = [examples[i] for i in members]
        before = [tmp_path / "a" / f"part-{n}" for n in range(1, number)]
        nll, model_so_far = losses_by_transformers(base, part), in_float64(checkpoint, *before)
        better = losses_by_transformers(model_so_far, part)
        chosen = [set(range(len(values))) for values in nll]
        if number > 1:
            chosen = best_of_pool([b - r for b, r in zip(nll, better, strict=True)], 0.5)
        line = log[2 * (number - 1)]
        assert line["selected_tokens"] == sum(map(len, chosen))
        assert line["loss"] == pytest.approx(loss_of(better, chosen, "batch"), rel=1e-4)
        assert line["lr"] == 0.01  # each part has a warm-up (of one step) and a decay of its own
        seen += members
    assert sorted(seen) == list(range(20))
    first = [load_file(tmp_path / "a" / f"part-{n}" / "adapter_model.safetensors") for n in (1, 2)]
    name = next(name for name in first[0] if "lora_A" in name)
    assert not torch.allclose(first[0][name], first[1][name], atol=0.05)  # drawn anew

    ids = examples[3].ids[None]
    whole = in_float64(checkpoint, *(tmp_path / "a" / f"part-{n}" for n in range(1, 6)))(ids).logits
    joined = in_float64(checkpoint, tmp_path / "a")(ids).logits
    assert (whole - joined).abs().max() < 1e-5
    assert (whole - base(ids).logits).abs().max() > 0.01
    merged = load_model(tmp_path / "a" / "merged")
    assert (merged.lm_head(merged(ids)) - whole).abs().max() < 1e-3


def test_in_bfloat16_the_joined_adapter_is_the_model_that_was_trained(llama, rows, tmp_path):
    flags = "--method self-evolving --batch-size 4 --dtype bfloat16 --lr 0.0005 --merge".split()
    main(llama, rows, tmp_path / "a", *flags, "--eval-data", rows)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    examples = examples_of(llama, rows)
    model = load_model(llama, torch.bfloat16)
    joined = torch.cat(response_losses(lora.load_adapter(model, tmp_path / "a"), examples)).mean().item()
    before, after = record["held_out_loss_before"], record["held_out_loss_after"]
    assert joined == pytest.approx(after, abs=0.1 * (before - after)) and after < before - 0.01
    merged = load_model(tmp_path / "a" / "merged", torch.bfloat16)

    self_evolving.freeze_adapters(model)  # on top of the joined one: the same model, and mergeable
    for layer in lora.lora_layers(model).values():
        assert layer.earlier[0].shape[0] == layer.rank and layer.lora_B.eq(0).all()
    again = torch.cat(response_losses(model, examples)).mean().item()
    assert again == pytest.approx(joined, abs=1e-3)
    lora.merge(model)
    assert all(map(torch.equal, model.parameters(), merged.parameters()))


def test_max_steps_is_of_all_parts_together(llama, rows, tmp_path):
    log = main(llama, rows, tmp_path / "a", *"--method self-evolving --batch-size 1 --max-steps 7".split())
    assert [line["part"] for line in log] == [1, 2, 3, 3, 4, 5, 5]


# ------------------------------------------------------------------------------------------------- reference models


def test_a_reference_trained_in_the_same_command_is_that_of_two_commands(llama, rows, tmp_path):
    subset = write_rows(tmp_path / "subset.jsonl")
    lines = subset.read_text().splitlines(keepends=True)
    subset.write_text("".join(lines[4:11]))
    main(llama, subset, tmp_path / "reference", "--method", "full", "--lora-dropout", "0.1")
    rho1 = ["--method", "rho1", "--lora-dropout", "0.1"]
    main(llama, rows, tmp_path / "two", *rho1, "--reference", tmp_path / "reference")
    main(llama, rows, tmp_path / "one", *rho1, "--reference-data", subset)
    adapter = lambda path: (tmp_path / path / "adapter_model.safetensors").read_bytes()
    assert adapter("reference") == adapter("one/reference")
    assert adapter("one") == adapter("two") != adapter("reference")
    seconds = [json.loads((tmp_path / name / "run.json").read_text())["seconds"] for name in ("one", "two")]
    assert seconds[0]["reference"] > 0 == seconds[1]["reference"]
    assert all(part["training"] > 0 and part["losses"] > 0 and part["loading"] > 0 for part in seconds)


def test_the_best_rated_rows_make_a_reference(llama, rows, tmp_path):
    rated = [json.loads(line) | {"score": (7 * i) % 20} for i, line in enumerate(rows.read_text().splitlines())]
    rows.write_text("".join(json.dumps(row) + "\n" for row in rated))
    best = [row for row in rated if row["score"] >= 15]
    (tmp_path / "best.jsonl").write_text("".join(json.dumps(row) + "\n" for row in best))
    main(llama, tmp_path / "best.jsonl", tmp_path / "a", "--method", "full")
    main(llama, rows, tmp_path / "b", "--method", "full", "--reference-top", "5")
    main(llama, rows, tmp_path / "c", "--method", "rho1", "--reference-top", "5")
    adapter = lambda path: (tmp_path / path / "adapter_model.safetensors").read_bytes()
    assert adapter("a") == adapter("b") == adapter("c/reference")
    with pytest.raises(UserError, match="row 1: column stars holds no rating"):
        main(llama, rows, tmp_path / "d", "--method", "full", "--reference-top", "5", "--rating-field", "stars")
    with pytest.raises(UserError, match="20 rated rows, 21 are to be taken"):
        main(llama, rows, tmp_path / "d", "--method", "full", "--reference-top", "21")


def test_a_reference_with_another_tokenizer_is_refused(llama, rows, tmp_path):
    other = make_checkpoint(tmp_path / "other", "llama", adds_bos=True)
    assert main(llama, rows, tmp_path / "a", "--method", "rho1", "--reference", other)  # the same one, another file

    def swap(tokenizer):
        first, second = list(tokenizer["model"]["vocab"])[100:102]
        ids = tokenizer["model"]["vocab"]
        ids[first], ids[second] = ids[second], ids[first]

    edit_json(other / "tokenizer.json", swap)
    with pytest.raises(UserError, match="has another tokenizer than"):
        main(llama, rows, tmp_path / "b", "--method", "rho1", "--reference", other)
    for part, changed in {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": None}.items():
        folder = make_checkpoint(tmp_path / part, "llama", adds_bos=True)
        edit_json(folder / "tokenizer.json", lambda tokenizer, new={part: changed}: tokenizer.update(new))
        with pytest.raises(UserError, match="has another tokenizer than"):
            main(llama, rows, tmp_path / "b", "--method", "rho1", "--reference", folder)
    no_bos = make_checkpoint(tmp_path / "no-bos", "llama", adds_bos=False)
    with pytest.raises(UserError, match="has another tokenizer than"):
        main(llama, rows, tmp_path / "b", "--method", "rho1", "--reference", no_bos)
    assert not (tmp_path / "b").exists()


MISTAKES = {
    "rho1 needs --reference": ["--method", "rho1"],
    "--reference has no effect with --method sstoken": ["--reference", "x"],
    "--reference-data has no effect with --method full": ["--method", "full", "--reference-data", "x"],
    "does not go with --reference-data": ["--method", "rho1", "--reference", "x", "--reference-data", "x"],
    "--excess has no effect with --method tokencleaning": [
        "--method",
        "tokencleaning",
        "--reference",
        "x",
        "--excess",
        "current",
    ],
    "--loss-mean sample would undo": ["--method", "self-evolving", "--loss-mean", "sample"],
    "--reference-top": ["--method", "full", "--reference-top", "0"],
    "--max-steps 4 leaves some": ["--method", "self-evolving", "--max-steps", "4"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_reference_that_is_missing_or_not_read_is_refused(message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--model", "x", *MISTAKES[message]])


# --------------------------------------------------------------------------------------------------- the loss cache


def test_losses_of_the_base_model_are_kept_where_sstoken_reads_them_and_nowhere_else():
    reads = lambda *flags: baselines.reads_kept_history(parse_arguments(["--model", "x", *flags]), 100)  # three steps
    assert reads("--cache", "c") and reads("--epochs", "2") and reads("--epochs", "2", "--max-steps", "4")
    assert not reads() and not reads("--epochs", "2", "--max-steps", "3")
    for flags in (["--gamma", "0"], ["--history", "ema"], ["--rho", "1"], ["--method", "full"]):
        assert not reads("--cache", "c", "--epochs", "2", *flags), flags


def nll_in(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache.glob("*.safetensors"))]


def test_kept_losses_serve_every_method_and_setting(llama, rows, reference, tmp_path, monkeypatch):
    cache, adapter = tmp_path / "cache", reference(llama)
    flags = ["--cache", cache, "--reference", adapter]
    first = main(llama, rows, tmp_path / "a", "--method", "rho1", *flags)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2  # of the base model and of the reference
    monkeypatch.setattr(frozen, "response_losses", lambda *given: pytest.fail("computed again"))
    again = main(llama, rows, tmp_path / "b", "--method", "rho1", "--micro-batch-size", "5", *flags)
    assert again[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)  # of the tokens selected
    main(llama, rows, tmp_path / "c", "--method", "tokencleaning", "--rho", "0.2", "--seed", "7", *flags)
    main(llama, rows, tmp_path / "d", "--gamma", "0.7", "--cache", cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    seconds = [json.loads((tmp_path / name / "run.json").read_text())["seconds"]["losses"] for name in "abc"]
    computing = sum(float(safe_open(path, "pt").metadata()["seconds"]) for path in cache.iterdir())
    assert all(taken >= computing > 0 for taken in seconds)  # as long as it took when they were computed


def test_kept_losses_are_the_same_bits_whatever_the_run_s_settings(llama, rows, reference, tmp_path):
    flags = ["--method", "tokencleaning", "--reference", reference(llama), "--dtype", "bfloat16"]
    kept = []
    for name, more in {
        "a": ["--micro-batch-size", "1"],
        "b": ["--batch-size", "5", "--gradient-checkpointing"],
    }.items():
        main(llama, rows, tmp_path / name, *flags, *more, "--cache", tmp_path / f"cache-{name}")
        kept.append({path.name: load_file(path)["nll"] for path in (tmp_path / f"cache-{name}").iterdir()})
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 2
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_frozen_losses_are_those_of_each_sample_alone(checkpoint, rows):
    model, examples = load_model(checkpoint, torch.float32), examples_of(checkpoint, rows)
    found = response_losses(model, examples)
    exact = losses_by_transformers(in_float64(checkpoint), examples)
    assert max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True)) < 1e-5
    assert [len(nll) for nll in found] == [int(e.response.sum()) for e in examples]


def test_a_run_that_reads_its_history_is_the_one_that_computes_it(llama, rows, tmp_path, monkeypatch):
    seen, real = [], objectives.GAINS["log"]
    spy = lambda nll, history: seen.append(real(nll, history)) or seen[-1]
    monkeypatch.setitem(objectives.GAINS, "log", spy)
    flags = ["--epochs", "3", "--batch-size", "10", "--gamma", "0.8"]
    logs, rels = [], []
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "reads_kept_history", lambda *given: False)  # as with one epoch
        logs.append(main(llama, rows, tmp_path / "a", *flags))
    rels.append(list(seen))
    seen.clear()
    monkeypatch.setattr(lora, "replaced", lambda *given: pytest.fail("a history pass"))
    logs.append(main(llama, rows, tmp_path / "b", *flags))
    rels.append(list(seen))
    in_step_1 = len(rels[0]) - len(rels[1])
    assert 0 < in_step_1 < len(rels[1]) / 3 and all(rel.eq(0).all() for rel in rels[0][:in_step_1])  # known to be zero
    for a, b in zip(rels[0][in_step_1:], rels[1], strict=True):
        assert (a - b).abs().max() < 1e-5
    assert any(rel.abs().max() > 0.01 for rel in rels[1])
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    adapters = [(tmp_path / "b" / "adapter_model.safetensors").read_bytes()]
    for name in "cd":  # computed, then read
        main(llama, rows, tmp_path / name, *flags, "--cache", tmp_path / "cache")
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
        monkeypatch.setattr(frozen, "response_losses", lambda *given: pytest.fail("computed again"))
    assert adapters[0] == adapters[1] == adapters[2]


def test_whatever_changes_a_loss_changes_its_key(llama, rows, reference, tmp_path):
    examples = examples_of(llama, rows)
    adapter = reference(llama)

    def key(model, adapter=None, examples=examples, dtype="float32", device="cpu"):
        return losses.losses_key(model, adapter, examples, dtype, device)

    keys = {"as it is": key(llama), "with an adapter": key(llama, adapter), "dtype": key(llama, dtype="bfloat16")}
    keys["device"] = key(llama, device="cuda")
    assert key(llama) == keys["as it is"]
    copy = make_checkpoint(tmp_path / "copy", "llama", adds_bos=True)
    assert key(copy) == keys["as it is"]  # by content, not by name
    tensors = load_file(copy / "model.safetensors")
    next(reversed(tensors.values())).view(-1)[-1] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    keys["last element of a weight"] = key(copy)
    half = len(tensors) // 2
    for name, part in {"first.safetensors": list(tensors)[:half], "second.safetensors": list(tensors)[half:]}.items():
        save_file({tensor: tensors[tensor] for tensor in part}, copy / name, metadata={"format": "pt"})
    where = {tensor: ("first" if i < half else "second") + ".safetensors" for i, tensor in enumerate(tensors)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (copy / "model.safetensors").unlink()
    keys["two files of other names"] = key(copy)
    tensors[list(tensors)[half]].view(-1)[7] += 1e-3
    save_file({name: tensors[name] for name in list(tensors)[half:]}, copy / "second.safetensors", {"format": "pt"})
    keys["a weight in the second of them"] = key(copy)
    edit_json(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    keys["config"] = key(copy)
    (copy / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    keys["how it writes, which DS2's judge does"] = key(copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    keys["tokenizer"] = key(copy)
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    assert key(llama, changed) == keys["with an adapter"]
    edit_json(changed / "adapter_config.json", lambda config: config.update(lora_alpha=99))
    keys["alpha"] = key(llama, changed)
    ids, response = examples[7]
    for name, change in {
        "a token": (torch.cat([ids[:-1], ids[-1:] + 1]), response),
        "what is supervised": (ids, torch.cat([response[:-1], ~response[-1:]])),
        "a sample's end": (ids[:-1], response[:-1]),
    }.items():
        keys[name] = key(llama, examples=[*examples[:7], change, *examples[8:]])
    keys["order"] = key(llama, examples=examples[::-1])
    assert len(set(keys.values())) == len(keys)


def compute_at_once(cache, out, start, value):
    def compute():
        start.wait()  # so that each has found nothing before any writes
        return torch.full((2_000_000,), value)

    nll, _ = losses.kept_losses(Path(cache), "key", compute)
    out.put((len(nll), nll.unique().tolist()))


@pytest.mark.slow
def test_runs_that_compute_the_same_losses_at_once_go_on_with_one_of_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    out, start = context.Queue(), context.Barrier(3)
    values = (0.25, 0.5, 0.75)
    processes = [context.Process(target=compute_at_once, args=(str(tmp_path), out, start, v)) for v in values]
    for process in processes:
        process.start()
    path, seen = tmp_path / "key.safetensors", set()
    while any(process.is_alive() for process in processes) and out.qsize() < 3:
        if path.exists():  # what a reader finds is whole at any time, and stays
            seen.add(float(load_file(path)["nll"].unique()))
    found = [out.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == found[2] and found[0][0] == 2_000_000 and found[0][1][0] in values
    assert seen <= {found[0][1][0]} and [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_a_cache_that_cannot_be_used_is_named(llama, rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(frozen, "response_losses", lambda *given: pytest.fail("work that would be lost"))
    with pytest.raises(UserError, match="file/losses cannot be written"):
        main(llama, rows, tmp_path / "a", "--cache", tmp_path / "file")
    monkeypatch.undo()
    main(llama, rows, tmp_path / "b", "--cache", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{kept.name} is not a whole safetensors file"):
        main(llama, rows, tmp_path / "c", "--cache", tmp_path / "cache")


@pytest.mark.parametrize("change", ["zeros", "a bit", "fewer", "seconds", "another name"])
def test_losses_that_were_changed_after_they_were_kept_are_named(tmp_path, change):
    losses.kept_losses(tmp_path, "key", lambda: torch.arange(500.0))
    path, compute = tmp_path / "key.safetensors", lambda: pytest.fail("computed again")
    nll, _ = losses.kept_losses(tmp_path, "key", compute)
    assert torch.equal(nll, torch.arange(500.0))
    content, seconds = path.read_bytes(), {"seconds": "0.001"}
    with safe_open(path, "pt") as file:
        head = file.metadata()
    if change == "zeros":
        path.write_bytes(content[:1500] + bytes(len(content) - 1500))
    elif change == "a bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        tensors = {"nll" if change != "another name" else "loss": nll[: 500 if change != "fewer" else 499].clone()}
        save_file(tensors, path, metadata=head | seconds if change == "seconds" else head)
    with pytest.raises(UserError, match="key.safetensors is damaged"):
        losses.kept_losses(tmp_path, "key", compute)


def test_random_selects_exactly_the_share_of_the_whole_pool():
    sizes = [5, 1, 30, 12, 2]
    selected = select_at_random(sizes, 0.3, seed=1)
    assert [len(s) for s in selected] == sizes and sum(int(s.sum()) for s in selected) == 15
    assert sum(int(s.sum()) for s in select_at_random(sizes, 0.31, seed=1)) == 16  # ceil of 15.5
    assert sum(int(s.sum()) for s in select_at_random([30], 0.1, seed=1)) == 3
    again, other = select_at_random(sizes, 0.3, seed=1), select_at_random(sizes, 0.3, seed=2)
    assert all(map(torch.equal, selected, again)) and not all(map(torch.equal, selected, other))
    hits = sum(torch.cat(select_at_random([50, 50], 0.2, seed)).float() for seed in range(500)) / 500
    assert (hits - 0.2).abs().max() < 5 * (0.2 * 0.8 / 500) ** 0.5  # every token as likely as any other
