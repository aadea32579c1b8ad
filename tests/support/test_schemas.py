"""What a row says of its text and of what is supervised: used, or refused by name; what is passed over is told."""

import json

import pytest
from conftest import EOS, make_tokenizer

import data
from support.files import UserError
from support.schemas import conversations
from support.sources import Account
from support.tokenizer import Tokenizer

QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
ALPACA = {"instruction": "Q", "input": "", "output": "A"}


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


# name: a row, and the conversation that it is
USED = {
    "alpaca, system": (ALPACA | {"system": "S"}, [SYSTEM, QUESTION, ANSWER]),
    "alpaca, system is empty": (ALPACA | {"system": ""}, [QUESTION, ANSWER]),
    "alpaca, history": (
        ALPACA | {"history": [["a", "b"], ["c", "d"]]},
        [user("a"), assistant("b"), user("c"), assistant("d"), QUESTION, ANSWER],
    ),
    "alpaca, both": (
        ALPACA | {"system": "S", "history": [["a", "b"]]},
        [SYSTEM, user("a"), assistant("b"), QUESTION, ANSWER],
    ),
    "alpaca, no history": (ALPACA | {"history": []}, [QUESTION, ANSWER]),
    "alpaca with Dolly's context": ({"instruction": "Q", "context": "C", "output": "A"}, [user("Q\nC"), ANSWER]),
    "dolly with Alpaca's input": ({"instruction": "Q", "input": "I", "response": "A"}, [user("Q\nI"), ANSWER]),
    "dolly, system": ({"instruction": "Q", "response": "A", "system_prompt": "S"}, [SYSTEM, QUESTION, ANSWER]),
    "completion, system": ({"prompt": "Q", "completion": "A", "system": "S"}, [SYSTEM, QUESTION, ANSWER]),
    "messages, system": ({"messages": [QUESTION, ANSWER], "system": "S"}, [SYSTEM, QUESTION, ANSWER]),
    "messages, the same system twice": ({"messages": [SYSTEM, QUESTION, ANSWER], "system": "S"}, None),
    "sharegpt, system": (
        {"conversations": [{"from": "human", "value": "Q"}, gpt("A")], "system": "S", "tools": "[]"},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "sharegpt, weight": (
        {"conversations": [{"from": "human", "value": "Q", "weight": 0}, gpt("A", weight=0), gpt("B", weight=1)]},
        [QUESTION, ANSWER | {"weight": 0}, assistant("B")],
    ),
    "openai, weight": (
        {"messages": [QUESTION, assistant("A", weight=0), QUESTION, assistant("B", weight=1)]},
        [QUESTION, ANSWER | {"weight": 0}, QUESTION, assistant("B")],
    ),
    "axolotl, train": (
        {"messages": [user("Q", train=False), assistant("A", train=False), assistant("B", train=True)]},
        [QUESTION, ANSWER | {"weight": 0}, assistant("B")],
    ),
    "a weight that is null, as parquet has it": (
        {"messages": [user("Q", weight=None), assistant("A", weight=None)]},
        None,
    ),
    "trl, earlier answers in a prompt": (
        {"prompt": [user("P"), assistant("B"), QUESTION], "completion": [ANSWER]},
        [user("P"), assistant("B", weight=0), QUESTION, ANSWER],
    ),
    "parts of text": (
        {"messages": [user([{"type": "text", "text": t} for t in ("Q", "R")]), ANSWER]},
        [user("QR"), ANSWER],
    ),
    "other names of roles": (
        {
            "messages": [
                {"role": "developer", "content": "S"},
                user("Q") | {"role": "Human"},
                {"role": "model", "content": "A"},
            ]
        },
        [SYSTEM, QUESTION, ANSWER],
    ),
    "a column of another schema that is null": ({"messages": None, **ALPACA}, [QUESTION, ANSWER]),
    "verl, slime, xtuner, ms-swift: an answer that is not supervised": (
        {
            "messages": [
                QUESTION,
                assistant("A", trainable=False),
                assistant("B", step_loss_mask=0),
                assistant("C", output_with_loss=False),
                assistant("D", loss=False, lossScale=0.0),
                assistant("E", masked=True),  # torchtune, the other way round
                assistant("F", trainable=True, loss_scale=1.0, masked=False),
            ]
        },
        [QUESTION, *(assistant(text, weight=0) for text in "ABCDE"), assistant("F")],
    ),
    "a column that says what holds anyway, as a table has it": (ALPACA | {"weight": "1"}, [QUESTION, ANSWER]),
    "LIMA, texts in turn": ({"conversations": ["Q", "A"], "source": "x"}, [QUESTION, ANSWER]),
    "a struct of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"], "weight": [None, 0], "id": None}},
        [QUESTION, ANSWER | {"weight": 0}],
    ),
    "a text of JSON": ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, None),
    "messages and a text": ({"prompt": [QUESTION], "completion": "A"}, [QUESTION, ANSWER]),
    "history as a table has it": (ALPACA | {"history": '[["a", "b"]]'}, [user("a"), assistant("b"), QUESTION, ANSWER]),
    "pandas' NaN is nothing": (ALPACA | {"input": float("nan"), "images": float("nan")}, [QUESTION, ANSWER]),
    "a system message that spells null": (
        ALPACA | {"system": "null"},
        [SYSTEM | {"content": "null"}, QUESTION, ANSWER],
    ),
    "no tool was called": (
        {"messages": [user("Q", tool_calls=None), assistant("A", tool_calls=[])], "tools": []},
        None,
    ),
}


@pytest.mark.parametrize("name", USED)
def test_what_says_something_of_the_text_or_the_mask_is_used(name):
    row, expected = USED[name]
    found = conversations([row])
    if not expected:
        given = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
        expected = [{"role": turn["role"], "content": turn["content"]} for turn in given]
    assert found == [expected]


# words of the error: a row
REFUSED = {
    "column tools beside messages": {"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]},
    "column tools beside instruction/output": ALPACA | {"tools": "f"},
    "column images beside conversations": {"conversations": [], "images": ["a.png"]},
    "column history beside messages": {"messages": [QUESTION, ANSWER], "history": [["a", "b"]]},
    "column input beside prompt/completion": {"prompt": "Q", "completion": "A", "input": "I"},
    "column rejected beside messages": {"messages": [QUESTION, ANSWER], "rejected": "B"},
    "column weight beside instruction/output": ALPACA | {"weight": 0.1},
    "column loss_mask beside messages": {"messages": [QUESTION, ANSWER], "loss_mask": [0, 1]},
    "column documents beside messages": {"messages": [QUESTION, ANSWER], "documents": [{"text": "D"}]},
    "column label beside prompt.completion says which answers": {"prompt": "Q", "completion": "A", "label": True},
    "history is no list of": ALPACA | {"history": "earlier"},
    "key function_call of a message": {"messages": [QUESTION, assistant("", function_call={"name": "f"})]},
    "key reasoning_content of a message": {"messages": [QUESTION, assistant("A", reasoning_content="hm")]},
    "key images of a message": {"messages": [user("Q", images=["a.png"]), ANSWER]},
    "key train_detail of a message": {"conversations": [gpt("A", train_detail=[{"begin_offset": 0}])]},
    "a message has weight 2": {"messages": [QUESTION, assistant("A", weight=2)]},
    "a message has train 'no'": {"messages": [QUESTION, assistant("A", train="no")]},
    "the user's content has a part of type input_audio": {"messages": [user([{"type": "input_audio"}]), ANSWER]},
    "the user's content is NoneType": {"messages": [user([{"type": "text", "text": None}]), ANSWER]},
    "a message has weight \\[1, 0\\]": {"messages": [QUESTION, assistant("A", weight=[1, 0])]},
    "a message has loss_scale 0.5": {"messages": [QUESTION, assistant("A", loss_scale=0.5)]},
    "a message has loss 1, trainable 0, which disagree": {"messages": [QUESTION, assistant("A", loss=1, trainable=0)]},
    "key mask of a message": {"messages": [QUESTION, assistant("A", mask=False)]},
    "key ignore_loss of a message": {"messages": [QUESTION, assistant("A", ignore_loss=True)]},
    "key isTrained of a message": {"messages": [QUESTION, assistant("A", isTrained=False)]},
    "key unsupervised of a message": {"messages": [QUESTION, assistant("A", unsupervised="1")]},
    "key label of a message says which": {"messages": [QUESTION, assistant("A", label=False)]},
    "key loss_weight of a part of the assistant's content": {
        "messages": [QUESTION, assistant([{"type": "text", "text": "A", "loss_weight": 0.0}])]
    },
    "column trainable beside instruction/output": ALPACA | {"trainable": 0},
    "column sample_weight beside instruction/output": ALPACA | {"sample_weight": 0.5},
    "column loss_scale beside instruction/output": ALPACA | {"loss_scale": "last_round"},
    "column weights beside instruction/output": ALPACA | {"weights": []},
    "column rejected_response beside instruction/output": ALPACA | {"rejected_response": "B"},
    "the user's content is int": ALPACA | {"input": 0},
    "the system's content is bool": ALPACA | {"system": False},
    "history is no list of .* but int": ALPACA | {"history": 0},
    "messages is no list of messages, nor its JSON, nor lists of one length: ": {"messages": "[{'role': 'user'}]"},
    "nor lists of one length: zip": {"messages": {"role": ["user"], "content": ["Q", "A"]}},
    "a message is str, not an object": {"messages": [QUESTION, "A"]},
    "a message is str": {"prompt": ["Q"], "completion": ["A"]},
    "messages is no list of messages, but int": {"messages": 5},
    "a message is NoneType": {"messages": [QUESTION, None, ANSWER]},
    "a message is list": {"messages": [["Q", "A"]]},
    "role 'function_call'": {"conversations": [{"from": "function_call", "value": "{}"}]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_says_something_that_is_not_implemented_is_refused_by_name(words):
    with pytest.raises(UserError, match=f"data, row 2: .*{words}"):
        conversations([*([{**ALPACA} if "instruction" in REFUSED[words] else _plain(REFUSED[words])]), REFUSED[words]])


def _plain(row):
    """A row of the same schema in which nothing is wrong."""
    if "messages" in row:
        return {"messages": [QUESTION, ANSWER]}
    return {"conversations": []} if "conversations" in row else {"prompt": "Q", "completion": "A"}


@pytest.mark.parametrize("value", [True, 0, 1.0, "False", "TRUE", " 0", "1.0", -1, "no", "undesirable"])
@pytest.mark.parametrize("name", ["label", "Label", "kto_tag", "KTO-tag"])
def test_ktos_label_is_preference_data_in_any_spelling(name, value):
    with pytest.raises(UserError, match=f"column {name} beside instruction.output says which answers are wanted"):
        conversations([ALPACA | {name: value}])


@pytest.mark.parametrize(
    "about", [{"label": "positive"}, {"label": 7}, {"train_split": "b"}, {"masked_text": "[MASK]"}]
)
def test_what_only_sounds_like_a_mark_or_a_label_is_passed_over(about):
    assert conversations([ALPACA | about], "data", account := Account()) == [[QUESTION, ANSWER]]
    assert account.lines() == [f"columns passed over: {next(iter(about))}"]


def test_half_a_surrogate_pair_in_a_name_is_told_as_its_escape():
    conversations([ALPACA | {"\ud83d": 1}], "data", account := Account())
    assert account.lines() == ["columns passed over: \\ud83d"]
    json.dumps(account.record(), ensure_ascii=False).encode()


def test_rows_of_several_schemas_may_stand_in_one_source():
    rows = [ALPACA, {"prompt": "Q", "completion": "A"}, {"messages": [QUESTION, ANSWER]}]
    assert conversations(rows) == 3 * [[QUESTION, ANSWER]]


def test_what_is_only_about_the_row_is_passed_over_and_told():
    account = Account()
    rows = [{"messages": [user("Q", name="Ann"), ANSWER], "id": 3, "score": 4.5, "system": ""}]
    conversations([*rows, rows[0] | {"source": "a book"}], "data", account)
    assert account.lines() == ["columns passed over: id, score, source", "keys of messages passed over: name"]
    tree = {"prompt": {"text": "Q", "role": "prompter", "lang": "en", "replies": []}, "message_tree_id": 1}
    conversations([tree], "data", account := Account())
    assert account.lines() == ["columns passed over: message_tree_id, lang"]


def test_rows_that_cannot_be_used_are_skipped_counted_and_told_where_that_is_asked_for():
    rows = [ALPACA, {"question": "Q"}, ALPACA | {"output": None}, ALPACA, {"question": "R"}, "text"]
    account = Account(skip_bad_rows=True)
    assert len(conversations(rows, "r.jsonl", account)) == 2
    assert [line[:42] for line in account.lines()] == [
        "skipped: 2 rows, the first r.jsonl, row 2:",
        "skipped: 1 rows, the first r.jsonl, row 3:",
        "skipped: 1 rows, the first r.jsonl, row 6:",
    ]
    assert sum(account.record()["skipped"].values()) == 4
    with pytest.raises(UserError, match="row 2: columns question fit no schema .*--skip-bad-rows"):
        conversations(rows, "r.jsonl", Account(skip_bad_rows=False))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(make_tokenizer(adds_bos=True), EOS)


def test_an_answer_of_weight_0_is_read_and_not_supervised(tokenizer):
    turns = [user("Q"), assistant("wrong", weight=0), user("R"), assistant("right")]
    example = data.encode(turns, tokenizer, 100)
    plain = data.encode([{**turn, "weight": 1} for turn in turns], tokenizer, 100)
    assert example.ids.tolist() == plain.ids.tolist()  # the text is the same, its end tokens too
    assert tokenizer.decode(example.ids[example.response].tolist()) == f"right{EOS}"
    assert tokenizer.decode(plain.ids[plain.response].tolist()) == f"wrong{EOS}right{EOS}"


def test_samples_that_are_cut_are_counted_beside_those_that_are_dropped(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt,completion\nQ,A\nQ,{'A ' * 50}\n{'Q ' * 50},A\n")
    account = Account()
    examples, _ = data.load_examples(str(tmp_path / "rows.csv"), tokenizer, 30, account=account)
    ends = [int(example.ids[-1]) == tokenizer.eos_id for example in examples]
    assert (len(examples), account.dropped, ends) == (2, 1, [True, False])
    assert account.lengths(30) == "1 dropped, without a response token in the first 30; 1 cut there, their ends lost"
    whole = len(examples[0].ids)  # what just fits is not cut
    data.load_examples(str(tmp_path / "rows.csv"), tokenizer, whole, 1, account=(fits := Account()))
    data.load_examples(str(tmp_path / "rows.csv"), tokenizer, whole - 1, 1, account=(cut := Account()))
    assert (fits.cut, cut.cut) == (0, 1)
