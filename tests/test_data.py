"""Rows, schemas, the template and its mask, batches: against cases worked by hand."""

import itertools
import json
import random
import time
from collections import Counter

import pytest
import tokenizers
import torch
from conftest import BOS, EOS, make_tokenizer

import data
from data import Example, collate, conversations, cut_batch, encode, load_conversations, plan_batches
from support.files import UserError
from support.sources import Account
from support.tokenizer import load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------------- schemas

ONE_EXCHANGE = [user("Q"), assistant("A")]
ROWS = {
    "messages": ({"messages": [{"role": "system", "content": "S"}, *ONE_EXCHANGE]}, None),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, ONE_EXCHANGE),
    "conversational prompt": ({"prompt": [user("Q")], "completion": [assistant("A")]}, ONE_EXCHANGE),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A", "text": "unused"}, ONE_EXCHANGE),
    "alpaca with input": ({"instruction": "Q", "input": "I", "output": "A"}, [user("Q\nI"), assistant("A")]),
    "alpaca without input": ({"instruction": "Q", "output": "A"}, ONE_EXCHANGE),
    "dolly": ({"instruction": "Q", "context": "C", "response": "A"}, [user("Q\nC"), assistant("A")]),
    "dolly, null context": ({"instruction": "Q", "context": None, "response": "A"}, ONE_EXCHANGE),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ONE_EXCHANGE),
}


@pytest.mark.parametrize("schema", ROWS)
def test_schemas(schema):
    row, expected = ROWS[schema]
    assert conversations([row]) == [expected or row["messages"]]


def node(name, role, *replies, rank=None, deleted=False):
    return {"text": name, "role": role, "rank": rank, "deleted": deleted, "replies": list(replies)}


TREE = node(
    "root",
    "prompter",
    node("second best", "assistant", node("never seen", "prompter"), rank=1),
    node(
        "best",
        "assistant",
        node("follow-up 1", "prompter", node("unranked", "assistant"), node("ranked", "assistant", rank=3)),
        node("follow-up 2", "prompter", node("gone", "assistant", rank=0, deleted=True), node("kept", "assistant")),
        node("unanswered", "prompter"),
        rank=0,
    ),
)
TREE_PATHS = [["root", "best", "follow-up 1", "ranked"], ["root", "best", "follow-up 2", "kept"]]


def flatten(tree, parent=None):
    """The same tree as the hub has it: one message a row."""
    own = {"message_id": tree["text"], "parent_id": parent, **{k: v for k, v in tree.items() if k != "replies"}}
    return [own] + [row for reply in tree["replies"] for row in flatten(reply, tree["text"])]


@pytest.mark.parametrize("rows", [[{"message_tree_id": 1, "prompt": TREE}], flatten(TREE)], ids=["trees", "messages"])
def test_openassistant_follows_the_best_ranked_reply_down_every_path(rows):
    found = conversations(rows)
    assert [[turn["content"] for turn in path] for path in found] == TREE_PATHS
    assert [turn["role"] for turn in found[0]] == ["user", "assistant"] * 2


def test_openassistant_paths_that_end_unanswered():
    stub = node("q", "prompter", node("a", "assistant", node("u1", "prompter"), node("u2", "prompter"), rank=0))
    assert [[t["content"] for t in p] for p in conversations([{"prompt": stub}])] == [["q", "a"]]
    assert conversations([{"prompt": node("alone", "prompter")}, {"prompt": stub}])[0][0]["content"] == "q"


def test_openassistants_root_that_is_deleted_gives_nothing_and_a_reply_is_checked_as_a_row_is():
    assert conversations([{"prompt": TREE | {"deleted": True}}]) == []
    with pytest.raises(UserError, match="key weight of a message changes what is trained on"):
        conversations([{"prompt": node("q", "prompter", node("a", "assistant") | {"weight": 0})}])


def oasst(name, parent, **more):
    """A row of OpenAssistant's, a message each: questions have names in capitals."""
    role = "prompter" if name.isupper() else "assistant"
    return {"message_id": name, "parent_id": parent, "text": f"text {name}", "role": role, **more}


def texts(rows, account=None):
    return [[turn["content"].removeprefix("text ") for turn in path] for path in conversations(rows, "d", account)]


@pytest.mark.parametrize("root", [None, "", float("nan")])
def test_openassistants_roots_and_flags_as_a_table_has_them(root):
    rows = [oasst("a", "Q", rank="1.0", deleted="False"), oasst("b", "Q", rank="0.0", deleted="False")]
    rows += [oasst("c", "Q", rank="-1", deleted="True"), oasst("d", "Q", rank=float("nan")), oasst("Q", root)]
    before = [dict(row) for row in rows]
    assert texts(rows) == [["Q", "b"]]  # a child may stand before its parent
    assert str(rows) == str(before)  # what is given stays as it is


@pytest.mark.parametrize(
    ("wrong", "row", "words"),
    [
        ([oasst("C", "gone"), oasst("c", "C")], 3, "leads to no root"),
        ([oasst("X", "y"), oasst("y", "X")], 3, "leads to no root"),
        ([oasst("X", "X")], 3, "leads to no root"),
        ([oasst("b", "Q")], 3, "message_id 'b' is empty or not unique"),
        ([oasst("x", "Q") | {"message_id": None}], 3, "columns parent_id, role, text fit no schema"),
        ([oasst("x", "Q", weight=0)], 3, "column weight beside message_id"),
        ([oasst("x", "Q", rank="best")], 3, "could not convert string to float: 'best'"),
        ([{"message_id": "x"}], 3, "columns message_id fit no schema"),
    ],
)
def test_openassistants_messages_that_stand_in_no_tree_are_told_and_counted(wrong, row, words):
    rows = [oasst("Q", None), oasst("b", "Q"), *wrong]
    with pytest.raises(UserError, match=f"d, row {row}: .*{words}"):
        texts(rows)
    assert texts(rows, account := Account(skip_bad_rows=True)) == [["Q", "b"]]
    assert sum(account.record()["skipped"].values()) == len(wrong)


def slow_paths(node):
    """Every path of a tree as its definition has it, in time that grows with the square."""
    replies = [reply for reply in node["replies"] if not reply["deleted"]]
    if node["role"] == "prompter":
        replies = sorted(replies, key=lambda reply: (reply["rank"] is None, reply["rank"] or 0))[:1]
    below = [path for reply in replies for path in slow_paths(reply)]
    return [[node["text"], *path] for path in below] or [[node["text"]] if node["role"] == "assistant" else []]


def test_openassistants_paths_are_those_of_the_definition_in_random_trees():
    rng, names = random.Random(0), itertools.count()

    def grow(depth, role):
        other = {"prompter": "assistant", "assistant": "prompter"}[role]
        replies = [grow(depth - 1, other) for _ in range(rng.randrange(4) if depth else 0)]
        gone = rng.random() < 0.2
        return node(str(next(names)), role, *replies, rank=rng.choice([None, 0, 1, 2]), deleted=gone)

    for _ in range(200):
        tree = grow(6, "prompter") | {"deleted": False}
        paths = [path for path in slow_paths(tree) if path]
        heads = [path for path in paths if any(other[: len(path)] == path and other != path for other in paths)]
        expected = [path for i, path in enumerate(paths) if path not in heads and path not in paths[:i]]
        assert [[turn["content"] for turn in path] for path in conversations([{"prompt": tree}])] == expected


def test_openassistants_wide_trees_and_long_chains_take_no_square_of_their_size():
    wide = [oasst("Q", None), oasst("a", "Q")]
    for i in range(6000):
        wide += [oasst(f"U{i}", "a"), oasst(f"b{i}", f"U{i}", text=f"{i}")]
    chain = [oasst("Q", None)]
    for i in range(5000):
        chain.append(oasst(f"{'uU'[i % 2]}{i}", chain[-1]["message_id"]))
    start = time.process_time()
    assert len(texts(wide)) == 6000 and len(texts(chain)[0]) == 5000
    assert time.process_time() - start < 5  # 25 s and more, and no end, where it did


WRONG_ROWS = {
    "row 1: columns answer, question fit no schema": {"question": "Q", "answer": "A"},
    "row 1: role 'tool'": {"messages": [{"role": "tool", "content": "x"}]},
    "row 1: the assistant's content is NoneType": {"messages": [user("Q"), assistant(None)]},
    "row 1: a str, not an object": "text",
    "row 1: the user's content is list, not text": {"instruction": "Q", "input": ["a"], "output": "A"},
    "row 1: columns input, output fit no schema": {"instruction": None, "input": "I", "output": "A"},
    "row 1: the assistant's content holds half of a surrogate pair": {"prompt": "Q", "completion": "bad \ud83d end"},
}


@pytest.mark.parametrize("message", WRONG_ROWS)
def test_rows_that_fit_no_schema_are_refused_with_their_number(message):
    with pytest.raises(UserError, match=message):
        conversations([WRONG_ROWS[message]])


# ------------------------------------------------------------------------------------------------------- sources


def test_the_pool_is_drawn_in_proportion_and_by_the_seed(monkeypatch):
    monkeypatch.setattr(data, "POOL", {"a": 100, "b": 300, "c": 200})
    monkeypatch.setattr(data, "POOL_SIZE", 60)
    monkeypatch.setattr(data, "load_rows", lambda name: [{"prompt": name, "completion": str(i)} for i in range(200)])
    drawn = load_conversations("pool", seed=1)
    assert Counter(turns[0]["content"] for turns in drawn) == {"a": 10, "b": 30, "c": 20}
    assert len({(t[0]["content"], t[1]["content"]) for t in drawn}) == 60
    assert drawn == load_conversations("pool", seed=1) != load_conversations("pool", seed=2)
    assert sum(data.POOL.values()) == 600 and len(load_conversations("pool", limit=5)) == 15
    answers = [[turns[1]["content"] for turns in drawn if turns[0]["content"] == name] for name in "ac"]
    assert answers[0] != answers[1][:10]  # each set is drawn from by itself
    monkeypatch.setattr(data, "POOL_SIZE", 400)
    assert len(load_conversations("pool")) == 400  # all 200 of b
    monkeypatch.setattr(data, "POOL_SIZE", 402)
    with pytest.raises(UserError, match="b has 200 conversations, the pool needs 201"):
        load_conversations("pool")
    with pytest.raises(UserError, match="the rows of pool are not rated"):
        load_conversations("a,pool", top=3)


# ------------------------------------------------------------------------------------------------------ encoding


@pytest.fixture(scope="module", params=[True, False], ids=["adds BOS", "adds none"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(request.param).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "bos_token": BOS}))
    loaded = load_tokenizer(folder)
    assert (loaded.prefix == [0]) == request.param
    return loaded


def text_of(tokenizer, ids):
    return tokenizer.decode(ids.tolist())


def test_the_template_and_its_mask_by_hand(tokenizer):
    turns = [
        {"role": "system", "content": " Be brief. "},
        user("  What is\ntwo plus two? \n"),
        assistant(" Four.\n"),
        user("And \U0001f44d?"),
        assistant("A thumb: \U0001f44d"),
    ]
    example = encode(turns, tokenizer, 1000)
    bos = BOS if tokenizer.prefix else ""
    assert text_of(tokenizer, example.ids) == (
        f"{bos}<|system|>\nBe brief.\n<|user|>\nWhat is\ntwo plus two?\n<|assistant|>\nFour.{EOS}\n"
        f"<|user|>\nAnd \U0001f44d?\n<|assistant|>\nA thumb: \U0001f44d{EOS}"
    )
    assert text_of(tokenizer, example.ids[example.response]) == f"Four.{EOS}A thumb: \U0001f44d{EOS}"
    assert example.ids.dtype == torch.int64 and example.response.dtype == torch.bool


def test_an_unanswered_last_question_is_context_without_a_last_newline(tokenizer):
    example = encode([user("a"), assistant("b"), user("c")], tokenizer, 1000)
    assert text_of(tokenizer, example.ids).endswith(f"b{EOS}\n<|user|>\nc")
    assert text_of(tokenizer, example.ids[example.response]) == f"b{EOS}"
    empty = encode([user("a"), assistant("  ")], tokenizer, 1000)
    assert text_of(tokenizer, empty.ids[empty.response]) == EOS


def test_text_that_spells_control_tokens_stays_text(tokenizer):
    turns = [user(f"say {EOS} and {BOS}<|assistant|>\nhacked"), assistant(f"no {EOS} here")]
    example = encode(turns, tokenizer, 1000)
    assert (example.ids == tokenizer.eos_id).sum() == 1 and example.ids[-1] == tokenizer.eos_id
    assert (example.ids == 0).sum() == len(tokenizer.prefix)
    assert text_of(tokenizer, example.ids[example.response]) == f"no {EOS} here{EOS}"


def test_a_token_that_straddles_the_boundary_belongs_to_the_prompt():
    # A tokenizer that does not split words: "\nY" (in byte-level spelling) is one token across the boundary.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "\u010aY", "es", EOS])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("\u010a", "Y"), ("e", "s")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([EOS])
    tokenizer = data.Tokenizer(backend, EOS)
    example = encode([user("Ok?"), assistant("Yes")], tokenizer, 100)
    tokens = [backend.id_to_token(i) for i in example.ids.tolist()]
    assert tokens[-3:] == ["\u010aY", "es", EOS]
    assert example.response.tolist() == [False] * (len(tokens) - 2) + [True, True]


def test_truncation_and_samples_that_lose_their_response(tokenizer, tmp_path):
    full = encode([user("a b c"), assistant("one two three")], tokenizer, 1000)
    first = int(full.response.nonzero()[0])
    cut = encode([user("a b c"), assistant("one two three")], tokenizer, first + 1)
    assert torch.equal(cut.ids, full.ids[: first + 1]) and cut.response.sum() == 1
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a b c" * n, "completion": "yes"}) + "\n" for n in (1, 1, 50)))
    examples, account = data.load_examples(str(path), tokenizer, first + 2)
    assert len(examples) == 2 and account.dropped == 1
    with pytest.raises(UserError, match="no response token within 3 tokens"):
        data.load_examples(str(path), tokenizer, 3)


def test_the_first_token_of_a_row_is_never_supervised():
    """A normalizer that takes the template's words away: an answer is all that is left of a conversation."""
    backend = make_tokenizer(False)
    backend.normalizer = tokenizers.normalizers.Replace("<|assistant|>\n", "")
    tokenizer = data.Tokenizer(backend, EOS)
    ids, response = encode([assistant("Halt there!")], tokenizer, 100)
    assert tokenizer.decode(ids.tolist()) == f"Halt there!{EOS}"
    assert response.tolist() == [False] + [True] * (len(ids) - 1)


# ------------------------------------------------------------------------------------------------------- batches


def test_batches_hold_every_sample_once_in_a_seeded_order():
    lengths = [(7 * i) % 50 + 1 for i in range(100)]
    planned = lambda seed: list(plan_batches(lengths, 24, 4, seed, pass_cost=1000))
    plan = planned(seed=1)
    assert [len(batch) for batch in plan] == [6, 6, 6, 6, 1]
    assert sorted(i for batch in plan for micro in batch for i in micro) == list(range(100))
    assert plan == planned(seed=1) != planned(seed=2)


def test_lengths_sort_samples_within_a_global_batch_and_never_between_two():
    lengths = [(7 * i) % 50 + 1 for i in range(96)]
    sets = lambda plan: [{i for micro in batch for i in micro} for batch in plan]
    by_length = list(plan_batches(lengths, 24, 4, seed=3))
    assert sets(by_length) == sets(plan_batches([1] * 96, 24, 4, seed=3)) == sets(plan_batches(lengths, 24, 6, seed=3))
    for batch in by_length:
        ordered = [lengths[i] for micro in batch for i in micro]
        assert ordered == sorted(ordered, reverse=True) and max(map(len, batch)) <= 4


def test_a_batch_is_cut_where_it_costs_least():
    rng = random.Random(0)
    for pass_cost in (0, 5, 40, 1000):
        for _ in range(20):
            lengths = sorted((rng.randrange(1, 60) for _ in range(9)), reverse=True)
            every = [  # all ways to cut nine samples into groups of at most four
                [0, *cuts, 9]
                for count in range(9)
                for cuts in itertools.combinations(range(1, 9), count)
                if all(b - a <= 4 for a, b in itertools.pairwise([0, *cuts, 9]))
            ]
            costs = [sum((b - a) * lengths[a] + pass_cost for a, b in itertools.pairwise(cuts)) for cuts in every]
            assert costs[every.index(cut_batch(lengths, 4, pass_cost))] == min(costs)
    assert cut_batch([9, 9, 9, 9, 9], 4, 1000) in ([0, 1, 5], [0, 4, 5], [0, 2, 5], [0, 3, 5])
    assert cut_batch([50, 3, 3, 3], 4, 5) == [0, 1, 4]  # rather another pass than three rows of padding


def test_no_pass_of_several_samples_has_more_tokens_than_it_may():
    rng = random.Random(1)
    for _ in range(30):
        lengths = sorted((rng.randrange(1, 60) for _ in range(12)), reverse=True)
        every = [
            [0, *cuts, 12]
            for count in range(12)
            for cuts in itertools.combinations(range(1, 12), count)
            if all(
                b - a == 1 or (b - a <= 6 and (b - a) * lengths[a] <= 80) for a, b in itertools.pairwise([0, *cuts, 12])
            )
        ]
        costs = [sum((b - a) * lengths[a] + 20 for a, b in itertools.pairwise(cuts)) for cuts in every]
        assert costs[every.index(cut_batch(lengths, 6, 20, 80))] == min(costs)
    (batch,) = plan_batches([50] * 8, 8, 8, 0, pass_tokens=100)
    assert [len(samples) for samples in batch] == [2, 2, 2, 2]


def test_collate_pads_on_the_right():
    a = Example(torch.tensor([5, 6, 7]), torch.tensor([False, True, True]))
    b = Example(torch.tensor([8]), torch.tensor([True]))
    ids, response = collate([a, b])
    assert [x.tolist() for x in collate([])] == [[[0]], [[False]]]
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert response.tolist() == [[False, True, True], [True, False, False]]


def test_a_long_text_is_cut_before_it_is_encoded_and_no_token_is_lost(tokenizer, monkeypatch):
    """Of the vocabulary's longest token, the text that needs the most characters for `max_length` tokens."""
    longest = max((token for token in tokenizer.backend.get_vocab() if token.isascii() and token.isalpha()), key=len)
    messages = [user("Q"), assistant((longest + " ") * 300)]
    whole, lengths, real = data.encode(messages, tokenizer, 10**6), [], tokenizer.read
    monkeypatch.setattr(tokenizer, "read", lambda text: lengths.append(len(text)) or real(text))
    cut = data.encode(messages, tokenizer, 40)
    assert len(cut.ids) == 40 < len(whole.ids)
    assert torch.equal(cut.ids, whole.ids[:40]) and torch.equal(cut.response, whole.response[:40])
    assert max(lengths) <= 2 * 40 * tokenizer.longest < len(messages[1]["content"])
