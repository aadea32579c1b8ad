"""Rows of anyone's form -> conversations.

A row's column, as a message's key, is read, or it changes the text or the mask and is refused by name, or it is about
the row (id, source, score, ...) and is passed over, and the run's first lines say so.
"""

import contextlib
import functools
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from support.files import UserError, check
from support.sources import Account, visible

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}, and "weight": 0 if it is not supervised
ROLES = {"human": "user", "prompter": "user", "developer": "system"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model"), "assistant")
KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))  # a message's role and text
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
TREE, NODE = ("prompt",), ("message_id", "parent_id", "text", "role")  # OpenAssistant, a tree or a message a row
TREE_READS = {*NODE, "prompt", "replies", "rank", "deleted"}
# The marks that are read of a message, by the names that trainers give them: what each says where it is supervised
MARKS = dict.fromkeys(("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale"), True)
MARKS |= dict.fromkeys(("loss_mask", "step_loss_mask", "output_with_loss"), True) | {"masked": False}
SOUNDS = re.compile(r"(?<![a-z])(un|non)?(loss(es)?|train|mask|weight|supervis|ignor)")  # how other names of them sound
# Keys of a message, and columns in rows of any schema, that change the text or the mask in ways not implemented here
MEDIA = set("tools functions images image videos video audios audio mask".split())
REFUSED_KEYS = set("tool_calls function_call tool_call_id image_url refusal prefix labels reasoning".split()) | MEDIA
REFUSED_KEYS |= set("reasoning_content thinking train_detail training_detail".split())
REFUSED_COLUMNS = set("chosen rejected rejected_response rejected_messages history documents".split())
REFUSED_COLUMNS |= {"chat_template", "chat_template_kwargs", *SYSTEM, *MEDIA}
NOTHING = ([], {}, "[]", "{}", "null")  # how one of these says that it does not apply, besides null
LABELS = {"label", "kto_tag", "kto_label", "desirable", "is_desirable"}  # KTO's: is this answer wanted?
FLAGS = dict.fromkeys(("1", "1.0", "true"), True) | dict.fromkeys(("0", "0.0", "false"), False)
WANTED = {*FLAGS, *"-1 -1.0 yes no y n t f good bad desirable undesirable".split()}


@functools.lru_cache(4096)
def plain(name) -> str:
    """A key in lower case, its words parted by _: stepLossMask is step_loss_mask."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s-]+", "_", str(name)).lower()


SPEAKERS = ("user", "assistant")  # in the order in which they speak


def absent(value) -> bool:
    """Whether a value is none: null, no text, or the NaN that pandas has for both. 0, false and [] are values."""
    return value is None or value == "" or value != value


def flag(value) -> bool | None:
    """What 1, 0, true or false says, as JSON or a table spells it; None for what is none of them."""
    return FLAGS.get(str(value).strip().lower())


def refused(given: dict, names: set[str], reads: set[str]) -> str | None:
    """The first key that is not read and changes the text or the mask: one of `names`, or what sounds like a mark."""
    for key in sorted(given.keys() - reads, key=str):
        name, value = plain(key), given[key]
        if absent(value) or flag(value) == MARKS.get(name, ""):  # such as a weight of 1, which holds anyway
            continue
        off = value in NOTHING or (value is False and names is REFUSED_KEYS and name != "mask")
        about = isinstance(value, str) and flag(value) is None and name not in MARKS  # a text on something else
        wanted = name in LABELS and str(value).strip().lower() in WANTED
        if wanted or (not off if key in names else SOUNDS.search(name) and not about):
            return key
    return None


def first_there(options: Iterable[tuple[str, ...]], given: dict) -> tuple[str, ...] | None:
    """The first of several tuples of keys that are all filled, or else all there."""
    filled = {key for key, value in given.items() if value is not None}
    return next((keys for there in (filled, given.keys()) for keys in options if there >= set(keys)), None)


def listed(value, wrong: str) -> list:
    """A list, however it was written: as it is, as a text of JSON, as a struct of lists; else a UserError, `wrong`."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
        columns = {key: held for key, held in value.items() if held is not None} if isinstance(value, dict) else None
        if columns is not None and all(isinstance(column, list) for column in columns.values()):
            value = [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{wrong}, nor JSON or lists of one length that make one, but {type(value).__name__}")
    return value


def text_of(role: str, content) -> str:
    """A message's content: a text, or a list of parts that are all text, which stand one behind the other."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if part.get("type") != "text":
                raise UserError(f"the {role}'s content has a part of type {part.get('type')}, only text is read")
            if key := refused(part, REFUSED_KEYS, {"type", "text"}):
                raise UserError(f"a part of the {role}'s content has {key}, which is not implemented")
        return "".join(text_of(role, part.get("text")) for part in content)
    check(isinstance(content, str), f"the {role}'s content is {type(content).__name__}, not text")
    check(visible(content) == content, f"the {role}'s content holds half of a surrogate pair, which is no character")
    return content


def message(role, content) -> Message:
    """A message by its role, whatever its name there, and its content."""
    role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role {role!r:.60} is not system, user or assistant")
    return {"role": role, "content": text_of(role, content)}


def turn(given: dict, account: Account) -> Message:
    """A message from an object of a list; KEYS names its role and its content, MARKS whether it is supervised."""
    check(isinstance(given, dict), f"a message is {type(given).__name__}, not an object with a role and a content")
    marks = {key: flag(mark) for key, mark in given.items() if plain(key) in MARKS and not absent(mark)}
    keys = first_there(KEYS, given) or KEYS[0]
    if key := refused(given, REFUSED_KEYS, {*keys, *marks}):
        raise UserError(f"a message has {key}, which is not implemented")
    found = message(*map(given.get, keys))
    said = ", ".join(f"{key} {given[key]!r:.60}" for key in marks)
    supervised = {mark == MARKS[plain(key)] for key, mark in marks.items()}
    check(None not in marks.values(), f"a message has {said}: it is supervised or not, 1 or 0")
    check(len(supervised) <= 1, f"a message has {said}, which disagree")
    if found["role"] != "assistant" and True in supervised:
        raise UserError(f"a {found['role']}'s message has {said}: only the assistant's are supervised")
    if found["role"] == "assistant" and False in supervised:
        found["weight"] = 0
    account.pass_over("keys of messages", [key for key in given if key not in {*keys, *marks, *MARKS, *REFUSED_KEYS}])
    return found


def turns(value, what: str, account: Account, roles: tuple[str, ...] = ()) -> list[Message]:
    """The messages of a list of objects or, where `roles` are given, of texts (LIMA), which these say in turn."""
    found = listed(value, f"{what} is no list of messages")
    if roles and all(isinstance(text, str) for text in found):
        return [message(role, text) for role, text in zip(itertools.cycle(roles), found, strict=False)]
    return [turn(given, account) for given in found]


def exchange(row: dict, schema: tuple[str, str], account: Account) -> list[Message]:
    """A question and its answer, each a text or messages; Alpaca's input or Dolly's context is a line of its own."""
    question, answer = (
        turns(row[name], name, account) if isinstance(row[name], list | dict) else [message(role, row[name])]
        for name, role in zip(schema, SPEAKERS, strict=True)
    )
    extras = [name for name in ("input", "context") if not absent(row.get(name)) and name in SCHEMAS[schema]]
    check(len(extras) <= 1, "both input and context: one of them is the text that follows the instruction")
    for name in extras:
        question[-1]["content"] += "\n" + text_of("user", row[name])
    wrong = "history is no list of [question, answer]"  # LLaMA-Factory's: earlier turns, supervised as any other
    earlier = [] if absent(row.get("history")) else listed(row["history"], wrong)
    check(all(isinstance(pair, list) and len(pair) == 2 for pair in earlier), wrong)
    said = [message(role, text) for pair in earlier for role, text in zip(SPEAKERS, pair, strict=True)]
    # what is a prompt is not supervised
    return said + [given | {"weight": 0} if given["role"] == "assistant" else given for given in question] + answer


def find_schema(row: dict) -> tuple[str, ...]:
    """The columns that tell which schema a row is of; UserError with its columns if it is of none."""
    check(isinstance(row, dict), f"a {type(row).__name__}, not an object with columns")
    if isinstance(row.get("prompt"), dict) and row.get("completion") is None:
        return TREE
    if schema := first_there((NODE, *SCHEMAS), row):
        return schema
    raise UserError(f"columns {', '.join(sorted(map(str, row)))} fit no schema ({KNOWN}): rename them to one of these")


def read_row(row: dict, schema: tuple[str, ...], account: Account) -> list[list[Message]]:
    """The conversations of a row: one, or of an OpenAssistant tree each of its paths."""
    row = row | row["prompt"] if schema == TREE else row
    reads = {*schema, *SCHEMAS.get(schema, TREE_READS)}
    changes = REFUSED_COLUMNS | ({"input", "context"} if schema == ("prompt", "completion") else set())
    if name := refused(row, changes, reads):
        words = "says which answers are wanted: that is preference data, not supervised rows"
        other = f"beside {'/'.join(schema)} changes what is trained on, and is not implemented"
        raise UserError(f"column {name} {words if plain(name) in LABELS else other}")
    known = reads | REFUSED_COLUMNS
    account.pass_over("columns", [name for name in row if name not in known and plain(name) not in MARKS])
    if schema == TREE:
        return tree_conversations(row)
    if schema == NODE:  # checked here, and read once its tree is whole
        tree_conversations({**row, "role": "user", "replies": [row | {"replies": []}]})
        return []
    found = exchange(row, schema, account) if len(schema) == 2 else turns(row[schema[0]], schema[0], account, SPEAKERS)
    for first in (message("system", row[name]) for name in SYSTEM if not absent(row.get(name))):
        if found and found[0]["role"] == "system" and found[0] != first:
            raise UserError("a column for the system message beside a conversation that has another one")
        found = found if found[:1] == [first] else [first, *found]
    return [found]


def tree_conversations(root: dict) -> list[list[Message]]:
    """Every root-to-leaf path of an OpenAssistant tree along the best-ranked replies, each path one conversation.

    Of assistant replies the one ranked best (lowest; unranked last) is followed, of user replies each. Deleted messages
    are left out, and so are a last question that nobody answered, and a path that is the head of another.
    """
    paths = {}  # (role, text) of every message down to one: the same without that one; two that say the same are one
    waiting = [] if flag(root.get("deleted")) else [(root, ())]
    while waiting:
        node, before = waiting.pop()
        if key := refused(node, REFUSED_COLUMNS, TREE_READS):
            raise UserError(f"a message has {key}, which is not implemented")
        said = message(node["role"], node["text"])
        path = (*before, tuple(said.values()))
        paths[path] = before
        replies = [reply for reply in node.get("replies") or () if not flag(reply.get("deleted"))]
        if said["role"] == "user" and replies:  # so they are the assistant's
            replies = [min(replies, key=lambda reply: math.inf if absent(reply.get("rank")) else float(reply["rank"]))]
        waiting += [(reply, path) for reply in reversed(replies)]
    answered = set(paths.values())
    kept = {path: before for path, before in paths.items() if path[-1][0] != "user" or path in answered}
    heads = set(kept.values())
    return [[message(*said) for said in path] for path in kept if path not in heads]


def conversations(rows: list[dict], source: str = "data", account: Account | None = None) -> list[list[Message]]:
    """Rows of any known schema -> conversations, each a list of messages. A row is one conversation, a tree several.

    Raises UserError with source, row (from 1) and columns where one fits no schema of SCHEMAS or OpenAssistant's, or
    another than those before it; an account that skips bad rows counts them instead.
    """
    account, found, first, schema = account or Account(), [], None, ()
    numbers, replies = {}, defaultdict(list)  # of OpenAssistant's messages by their ids; the roots reply to None
    for number, row in enumerate(rows, 1):
        try:
            schema = find_schema(row)
            if schema != (first := first or schema):
                columns = f"columns {', '.join(sorted(map(str, row)))}, row 1 has {'/'.join(first)}"
                raise UserError(f"{columns}: a source is to hold one schema ({KNOWN})")
            found += read_row(row, schema, account)
            if schema == NODE:
                name, parent = row["message_id"], row["parent_id"]
                if absent(name) or name in numbers:
                    raise UserError(f"message_id {name!r:.60} is empty, or another row's as well")
                replies[None if absent(parent) else parent].append(row | {"replies": replies[name]})
                numbers[name] = number
        except (AttributeError, TypeError, KeyError, ValueError) as reason:
            what = f"{'/'.join(schema)} does not hold what this schema has there ({type(reason).__name__}: {reason})"
            account.refuse(f"{source}, row {number}", str(reason) if isinstance(reason, UserError) else what)
    reached = [*replies[None]]
    for node in reached:
        reached += node["replies"]
        del numbers[node["message_id"]]
    for number in numbers.values():
        what = "its parent_id leads to no root: a message above it is missing, or they stand in a circle"
        account.refuse(f"{source}, row {number}", what)
    return found + [path for root in replies[None] for path in tree_conversations(root)]
