"""Readers of the public data files, which are recognised by their contents, never by their names.

A file becomes text (gunzipped, decoded), the text becomes records (of a JSON list, JSON Lines or CSV), and the keys of
most records show the layout. One small function per layout turns a record into a row.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from pathlib import Path

from nanosdd.checkpoint import MOST_BYTES, why_unreadable
from nanosdd.errors import InputError

KNOWN = (
    "BeaverTails, LIMA, Dolly, messages or pairs (JSONL), Alpaca or ShareGPT (JSON or JSONL), AdvBench or XSTest "
    "(CSV), MMLU (CSV without a header), OpenBookQA (JSONL)"
)
# The keys of each layout. A record has the first layout whose keys it holds.
KEYS = {
    "BeaverTails": {"prompt", "response", "is_safe"},
    "pairs": {"prompt", "response"},
    "Dolly": {"instruction", "context", "response"},
    "Alpaca": {"instruction", "output"},
    "LIMA or ShareGPT": {"conversations"},
    "messages": {"messages"},
    "OpenBookQA": {"question", "answerKey"},
    "AdvBench": {"goal", "target"},
    "XSTest": {"prompt", "type", "focus"},
}
LETTERS = ["A", "B", "C", "D"]
TYPES = {str: "string", bool: "true or false", list: "list", dict: "object"}

csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is too short for some responses


def read_rows(path) -> list[dict]:
    """Rows {"prompt": str, "response": str, "row": int} of a prompt-response file; row: the record's number from 0.

    BeaverTails rows also have "categories" (list[str], the true ones) and "is_safe" (bool), AdvBench rows "harmful"
    (true), pairs of data.pairs "owner" (str), conversations with a system turn "system" (str). Alpaca's input and
    Dolly's context follow the instruction after a blank line. A conversation (LIMA, ShareGPT, messages) contributes its
    first user turn that has an answer right after it.

    Malformed records, up to 1% of all records (rounded down), are listed on stdout and skipped. Records with a blank or
    missing prompt or answer are not malformed; they are counted on stdout and left out. InputError: the file cannot be
    read, has an unknown layout or one of another kind, has more malformed records, or has no rows.
    """
    return _read(
        path,
        "prompt-response rows",
        {
            "BeaverTails": _beavertails,
            "pairs": _pairs,
            "AdvBench": _advbench,
            "Dolly": lambda record: _plain(record, "instruction", "response", extra="context"),
            "Alpaca": lambda record: _plain(record, "instruction", "output", extra="input"),
            "LIMA or ShareGPT": lambda record: _conversation(
                record, "conversations", "from", "value"
            ),
            "messages": lambda record: _conversation(record, "messages", "role", "content"),
        },
    )


def read_questions(path) -> list[dict]:
    """Questions {"question": str, "choices": list[str], "answer": int, "row": int} of MMLU (CSV: question, A, B, C, D,
    letter) or OpenBookQA (JSONL); answer: the index of the right choice. Skipped records and errors as in read_rows."""
    return _read(path, "multiple-choice questions", {"MMLU": _mmlu, "OpenBookQA": _openbookqa})


def read_xstest(path) -> list[dict]:
    """Prompts {"prompt": str, "safe": bool, "type": str, "row": int} of an XSTest CSV, in any of its public layouts;
    without a label column, a type that begins with "contrast" is unsafe. Skipped records and errors as in read_rows."""
    return _read(path, "XSTest prompts", {"XSTest": _xstest})


def _read(path, kind, readers) -> list[dict]:
    """The rows of a file in one of the layouts of `readers`, {layout: function from a record to a row}. A function
    returns None for a record without an answer, and raises ValueError, with the reason, for a malformed one."""
    text = _text(path)
    first = [line for line in text.split("\n", 100)[:100] if line.strip()]
    objects = [line for line in first if re.match(r'\s*\{\s*["}]', line)]
    if re.match(
        r'\s*\[\s*(null|true|false|[\[{"\]])', text
    ):  # an MMLU question may begin with a bracket too
        records = list(_json_list(path, text))
    elif len(objects) > len(first) / 2:  # some lines may be broken
        records = list(_jsonl(text))
    else:
        records = list(_csv(path, text))
    if not records:
        raise InputError(f"{path} holds no rows; fetch it again")
    layouts = Counter(filter(None, (_layout(record) for _, record in records)))
    if not layouts:
        line, record = records[0]
        shown = list(record) if isinstance(record, dict) else record  # of a dict, its keys
        raise InputError(f"{path} is of no known format (line {line}: {shown!r:.60}); give {KNOWN}")
    layout = layouts.most_common(1)[0][0]
    if layout not in readers:
        raise InputError(f"{path} holds {layout} records; expected {kind}: {', '.join(readers)}")

    rows, malformed, incomplete = [], [], 0
    for number, (line, record) in enumerate(records):
        try:
            if isinstance(record, ValueError):
                raise record
            row = readers[layout](record)
        except ValueError as reason:
            malformed.append(f"line {line} (row {number}: {reason})")
            continue
        if row is None:
            incomplete += 1
        else:
            rows.append({**row, "row": number})
    if len(malformed) > len(records) // 100:
        raise InputError(
            f"{path}: {len(malformed)} of {len(records)} {layout} rows are malformed, more than 1%, first "
            f"{malformed[0]}; fix them or fetch the file again"
        )
    if malformed:
        more = f" and {len(malformed) - 5} more" if len(malformed) > 5 else ""
        print(
            f"{path}: skipped {len(malformed)} of {len(records)} rows: {', '.join(malformed[:5])}{more}"
        )
    if incomplete:
        print(f"{path}: left out {incomplete} of {len(records)} rows, blank or without an answer")
    if not rows:
        raise InputError(f"{path} holds no rows with text and an answer; fetch it again")
    return rows


def _text(path) -> str:
    if reason := why_unreadable(path):
        raise InputError(f"{path} is not a file that can be read ({reason}); give {KNOWN}")
    raw = Path(path).read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(raw)) as file:
                raw = file.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise InputError(
                    f"{path} holds more than {MOST_BYTES:,} bytes of text; give a part of it"
                )
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(
                f"{path} is a truncated or corrupt gzip ({error}); fetch it again"
            ) from None
    encoding = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-8"
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not {encoding}; convert the file to UTF-8 text"
        ) from None
    if not text.strip():
        raise InputError(f"{path} is empty; fetch it again")
    if "\0" in text:
        raise InputError(
            f"{path}: character {text.index(chr(0))} is NUL: the file is damaged or not UTF-8 text; "
            "fetch it again or convert it"
        )
    return text


# Each of these yields (line, record): the line where the record starts, from 1, and its value, or a ValueError with the
# reason if it cannot be parsed.


def _jsonl(text):
    for line, piece in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: U+2028 and others may stand in a string
        if piece.strip():
            try:
                record = json.loads(piece)
            except (ValueError, RecursionError):
                record = ValueError("not JSON")
            yield line, record


def _json_list(path, text):
    skip, decode = re.compile(r"[ \t\r\n]*").match, json.JSONDecoder().raw_decode
    line, counted, at, whole = 1, 0, text.index("["), 0
    try:
        while text[at] in "[,":
            start = skip(text, at + 1).end()
            if text[at] == "[" and text[start : start + 1] == "]":
                at = start
                break
            line, counted = line + text.count("\n", counted, start), start
            record, end = decode(text, start)
            whole += 1
            yield line, record
            at = skip(text, end).end()
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("no comma or ]", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("more after the end of the list", text, at + 1)
    except (ValueError, RecursionError) as error:  # the start of the next record is unknown
        if whole >= 100 and isinstance(error, json.JSONDecodeError) and _cut_short(text, error):
            print(
                f"{path} is cut short in line {text.count(chr(10)) + 1}: the {whole:,} whole records before it are "
                "read"
            )
            return
        raise InputError(
            f"{path}, line {getattr(error, 'lineno', line)}: not JSON ({getattr(error, 'msg', error)}); "
            "is the file cut short? fetch it again"
        ) from None


def _cut_short(text, error) -> bool:
    """Whether the text ended where JSON went on: inside a string, or where nothing but white space follows."""
    return error.msg.startswith("Unterminated string") or not text[error.pos :].strip()


def _csv(path, text):
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error:
            raise InputError(
                f"{path}, line {line}: the CSV record that starts there has an unclosed or misplaced "
                "quote; fix it or fetch the file again"
            ) from None
        if fields is None:
            return
        if not "".join(fields).strip() and len(fields) < 2:
            continue
        if header is None:  # the first record
            header = (
                fields if KEYS["AdvBench"] <= set(fields) or KEYS["XSTest"] <= set(fields) else []
            )
            if header:
                continue
        if header and len(fields) != len(header):
            yield line, ValueError(f"{len(fields)} fields, not {len(header)}")
        else:
            yield line, dict(zip(header, fields)) if header else tuple(fields)


def _layout(record) -> str | None:
    if isinstance(record, tuple):  # of a CSV file without a header
        return "MMLU" if len(record) == 6 and record[5].strip() in LETTERS else None
    found = record.keys() if isinstance(record, dict) else set()
    return next((name for name, keys in KEYS.items() if keys <= found), None)


# One function per layout, from a record to a row.


def _beavertails(record):
    category = _get(record, "category", dict)
    if not all(isinstance(value, bool) for value in category.values()):
        raise ValueError("category holds more than true and false")
    more = {
        "categories": [name for name in category if category[name]],
        "is_safe": _get(record, "is_safe", bool),
    }
    return _exchange(_get(record, "prompt"), _get(record, "response"), **more)


def _pairs(record):
    """Pairs from data.pairs name the owner of each harmful prompt; pairs from elsewhere do not."""
    prompt, response = _get(record, "prompt"), _get(record, "response")
    more = {key: _get(record, key) for key in ("owner", "rejected") if record.get(key) is not None}
    return _exchange(prompt, response, **more)


def _advbench(record):
    row = _plain(record, "goal", "target")
    return row and row | {"harmful": True}


def _plain(record, prompt_key, response_key, extra=None):
    """The row of a record with two texts; extra: the key of a text that may follow the prompt."""
    prompt, response = _get(record, prompt_key), _get(record, response_key)
    more = _get(record, extra) if extra in record else ""
    return _exchange(f"{prompt}\n\n{more}" if prompt.strip() and more.strip() else prompt, response)


def _conversation(record, key, role, text):
    turns = _get(record, key, list)
    if turns and all(isinstance(turn, str) for turn in turns):  # LIMA: user and assistant alternate
        turns = [{role: ("human", "gpt")[i % 2], text: turn} for i, turn in enumerate(turns)]
    turns = [(_get(turn, role), _get(turn, text)) for turn in turns]
    system = [{"system": words} for who, words in turns if who == "system"] or [{}]
    for (who, prompt), (next_who, response) in itertools.pairwise(turns):
        if who in ("human", "user") and next_who in ("gpt", "assistant"):
            return _exchange(prompt, response, **system[0])
    return None


def _mmlu(record):
    if len(record) != 6:
        raise ValueError(f"{len(record)} fields, not 6")
    question, *choices, letter = record
    if letter.strip() not in LETTERS:
        raise ValueError("the answer is none of A, B, C, D")
    return _question(question, choices, LETTERS.index(letter.strip()))


def _openbookqa(record):
    question = _get(record, "question", dict)
    choices = _get(question, "choices", list)
    labels, answer = [_get(choice, "label") for choice in choices], _get(record, "answerKey")
    if labels.count(answer) != 1:
        raise ValueError("answerKey is not the label of one choice")
    return _question(
        _get(question, "stem"), [_get(choice, "text") for choice in choices], labels.index(answer)
    )


def _xstest(record):
    prompt, kind = _get(record, "prompt"), _get(record, "type")
    label = "unsafe" if kind.startswith("contrast") else "safe"
    if "label" in record:
        label = _get(record, "label")
    if label not in ("safe", "unsafe"):
        raise ValueError("the label is neither safe nor unsafe")
    return {"prompt": prompt, "safe": label == "safe", "type": kind} if prompt.strip() else None


def _get(record, key, kind=str):
    """record[key]; ValueError when it is missing or of another kind."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"no {TYPES[kind]} {key}")
    if kind is str and re.search(
        "[\ud800-\udfff]", value
    ):  # valid in JSON, but no tokenizer can encode it
        raise ValueError(f"half a surrogate pair in {key}")
    return value


def _exchange(prompt, response, **more):
    return (
        {"prompt": prompt, "response": response, **more}
        if prompt.strip() and response.strip()
        else None
    )


def _question(question, choices, answer):
    blank = any(not text.strip() for text in [question, *choices])
    return None if blank else {"question": question, "choices": choices, "answer": answer}
