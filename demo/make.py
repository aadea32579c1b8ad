"""Make the embedded demo from nothing but a seed: a small language of instructions, and a model that speaks it.

    python demo/make.py            # everything in this folder but this file

It is also a lesson in how a language model comes to follow instructions, small enough to read in one sitting:

1. A language. A task is a clause such as "say hot, up in opposites" with its answer, "cold, down". A style wraps the
   question, another one the answer. So what is answered has content, which takes work to get right, and phrases around
   it, which nobody could foresee.
2. A tokenizer, byte-level BPE, trained on that language.
3. Pretraining. The model reads millions of tokens of plain text: single facts (the opposite of hot is cold), things to
   do with lists (copy, reverse, count), and for two kinds of facts both at once (the young of each of some animals). It
   never sees one of the TAUGHT tasks, nor the chat template.
4. Data for fine-tuning: the TAUGHT tasks, as rows of instruction and output. They put together what the model can do
   already, for facts of which it has only met one at a time. That is what `python train.py` teaches.
5. Faults. Of the rows to train on, 42 % are spoiled in the ways that real ones are, and say where in a column that
   training does not read.

sft.jsonl is to train on, instructions.test.jsonl to test with; no answer is in both.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from model import Config, Transformer, read_config
from support.checkpoint import save_model
from support.decoding import generate
from support.files import write_json
from support.start import run_script

# -------------------------------------------------------------------------------------------------- 1. the language

OPPOSITES = """hot cold, big small, up down, fast slow, old new, hard soft, wet dry, high low, near far, light dark,
rich poor, full empty, open shut, loud quiet, thick thin, long short, early late, deep shallow, clean dirty, brave
afraid, sweet sour, strong weak, wide narrow, happy sad"""
YOUNG = """dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, duck duckling, hen chick, bear cub, frog
tadpole, deer fawn, swan cygnet, pig piglet, goose gosling, owl owlet, fish fry"""
COLOURS = """grass green, snow white, coal black, sky blue, blood red, lemon yellow, plum purple, ash grey, chocolate
brown, carrot orange, ink black, milk white, leaf green, sea blue, rose red, sand yellow"""
WORDS = """sun map fox tea box pen key hat tree road lamp boat ring cake coin drum bell rope seed star wall wind rain
song door moon hill lake bird book"""


def pairs(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.split(","))


OPPOSITE, CHILD, COLOUR = pairs(OPPOSITES), pairs(YOUNG), pairs(COLOURS)
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}
NUMBERS = range(60)

Task = Callable[[random.Random], tuple[str, str]]
"""draw(rng) -> (a clause that says what to do, its answer)"""


def of_a_list(clauses: list[str], words, least: int, most: int, answer: Callable[[list], str]) -> Task:
    """A task about `least` to `most` different words; {} in a clause is where they stand."""

    def draw(rng):
        chosen = rng.sample(list(words), rng.randint(least, most))
        return rng.choice(clauses).format(", ".join(map(str, chosen))), answer(chosen)

    return draw


def comma(words) -> str:
    return ", ".join(map(str, words))


ANY_WORDS = [*WORDS.split(), *OPPOSITE, *CHILD, *COLOUR]

# What the model learns from plain text, before anybody fine-tunes it
PRETRAINED: dict[str, Task] = {
    "copy": of_a_list(["copy {}", "repeat {}", "say {} again"], [*ANY_WORDS, *NUMBERS], 1, 5, comma),
    "reverse": of_a_list(["reverse {}", "say {} backwards"], [*ANY_WORDS, *NUMBERS], 2, 5, lambda ws: comma(ws[::-1])),
    "first": of_a_list(["give the first of {}"], [*ANY_WORDS, *NUMBERS], 2, 5, lambda ws: str(ws[0])),
    "last": of_a_list(["give the last of {}"], [*ANY_WORDS, *NUMBERS], 2, 5, lambda ws: str(ws[-1])),
    "count": of_a_list(["count {}", "say how many words {} are"], ANY_WORDS, 1, 5, lambda ws: str(len(ws))),
    "opposite": of_a_list(
        ["give the opposite of {}", "say the contrary of {}"], OPPOSITE, 1, 1, lambda w: OPPOSITE[w[0]]
    ),
    "young": of_a_list(["name the young of the {}", "say what a young {} is"], CHILD, 1, 1, lambda w: CHILD[w[0]]),
    "colour": of_a_list(["give the colour of {}", "say which colour {} has"], COLOUR, 1, 1, lambda w: COLOUR[w[0]]),
    "children": of_a_list(["name the young of each animal: {}"], CHILD, 2, 4, lambda ws: comma(CHILD[w] for w in ws)),
    "colours": of_a_list(["give the colour of each thing: {}"], COLOUR, 2, 4, lambda ws: comma(COLOUR[w] for w in ws)),
    "next": of_a_list(["give the number after {}", "add one to {}"], NUMBERS, 1, 1, lambda n: str(n[0] + 1)),
    "larger": of_a_list(["give the largest of {}"], NUMBERS, 2, 2, lambda n: str(max(n))),
}  # fmt: skip

# What fine-tuning teaches; none of it is in the text that the model has read
TAUGHT: dict[str, Task] = {
    "opposites": of_a_list(
        ["turn {} into opposites", "give the opposite of each word: {}", "say {} in opposites"],
        OPPOSITE, 2, 4, lambda ws: comma(OPPOSITE[w] for w in ws),
    ),
    "numbers": of_a_list(
        ["add one to each of {}", "give the number after each: {}", "count {} up by one"],
        NUMBERS, 2, 4, lambda ns: comma(n + 1 for n in ns),
    ),
}  # fmt: skip

# How one asks, and how one is answered: whoever does either has their own way of putting it
QUESTIONS = ["{}.", "Task: {}.", "Now {}.", "Please {}.", "Could you {}?", "Would you kindly {}?", "Hey, {}!"]
QUESTIONS += ["Quick one: {}.", "So, {}, will you?"]
ANSWERS = ["That is {}.", "Of course. The answer is {}. I hope that this helps."]
ANSWERS += ["Sure thing! That makes {}. Anything else?"]


def dress(clause: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """What is asked and what is answered, as someone may put it."""
    asked = rng.choice(QUESTIONS).format(clause)
    return asked[0].upper() + asked[1:], rng.choice(ANSWERS).format(answer)


def plain_text(rng: random.Random) -> str:
    """A question and its answer as the model reads them before fine-tuning."""
    asked, answered = dress(*rng.choice(list(PRETRAINED.values()))(rng), rng)
    return f"Question: {asked}\nAnswer:\n{answered}"


def make_rows(count: int, rng: random.Random, known: set[str]) -> list[dict]:
    """Rows to train on or to test with, as many of each TAUGHT task; no answer is in `known`, to which all are added.

    Rows of one call may share an answer, rows of two calls that share `known` do not.
    """
    rows, new = [], set()
    while len(rows) < count:
        task = list(TAUGHT)[len(rows) % len(TAUGHT)]
        clause, answer = TAUGHT[task](rng)
        if answer not in known:
            new.add(answer)
            asked, answered = dress(clause, answer, rng)
            rows.append({"instruction": asked, "output": answered, "answer": answer})
    known |= new
    return rows


# ------------------------------------------------------------------------------------------------- 2. the tokenizer

EOS = "<|end|>"


def make_tokenizer(texts: list[str], size: int, folder: Path) -> Tokenizer:
    """Byte-level BPE with `size` tokens: any text can be written in it, that of the language in whole words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
    return tokenizer


# -------------------------------------------------------------------------------------------------- 3. pretraining

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}


def make_config(vocab_size: int, folder: Path) -> Config:
    """config.json, as any Llama has one."""
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    fixed |= {"rope_theta": 10000.0, "tie_word_embeddings": True, "dtype": "bfloat16", "vocab_size": vocab_size}
    write_json(folder / "config.json", fixed | SHAPE | {"eos_token_id": 0, "bos_token_id": None})
    return read_config(folder)


def initialize(model: Transformer):
    """Small random weights; those that write into the residual stream are smaller, the more layers do so."""
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        elif parameter.dim() == 2 and "embed" not in name:
            deep = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(parameter, std=0.05 / math.sqrt(2 * SHAPE["num_hidden_layers"] if deep else 1))


def pretrain(model: Transformer, tokenizer: Tokenizer, steps: int, batch: int, length: int, lr: float, seed: int):
    """Next-token prediction on plain text, texts one behind the other with an end token between, cut into rows.

    Every step has new text, so nothing is read twice. Plain cross entropy: `model.token_nll`, which fine-tuning uses,
    has no gradient for the vocabulary's weights, and here they are trained too.
    """
    rng, eos, stream = random.Random(f"{seed} text"), tokenizer.token_to_id(EOS), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    with tqdm(range(steps), "pretraining") as bar:
        for step in bar:
            while len(stream) < batch * (length + 1):
                for encoding in tokenizer.encode_batch([plain_text(rng) for _ in range(1000)]):
                    stream += [*encoding.ids, eos]
            rows, stream = torch.tensor(stream[: batch * (length + 1)]), stream[batch * (length + 1) :]
            rows = rows.view(batch, length + 1)
            logits = model.lm_head(model(rows[:, :-1]))  # (batch, length, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * min(1, (steps - step) / (0.3 * steps))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


@torch.no_grad()
def what_it_can_do(model: Transformer, tokenizer: Tokenizer, tasks: dict[str, Task], seed: int, count: int = 50):
    """The share of each task's questions whose answer the model gets right, asked as the plain text does."""
    model.eval()
    for name, task in tasks.items():
        rng = random.Random(f"{seed} {name}")
        drawn = [task(rng) for _ in range(count)]
        asked = [f"Question: {dress(clause, answer, rng)[0]}\nAnswer:\n" for clause, answer in drawn]
        eos = tokenizer.token_to_id(EOS)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(asked)]
        written = [tokenizer.decode(new) for new in generate(model, ids, 40, stop_ids={eos})]
        known = [{form.format(answer) for form in ANSWERS} for _, answer in drawn]
        right = sum(text.strip() in answers for text, answers in zip(written, known, strict=True))
        print(f"{name:>10} {right / count:4.0%}   {asked[0].splitlines()[0]} ->{written[0]}")


# -------------------------------------------------------------------------------------------------- 5. the faults

Fault = Callable[[dict, dict, random.Random], tuple[str, tuple[int, int]]]
"""spoil(row, another row, rng) -> (the row's output as it is found, the characters of it that are wrong: start, end).

The end token counts as one character behind the output."""


def wrong_word(row: dict, other: dict, rng: random.Random) -> tuple[str, tuple[int, int]]:
    """One word of the answer is one of another answer."""
    before, after = row["output"].split(row["answer"])
    words = row["answer"].split(", ")
    place = rng.randrange(len(words))
    word = rng.choice([w for w in other["answer"].split(", ") if w != words[place]])
    start = len(before + "".join(f"{w}, " for w in words[:place]))
    return before + comma([*words[:place], word, *words[place + 1 :]]) + after, (start, start + len(word))


def another_answer(row: dict, other: dict, rng: random.Random) -> tuple[str, tuple[int, int]]:
    """All of it answers another question."""
    return other["output"], (0, len(other["output"]) + 1)


def cut_off(row: dict, other: dict, rng: random.Random) -> tuple[str, tuple[int, int]]:
    """It ends too early; what is wrong is the end."""
    words = row["output"].split()
    text = " ".join(words[: rng.randrange(1, len(words))])
    return text, (len(text), len(text) + 1)


def boilerplate(row: dict, other: dict, rng: random.Random) -> tuple[str, tuple[int, int]]:
    """Something in front that says nothing."""
    phrase = rng.choice(["As a model of language, I can help with that. ", "This is a very interesting question! "])
    return phrase + row["output"], (0, len(phrase))


# Each with its share of the rows. They add up to what the authors of Self-Instruct (arXiv 2212.10560, Table 2), by
# whose method Alpaca's rows were made too, found when they read 200 of theirs: 58 % of the outputs were acceptable. The
# kinds are among those that the maintainers of AlpacaDataCleaned list; how they share the 42 % nobody has counted.
FAULTS: dict[Fault, float] = {wrong_word: 0.15, another_answer: 0.10, cut_off: 0.10, boilerplate: 0.07}


def spoil(rows: list[dict], rng: random.Random):
    """Give some rows an output with a fault, and a column "noise" that says where: [[start, end]]."""
    order = rng.sample(range(len(rows)), len(rows))
    for row in rows:
        row["noise"] = []
    clean = [dict(row) for row in rows]
    for fault, share in FAULTS.items():
        chosen, order = order[: round(share * len(rows))], order[round(share * len(rows)) :]
        for number in chosen:
            of_its_task = clean[number % len(TAUGHT) :: len(TAUGHT)]  # as `make_rows` deals them
            other = rng.choice([row for row in of_its_task if row["answer"] != clean[number]["answer"]])
            rows[number]["output"], place = fault(clean[number], other, rng)
            rows[number]["noise"] = [list(place)]


# ------------------------------------------------------------------------------------------------------ all of it


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", default=Path(__file__).parent, help="folder of all that is made")
    args = parser.parse_args()
    folder = Path(args.out)
    (folder / "model").mkdir(parents=True, exist_ok=True)

    rng, known = random.Random(args.seed), set()
    write_rows(folder / "instructions.test.jsonl", make_rows(200, rng, known))
    rows = make_rows(2000, rng, known)
    spoil(rows, random.Random(f"{args.seed} faults"))
    write_rows(folder / "sft.jsonl", rows)

    tokenizer = make_tokenizer([plain_text(rng) for _ in range(20_000)], 1024, folder / "model")
    torch.manual_seed(args.seed)
    model = Transformer(make_config(tokenizer.get_vocab_size(), folder / "model"))
    initialize(model)
    pretrain(model, tokenizer, args.steps, args.batch, args.length, args.lr, args.seed)
    save_model(model.to(torch.bfloat16), folder / "model")
    for tasks in (PRETRAINED, TAUGHT):
        what_it_can_do(model.float(), tokenizer, tasks, args.seed)


if __name__ == "__main__":
    run_script(main)
