"""lm-evaluation-harness on rows in a folder: its own tasks, with the hub replaced by <file>.<split>.jsonl."""

import json
import logging
import time
from pathlib import Path
from unittest import mock

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from paper.benchmarks import GROUPS, TASKS

FOLDERS = "agieval arc hellaswag logiqa mmlu triviaqa truthfulqa tydiqa winogrande".split()  # of its thousands of tasks
SHOTS = {"mmlu": 5, "tydiqa": 1}  # the paper's; the others are asked without examples


def shots(name: str) -> int:
    return next((n for group, n in SHOTS.items() if name.startswith(group)), 0)


class Harness:
    """A model in the harness; `run` evaluates one of its tasks or groups on the rows of a folder."""

    def __init__(self, model, folder: Path, dtype="float32", batch_size=8, adapter=None):
        here = Path(lm_eval.tasks.__file__).parent
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        settings = {"peft": str(adapter)} if adapter else {}
        self.lm = HFLM(pretrained=str(model), dtype=dtype, batch_size=batch_size, device="cpu", **settings)
        self.manager = TaskManager(include_path=[here / name for name in FOLDERS], include_defaults=False)
        self.folder = folder
        self.seconds = 0.0
        for name in ("loglikelihood", "generate_until"):
            setattr(self.lm, name, self._timed(getattr(self.lm, name)))

    def _timed(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def _load_dataset(self, path, name=None, **_):
        (file,) = {task["file"] for task in TASKS.values() if task["hub"] == (path, name)}
        files = sorted(self.folder.glob(f"{file}.*.jsonl"))
        splits = {p.name.split(".")[-2]: [json.loads(line) for line in p.open(encoding="utf-8")] for p in files}
        found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        anything = next(iter(found.values()))  # a split without a file is only looked at, never asked
        return datasets.DatasetDict({"train": anything, "validation": anything, "test": anything} | found)

    def run(self, name: str, limit=None) -> dict:
        """results {task or group: {metric: value}}, samples {task: [...]}, and the seconds of the model's work."""
        self.seconds = 0.0
        # the harness has only a tag for tydiqa, no group
        asked = GROUPS[name][0] if name == "tydiqa" else [name]
        with mock.patch("lm_eval.api.task.datasets.load_dataset", self._load_dataset):
            found = lm_eval.simple_evaluate(
                model=self.lm,
                tasks=asked,
                num_fewshot=shots(name),
                limit=limit,
                task_manager=self.manager,
                log_samples=True,
                bootstrap_iters=1,  # 0 would leave out the standard errors that need none
                verbosity="ERROR",
            )
        results = found["results"] | found.get("groups", {})
        plain = {task: {key.split(",")[0]: value for key, value in scores.items()} for task, scores in results.items()}
        samples = {
            task: [
                {"arguments": s["arguments"], "answers": [r[0] for r in s["resps"]], "doc_id": s["doc_id"]}
                for s in sorted(samples, key=lambda s: s["doc_id"])
            ]
            for task, samples in found["samples"].items()
        }
        return {"results": plain, "samples": samples, "seconds": self.seconds}


def differences(name: str, requests: list, answers: list, samples: list[dict]) -> list[str]:
    """What differs between our requests and answers of a task, and the harness's samples: one line each."""
    found = [] if len(requests) == len(samples) else [f"{name}: {len(requests)} rows, theirs {len(samples)}"]
    for n, (ours, given, sample) in enumerate(zip(requests, answers, samples, strict=False)):
        theirs = [tuple(argument) for argument in sample["arguments"]]
        asked = [(context, rest if isinstance(rest, str) else generation(rest)) for context, rest in ours]
        asked_there = [(context, rest if isinstance(rest, str) else generation(rest)) for context, rest in theirs]
        if asked != asked_there:
            found.append(f"{name}, row {n}: requests\n  {asked}\n  {asked_there}")
        for mine, other in zip(given, sample["answers"], strict=True):
            if isinstance(mine, str):
                if mine != other:
                    found.append(f"{name}, row {n}: {mine!r}, theirs {other!r}")
            elif abs(mine[0] - float(other[0])) > 1e-3 or str(mine[1]) != str(other[1]):
                found.append(f"{name}, row {n}: {mine}, theirs {other}")
    return found


def metric_differences(ours: dict[str, dict], theirs: dict[str, dict]) -> list[str]:
    """What differs between our results {task or group: {metric: value}} and the harness's: one line each."""
    found = []
    for task, scores in theirs.items():
        if task not in GROUPS and task not in TASKS:
            continue  # the harness's parts of mmlu
        near = 1e-4 if task == "truthfulqa_mc2" else 1e-9  # MC2 is a share of probability, the others are counts
        metrics = [metric for metric in scores if metric.startswith(("acc", "exact_match", "f1"))]
        if not metrics:
            found.append(f"{task}: the harness reports only {list(scores)}")
        for metric in metrics:
            here, there = ours[task][metric], None if scores[metric] == "N/A" else scores[metric]
            if (here is None) != (there is None) or (here is not None and abs(here - there) > near):
                found.append(f"{task}: {metric} {here}, theirs {there}")
    return found


def generation(settings: dict) -> dict:
    """What a generation request means: the harness's own defaults filled in, greedy decoding taken as given."""
    assert not settings.get("do_sample") and not settings.get("temperature")
    return {"until": settings["until"], "max_gen_toks": settings.get("max_gen_toks", 256)}
