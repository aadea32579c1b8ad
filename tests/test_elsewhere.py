"""sstoken.py in other people's trainers: alone in a folder, on the models of transformers, in its Trainer and TRL's."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, make_checkpoint, write_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

import data
import lora
import sstoken
import train as train_module
from model import load_model
from sstoken import AttentionProbe, score, select

ROOT = Path(__file__).parents[1]
SIZES = {
    **{"vocab_size": 200, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# What can be probed: grouped queries in all, and what a family has of its own
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 9},
    "mixtral": {"sliding_window": 9, "num_local_experts": 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {"attention_multiplier": 0.3},
    "olmo": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
    "starcoder2": {"sliding_window": 9},
    "seed_oss": {},
}
FAMILIES["gemma3_text"] |= {"num_hidden_layers": 4}
# What cannot, and the reason that is given
REFUSED = {
    "cohere": ({}, "off"),  # pairs the rotated halves otherwise, as the next four
    "cohere2": ({}, "off"),
    "glm": ({"head_dim": 16}, "off"),
    "glm4": ({}, "off"),
    "ernie4_5": ({}, "off"),
    "gpt_oss": ({"num_local_experts": 4}, "off"),  # attends to a sink
    "stablelm": ({"qk_layernorm": True}, "off"),
    "smollm3": ({"no_rope_layers": [1, 1, 0]}, "off"),  # the last layer rotates nothing
    "olmo2": ({}, "no attribute 'input_layernorm'"),
    "olmoe": ({}, "size of tensor"),  # norms of queries and keys over all heads
    "phi": ({}, "no attribute 'o_proj'"),
    "phi3": ({}, "no attribute 'v_proj'"),
    "gpt_neox": ({}, "GPTNeoXLayer"),
    "gpt2": ({}, "GPT2LMHeadModel"),
    "deepseek_v3": ({}, "no attribute 'v_proj'"),
}


def tiny(family, **changes):
    """A random model of transformers, its norms too, whose attention is far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3).add_(1.0 if parameter.dim() == 1 and name.endswith("norm.weight") else 0.0)
    return model


def padded(lengths, left=False):
    """Random ids of two turns a row, their response mask and attention mask, padded on one side, (B, L) each."""
    generator, size = torch.Generator().manual_seed(0), max(lengths)
    ids, response, real = torch.zeros(len(lengths), size, dtype=torch.long), [], []
    for row, length in enumerate(lengths):
        start = size - length if left else 0
        ids[row, start : start + length] = torch.randint(3, 200, (length,), generator=generator)
        place = torch.arange(size) - start
        real.append((place >= 0) & (place < length))
        turns = ((place >= length // 4) & (place < length // 2)) | (place >= 3 * length // 4)
        response.append(turns & real[-1])
    return ids, torch.stack(response), torch.stack(real).long()


@torch.no_grad()
def by_eager_attention(model, ids, response, real, layer, **more):
    """AttnScore from the attention weights that transformers returns, (B, L)."""
    weights = model(ids, attention_mask=real, output_attentions=True, **more).attentions[layer]
    prompt = (~response & real.bool()).float()[:, None, :, None]
    return (weights.float() @ prompt).squeeze(3).mean(1) * response


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_gives_what_eager_attention_returns(family, left):
    """Padded on the left, each row's positions are its own (every second), so each has its own rotary table."""
    model, batch = tiny(family, **FAMILIES[family]), padded([40, 33, 29], left)
    ids, response, real = batch
    for layer in range(model.config.num_hidden_layers):
        probe = AttentionProbe(model, layer)
        positions = {"position_ids": (real.cumsum(dim=1) - 1).clamp(min=0) * 2} if left else {}
        expected = by_eager_attention(model, *batch, layer, **positions)
        scores = probe.scores(response, real)
        assert (scores - expected).abs().max() < 1e-6 and scores[response].std() > 0.05
        probe.remove()


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_read_right_is_refused_by_name_and_left_as_it_was(family):
    changes, reason = REFUSED[family]
    model = tiny(family, **changes).train()
    with pytest.raises(ValueError, match=f"the attention of .* is not a Llama's: .*{reason}|the attention of {reason}"):
        AttentionProbe(model)
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks and all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_row_padded_on_the_left_is_selected_from_as_one_padded_on_the_right_and_as_one_alone(family):
    model, lengths = tiny(family, **FAMILIES[family]), [40, 33, 29]
    probe, selected = AttentionProbe(model), []
    for left in (False, True):
        ids, response, real = padded(lengths, left)
        model(ids, attention_mask=real)
        scores = probe.scores(response, real)
        assert scores[~response].eq(0).all()
        selected.append([select(row[mask], 0.6) for row, mask in zip(scores, response, strict=True)])
    for row, length in enumerate(lengths):
        ids, response, real = padded(lengths)
        model(ids[row : row + 1, :length])
        mask = response[row : row + 1, :length]
        alone = select(probe.scores(mask)[mask], 0.6)
        assert torch.equal(selected[0][row], alone) and torch.equal(selected[1][row], alone)


def test_peft_s_adapters_and_sdpa_count_and_are_left_alone():
    """The scores of a peft model by sdpa are eager attention's, with the adapters and, where they are off, without."""
    model, batch = tiny("llama"), padded([40, 33])
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    adapted = get_peft_model(model, config).train()
    probe, found = AttentionProbe(adapted), []
    state = torch.get_rng_state()
    for on in (True, False):
        with contextlib.nullcontext() if on else adapted.disable_adapter():
            adapted.eval()
            expected = by_eager_attention(adapted, *batch, -1)
            model.set_attn_implementation("sdpa")
            adapted(batch[0], attention_mask=batch[2])
            found.append(probe.scores(batch[1]))
            model.set_attn_implementation("eager")
        assert (found[-1] - expected).abs().max() < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert (found[0] - found[1]).abs().max() > 0.01  # the adapters counted


def test_gradient_checkpointing_of_transformers_does_not_fire_the_probe_again():
    model, (ids, response, real) = tiny("llama").train(), padded([40, 33])
    model.gradient_checkpointing_enable()
    probe = AttentionProbe(model)
    loss = model(ids, attention_mask=real, labels=ids.where(response, -100)).loss
    kept = probe.hidden
    loss.backward()
    assert probe.hidden is kept and not kept.requires_grad
    assert model.lm_head.weight.grad is not None


ALONE = """
import sys
blocked = "lora model data train evaluate support paper peft trl datasets accelerate".split()
sys.modules |= dict.fromkeys(blocked)  # whoever imports one is told that there is none
import numpy
import torch
import sstoken
from transformers import LlamaConfig, LlamaForCausalLM

numpy.random.seed(0)
nll, other = numpy.random.rand(2, 10) * 8
theirs = [torch.tensor(values, dtype=torch.float32) for values in (nll, other)]
close = lambda found, expected: numpy.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
close(sstoken.sft_loss(theirs[0]), nll.mean())  # Eq. 1
close(sstoken.excess_loss(*theirs), nll - other)  # Eq. 2
close(sstoken.retrospective_excess_loss(*theirs), other - nll)  # Eq. 3
average = theirs[1].clone()
sstoken.ema_update([average], [theirs[0]], 0.9)
close(average, 0.9 * other + 0.1 * nll)  # Eq. 4
rel = ((other - nll) - (other - nll).min()) / numpy.ptp(other - nll)
close(normalized := sstoken.normalize(theirs[1] - theirs[0]), rel)  # Eq. 8
attention = numpy.random.rand(10)
close(score := sstoken.score(normalized, torch.tensor(attention), 0.3), 0.3 * rel + 0.7 * attention)  # Eq. 9
chosen = numpy.argsort(-score.numpy())[:6]
selected = sstoken.select(score, 0.6)
assert sorted(chosen) == selected.nonzero().flatten().tolist()  # Eq. 11
close(sstoken.selected_loss(theirs[0], selected), nll[chosen].mean())  # Eq. 10

sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, attn_implementation="eager", pad_token_id=0)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
for parameter in model.parameters():
    parameter.data.normal_(std=0.5)
probe = sstoken.AttentionProbe(model)
ids, response = torch.arange(1, 21)[None], torch.arange(20)[None] >= 8
weights = model(ids, output_attentions=True).attentions[-1][0].detach().numpy()
close(probe.scores(response)[response], weights[:, 8:, :8].sum(2).mean(0))  # Eqs. 5 to 7
print("alone:", sstoken.__file__, sorted(set(blocked) & {name for name in sys.modules if sys.modules[name]}))
"""


@pytest.mark.slow  # seconds: a process that imports transformers
def test_the_file_alone_in_a_folder_computes_every_equation_and_probes_a_model_of_transformers(tmp_path):
    shutil.copy(ROOT / "sstoken.py", tmp_path)
    (tmp_path / "use.py").write_text(ALONE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"alone: {tmp_path / 'sstoken.py'} []\n"


@torch.no_grad()
def test_the_lines_of_the_readme_are_a_step_of_the_paper():
    """The loss that they leave, against Algorithm 1 written out from eager attention and float64 losses."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Take it with you")[1].split("## ")[0]
    lines = "\n".join(line[4:] for line in text.splitlines() if line[:4] == "    " or not line)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    for left in (False, True):
        model = get_peft_model(tiny("qwen3", head_dim=16), config)
        ids, response, real = padded([40, 33, 29], left)
        found = vars(sstoken) | {"F": torch.nn.functional, "model": model, "ids": ids, "mask": real}
        exec(lines, found | {"labels": ids.where(response, -100)}, left_behind := {})
        attention, losses, means = by_eager_attention(model, ids, response, real, -1), [], []
        for switch in (model.disable_adapter, contextlib.nullcontext):
            with switch():
                logits = model(input_ids=ids, attention_mask=real).logits.double().log_softmax(dim=2)
            losses.append(-logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0])
        for row, at in enumerate(response[:, 1:]):
            history, current = losses[0][row, at], losses[1][row, at]
            rel = history - current
            scores = 0.5 * (rel - rel.min()) / (rel.max() - rel.min()) + 0.5 * attention[row, 1:][at]
            best = scores.argsort(descending=True)[: math.ceil(round(0.6 * len(scores), 9))]
            means.append(current[best].mean())
        assert left_behind["loss"].item() == pytest.approx(torch.stack(means).mean().item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- trainers


STEPS = 3
LENGTHS = {"llama": 6, "qwen3": 6, "demo": 12}  # samples a step


@pytest.fixture(scope="module")
def elsewhere():
    """demo/with_transformers.py, which imports TRL, for seconds: not where only other tests run."""
    from demo import with_transformers

    return with_transformers


def given(kind, folder) -> tuple[Path, list[data.Example], list[str]]:
    """A checkpoint, samples for STEPS steps in the order of train.py, and the flags that it is trained by."""
    if kind == "demo":
        checkpoint, rows, flags = ROOT / "demo" / "model", ROOT / "demo" / "sft.jsonl", ["--lr", "0.01"]
    else:
        checkpoint, rows, flags = make_checkpoint(folder, kind), write_rows(folder / "rows.jsonl"), ["--lr", "0.02"]
    size = LENGTHS[kind]
    flags += ["--model", str(checkpoint), "--data", str(rows), "--limit", str(STEPS * size), "--batch-size", str(size)]
    flags += ["--lora-rank", "4", "--lora-dropout", "0", "--dtype", "float32", "--device", "cpu", "--micro-batch-size"]
    examples, _ = data.load_examples(str(rows), data.load_tokenizer(checkpoint), 128, STEPS * size)
    return checkpoint, examples, [*flags, str(size), "--max-steps", str(STEPS)]


def by_train_py(examples, flags, folder, patch) -> SimpleNamespace:
    """A run of train.py: its adapters, the losses of its steps, the selected tokens, the samples in their order."""
    args = train_module.parse_arguments(flags)
    model, selected, log = load_model(args.model, torch.float32), [], []
    lora.new_adapters(model, args)
    lora.save_adapter(model, folder / "before")
    patch.setattr(train_module, "select", lambda *scored: selected.append(select(*scored)) or selected[-1])
    plan = train_module.plan_steps([len(e.ids) for e in examples], args, torch.device("cpu"))
    train_module.train(model, examples, args, log.append)
    lora.save_adapter(model, folder / "after")
    order = [examples[i] for batch in plan for samples in batch for i in samples]
    adapters = load_file(folder / "after" / "adapter_model.safetensors")
    losses, found = [line["loss"] for line in log], {"selected": selected, "order": order, "adapters": adapters}
    return SimpleNamespace(args=args, folder=folder, losses=losses, **found)


def by_trainer(elsewhere, run, patch, folder, base, arguments, micro, left=False, processes=1) -> SimpleNamespace:
    """The same run by a trainer with SSToken in front of it, `micro` samples a pass."""
    model = AutoModelForCausalLM.from_pretrained(run.args.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run.folder / "before", is_trainable=True)
    selected, losses, size = [], [], run.args.batch_size
    patch.setattr(elsewhere, "select", lambda *scored: selected.append(select(*scored)) or selected[-1])

    class Mine(elsewhere.SSToken, base):
        def _get_train_sampler(self, *given):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *given, **named):
            loss = super().compute_loss(*given, **named)
            losses.append(loss.item())
            return loss

    def collate(rows):
        side = {"batch_first": True, "padding_side": "left" if left else "right"}
        pad = lambda name, value: pad_sequence([torch.tensor(row[name]) for row in rows], **side, padding_value=value)
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": pad("real", 0)}

    rows = [{"input_ids": e.ids, "labels": e.ids.where(e.response, -100)} for e in run.order]
    rows = [row | {"real": torch.ones_like(row["input_ids"])} for row in rows]
    passes = size // micro // processes
    settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": passes, "use_cpu": True}
    settings |= {"max_steps": STEPS, "max_grad_norm": 0, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "bf16": False}  # TRL computes in bfloat16 unless it is told not to
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], run.args.lr, weight_decay=0.0)
    rate = lambda step: train_module.learning_rate(step + 1, STEPS, 1.0, run.args.warmup_ratio)
    trainer = Mine(
        model=model,
        args=arguments(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    losses = torch.tensor(losses).view(STEPS, passes).sum(dim=1).tolist()
    adapters = load_file(folder / "adapter_model.safetensors")
    return SimpleNamespace(losses=losses, selected=selected, adapters=adapters)


def check_same(run, other, order=True):
    assert len(run.selected) == len(other.selected) == len(run.order)
    assert all(torch.equal(a, b) for a, b in zip(run.selected, other.selected, strict=True))
    assert other.losses == pytest.approx(run.losses, abs=1e-5)
    assert run.adapters.keys() == other.adapters.keys()
    moved = load_file(run.folder / "before" / "adapter_model.safetensors")
    for name, tensor in run.adapters.items():
        assert (tensor - other.adapters[name]).abs().max() < 1e-4, name
    assert max((tensor - moved[name]).abs().max() for name, tensor in run.adapters.items()) > 1e-2


@pytest.mark.slow  # seconds: it imports TRL, and trains
@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_a_trainer_selects_and_trains_as_train_py(elsewhere, kind, base, tmp_path, monkeypatch):
    _, examples, flags = given(kind, tmp_path)
    run = by_train_py(examples, flags, tmp_path, monkeypatch)
    arguments = elsewhere.SFTConfig if base == "SFTTrainer" else elsewhere.TrainingArguments
    ways = {"at once": {"micro": LENGTHS[kind]}, "accumulated": {"micro": 2}, "left": {"micro": 3, "left": True}}
    for name, way in ways.items():
        found = by_trainer(elsewhere, run, monkeypatch, tmp_path / name, getattr(elsewhere, base), arguments, **way)
        check_same(run, found)


@pytest.mark.slow  # seconds: it imports TRL, and trains
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_families_that_train_py_does_not_know_train(elsewhere, family, tmp_path, monkeypatch):
    """A Mistral and a Gemma 3 of random weights, with windows: the loss falls, AttnScore is eager attention's."""
    tiny(family, **FAMILIES[family]).save_pretrained(tmp_path / "model")
    peft_model = get_peft_model(tiny(family, **FAMILIES[family]), LoraConfig(r=4, target_modules="all-linear"))
    peft_model.save_pretrained(tmp_path / "before")
    ids, response, _ = padded([40, 33, 29, 25])
    examples = [data.Example(row, mask) for row, mask in zip(ids, response, strict=True)] * STEPS
    args = SimpleNamespace(model=tmp_path / "model", batch_size=4, lr=0.01, warmup_ratio=0.0)
    run, attention = SimpleNamespace(args=args, folder=tmp_path, order=examples), []
    monkeypatch.setattr(elsewhere, "score", lambda *given: attention.append(given[1]) or score(*given))
    kinds = elsewhere.Trainer, elsewhere.TrainingArguments
    found = by_trainer(elsewhere, run, monkeypatch, tmp_path / "after", *kinds, 4)
    assert found.losses[2] < found.losses[0] and found.selected
    real = torch.ones_like(ids)
    expected = by_eager_attention(tiny(family, **FAMILIES[family]), ids, response, real, -1)[response]  # before step 1
    assert (torch.cat(attention[:4]) - expected).abs().max() < 1e-5


@pytest.mark.slow  # seconds: it imports TRL, and trains
def test_a_sample_without_a_supervised_token_has_no_weight_in_any_micro_batch(elsewhere, tmp_path, monkeypatch):
    """With one more row a step, where nothing is supervised, all is as without it: Eq. 10's mean is over the others."""
    _, examples, flags = given("llama", tmp_path)
    run = by_train_py(examples, flags, tmp_path, monkeypatch)
    silent, size = data.Example(examples[0].ids, torch.zeros_like(examples[0].response)), run.args.batch_size
    steps = [run.order[start : start + size] for start in range(0, len(run.order), size)]
    args = SimpleNamespace(**vars(run.args) | {"batch_size": size + 1})
    more = SimpleNamespace(args=args, folder=tmp_path, order=[e for step in steps for e in [silent, *step]])
    for micro in (1, size + 1):
        kinds = elsewhere.Trainer, elsewhere.TrainingArguments
        check_same(run, by_trainer(elsewhere, more, monkeypatch, tmp_path / str(micro), *kinds, micro))


RANKS = """
import sys
from pathlib import Path
import pytest
import torch
import test_elsewhere
from demo import with_transformers as elsewhere

run = torch.load(sys.argv[1], weights_only=False)
kinds = elsewhere.Trainer, elsewhere.TrainingArguments
test_elsewhere.by_trainer(elsewhere, run, pytest.MonkeyPatch(), Path(sys.argv[2]), *kinds, 1, processes=2)
"""


@pytest.mark.slow  # two processes that import TRL, and train
def test_two_processes_give_the_adapters_of_one(tmp_path, monkeypatch):
    _, examples, flags = given("llama", tmp_path)
    run = by_train_py(examples, [*flags, "--batch-size", "4", "--micro-batch-size", "4"], tmp_path, monkeypatch)
    torch.save(run, tmp_path / "run.pt")
    (tmp_path / "rank.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [tmp_path / "rank.py", tmp_path / "run.pt", tmp_path / "two"]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "two" / "adapter_model.safetensors")
    for name, tensor in run.adapters.items():
        assert (tensor - found[name]).abs().max() < 1e-4, name


@pytest.mark.slow  # it imports TRL, and trains by both
def test_the_demo_of_it_trains(elsewhere, tmp_path):
    for kinds in ((), (elsewhere.SFTTrainer, elsewhere.SFTConfig)):
        more = {"max_steps": 12, "use_cpu": True, "logging_steps": 4, "disable_tqdm": True}
        trainer = elsewhere.train(*kinds, folder=str(tmp_path), **more)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert len(losses) == 3 and losses[2] < losses[0] - 0.5
        model = lora.load_adapter(load_model(ROOT / "demo" / "model"), tmp_path)  # what evaluate.py reads
        assert len(lora.lora_layers(model)) == 7 * model.config.num_hidden_layers
