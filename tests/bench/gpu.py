"""What a GPU makes of this code, asked in one call: is it right, does it take flash, does it wait, is it fast?

    python tests/bench/gpu.py --out results/gpu [--minutes 8] [--stages right,flash] [--dry-run]

Six stages, the most valuable first, each with a share of the minutes. A result is printed, and OUT/gpu.json written
anew, as soon as it is there; an error ends its stage with a traceback in both, and the next one runs. Nothing is
downloaded: tiny models, and one of Llama-3.2-3B's sizes with random weights, on texts from demo/. --dry-run goes
through all of it in miniature, on a CPU. The status is 1 if any stage had an error.
"""

import argparse
import collections
import contextlib
import copy
import gc
import hashlib
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: repeatable products
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(1, str(Path(__file__).parents[1]))

import bench_memory
import bench_step
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import data
import evaluate
import lora
import sstoken
import train
from model import Transformer, read_config, response_nll, token_nll
from paper import baselines
from paper.frozen import FrozenLosses, response_losses
from paper.objectives import OBJECTIVES
from support import kernels, machine, runs
from support.decoding import generate
from support.files import write_json, write_lines

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
BASE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
FAMILIES = {
    "llama": BASE | {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen2": BASE | {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": BASE | {"model_type": "qwen3", "tie_word_embeddings": False},
}
LARGE = FAMILIES["llama"] | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
LARGE |= {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256}  # Llama-3.2-3B
SMALL = LARGE | {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 2048,
}
SMALL |= {"num_attention_heads": 6, "num_key_value_heads": 2}  # in its place in a dry run


class OutOfTime(BaseException):
    """A stage has used its share of the minutes; nobody on the way is to catch it."""


class Report:
    """What is printed is written too: OUT/gpu.txt as it is, OUT/gpu.json by stage and question."""

    def __init__(self, out: Path, environment: dict):
        self.json, self.text = out / "gpu.json", (out / "gpu.txt").open("w", encoding="utf-8")
        self.record = {"environment": environment, "stages": {}}
        self.say(" ".join(f"{key} {value}" for key, value in environment.items()))

    def say(self, line: str):
        print(line, flush=True)
        print(line, file=self.text, flush=True)

    def start(self, name: str):
        self.stage = self.record["stages"][name] = {"seconds": None, "results": {}, "error": None}
        self.say(f"\n## {name}")

    def __call__(self, question: str, answer):
        self.stage["results"][question] = answer
        self.say(f"{question}: {json.dumps(answer)}")
        write_json(self.json, self.record)

    def end(self, seconds: float, error: str | None = None):
        self.stage |= {"seconds": round(seconds, 1), "error": error}
        self.say(f"({seconds:.0f} s)" + (f"\n{error}" if error else ""))
        write_json(self.json, self.record)


class Setting:
    """Where and how large: a GPU and the 3B's sizes, or a CPU and miniatures. `large` is built once, when asked for."""

    def __init__(self, dry_run: bool):
        self.dry_run, self.device = dry_run, torch.device("cpu" if dry_run else "cuda")
        self.length, self.repeats = (96, 1) if dry_run else (2048, 3)
        self.tokenizer = data.load_tokenizer(DEMO / "model")
        examples, _ = data.load_examples(str(DEMO / "sft.jsonl"), self.tokenizer, 512, 400)
        self.rows, self.text = examples, torch.cat([example.ids for example in examples])
        self.model = None

    def config(self, values: dict):
        """model.Config of a config.json with these values; the demo's vocabulary where they name none."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps({"vocab_size": self.tokenizer.vocab_size, **values}))
            return read_config(Path(folder))

    def large(self) -> Transformer:
        if self.model is None:
            torch.set_default_dtype(torch.bfloat16)
            with self.device:
                self.model = Transformer(self.config(SMALL if self.dry_run else LARGE)).eval()
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
            self.model.folder, self.model.name_or_path = DEMO / "model", "random"
        return lora.remove_lora(self.model)

    def of_lengths(self, lengths: list[int], prompt=0.3) -> list[data.Example]:
        """Samples of these lengths from the demo's text, the first `prompt` of each their prompt."""
        found, start = [], 0
        for length in lengths:
            ids = torch.cat([self.text] * (1 + (start % len(self.text) + length) // len(self.text)))
            ids = ids[start % len(self.text) :][:length]
            found.append(data.Example(ids, torch.arange(length) >= max(1, int(prompt * length))))
            start += length
        return found

    def mixture(self, count: int) -> list[data.Example]:
        """Samples of lengths as in a mixture of instruction data: log-normal, 350 tokens on the average."""
        draw = random.Random(0)
        drawn = [int(draw.lognormvariate(5.5, 0.85)) for _ in range(count)]
        return self.of_lengths([min(max(n, 24), 2048) // (8 if self.dry_run else 1) + 8 for n in drawn])

    def arguments(self, *flags) -> argparse.Namespace:
        given = ["--model", str(DEMO / "model"), "--data", "x", "--device", str(self.device), *map(str, flags)]
        return train.parse_arguments(given)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, work, repeats: int | None = None) -> float:
        """The median time of some runs of work(), after one that warms up."""
        work()
        self.wait()
        taken = []
        for _ in range(repeats or self.repeats):
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(1e3 * (time.perf_counter() - start))
        return round(statistics.median(taken), 3)

    def peak(self, work) -> float:
        """GiB that work() allocates at most, with what is there; 0 on a CPU."""
        self.tidy()
        work()
        self.wait()
        return self.peak_so_far()

    def peak_so_far(self) -> float:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else 0.0

    def tidy(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max())


def run_python(*command, timeout=300, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------------------------------------------ 1. right


def tiny(setting: Setting, family: str) -> Transformer:
    """A random model on the CPU in float32, norms and biases random too."""
    torch.manual_seed(1)
    model = Transformer(setting.config(FAMILIES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.02))
    model.folder, model.name_or_path = DEMO / "model", family
    return model


def with_adapters(model: Transformer, device, dtype=torch.float32) -> Transformer:
    """A copy of it on a device, with adapters that do something."""
    model = lora.add_lora(copy.deepcopy(model).to(dtype), rank=8, dropout=0.0)
    torch.manual_seed(2)
    for layer in lora.lora_layers(model).values():
        layer.lora_A.data.normal_(0, 0.1)
        layer.lora_B.data.normal_(0, 0.1)
    return model.to(device)


def right(setting: Setting, report: Report):
    """The GPU's numbers beside the CPU's, in float32, for the three families; bfloat16's selection beside float32's."""
    samples = setting.rows[:5]
    for family in FAMILIES:
        base = tiny(setting, family)
        theirs, ours = (computed(setting, with_adapters(base, device), samples) for device in ("cpu", setting.device))
        written = theirs.pop("written") == ours.pop("written")
        report(f"{family}: greedy decoding writes the same", written)
        differences = {name: differ(value, ours[name]) for name, value in theirs.items()}
        report(f"{family}, float32, largest difference from the CPU", differences)
        for method in [name for name in baselines.METHODS if name not in OBJECTIVES] + ["eaft", "surprise"]:
            losses = [train_by(setting, method, base, torch.device(device)) for device in ("cpu", setting.device)]
            worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
            report(f"{family}, --method {method}: losses of its first steps differ by", worst)
        picks = [
            picked(with_adapters(base, setting.device, dtype), samples) for dtype in (torch.float32, torch.bfloat16)
        ]
        changed = (picks[0] & ~picks[1]).sum() / picks[0].sum()
        report(f"{family}, bfloat16: share of the selected tokens that differs from float32", changed.item())
    in_one_row(setting, report)
    masked_attention(setting, report)
    killed_and_resumed(setting, report)


def in_one_row(setting: Setting, report: Report):
    """train.py --pack: losses, AttnScore, gradient and selection of samples in one row, beside the padded batch's."""
    report("varlen_attn is there", bool(kernels.varlen_kernel(torch.ones(1, device=setting.device).bfloat16())))
    base, samples = tiny(setting, "llama"), setting.rows[:9]
    for dtype in (torch.float32, torch.bfloat16):
        both = [with_adapters(base, setting.device, dtype) for _ in range(2)]
        both[1].packed = True
        padded, packed = (computed(setting, model, samples) for model in both)
        names = ("losses", "attention scores", "their gradient, of its largest")
        differences = {name: differ(padded[name], packed[name]) for name in names}
        report(f"--pack, {dtype}: largest difference from the padded batch", differences)
        picks = [picked(model, samples) for model in both]
        report(f"--pack, {dtype}: selected tokens that differ", (picks[0] & ~picks[1]).sum().item())


def computed(setting: Setting, model: Transformer, samples: list[data.Example]) -> dict:
    """Whatever a model is asked for, by name: training, scoring, choices and written answers."""
    (ids, response), device = data.collate(samples), model.lm_head.weight.device
    probe = sstoken.AttentionProbe(model, -1)
    found = {"losses": response_nll(model, ids.to(device), response), "attention scores": probe.scores(response)}
    probe.remove()
    found["losses"].mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    found["their gradient, of its largest"] = gradient / gradient.abs().max()
    with torch.no_grad():
        hidden = model(ids.to(device))
    lengths = [len(sample.ids) for sample in samples]
    found["hidden states"] = torch.cat([states[:n] for states, n in zip(hidden, lengths, strict=True)])
    words = [setting.tokenizer.decode(sample.ids.tolist()).split() for sample in samples]
    pairs = [(" ".join(w[:n]), " " + " ".join(w[n : n + 2])) for w in words for n in (2, 3, len(w) // 2)]
    scored = evaluate.loglikelihoods(model, setting.tokenizer, pairs)
    found["log-likelihoods"] = torch.tensor([log_p for log_p, _ in scored])
    prompts = [ids[0, :n].tolist() for n in (3, 30, 9, 17)] + [ids[1, :40].tolist()]
    return found | {"written": generate(model, prompts, 12)}


@torch.no_grad()
def picked(model: Transformer, samples: list[data.Example]) -> torch.Tensor:
    """Which response tokens ssToken selects: a bool each, one sample after the other."""
    (ids, response), device = data.collate(samples), model.lm_head.weight.device
    probe = sstoken.AttentionProbe(model, -1)
    with lora.disabled(model):
        history = response_nll(model, ids.to(device), response)
    rel = sstoken.retrospective_excess_loss(response_nll(model, ids.to(device), response), history)
    attention = probe.scores(response).flatten()[response.flatten().to(device)]
    sizes = [int(sample.response.sum()) for sample in samples]
    parts = zip(rel.split(sizes), attention.split(sizes), strict=True)
    return torch.cat([sstoken.select(sstoken.score(sstoken.normalize(r), a, 0.5), 0.6) for r, a in parts])


def train_by(setting: Setting, method: str, base: Transformer, device: torch.device) -> list[float]:
    """The losses of three steps (self-evolving: of its five parts) by a method, without dropout."""
    flags = ["--method", method, "--batch-size", 4, "--lora-dropout", 0, "--lr", 0.01, "--lora-rank", 8]
    flags += ["--reference-data", "x"] if method in baselines.WITH_REFERENCE else []
    args, model, lines = setting.arguments(*flags), copy.deepcopy(base).to(device), []
    args.device = str(device)
    lora.new_adapters(model, args)

    def fit(samples, frozen, args, folder):
        here = []
        folder.mkdir(parents=True, exist_ok=True)
        train.train(model, samples, args, here.append, frozen=frozen)
        lora.save_adapter(model, folder)
        write_lines(folder / "log.jsonl", here)
        lines.extend(here)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        reference = setting.rows[20:24] if method in baselines.WITH_REFERENCE else []
        baselines.run_method(model, setting.rows[:12], reference, args, Path(folder) / "run", fit)
    return [line["loss"] for line in lines]


def masked_attention(setting: Setting, report: Report):
    """attention with a mask and grouped queries, as evaluate.py has it, beside float64 on the CPU."""
    for heads, key_heads in ((24, 8), (14, 2), (4, 1)):
        torch.manual_seed(3)
        q, k, v = (torch.randn(2, n, 70, 64) for n in (heads, key_heads, key_heads))
        mask = torch.rand(2, 1, 70, 70).gt(0.3).tril() | torch.eye(70, dtype=torch.bool)
        wide = [x.double().repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask)
        for dtype in (torch.float32, torch.bfloat16):
            given = [x.to(setting.device, dtype) for x in (q, k, v)]
            found = differ(kernels.attention(*given, mask.to(setting.device)), exact)
            report(f"masked attention, {heads} heads over {key_heads}, {dtype}: differs from float64 by", found)


def killed_and_resumed(setting: Setting, report: Report):
    """The demo, trained twice, and once more with a kill on its way: one adapter?"""
    flags = ["--limit", 96, "--batch-size", 24, "--max-steps", 12, "--checkpoint-every", 2, "--epochs", 3]
    flags += ["--device", setting.device]
    with tempfile.TemporaryDirectory() as folder:
        command = lambda name: ["train.py", *flags, "--out", Path(folder) / name]
        digest = lambda name: hashlib.sha256(
            (Path(folder) / name / "adapter_model.safetensors").read_bytes()
        ).hexdigest()
        for name in ("one", "two"):
            found = run_python(*command(name))
            if found.returncode:
                report(f"training {name} ended with {found.returncode}", found.stderr[-600:])
                return
        report("one seed twice: the same bits", digest("one") == digest("two"))
        words = [sys.executable, *map(str, command("three"))]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((Path(folder) / "three").glob("checkpoint-0000000[2-6]*")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        done = len(runs.read_log(Path(folder) / "three"))
        found = run_python(*command("three"), "--resume")
        report("killed after step", done)
        report("resumed: the same bits", not found.returncode and digest("three") == digest("one"))


# ------------------------------------------------------------------------------------------------------ 2. flash

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
ATTENTION = ("flash", "fmha", "cudnn", "attention", "softmax", "sdpa")  # in the names of its kernels


def attention_kernels(setting: Setting, work) -> list[str]:
    """The names of the attention's kernels that work() runs, by torch's profiler."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setting.device.type == "cuda" else [])
    with profile(activities=activities) as record:
        work()
        setting.wait()
    names = {e.key for e in record.key_averages() if e.self_device_time_total or setting.device.type == "cpu"}
    return sorted({name.split("<")[0][:80] for name in names if any(word in name.lower() for word in ATTENTION)})


def flash(setting: Setting, report: Report):
    """Which kernel attention takes, in training and in the history pass, and what the others would cost."""
    values = SMALL if setting.dry_run else LARGE | {"num_hidden_layers": 2, "vocab_size": 2048}
    torch.manual_seed(0)
    model = Transformer(setting.config(values)).to(setting.device, torch.bfloat16).train()
    lora.add_lora(model)
    ids, response = data.collate(setting.of_lengths([setting.length] * 3), setting.device)
    ids %= values["vocab_size"]

    def history():
        with torch.no_grad(), lora.disabled(model):
            response_nll(model, ids, response)

    def training():
        response_nll(model, ids, response).sum().backward()

    report("kernels of the history pass", attention_kernels(setting, history))
    report("kernels of training", attention_kernels(setting, training))
    report("ms of the history pass, and of training", [setting.milliseconds(history), setting.milliseconds(training)])
    compare_kernels(setting, report, {"the history pass": history, "training": training})
    at_the_first_step(setting, report)
    masked_ways(setting, report)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            torch.randn(2, n, setting.length, 64, device=setting.device, dtype=dtype, requires_grad=True)
            for n in ((12, 4, 4) if setting.dry_run else (24, 8, 8))
        )
        for name, times in (("grouped", 1), ("k and v repeated", q.shape[1] // k.shape[1])):

            def work(q=q, k=k, v=v, times=times):
                wide = [x.repeat_interleave(times, dim=1) for x in (k, v)]
                attend = torch.nn.functional.scaled_dot_product_attention
                attend(q, *wide, is_causal=True, enable_gqa=True).sum().backward()

            said = {"kernels": attention_kernels(setting, work), "ms": setting.milliseconds(work)}
            report(f"{dtype}, {name}", said | {"GiB": setting.peak(work)})


def at_the_first_step(setting: Setting, report: Report):
    """REL where the adapters change nothing yet: the history pass and the current one are to take the same kernels."""
    ids, response = data.collate(setting.mixture(6), setting.device)
    for dtype in (torch.bfloat16, torch.float32):
        model = copy.deepcopy(setting.large().model.layers[:2]).to(dtype)
        small = Transformer(setting.config((SMALL if setting.dry_run else LARGE) | {"num_hidden_layers": 2}))
        small.model.layers.load_state_dict(model.state_dict())
        small = lora.add_lora(small.to(setting.device, dtype))
        with torch.no_grad(), lora.disabled(small):
            history = response_nll(small, ids, response)
        report(f"{dtype}: largest |REL| at step 1", differ(response_nll(small.train(), ids, response), history))


def masked_ways(setting: Setting, report: Report):
    """Attention with a mask, as evaluate.py has it: queries grouped, or k and v repeated."""
    length = 64 if setting.dry_run else 512
    mask = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril().expand(4, 1, -1, -1)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(4, n, length, 128, device=setting.device, dtype=dtype) for n in (24, 8, 8))
        for name, times in (("grouped", 1), ("k and v repeated", 3)):
            wide = [x.repeat_interleave(times, 1) for x in (k, v)]
            work = lambda q=q, wide=wide: torch.nn.functional.scaled_dot_product_attention(
                q, *wide, attn_mask=mask, enable_gqa=True
            )
            said = {"kernels": attention_kernels(setting, work), "ms": setting.milliseconds(work)}
            report(f"with a mask, {dtype}, {name}", said | {"GiB": setting.peak(work)})


def compare_kernels(setting: Setting, report: Report, works: dict):
    for name, backend in BACKENDS.items():
        said = {}
        for what, work in works.items():

            def forced(work=work, backend=backend):
                with sdpa_kernel(backend):
                    work()

            try:
                said[f"ms of {what}"] = setting.milliseconds(forced)
            except RuntimeError as reason:
                said[what] = str(reason).splitlines()[0][:160]
        report(f"bfloat16, {name} forced", said)


# ---------------------------------------------------------------------------------------------------- 3. waiting


def waiting(setting: Setting, report: Report):
    """Steps in which any wait for the GPU but the one read of the log is an error; and how long the GPU idles."""
    real = runs.StepRecord.read
    mode = torch.cuda.set_sync_debug_mode if setting.device.type == "cuda" else lambda mode: None

    def read(record, *given):
        mode("default")
        try:
            return real(record, *given)
        finally:
            mode("error")

    samples = setting.mixture(32)
    for method in ("full", "sstoken"):
        model = lora.add_lora(setting.large())
        args = setting.arguments("--method", method, "--batch-size", 16, "--micro-batch-size", 8)
        runs.StepRecord.read = read
        try:
            mode("error")
            train.train(model, samples, args, lambda line: None)
            said = "nowhere but for its log"
        except RuntimeError as reason:
            frames = traceback.extract_tb(reason.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if str(ROOT) in f.filename]
            said = f"{ours[-1] if ours else '?'}: {str(reason).splitlines()[0][:200]}"
        finally:
            mode("default")
            runs.StepRecord.read = real
        report(f"--method {method}: a step waits", said)
    for micro in (4, 16):
        model = lora.add_lora(setting.large())
        args = setting.arguments("--batch-size", 16, "--micro-batch-size", micro, "--max-steps", 2)
        report(
            f"sstoken, micro-batches of {micro}: share of a step in which the GPU idles",
            idle(setting, model, samples, args),
        )


def idle(setting: Setting, model, samples, args) -> float | None:
    """1 - (time with a kernel running) / (time from the first kernel to the last's end), of two steps."""
    if setting.device.type == "cpu":
        train.train(model, samples, args, lambda line: None)
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        train.train(model, samples, args, lambda line: None)
        setting.wait()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return round(1 - busy / (end - spans[0][0]), 3)


# ------------------------------------------------------------------------------------------------------- 4. fast


def matmul_rate(setting: Setting) -> float:
    """The rate of a large bfloat16 product, FLOP/s."""
    size = 256 if setting.dry_run else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (setting.milliseconds(lambda: a @ b, 10) / 1e3)


def steps(setting: Setting, samples, flags, kept=None, checkpointing=False) -> dict:
    """Tokens/s, the median over steps but the first; GFLOP/s that are needed at least; peak GiB."""
    model = lora.add_lora(setting.large())
    model.gradient_checkpointing = checkpointing
    args, lines = setting.arguments(*flags), []
    model.packed = args.pack
    if args.compile:
        setting.model = None  # nobody else is to have compiled layers
        machine.COMPILER = "eager" if setting.dry_run else "inductor"
        machine.compile_layers(model)
    setting.tidy()
    train.train(model, samples, args, lines.append, frozen=FrozenLosses(base=kept))
    model.gradient_checkpointing = model.packed = False
    rate = statistics.median(line["tokens"] / line["seconds"] for line in lines[1:] or lines)
    needed = bench_step.operations(samples, args, model.config, history=kept is None) / sum(len(e.ids) for e in samples)
    return {"tokens/s": round(rate), "GFLOP/s": round(rate * needed / args.epochs / 1e9), "GiB": setting.peak_so_far()}


def fast(setting: Setting, report: Report):
    """Llama-3.2-3B's sizes in bfloat16: tokens/s, share of the card's rate, memory; beside transformers and peft."""
    rate = matmul_rate(setting)
    report("bfloat16 matmul, TFLOP/s", round(rate / 1e12, 1))
    long, short = setting.of_lengths([setting.length] * 12), setting.mixture(96 if not setting.dry_run else 12)
    report("mean length of the mixture", statistics.mean(len(e.ids) for e in short))
    whole = ["--batch-size", 3, "--micro-batch-size", 3]
    kept = response_losses(lora.add_lora(setting.large()), long)
    for name, flags, base in (
        ("full", ["--method", "full"], None),
        ("sstoken", [], None),
        ("sstoken, history's losses kept", [], kept),
    ):
        for checkpointing in (False, True):
            found = steps(setting, long, whole + flags, base, checkpointing)
            found["share of the matmul's rate"] = round(found["GFLOP/s"] * 1e9 / rate, 3)
            title = f"3 x {setting.length} tokens, {name}" + (", --gradient-checkpointing" if checkpointing else "")
            report(title, found)
    for checkpointing in (False, True):
        lines = bench_memory.table(setting.large().config, setting.length, 3, 64, checkpointing)
        report(f"GiB by the table of shapes, checkpointing {checkpointing}", round(sum(lines.values()) / 2**30, 2))
    report("the peer, transformers + peft, the same batches", peer_steps(setting, long, whole))
    batch = 48 if not setting.dry_run else 12
    for method in ("full", "sstoken"):
        for micro in (4, 8, 16, batch):
            flags = ["--batch-size", batch, "--micro-batch-size", micro if batch % micro == 0 else batch]
            report(
                f"mixture, {method}, micro-batches of {flags[-1]}", steps(setting, short, [*flags, "--method", method])
            )
        for flags in (["--pack"], ["--compile", "--micro-batch-size", min(16, batch)], ["--pack", "--compile"]):
            found = steps(setting, short, ["--batch-size", batch, "--method", method, *flags])
            report(f"mixture, {method}, {' '.join(map(str, flags))}", found)
        found = steps(setting, long, [*whole, "--compile", "--method", method])
        report(f"3 x {setting.length} tokens, {method}, --compile", found)
    pass_costs(setting, report, short, batch)
    report(
        "the peer on the mixture, micro-batches of 4",
        peer_steps(setting, short, ["--batch-size", batch, "--micro-batch-size", 4]),
    )
    pieces(setting, report)
    compiled(setting, report, long)


def pass_costs(setting: Setting, report: Report, samples, batch: int):
    """What data.PASS_COST is to be: tokens/s by the cost that the plan of the micro-batches counts for a pass."""
    before = dict(data.PASS_COST)
    for cost in (64, 256, 1024, 4096):
        data.PASS_COST.update(dict.fromkeys(data.PASS_COST, cost))
        found = steps(setting, samples, ["--batch-size", batch, "--micro-batch-size", min(16, batch)])
        report(f"mixture, sstoken, micro-batches of at most {min(16, batch)}, a pass counted as {cost} tokens", found)
    data.PASS_COST.update(before)


@contextlib.contextmanager
def as_usual(setting: Setting):
    """A context without the deterministic mode that train.py sets: what a peer's user would have."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        machine.compute_exactly(setting.device)


def peer_steps(setting: Setting, samples, flags) -> dict:
    """bench_step's peer on this device, its weights random too."""
    args, lines, base = setting.arguments(*flags), [], peer_model(setting)
    setting.tidy()
    with as_usual(setting):
        bench_step.train_peer(samples, args, lines.append, base)
    rate = statistics.median(line["tokens"] / line["seconds"] for line in lines[1:] or lines)
    del base
    return {"tokens/s": round(rate), "GiB": setting.peak_so_far()}


def peer_model(setting: Setting):
    """transformers' model of the same sizes, random, while ours waits on the host."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    setting.model = None
    setting.tidy()
    config = LlamaConfig(**SMALL if setting.dry_run else LARGE)
    with setting.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def pieces(setting: Setting, report: Report):
    """Logits at a time, and queries of the attention score at a time."""
    model = lora.add_lora(setting.large())
    vocabulary, size = model.lm_head.weight.shape
    hidden = torch.randn(1200, size, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1200,), device=setting.device)
    for power in (23, 25, 26, 27):
        work = lambda power=power: token_nll(hidden, model.lm_head.weight, targets, max(1, 2**power // vocabulary))
        report(f"ms of token_nll of 1,200 tokens, 2^{power} logits at a time", setting.milliseconds(work))
    ids, response = data.collate(setting.mixture(4), setting.device)
    probe, before = sstoken.AttentionProbe(model, -1), dict(sstoken.QUERY_CHUNK)
    with torch.no_grad():
        model(ids)
    for chunk in (32, 256, 1024):
        sstoken.QUERY_CHUNK[setting.device.type] = chunk
        report(
            f"ms of the attention score, {chunk} queries at a time",
            setting.milliseconds(lambda: probe.scores(response)),
        )
    sstoken.QUERY_CHUNK.update(before)
    probe.remove()


def compiled(setting: Setting, report: Report, samples):
    """Forward and backward of three long samples, the layers as they are and by torch.compile."""
    model = lora.add_lora(setting.large()).train()
    ids, response = data.collate(samples[:3], setting.device)
    work = lambda: response_nll(model, ids, response).sum().backward()
    plain = setting.milliseconds(work)
    setting.model = None  # nobody else is to have compiled layers
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager" if setting.dry_run else "inductor")
    start = time.perf_counter()
    work()
    setting.wait()
    first = round(time.perf_counter() - start, 1)
    report(
        "torch.compile of the layers: ms before, ms after, s of its first pass",
        [plain, setting.milliseconds(work), first],
    )


# --------------------------------------------------------------------------------------------------- 5. evaluate


@contextlib.contextmanager
def repeated_keys():
    """A context in which attention with a mask gets k and v repeated to all heads, which other kernels can take."""
    functional, real = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None, **given):
        if attn_mask is not None and given.pop("enable_gqa", False):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return real(q, k, v, attn_mask=attn_mask, **given)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


def answering(setting: Setting, report: Report):
    """Choices and written answers on the large model, beside a plain loop over transformers' model."""
    count, new = (8, 4) if setting.dry_run else (125, 64)
    words = " ".join(setting.tokenizer.decode(example.ids.tolist()) for example in setting.rows).split()
    text = lambda start, n: " ".join(words[start % 1000 :][:n])
    shared = text(7, 20 if setting.dry_run else 400)
    kinds = {
        "ARC-like": [(text(31 * i, 40), " " + text(i + j, 3)) for i in range(count // 2) for j in range(4)],
        "MMLU-like": [
            (f"{shared}\n\n{text(17 * i, 60)}\nAnswer:", f" {c}") for i in range(count - count // 2) for c in "ABCD"
        ],
    }
    prompts = [text(13 * i, 30 + i) for i in range(count * 2 // 5)]
    asked = [(prompt, {"until": ["\x00"], "max_gen_toks": new}) for prompt in prompts]
    model = setting.large()
    for name, pairs in kinds.items():
        for tokens in (2048, 8192):
            work = lambda pairs=pairs, tokens=tokens: evaluate.loglikelihoods(model, setting.tokenizer, pairs, tokens)
            title = f"{name}, {len(pairs)} requests, --batch-tokens {tokens}: seconds"
            report(title, round(setting.milliseconds(work, 1) / 1e3, 2))
    for tokens in (2048, 8192):
        work = lambda tokens=tokens: evaluate.generations(model, setting.tokenizer, asked, tokens)
        title = f"{len(asked)} written answers of {new} tokens, --batch-tokens {tokens}: seconds"
        report(title, round(setting.milliseconds(work, 1) / 1e3, 2))
    with repeated_keys():
        for name, pairs in kinds.items():
            work = lambda pairs=pairs: evaluate.loglikelihoods(model, setting.tokenizer, pairs, 2048)
            report(f"{name}, k and v repeated: seconds", round(setting.milliseconds(work, 1) / 1e3, 2))
        work = lambda: evaluate.generations(model, setting.tokenizer, asked, 2048)
        report("written answers, k and v repeated: seconds", round(setting.milliseconds(work, 1) / 1e3, 2))
    del work
    peer, encode = peer_model(setting), lambda text: setting.tokenizer.encode(text)[0]

    @torch.no_grad()
    def choices(pairs):
        for start in range(0, len(pairs), 16):
            both = [(encode(a), encode(a + b)) for a, b in pairs[start : start + 16]]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(whole) for _, whole in both], batch_first=True)
            logits = peer(ids.to(setting.device)).logits.float().log_softmax(-1)
            for row, (a, whole) in enumerate(both):
                answer = torch.tensor(whole[len(a) :], device=setting.device)
                logits[row, len(a) - 1 : len(whole) - 1].gather(1, answer[:, None]).sum().item()

    def written():
        for start in range(0, len(prompts), 16):
            ids = [encode(prompt) for prompt in prompts[start : start + 16]]
            longest = max(map(len, ids))
            padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=setting.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=setting.device)
            peer.generate(
                padded, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )

    with as_usual(setting):
        for name, pairs in kinds.items():
            report(
                f"{name}, a plain loop: seconds", round(setting.milliseconds(lambda p=pairs: choices(p), 1) / 1e3, 2)
            )
        report("written answers, a plain loop: seconds", round(setting.milliseconds(written, 1) / 1e3, 2))


# ------------------------------------------------------------------------------------------------------ 6. ranks


def one_rank(setting: Setting, report: Report):
    """One rank by torchrun, weights in parts, two steps; and a run that is moved to another name of its device."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "train.py"]
        flags = [
            "--limit",
            48,
            "--batch-size",
            24,
            "--epochs",
            1,
            "--device",
            setting.device.type,
            "--out",
            f"{folder}/a",
        ]
        found = run_python(*launch, *flags, "--shard")
        report("torchrun, one rank, --shard: status", found.returncode)
        if found.returncode:
            report("its last words", found.stderr[-800:])
        flags[-1] = f"{folder}/b"
        first = run_python("train.py", *flags)
        (Path(folder) / "b" / "adapter_model.safetensors").unlink(missing_ok=True)
        again = run_python(*launch, *flags, "--resume")
        report("a run that torchrun resumes: status before, and after", [first.returncode, again.returncode])
        if again.returncode:
            report("its last words", again.stderr[-800:])


STAGES = {  # each with its share of the minutes
    "right": (right, 0.22),
    "flash": (flash, 0.1),
    "waiting": (waiting, 0.08),
    "fast": (fast, 0.38),
    "evaluate": (answering, 0.12),
    "ranks": (one_rank, 0.1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of gpu.json and gpu.txt")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    out, setting = Path(args.out), Setting(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    machine.compute_exactly(setting.device)
    card = torch.cuda.get_device_name() if setting.device.type == "cuda" else platform.processor() or "CPU"
    report = Report(
        out, {"torch": torch.__version__, "CUDA": torch.version.cuda, "device": card, "dry run": args.dry_run}
    )

    def stop(number, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    errors, begin = collections.Counter(), time.monotonic()
    for name in args.stages.split(","):
        work, share = STAGES[name]
        left = 60 * args.minutes - (time.monotonic() - begin)
        report.start(name)
        if left < 5:
            report.end(0, "skipped: the minutes are over")
            continue
        start, error = time.monotonic(), None
        signal.setitimer(signal.ITIMER_REAL, min(left, 60 * args.minutes * share * 1.3))
        try:
            work(setting, report)
        except OutOfTime:
            error = "stopped: its time is up"
        except Exception:
            error = traceback.format_exc()
            errors[name] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.end(time.monotonic() - start, error)
        setting.tidy()
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
