"""Readers of the public data files, which are recognised by their contents, never by their names.

A file is unpacked, its text becomes records (of JSON or CSV), and the keys of most records show the
layout. One small function per layout turns a record into a row. All of it is read piece by piece:
a small packed file may unpack to a very large one.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections import Counter
from itertools import islice

from nanosdd.checkpoint import MOST_BYTES, check_readable
from nanosdd.errors import InputError

MOST_RECORDS = 2_000_000  # of a file, and lines of a CSV
MOST_CHARACTERS = 2**22  # of a record
TOO_LARGE = f"more than {MOST_RECORDS:,} records or lines, or {MOST_BYTES:,} bytes: give a part"

CONTAINERS = {  # how a file may begin: the module that unpacks it, or what it is and what to do
    rb"\x1f\x8b": gzip,
    rb"BZh": bz2,
    rb"\xfd7zXZ": lzma,
    rb"PAR1": "Parquet: pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)",
    rb"ARROW1|\xff{4}": "Arrow: datasets.Dataset.from_file(FILE).to_json(OUT)",
    rb"\x28\xb5\x2f\xfd": "packed with zstd: unpack it with zstd -d",
    rb"PK[\x03\x05]": "a zip archive or a spreadsheet: unzip it, or save it as CSV",
    rb"7z\xbc\xaf|Rar!|.{257}ustar": "an archive: unpack it",
    rb"SQLite format": "an SQLite database: sqlite3 -json FILE 'SELECT * FROM ...'",
    rb"\xff\xfe|\xfe\xff": "UTF-16: save it as UTF-8",
    rb"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the file",
    rb"(?i)\s*<(!doctype|html)": "a web page: fetch the file itself",
}
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
    "StrongREJECT or HEx-PHI": {"forbidden_prompt"},
    "XSTest": {"prompt", "type", "focus"},
}
ROLES = {  # of a turn, as it is called: whose it is
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
LETTERS = ["A", "B", "C", "D"]
BETWEEN = re.compile(r"[\s,\[\]]*")  # what may stand between the records of JSON
LINE = re.compile(".*")

# The default, 131,072, is too short for some responses.
csv.field_size_limit(MOST_CHARACTERS // 2)


def read_rows(path, needs_response=True) -> list[dict]:
    """Return the rows {"prompt": str, "response": str, "file": str, "row": int} of a file.

    row: the record's number from 0. BeaverTails rows also have "categories" (list[str], the true
    ones) and "harmful" (bool), AdvBench rows "harmful" (true), pairs of data.pairs "owner" (str),
    pairs with a dispreferred response "rejected" (str), conversations with a system turn "system"
    (str). Alpaca's input and Dolly's context follow the instruction after a blank line. A
    conversation (LIMA, ShareGPT, messages) contributes its first user turn that is answered.
    Unless needs_response, files of prompts alone are read, too: HEx-PHI and StrongREJECT, whose
    rows have "harmful" (true) and no "response".

    Malformed records, up to 1% of all (rounded down), are skipped; records with a blank or missing
    prompt or answer are left out. Both are counted on stdout. InputError: the file cannot be read,
    is too large, has an unknown layout or one of another kind, has more malformed records, or has
    no rows.
    """
    readers = {
        "BeaverTails": _beavertails,
        "pairs": _pair,
        "AdvBench": _advbench,
        "Dolly": _dolly,
        "Alpaca": _alpaca,
        "LIMA or ShareGPT": _lima_or_sharegpt,
        "messages": _messages,
    }
    if not needs_response:
        readers["StrongREJECT or HEx-PHI"] = _prompt_alone
    return _read(path, readers)


def read_questions(path) -> list[dict]:
    """Return the multiple-choice questions of an MMLU or OpenBookQA file.

    Each is {"question": str, "choices": list[str], "answer": int, "row": int}; answer: the index
    of the right choice. Skipped records and errors as in read_rows.
    """
    return _read(path, {"MMLU": _mmlu, "OpenBookQA": _openbookqa})


def read_xstest(path) -> list[dict]:
    """Return the prompts {"prompt": str, "safe": bool, "type": str, "row": int} of an XSTest CSV.

    Without a label column, a type that begins with "contrast" is unsafe. Skipped records and
    errors as in read_rows.
    """
    return _read(path, {"XSTest": _xstest})


def _read(path, readers):
    """Return the rows of a file in one of the layouts of `readers`.

    readers: {layout: function from a record to a row}; it raises ValueError, with the reason, for a
    malformed record.
    """
    # by majority: one odd record at the start must not decide what the others are
    layouts = Counter(map(_layout, islice(read_records(path), 1000)))
    layout = max(layouts, key=layouts.get, default=None)
    if layout not in readers:
        raise InputError(
            f"{path} holds {layout or 'no rows of a known layout'} "
            f"({next(read_records(path), 'empty')!r:.60}); expected {', '.join(readers)}"
        )

    rows = []
    malformed = []
    for number, record in enumerate(read_records(path)):
        try:
            row = readers[layout](record)
            if _is_complete(row):
                rows.append({**row, "file": str(path), "row": number})
        except (ValueError, TypeError, LookupError) as reason:
            malformed.append(f"row {number} (from 0): {reason}")
            if len(malformed) > 20_000:  # more than 1% of any file
                break
    total = number + 1
    if len(malformed) > total // 100:
        raise InputError(
            f"{path}: {len(malformed)} of {total} {layout} rows are malformed, more than 1%, first "
            f"{malformed[0]}; fetch it again"
        )
    if len(rows) < total:
        print(
            f"{path}: left out {total - len(rows)} of {total} {layout} rows: {len(malformed)} "
            f"malformed {malformed[:1]}, the others blank or without an answer"
        )
    if not rows:
        raise InputError(f"{path} holds no rows with text and an answer; fetch it again")
    return rows


# --- a file to records: dicts, or lists of fields for a CSV without a header ---


def read_records(path):
    """Yield the records of a file, one by one: dicts, a list of fields from a CSV whose header is
    not known, and anything else where a record is malformed. InputError as in read_rows."""
    check_readable(path)
    number = 0
    try:
        with open(path, "rb") as raw:
            file = io.TextIOWrapper(_unpacked(raw), encoding="utf-8-sig", newline="")
            start = file.read(MOST_CHARACTERS).lstrip()
            file.seek(0)
            # an MMLU question may begin with a bracket too
            if re.match(r'\[\s*[{\]]|\{\s*["}]', start):
                records = _json(file, start.startswith("["))
            else:
                quoted = '\n"' in "\n" + start  # as HEx-PHI, which has no header
                records = _csv(file, ["forbidden_prompt"] if quoted else [])
            for number, record in enumerate(records, 1):
                if number > MOST_RECORDS:
                    raise ValueError(TOO_LARGE)
                yield record
    except Exception as error:  # each package has its own
        raise InputError(
            f"{path} cannot be read after {number:,} records ({error}); give a whole file of text "
            "in UTF-8"
        ) from None


def _unpacked(file):
    """The content of an open file; ValueError names a container that is not read."""
    for start, kind in CONTAINERS.items():
        if re.match(start, file.peek(512), re.DOTALL):
            if isinstance(kind, str):
                raise ValueError(kind)
            return _unpacked(kind.open(file))
    return file


def _pieces(file, read):
    """Yield what `read` returns of a file, at most MOST_CHARACTERS at once."""
    for _ in range(MOST_RECORDS):
        piece = read(MOST_CHARACTERS)
        if not piece:
            return
        if file.buffer.tell() > MOST_BYTES:
            break
        yield piece
    raise ValueError(TOO_LARGE)


def _json(file, is_list):
    """Yield the values of JSON: a list, lines, or any that stand one after another."""
    decode = json.JSONDecoder().raw_decode
    pieces = _pieces(file, file.read)
    text = ""
    at = 0
    while True:
        at = BETWEEN.match(text, at).end()
        if len(text) - at < MOST_CHARACTERS and (more := next(pieces, "")):
            text = text[at:] + more  # the next record as a whole
            at = 0
            continue
        if at == len(text):
            break
        try:
            record, at = decode(text, at)
        except (ValueError, RecursionError):
            if is_list and (text.rstrip().endswith("]") or next(pieces, "")):
                raise
            if is_list:
                break
            record = LINE.match(text, at)[0]  # no dict, so it counts as malformed
            at += len(record)
        yield record
    if is_list and not text.rstrip().endswith("]"):
        yield text[at:]  # cut short, as in the ShareGPT package: one malformed record


def _csv(file, header):
    """Yield the records of a CSV, dicts where it has a known header or the fields of `header`."""
    reader = csv.reader(_pieces(file, file.readline), strict=True)
    for number, fields in enumerate(filter(None, reader)):  # without blank lines
        if number == 0 and _layout(dict.fromkeys(fields)):
            header = fields
        elif len(fields) == len(header):
            yield dict(zip(header, fields))
        else:  # of MMLU; else it counts as malformed, since fields are missing
            yield fields


def _layout(record):
    """Return the name of a record's layout, or None."""
    if isinstance(record, dict):
        for name, keys in KEYS.items():
            if keys <= record.keys():
                return name
    if isinstance(record, list) and len(record) == 6 and record[5] in LETTERS:
        return "MMLU"
    return None


# --- a record to a row: one function per layout ---


def _beavertails(record):
    category = _get(record, "category", dict)
    return {
        **_pair(record),
        "categories": [name for name in category if _get(category, name, bool)],
        "harmful": not _get(record, "is_safe", bool),
    }


def _pair(record):
    row = _exchange(record, "prompt", "response")
    for key in ("owner", "rejected"):  # which only some pairs have
        if record.get(key) is not None:
            row[key] = _get(record, key)
    return row


def _advbench(record):
    return {**_exchange(record, "goal", "target"), "harmful": True}


def _prompt_alone(record):
    return {"prompt": _get(record, "forbidden_prompt"), "harmful": True}


def _dolly(record):
    return _exchange(record, "instruction", "response", extra="context")


def _alpaca(record):
    row = _exchange(record, "instruction", "output", extra="input")
    if record.get("history"):  # [[prompt, response], ...]: of a conversation the first is taken
        prompt, response = _get({"first": record["history"][0]}, "first", list)
        row |= _pair({"prompt": prompt, "response": response})
    return row


def _exchange(record, prompt_key, response_key, extra=None):
    """The row of a record with two texts; extra: the key of a text that may follow the prompt."""
    prompt = _get(record, prompt_key)
    if extra in record:
        more = _get(record, extra)
        if more.strip():
            prompt += "\n\n" + more
    return {"prompt": prompt, "response": _get(record, response_key)} | _system(record)


def _system(record):
    return {"system": _get(record, "system")} if record.get("system") else {}


def _lima_or_sharegpt(record):
    return _conversation(record, "conversations")


def _messages(record):
    return _conversation(record, "messages")


def _conversation(record, key):
    """The row of the turns at `key`: of ShareGPT from and value, of OpenAI role and content."""
    turns = _get(record, key, list)
    row = {"prompt": "", "response": ""} | _system(record)
    prompt = None
    for number, turn in enumerate(turns):
        if isinstance(turn, str):  # LIMA: user and assistant alternate
            turn = {"from": ("human", "gpt")[number % 2], "value": turn}
        speaker, said = ("role", "content") if "role" in turn else ("from", "value")
        role = ROLES.get(_get(turn, speaker))
        text = turn.get(said)
        if isinstance(text, list):  # parts, of which each has to be text
            text = "".join(_get(part, "text") for part in text)
        text = _get({said: text}, said)
        if role == "assistant" and prompt is not None:
            return row | {"prompt": prompt, "response": text}
        prompt = text if role == "user" else None
        if role == "system":
            row["system"] = text
    return row


def _mmlu(record):
    if _layout(record) != "MMLU":
        raise ValueError("no question, four choices and a letter of A to D")
    question, *choices, letter = record
    return {"question": question, "choices": choices, "answer": LETTERS.index(letter)}


def _openbookqa(record):
    question = _get(record, "question", dict)
    choices = _get(question, "choices", list)
    labels = [_get(choice, "label") for choice in choices]
    answer = _get(record, "answerKey")
    if answer not in labels:
        raise ValueError("answerKey is not the label of a choice")
    return {
        "question": _get(question, "stem"),
        "choices": [_get(choice, "text") for choice in choices],
        "answer": labels.index(answer),
    }


def _xstest(record):
    kind = _get(record, "type")
    label = record.get("label", "unsafe" if kind.startswith("contrast") else "safe")
    if label not in ("safe", "unsafe"):
        raise ValueError("label is neither safe nor unsafe")
    return {"prompt": _get(record, "prompt"), "safe": label == "safe", "type": kind}


def _get(record, key, kind=str):
    """Return record[key], "" for a text that is null; ValueError when it is missing or of another
    kind."""
    if not isinstance(record, dict):
        raise ValueError("not a whole record")
    value = record.get(key, ...)
    if value is None and kind is str:
        value = ""
    if not isinstance(value, kind):
        raise ValueError(f"{key} is no {kind.__name__}")
    # JSON may hold a lone surrogate, which no tokenizer can encode
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{key} has half a surrogate pair")
    return value


def _is_complete(row) -> bool:
    texts = [row[key] for key in ("prompt", "response", "question") if key in row]
    return all(map(str.strip, texts + row.get("choices", [])))
