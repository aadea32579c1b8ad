"""Rows of anyone's form -> conversations.

A column of a row, or a key of a message, is read; or it changes the text or the mask and is refused by name; or it is
about the row (id, source, score, ...) and is passed over. The run's first lines name what is passed over.
"""

import functools
import json
import re
from collections import defaultdict
from itertools import cycle
from pathlib import Path

from support.files import UserError, check, told
from support.sources import Account, visible

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}, and "weight": 0 if it is not supervised
SPEAKERS = ("user", "assistant")  # in the order in which they speak
ROLES = {"human": "user", "prompter": "user", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model"), "assistant")
KEYS = ("role", "from", "content", "value")  # of a message: its role and its content
SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold a system message
# Columns that tell a schema, and those that it reads besides: one is a list of messages, two a question and an answer
SCHEMAS = {
    ("messages",): SYSTEM,
    ("conversations",): SYSTEM,
    ("prompt", "completion"): (*SYSTEM, "history"),
    ("instruction", "output"): (*SYSTEM, "history", "input", "context"),  # Alpaca
    ("instruction", "response"): (*SYSTEM, "history", "input", "context"),  # Dolly
}
KNOWN = "; ".join("/".join(columns) for columns in SCHEMAS) + "; OpenAssistant's trees"
TREE, NODE = ("prompt",), ("message_id", "text", "role")  # OpenAssistant, a tree or a message a row
TREE_READS = {*NODE, "parent_id", "prompt", "replies", "rank", "deleted"}
# What a column, or a key of a message, means by its name. True, False: a mark, and its value that says "supervised"
MEANING = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SOUNDS = re.compile(r"(?<![a-z])(un|non)?(loss(es)?|train|mask|weight|supervis|ignor)")  # how unknown marks are named
FLAGS = dict.fromkeys(("1", "1.0", "true"), True) | dict.fromkeys(("0", "0.0", "false"), False)
WANTED = {*FLAGS, *"-1 -1.0 yes no y n t f good bad desirable undesirable".split()}  # the values of a label


@functools.lru_cache(4096)
def plain(name) -> str:
    """A name in lower case, its words parted by _: stepLossMask is step_loss_mask."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s-]+", "_", str(name)).lower()


def absent(value) -> bool:
    """Whether a value is null, no text, or the NaN that pandas has for both. 0, false and [] are values."""
    return value is None or value == "" or value != value


def flag(value) -> bool | None:
    """What 1, 0, true or false says, in JSON or as text; None for any other value."""
    return FLAGS.get(str(value).strip().lower())


def about_the_row(given: dict, reads: set[str], place: str, changes=("changes", "changes a message")) -> list[str]:
    """The names outside `reads`. UserError for one that changes the text or the mask, such as `changes`."""
    found, words = [], "changes what is trained on, and is not implemented"
    for key, value in given.items():
        meaning = MEANING.get(name := plain(key))
        if key in reads:
            continue
        if isinstance(meaning, bool):
            wrong = flag(value) is not meaning
        elif meaning in changes:
            wrong = value not in ([], {}, "[]", "{}", "null") and (value is not False or name == "mask")
        elif meaning == "label" and str(value).strip().lower() in WANTED:
            wrong, words = True, "says which answers are wanted: that is preference data, not supervised rows"
        else:
            found.append(key)
            wrong = SOUNDS.search(name) and (not isinstance(value, str) or flag(value) is not None)
        check(absent(value) or not wrong, f"{place.format(key)} {words}")
    return found


def listed(value, wrong: str) -> list:
    """A list, as it is, as a text of JSON, or as a struct of lists. Raises UserError(wrong) for any other value."""
    with told(f"{wrong}, nor its JSON, nor lists of one length"):
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, dict):  # as parquet files may store a list of structs
            columns = {key: held for key, held in value.items() if held is not None}
            value = [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
    check(isinstance(value, list), f"{wrong}, but {type(value).__name__}")
    return value


def message(role, content) -> Message:
    """A message by its role and its content, which is a text or a list of parts that are all text."""
    role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    check(role in ("system", *SPEAKERS), f"role {role!r:.60} is not system, user or assistant")
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            check(part.get("type") == "text", f"the {role}'s content has a part of type {part.get('type')}, not text")
            about_the_row(part, {"type", "text"}, f"key {{}} of a part of the {role}'s content")
        content = "".join(message(role, part.get("text"))["content"] for part in content)
    check(isinstance(content, str), f"the {role}'s content is {type(content).__name__}, not text")
    check(visible(content) == content, f"the {role}'s content holds half of a surrogate pair, which is no character")
    return {"role": role, "content": content}


def turn(given: dict, account: Account) -> Message:
    """A message from an object of a list, as OpenAI's or ShareGPT's; marks say whether it is supervised."""
    check(isinstance(given, dict), f"a message is {type(given).__name__}, not an object with a role and a content")
    role = given.get("from") if given.get("role") is None else given["role"]
    content = given.get("value") if given.get("content") is None else given["content"]
    marks = {key: MEANING.get(plain(key)) for key, value in given.items() if not absent(value)}
    marks = {key: flag(given[key]) is meaning for key, meaning in marks.items() if isinstance(meaning, bool)}
    account.pass_over("keys of messages", about_the_row(given, {*KEYS, *marks}, "key {} of a message"))
    found = message(role, content)
    said = "a message has " + ", ".join(f"{key} {given[key]!r:.60}" for key in marks)
    check(None not in map(flag, map(given.get, marks)), f"{said}: it is supervised or not, 1 or 0")
    check(len(set(marks.values())) <= 1, f"{said}, which disagree")
    check(found["role"] == "assistant" or True not in marks.values(), f"{said}: only the assistant's are supervised")
    return found | ({"weight": 0} if found["role"] == "assistant" and False in marks.values() else {})


def turns(value, what: str, account: Account, speakers=()) -> list[Message]:
    """The messages of a list of objects, or, with `speakers`, of texts that these say in turn (LIMA)."""
    found = listed(value, f"{what} is no list of messages")
    if speakers and all(isinstance(text, str) for text in found):
        found = [{"role": role, "content": text} for role, text in zip(cycle(speakers), found, strict=False)]
    return [turn(given, account) for given in found]


def exchange(row: dict, schema: tuple[str, str], account: Account) -> list[Message]:
    """A question and its answer, texts or messages; Alpaca's input or Dolly's context is a line of its own."""
    question, answer = (
        turns(row[name], name, account) if isinstance(row[name], list | dict) else [message(role, row[name])]
        for name, role in zip(schema, SPEAKERS, strict=True)
    )
    extras = [name for name in ("input", "context") if not absent(row.get(name)) and name in SCHEMAS[schema]]
    check(len(extras) <= 1, "both input and context: one of them is the text that follows the instruction")
    for name in extras:
        question[-1]["content"] += "\n" + message("user", row[name])["content"]
    wrong = "history is no list of [question, answer]"  # LLaMA-Factory's: earlier turns, supervised as any other
    earlier = [] if absent(row.get("history")) else listed(row["history"], wrong)
    check(all(isinstance(pair, list) and len(pair) == 2 for pair in earlier), wrong)
    said = [message(role, text) for pair in earlier for role, text in zip(SPEAKERS, pair, strict=True)]
    asked = [given | {"weight": 0} if given["role"] == "assistant" else given for given in question]  # not supervised
    return said + asked + answer


def read_row(row: dict, schema: tuple[str, ...], account: Account) -> list[list[Message]]:
    """The conversations of a row: one, or of an OpenAssistant tree each of its paths."""
    row = row | row["prompt"] if schema == TREE else row
    changes = ("changes", "changes a prompt") if schema == ("prompt", "completion") else ("changes",)
    reads, place = {*schema, *SCHEMAS.get(schema, TREE_READS)}, f"column {{}} beside {'/'.join(schema)}"
    account.pass_over("columns", about_the_row(row, reads, place, changes))
    if schema == TREE:
        return tree_conversations(row)
    if schema == NODE:  # checked here, and read once its tree is whole
        tree_conversations({**row, "role": "user", "replies": [row | {"replies": []}]})
        return []
    found = exchange(row, schema, account) if len(schema) == 2 else turns(row[schema[0]], schema[0], account, SPEAKERS)
    for first in (message("system", row[name]) for name in SYSTEM if not absent(row.get(name))):
        other = found and found[0]["role"] == "system" and found[0] != first
        check(not other, "a column for the system message beside a conversation that has another one")
        found = found if found[:1] == [first] else [first, *found]
    return [found]


def kept(nodes: list[dict] | None) -> list[dict]:
    return [node for node in nodes or () if not flag(node.get("deleted"))]


def tree_conversations(root: dict) -> list[list[Message]]:
    """Every path of an OpenAssistant tree from its root to a last answer, each one conversation.

    Of assistant replies the one ranked best (lowest; unranked last) is followed. What is deleted is left out.
    """
    found, waiting = [], [(node, []) for node in kept([root])]
    while waiting:
        node, before = waiting.pop()
        about_the_row(node, TREE_READS, "key {} of a message", ("changes",))
        path, replies = [*before, message(node["role"], node["text"])], kept(node.get("replies"))
        if path[-1]["role"] == "user":  # so the replies are the assistant's
            replies = sorted(replies, key=lambda r: float("inf") if absent(r.get("rank")) else float(r["rank"]))[:1]
        elif not any(kept(reply.get("replies")) for reply in replies):
            found.append(path)
        waiting += [(reply, path) for reply in reversed(replies)]
    return found


def conversations(rows: list[dict], source: str = "data", account: Account | None = None) -> list[list[Message]]:
    """Rows of any known schema -> conversations, each a list of messages. A tree is several conversations.

    Raises UserError with source and row (from 1) where one cannot be read. An account that skips it counts it.
    """
    account, found = account or Account(), []
    numbers, replies = {}, defaultdict(list)  # of OpenAssistant's messages by their ids; the roots reply to None
    for number, row in enumerate(rows, 1):
        try:
            check(isinstance(row, dict), f"a {type(row).__name__}, not an object with columns")
            filled = {name for name, value in row.items() if value is not None}
            tree = isinstance(row.get("prompt"), dict) and "completion" not in filled
            schema = TREE if tree else next((names for names in (NODE, *SCHEMAS) if filled >= set(names)), None)
            check(schema, f"columns {', '.join(sorted(map(str, filled)))} fit no schema ({KNOWN}): rename them")
            found += read_row(row, schema, account)
            if schema == NODE:
                name, parent = row["message_id"], row.get("parent_id")
                check(name not in numbers and not absent(name), f"message_id {name!r:.60} is empty or not unique")
                replies[None if absent(parent) else parent].append(row | {"replies": replies[name]})
                numbers[name] = number
        except UserError as reason:
            account.refuse(f"{source}, row {number}", str(reason))
        except (AttributeError, TypeError, KeyError, ValueError) as reason:
            account.refuse(f"{source}, row {number}", f"{'/'.join(schema)} cannot be read: {reason!r}")
    reached = [*replies[None]]
    for node in reached:
        reached += node["replies"]
        del numbers[node["message_id"]]
    for number in numbers.values():
        account.refuse(f"{source}, row {number}", "its parent_id leads to no root: a message is missing")
    return found + [path for root in replies[None] for path in tree_conversations(root)]
