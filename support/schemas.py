"""Rows of anyone's form -> conversations: what their columns say, what is refused by name, what is passed over.

Nothing that a row says of its text or of what is supervised is dropped in silence. A column is read, or it changes the
meaning and is refused, or it is about the row (id, source, score, ...): passed over, and the run's first lines say so.
The same holds for the keys of a message.
"""

from collections.abc import Iterator

from support.files import UserError
from support.sources import Account, build_trees

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}, and "weight": 0 if it is not supervised
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"ai": "assistant", "model": "assistant", "developer": "system"}
SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold a system message
WEIGHTS = ("weight", "train", "training", "loss")  # keys of a message: is it supervised?
# Keys of a message that change its text or its mask in ways that are not implemented here
REFUSED_KEYS = {
    *("tool_calls", "function_call", "tool_call_id", "tools", "functions", "images", "image", "image_url", "audio"),
    *("audios", "video", "videos", "refusal", "reasoning", "reasoning_content", "thinking", "prefix", "mask"),
    *("train_detail", "training_detail", "loss_mask", "labels"),
}
# Columns that do, in rows of any schema
REFUSED_COLUMNS = {
    *("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "chosen", "rejected", "kto_tag"),
    *("weight", "train", "mask", "loss_mask", "completion_mask", "assistant_masks", "history", *SYSTEM),
    *("documents", "chat_template", "chat_template_kwargs"),
}
NOTHING = (None, "", [], {}, "[]", "{}", "null")  # how a column or key says that it does not apply


# ------------------------------------------------------------------------------------------------------- a message


def text_of(role: str, content) -> str:
    """A message's content: a text, or a list of parts that are all text, which stand one behind the other."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        kinds = [part.get("type") for part in content if part.get("type") != "text"]
        if kinds:
            raise UserError(f"the {role}'s content has a part of type {kinds[0]}, only text is read")
        parts = [text_of(role, part.get("text")) for part in content]
        return "".join(parts)
    if not isinstance(content, str):
        raise UserError(f"the {role}'s content is {type(content).__name__}, not text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise UserError(f"the {role}'s content holds half of a surrogate pair, which is no character") from None
    return content


def message(role, content) -> Message:
    """A message by its role, whatever its name there, and its content."""
    role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role {role!r} is not system, user or assistant")
    return {"role": role, "content": text_of(role, content)}


def turn(given: dict, role: tuple[str, ...], content: tuple[str, ...], account: Account) -> Message:
    """A message from an object of a list. role, content: the keys that hold them, the first that is there."""
    for key in sorted(given.keys() & REFUSED_KEYS):
        if given[key] not in NOTHING and given[key] is not False:
            raise UserError(f"a message has {key}, which is not implemented")
    role, content = (next((key for key in keys if key in given), keys[0]) for keys in (role, content))
    found = message(given.get(role), given.get(content))
    marks = {key: given[key] for key in WEIGHTS if given.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise UserError(f"a message has {key} {mark!r}: it is supervised or not, 1 or 0")
    if len(set(map(bool, marks.values()))) > 1:
        raise UserError(f"a message has {' and '.join(marks)}, which disagree")
    if found["role"] != "assistant" and any(marks.values()):
        raise UserError(f"a {found['role']}'s message has {next(iter(marks))} 1: only the assistant's are supervised")
    if found["role"] == "assistant" and not all(marks.values()):
        found["weight"] = 0
    account.pass_over("keys of messages", [key for key in given if key not in {role, content, *WEIGHTS, *REFUSED_KEYS}])
    return found


# ------------------------------------------------------------------------------------------------------- a schema


def _messages(row: dict, account: Account) -> list[Message]:
    return [turn(given, ("role",), ("content",), account) for given in row["messages"]]


def _sharegpt(row: dict, account: Account) -> list[Message]:
    return [turn(given, ("from", "role"), ("value", "content"), account) for given in row["conversations"]]


def _completion(row: dict, account: Account) -> list[Message]:
    if not isinstance(row["prompt"], list):
        return [message("user", row["prompt"]), message("assistant", row["completion"])]
    prompt, completion = (_messages({"messages": row[part]}, account) for part in ("prompt", "completion"))
    answers = [given | {"weight": 0} if given["role"] == "assistant" else given for given in prompt]
    return answers + completion  # what is a prompt is not supervised


def _exchange(answer: str):
    """A question and its answer; Alpaca's input or Dolly's context follows the question on a line of its own."""

    def read(row: dict, account: Account) -> list[Message]:
        extras = [name for name in ("input", "context") if row.get(name)]
        if len(extras) > 1:
            raise UserError("both input and context: one of them is the text that follows the instruction")
        question = message("user", row["instruction"])
        for name in extras:
            question["content"] += "\n" + text_of("user", row[name])
        return [question, message("assistant", row[answer])]

    return read


# Columns that tell a schema: how its rows are read, and columns that it reads besides. The first whose columns are all
# there is taken.
SCHEMAS = {
    ("messages",): (_messages, SYSTEM),
    ("conversations",): (_sharegpt, SYSTEM),
    ("prompt", "completion"): (_completion, (*SYSTEM, "history")),
    ("instruction", "output"): (_exchange("output"), (*SYSTEM, "history", "input", "context")),  # Alpaca
    ("instruction", "response"): (_exchange("response"), (*SYSTEM, "history", "input", "context")),  # Dolly
}
KNOWN = "; ".join("/".join(columns) for columns in SCHEMAS) + "; OpenAssistant's trees"
TREE = ("prompt",)  # OpenAssistant, a tree a row
TREE_COLUMNS = {"message_id", "parent_id", "text", "role"}  # OpenAssistant, one message a row
TREE_READS = {*TREE_COLUMNS, "prompt", "replies", "rank", "deleted"}


def find_schema(row: dict) -> tuple[str, ...]:
    """The columns that tell which schema a row is of; UserError with its columns if it is of none."""
    if not isinstance(row, dict):
        raise UserError(f"a {type(row).__name__}, not an object with columns")
    if isinstance(row.get("prompt"), dict):
        return TREE
    filled = {name for name, value in row.items() if value is not None}  # other sources' columns may be null
    for there in (filled, row.keys()):
        for columns in SCHEMAS:
            if there >= set(columns):
                return columns
    raise UserError(f"columns {', '.join(sorted(map(str, row)))} fit no schema ({KNOWN}): rename them to one of these")


def read_row(row: dict, schema: tuple[str, ...], account: Account) -> list[list[Message]]:
    """The conversations of a row: one, or of an OpenAssistant tree each of its paths."""
    if schema == TREE:
        account.pass_over("columns", [name for name in {**row, **row["prompt"]} if name not in TREE_READS])
        return list(tree_conversations(row["prompt"]))
    read, besides = SCHEMAS[schema]
    refused = REFUSED_COLUMNS - {*schema, *besides}
    if set(schema) <= {"prompt", "completion"}:
        refused |= {"input", "context"}
    for name in sorted(row.keys() & refused):
        if row[name] not in NOTHING and not (name in WEIGHTS and row[name] == 1):
            raise UserError(
                f"column {name} beside {'/'.join(schema)} changes what is trained on, and is not implemented"
            )
    if isinstance(row.get("label"), bool):
        raise UserError("column label says which answers are wanted: that is preference data, not supervised rows")
    found = read(row, account)
    if row.get("history") not in NOTHING:
        found = _earlier(row["history"]) + found
    for system in (row[name] for name in SYSTEM if row.get(name) not in NOTHING):
        first = message("system", system)
        if found and found[0]["role"] == "system" and found[0] != first:
            raise UserError("a column for the system message beside a conversation that has another one")
        found = found if found and found[0] == first else [first, *found]
    account.pass_over("columns", [name for name in row if name not in {*schema, *besides, *REFUSED_COLUMNS}])
    return [found]


def _earlier(history) -> list[Message]:
    """LLaMA-Factory's column history, a list of [question, answer]: earlier turns, supervised as any other."""
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history is no list of [question, answer]")
    return [message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]


def tree_conversations(root: dict) -> Iterator[list[Message]]:
    """Every root-to-leaf path of an OpenAssistant tree along the best-ranked replies, each path one conversation.

    Of several assistant replies the one ranked best (lowest; unranked last) is followed, of several user replies each
    one. Deleted messages are left out; a question that nobody answered is cut off the end of its path.
    """
    found = []

    def walk(node, path):
        path = path + [message(node["role"], node["text"])]
        replies = [reply for reply in node.get("replies") or () if not reply.get("deleted")]
        if path[-1]["role"] == "user":  # so the replies are the assistant's
            replies.sort(key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
            replies = replies[:1]
        for reply in replies:
            walk(reply, path)
        if not replies:
            path = path[:-1] if path[-1]["role"] == "user" else path
            if path and path not in found:
                found.append(path)

    if not root.get("deleted"):
        walk(root, [])
    # an unanswered question leaves the head of a longer path behind
    return (path for path in found if not any(other[: len(path)] == path and other != path for other in found))


# ---------------------------------------------------------------------------------------------------- all its rows


def conversations(rows: list[dict], source: str = "data", account: Account | None = None) -> list[list[Message]]:
    """Rows of any known schema -> conversations, each a list of messages. A row is one conversation, a tree several.

    Schemas: messages; prompt/completion; Alpaca; Dolly; ShareGPT; OpenAssistant (whole trees, or a message a row).
    Raises UserError with the source, the row's number (from 1) and its columns when a row fits none of them, or
    another than the rows before it; with an account that skips bad rows, they are counted there instead.
    """
    account = account or Account()
    if all(isinstance(row, dict) and row.keys() >= TREE_COLUMNS for row in rows):
        try:
            rows = [{"prompt": root} for root in build_trees(rows)]
        except TypeError as reason:
            raise UserError(f"{source}: a message_id or parent_id is no text ({reason})") from None
    found, first = [], None
    for number, row in enumerate(rows, 1):
        try:
            schema = find_schema(row)
            if schema != (first := first or schema):
                found_columns = f"columns {', '.join(sorted(map(str, row)))}, row 1 has {'/'.join(first)}"
                raise UserError(f"{found_columns}: a source is to hold one schema ({KNOWN})")
            found += read_row(row, schema, account)
        except UserError as reason:
            account.refuse(f"{source}, row {number}", str(reason))
        except (AttributeError, TypeError, KeyError) as reason:
            what = f"{'/'.join(schema)} does not hold what this schema has there"
            account.refuse(f"{source}, row {number}", f"{what} ({type(reason).__name__}: {reason})")
    return found
