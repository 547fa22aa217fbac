"""Readers of public data files, told apart by what is in them: AdvBench (CSV) and Alpaca (JSON).

A row is {"prompt": str, "response": str, "row": int}, the row's number in its file from 0.
"""

import csv
import io
import json
from pathlib import Path

from errors import InputError

KNOWN = "AdvBench CSV (header goal,target) or Alpaca JSON (a list of {instruction, input, output})"


def read_rows(path) -> list[dict]:
    """Rows of a data file; InputError (with the line or row) when it is missing, empty, malformed or unknown."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is not a file; give the path of an {KNOWN}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if not text.strip():
        raise InputError(f"{path} is empty; fetch it again")
    rows = _alpaca(path, text) if text.lstrip()[0] in "[{" else _advbench(path, text)
    if not rows:
        raise InputError(f"{path} holds no rows; fetch it again")
    return rows


def read_jsonl(path) -> list[dict]:
    """The objects of a JSON Lines file, blank lines skipped; InputError with the line number."""
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends raw
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path} is not a file; give the path of a JSONL file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg}); mend or drop the line") from None
    if not rows:
        raise InputError(f"{path} holds no rows; write it again")
    return rows


def _advbench(path, text) -> list[dict]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        lacking = [name for name in ("goal", "target") if name not in (reader.fieldnames or ())]
        if lacking:
            raise InputError(f"{path}, line 1: no column {' or '.join(lacking)}; expected {KNOWN}")
        for record in reader:
            if not (record["goal"] or "").strip() or not (record["target"] or "").strip() or None in record:
                raise InputError(f"{path}, line {reader.line_num}: a row needs exactly a goal and a target")
            rows.append({"prompt": record["goal"], "response": record["target"], "row": len(rows)})
    except csv.Error as error:
        raise InputError(f"{path}, after line {reader.line_num}: {error}; mend the CSV") from None
    return rows


def _alpaca(path, text) -> list[dict]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}); fetch it again") from None
    rows = []
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        texts = [record.get(key, "") for key in ("instruction", "input", "output")] if isinstance(record, dict) else []
        if not all(isinstance(value, str) for value in texts) or not texts or not texts[0].strip() or not texts[2]:
            raise InputError(f"{path}, row {number}: needs the strings instruction and output; expected {KNOWN}")
        prompt = f"{texts[0]}\n\n{texts[1]}" if texts[1].strip() else texts[0]
        rows.append({"prompt": prompt, "response": texts[2], "row": number})
    return rows
