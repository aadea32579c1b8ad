"""What a run leaves to whoever goes on with it: its chat template, a model card, the commands to type next."""

import argparse
import contextlib
import json
import shlex
from pathlib import Path

from support.checkpoint import generation_config, tokenizer_settings
from support.command import cell
from support.files import readable, write_json, write_text, write_whole
from support.machine import find_device, usual_dtype
from support.tokenizer import Tokenizer, load_backend

# Appendix A.1, as data.encode builds it; BOS and EOS stand for the tokenizer's own, and line breaks for nothing
FORM = Path(__file__).with_name("paper_template.jinja").read_text(encoding="utf-8").replace("\n", "")


def chat_template(tokenizer: Tokenizer) -> str:
    """Jinja text that renders messages as the run has seen them, BOS and end tokens included."""
    start, eos = (f"{{{{ {json.dumps(text)} }}}}" if text else "" for text in (tokenizer.start, tokenizer.eos))
    return FORM.replace("{{ BOS }}", start).replace("{{ EOS }}", eos)


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path):
    """Write the tokenizer of `source` to `folder`, with the run's template; a model there gets its end tokens."""
    # a template stands in both places that are read, by older and by newer programs
    template = tokenizer.template.text if tokenizer.template else chat_template(tokenizer)
    settings = {key: value for key, value in tokenizer_settings(source).items() if value is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    write_whole(folder / "tokenizer.json", lambda path: load_backend(source).save(str(path)))
    write_json(folder / "tokenizer_config.json", settings)
    write_text(folder / "chat_template.jinja", template)
    if (path := folder / "generation_config.json").exists():
        write_json(path, generation_config(folder, {}, sorted(tokenizer.end_ids)))


MADE = "<!-- made by train.py from run.json; a file without this line is left alone -->"


def write_card(record: dict, folder: Path, defaults: dict):
    """README.md, as the hub shows it, from what run.json records; a card that somebody else wrote stays."""
    path, held = folder / "README.md", ""
    with contextlib.suppress(OSError):  # of what is no file it is not made either
        held = readable(path).read_text(encoding="utf-8", errors="replace") if path.exists() else MADE
    if MADE in held:
        write_text(path, card(record, folder.resolve().name, defaults))


def card(record: dict, name: str, defaults: dict) -> str:
    """A model card: the head that the hub reads, in YAML, then what was done. What users named is escaped.

    defaults: the arguments of a run that is given only its model, which the command leaves out.
    """
    args, where = record["arguments"], ""
    head = {"library_name": "peft", "pipeline_tag": "text-generation", "base_model": args["model"]}
    head["tags"] = ["lora", "sstoken", "token-selection", f"method:{args['method']}"]
    if Path(args["model"]).is_dir():  # the hub knows no folder of ours
        where = "the model in the local folder "
        del head["base_model"]
    rows = {"data": args["data"], "samples": record["samples"], "seed": args["seed"], "rho": args["rho"]}
    rows["rank, alpha"] = f"{args['lora_rank']}, {args['lora_alpha']}"
    rows["learning rate, epochs, batch"] = f"{args['lr']}, {args['epochs']}, {args['batch_size']}"
    for when in ("before", "after"):
        if f"held_out_loss_{when}" in record:
            rows[f"held-out response loss {when}"] = f"{record[f'held_out_loss_{when}']:.4f} nats a token"
    if auto := record.get("auto"):
        rows["answers dropped"] = f"{auto['dropped']} of {auto['answers']} {auto['reason']}"
        rows["tokens dropped as surprise"] = f"{auto['surprise']:.1%}"
    elif args["method"] == "sstoken":
        rows["gamma"] = args["gamma"]
    rows["versions"] = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    command = shlex.join(["python", "train.py", "--model", args["model"], *given_flags(args, defaults)])
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", MADE, ""]
    lines += [f"# {cell(name)}", "", f"A LoRA adapter of {where}{cell(args['model'])}, trained with"]
    lines += [f"`--method {args['method']}` of ssToken (self-modulated and semantic-aware token selection)."]
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {cell(str(value))} |" for key, value in rows.items())]
    lines += ["", "The command:", "", f"    {' '.join(command.split())}", ""]
    lines += ["Ask it in the template that it was trained in, which its tokenizer carries (`apply_chat_template`).", ""]
    return "\n".join(lines)


def given_flags(args: dict, defaults: dict) -> list[str]:
    """The flags that differ from the defaults, without those of the folder and of resuming."""
    found = []
    for name in args.keys() - {"model", "out", "overwrite", "resume", "pass_tokens", "device", "cache", "debug"}:
        if args[name] not in (defaults.get(name), None, False):
            found.append([f"--{name.replace('_', '-')}"] + ([str(args[name])] if args[name] is not True else []))
    return sum(sorted(found), [])


def next_commands(args: argparse.Namespace, folder: Path, reference: bool, demo: str | None) -> list[list[str]]:
    """What to type after a run, without `python`: whatever it was given that those commands need as well.

    reference: whether the run trained one, into its folder. demo: the folder of the demo, if this was it.
    """
    usual = usual_dtype(find_device("auto"))  # as of commands that name no device
    asked = given_flags({"revision": args.revision, "dtype": args.dtype}, {"dtype": usual})
    these = ["--model", args.model, "--adapter", str(folder), *asked]
    better = str(folder / "reference") if reference else args.reference
    rows = [args.data, "--limit", "40"] if demo else [args.eval_data or args.data]  # the demo's mark their noise
    asked = given_flags({"reference": better, "max_length": args.max_length}, {"max_length": 2048})
    question = "Now say up, hot in opposites." if demo else "What is the capital of France?"
    graded = ["--tasks", "instructions", "--data", demo] if demo else []
    commands = [["evaluate.py", *these, "--ask", question], ["evaluate.py", *these, *graded]]
    commands.append(["-m", "paper.visualize", *these, "--data", *rows, *asked])
    if demo:
        larger = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--data", "tatsu-lab/alpaca", "--limit", "1000"]
        commands += [["train.py", "--rho", "auto"], ["train.py", *larger]]
    return commands
