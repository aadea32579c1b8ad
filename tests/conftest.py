"""Fixtures: a small byte-level tokenizer and tiny random checkpoints of the three families, written by transformers."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

# What pytest and the processes of the tests run in, whatever it was started in. One thread: the models are tiny, and
# threads of several processes wait for each other. No test reaches the hub; those that are about it serve one.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
os.environ.pop("PYTHONSAFEPATH", None)

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# A signal that is ignored here (nohup, `&` in a script), or blocked, would be so in every process that a test starts
for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # which Python itself ignores
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

PATIENCE = 300  # seconds until what has hung ends its test: nothing else depends on how long something takes

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "<|user|>\nName three primary colours.\n<|assistant|>\nRed, yellow and blue are the primary colours.",
    "<|system|>\nAnswer briefly.\n<|user|>\nWhat is two plus two?\n<|assistant|>\nTwo plus two is four.",
    "A sentence with numbers 1 2 3 45 678, some code: x = f(y) + z[0]; and an emoji \U0001f44d or two.",
]
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def pytest_xdist_auto_num_workers(config) -> int:
    """A process a core, at most 8; none but this one where only files are named: they end before others have begun."""
    if all(Path(given.split("::")[0]).is_file() for given in config.args):
        return 0
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, each reason once: "46 Skipped: no browser ..."."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} {reason}")


def make_tokenizer(adds_bos: bool) -> Tokenizer:
    """A byte-level BPE of 400 tokens; with `adds_bos` its post-processor puts BOS first, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        bos = [(BOS, tokenizer.token_to_id(BOS))]
        steps.append(processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=bos))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def make_config(family: str, **changes) -> dict:
    """config.json of a tiny model: 3 layers, grouped queries, and what each family has of its own."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    name, own = {
        "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": ROPE_LLAMA3}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": False}),  # biased q, k, v; head_dim 48 / 6
        "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),  # norms of q and k
    }[family]
    return {"model_type": family, "architectures": [f"{name}ForCausalLM"]} | sizes | own | changes


def randomize(model):
    """Random weights, norms and biases too; larger than as transformers draws them, where attention is uniform."""
    import torch  # here, as transformers below: not every process of the tests needs it

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(0.08 / parameter.std())
    return model


def make_model(folder: Path, family: str, **changes):
    """A tiny decoder of ours with random weights; nothing of transformers, which takes seconds to be imported."""
    import torch

    from model import Transformer, read_config

    (folder / "config.json").write_text(json.dumps(make_config(family, **changes)))
    torch.manual_seed(0)
    return randomize(Transformer(read_config(folder))).eval()


def make_checkpoint(folder: Path, family: str, adds_bos=False, shard_size="5GB", **changes) -> Path:
    """A random checkpoint as transformers saves it, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**make_config(family, **changes))).float()
    randomize(model).save_pretrained(folder, max_shard_size=shard_size)
    backend = make_tokenizer(adds_bos)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def edit_json(path: Path, change):
    """Rewrite a JSON file by `change`, a function that gets its value and edits it in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def to_old_dialect(config: dict):
    """transformers 4's config.json: rope_theta on top, rope_scaling beside it, torch_dtype."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3"])
def checkpoint(request, tmp_path_factory) -> Path:
    """One tiny checkpoint of each family in turn."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, shard_size="100KB")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama checkpoint, single file, tied head, whose tokenizer adds BOS."""
    return make_checkpoint(tmp_path_factory.mktemp("llama-bos"), "llama", adds_bos=True)


def write_rows(path: Path) -> Path:
    """A JSONL file of 20 Alpaca rows of different lengths."""
    words = " ".join(TEXT).split()
    with path.open("w") as file:
        for i in range(20):
            row = {
                "instruction": f"Repeat {i} words.",
                "input": "",
                "output": " ".join(words[i % 7 : i % 7 + 3 + 2 * i]),
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")
