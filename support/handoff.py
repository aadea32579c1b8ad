"""What a run leaves to whoever goes on with it: its chat template, a model card, the commands to type next."""

import argparse
import contextlib
import json
import shlex
from pathlib import Path

import jinja2

from support.checkpoint import generation_config, tokenizer_settings
from support.command import cell
from support.files import readable, write_json, write_text, write_whole
from support.machine import find_device, usual_dtype
from support.tokenizer import Tokenizer, load_backend

# Appendix A.1, as data.encode builds it; BOS and EOS stand for the tokenizer's own, and line breaks for nothing
HERE = Path(__file__).parent
FORM = (HERE / "paper_template.jinja").read_text(encoding="utf-8").replace("\n", "")
MADE = "<!-- made by train.py from run.json; a file without this line is left alone -->"
JINJA = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
JINJA.filters |= {"cell": cell, "json": json.dumps}


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
    model = record["arguments"]["model"]
    command = shlex.join(["python", "train.py", "--model", model, *given_flags(record["arguments"], defaults)])
    local = Path(model).is_dir()  # the hub knows no folder of ours
    text = (HERE / "model_card.jinja").read_text(encoding="utf-8")
    return JINJA.from_string(text).render(record, name=name, made=MADE, local=local, command=" ".join(command.split()))


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
