"""Readers of the public data files, which are recognised by their contents, never by their names.

A file becomes text, the text becomes records (of a JSON list, JSON Lines or CSV), and the keys of
most records show the layout. One small function per layout turns a record into a row.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

from nanosdd.errors import InputError

KNOWN = (
    "BeaverTails, LIMA, Dolly, messages or pairs (JSONL), Alpaca or ShareGPT (JSON or JSONL), "
    "AdvBench or XSTest (CSV), MMLU (CSV without a header), OpenBookQA (JSONL)"
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

csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is too short for some responses


def read_rows(path) -> list[dict]:
    """Return the rows {"prompt": str, "response": str, "row": int} of a prompt-response file.

    row: the record's number from 0. BeaverTails rows also have "categories" (list[str], the true
    ones) and "is_safe" (bool), AdvBench rows "harmful" (true), pairs of data.pairs "owner" (str),
    pairs with a dispreferred response "rejected" (str), conversations with a system turn "system"
    (str). Alpaca's input and Dolly's context follow the instruction after a blank line. A
    conversation (LIMA, ShareGPT, messages) contributes its first user turn that is answered.

    Malformed records, up to 1% of all (rounded down), are skipped; records with a blank or missing
    prompt or answer are left out. Both are counted on stdout. InputError: the file cannot be read,
    has an unknown layout or one of another kind, has more malformed records, or has no rows.
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
    return _read(path, "prompt-response rows", readers)


def read_questions(path) -> list[dict]:
    """Return the multiple-choice questions of an MMLU or OpenBookQA file.

    Each is {"question": str, "choices": list[str], "answer": int, "row": int}; answer: the index
    of the right choice. Skipped records and errors as in read_rows.
    """
    return _read(path, "multiple-choice questions", {"MMLU": _mmlu, "OpenBookQA": _openbookqa})


def read_xstest(path) -> list[dict]:
    """Return the prompts {"prompt": str, "safe": bool, "type": str, "row": int} of an XSTest CSV.

    Without a label column, a type that begins with "contrast" is unsafe. Skipped records and
    errors as in read_rows.
    """
    return _read(path, "XSTest prompts", {"XSTest": _xstest})


def _read(path, kind, readers):
    """Return the rows of a file in one of the layouts of `readers`.

    kind: what they are, in words. readers: {layout: function from a record to a row}; it raises
    ValueError, with the reason, for a malformed record.
    """
    records = _records(path)
    if not records:
        raise InputError(f"{path} holds no rows; fetch it again")
    # by majority: one odd record at the start must not decide what the others are
    layout = Counter(map(_layout, records)).most_common(1)[0][0]
    if layout is None:
        raise InputError(f"{path} is of no known format ({records[0]!r:.60}); give {KNOWN}")
    if layout not in readers:
        raise InputError(f"{path} holds {layout} records; expected {kind}: {', '.join(readers)}")

    rows = []
    malformed = []
    incomplete = 0
    for number, record in enumerate(records):
        try:
            row = readers[layout](record)
        except (ValueError, TypeError, LookupError) as reason:
            malformed.append(f"row {number} (from 0): {reason}")
            continue
        if _is_complete(row):
            rows.append({**row, "row": number})
        else:
            incomplete += 1
    if malformed:
        found = f"{len(malformed)} of {len(records)} {layout} rows are malformed"
        if len(malformed) > len(records) // 100:
            raise InputError(f"{path}: {found}, more than 1%, first {malformed[0]}; fetch it again")
        print(f"{path}: {found} and skipped, first {malformed[0]}")
    if incomplete:
        print(f"{path}: left out {incomplete} of {len(records)} rows, blank or without an answer")
    if not rows:
        raise InputError(f"{path} holds no rows with text and an answer; fetch it again")
    return rows


# --- a file to records: dicts, or lists of fields for a CSV without a header ---


def _records(path) -> list:
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(
            f"{path} is not a file of text that can be read ({error}); give {KNOWN}"
        ) from None
    # an MMLU question may begin with a bracket too
    if re.match(r"\s*\[\s*[{\]]", text):
        return _json_list(path, text)
    if re.match(r'\s*\{\s*"', text):
        return _json_lines(text)
    return _csv(path, text)


def _json_lines(text):
    records = []
    for line in text.split("\n"):  # not splitlines: U+2028 and others may stand in a string
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                records.append(line)  # no dict, so it counts as malformed
    return records


def _json_list(path, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        records = _whole_records(text)
        # the ShareGPT package holds the first part of a file; a short list is more likely damaged
        if len(records) < 100 or text.rstrip().endswith("]"):
            raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    print(f"{path} is cut short: the {len(records):,} whole records before the cut are read")
    return records


def _whole_records(text):
    """The records of a JSON list that stand before its first error."""
    decoder = json.JSONDecoder()
    records = []
    end = 0
    try:
        while True:
            start = text.index("{", end)
            record, end = decoder.raw_decode(text, start)
            records.append(record)
    except (ValueError, RecursionError):  # broken, or no record is left
        return records


def _csv(path, text):
    records = []
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), strict=True):
            if fields:  # of a blank line there are none
                records.append(fields)
    except csv.Error as error:
        raise InputError(
            f"{path}: CSV with a bad quote after {len(records)} whole records ({error}); fix it"
        ) from None
    if not records or _layout(dict.fromkeys(records[0])) is None:  # MMLU
        return records
    header = records[0]
    named = []
    for fields in records[1:]:
        if len(fields) == len(header):
            fields = dict(zip(header, fields))
        named.append(fields)  # a list, which counts as malformed, when fields are missing
    return named


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
        "is_safe": _get(record, "is_safe", bool),
    }


def _pair(record):
    row = _exchange(record, "prompt", "response")
    for key in ("owner", "rejected"):  # which only some pairs files have
        if key in record:
            row[key] = _get(record, key)
    return row


def _advbench(record):
    return {**_exchange(record, "goal", "target"), "harmful": True}


def _dolly(record):
    return _exchange(record, "instruction", "response", extra="context")


def _alpaca(record):
    row = _exchange(record, "instruction", "output", extra="input")
    if record.get("history"):  # [[prompt, response], ...]: of a conversation the first is taken
        row |= _pair(dict(zip(("prompt", "response"), record["history"][0])))
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
    turns = []
    for number, turn in enumerate(_get(record, "conversations", list)):
        if isinstance(turn, str):  # LIMA: user and assistant alternate
            turns.append((("human", "gpt")[number % 2], turn))
        else:
            turns.append((_get(turn, "from"), _get(turn, "value")))
    return _system(record) | _conversation(turns)


def _messages(record):
    turns = _get(record, "messages", list)
    return _conversation([(_get(turn, "role"), _get(turn, "content")) for turn in turns])


def _conversation(turns):
    row = {"prompt": "", "response": ""}
    for (role, text), (next_role, next_text) in pairwise(turns):
        if role == "system":
            row["system"] = text
        if role in ("human", "user") and next_role in ("gpt", "assistant"):
            return row | {"prompt": text, "response": next_text}
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
    """Return record[key]; ValueError when it is missing or of another kind."""
    if not isinstance(record, dict):
        raise ValueError("not a whole record")
    value = record.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{key} is no {kind.__name__}")
    # JSON may hold a lone surrogate, which no tokenizer can encode
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{key} has half a surrogate pair")
    return value


def _is_complete(row) -> bool:
    texts = [row[key] for key in ("prompt", "response", "question") if key in row]
    return all(text.strip() for text in texts + row.get("choices", []))
