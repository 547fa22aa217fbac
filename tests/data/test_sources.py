"""The readers of public data files.

tests/fixtures/sources has harmless text in each layout, well formed and not; expected.json, the
rows of each well-formed file; and records.jsonl, single records with their row, null where they are
left out, or a part of the reason why they are malformed.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.sources import MOST_CHARACTERS, read_questions, read_rows, read_xstest
from nanosdd.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures/sources"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
RECORDS = [json.loads(line) for line in (FIXTURES / "records.jsonl").read_text().splitlines()]
PACKED = {
    "plain": bytes,
    "bom": lambda content: b"\xef\xbb\xbf" + content,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "twice": lambda content: gzip.compress(lzma.compress(content)),
    "in parts": lambda content: gzip.compress(content[:50]) + gzip.compress(content[50:]),
}
BAD = {  # in each, the record in row 1 is malformed
    "beavertails_bad.jsonl": "1 of 3 BeaverTails",
    "advbench_bad.csv": "1 of 2 AdvBench",
    "lima_bad.jsonl": "1 of 2 LIMA or ShareGPT",
    "alpaca_bad.json": "1 of 4 Alpaca",
    "dolly_bad.jsonl": "1 of 2 Dolly",
    "sharegpt_bad.json": "1 of 4 LIMA or ShareGPT",
    "messages_bad.jsonl": "1 of 2 messages",
    "pairs_bad.jsonl": "1 of 2 pairs",
    "mmlu_bad.csv": "1 of 2 MMLU",
    "openbookqa_bad.jsonl": "1 of 3 OpenBookQA",
    "xstest_bad.csv": "1 of 2 XSTest",
}


def reader(name):
    if "xstest" in name:
        return read_xstest
    if "mmlu" in name or "openbookqa" in name:
        return read_questions
    return read_rows


def rows_of(path, read=read_rows):
    """The rows of a file; that each names it is checked here."""
    rows = read(path)
    assert {row.pop("file") for row in rows} == {str(path)}
    return rows


@pytest.fixture
def written(tmp_path):
    """A function that writes a file and returns its path."""

    def write(content):
        path = tmp_path / "data.bin"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(read, path):
    with pytest.raises(InputError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def pair(number, response="x"):
    return {"prompt": f"ask {number}", "response": response}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = lines(map(pair, range(130)))

# ---- layouts ----


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("pack", PACKED)
def test_every_layout_is_told_by_its_content(written, name, pack):
    path = written(PACKED[pack]((FIXTURES / name).read_bytes()))
    assert rows_of(path, reader(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in EXPECTED if "csv" not in name])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("between", ["", "\r\n\r\n", ",\n"])
def test_json_objects_may_stand_one_after_another(written, name, indent, between):
    text = (FIXTURES / name).read_text()
    records = json.loads(text) if name.endswith("json") else map(json.loads, text.splitlines())
    text = between.join(json.dumps(record, indent=indent) for record in records)
    for more in (text, f" [{text}]\n[]"):
        assert rows_of(written(more), reader(name)) == EXPECTED[name]


@pytest.mark.parametrize("record, row", RECORDS)
def test_records_of_every_kind(written, record, row):
    read = read_questions if "question" in record else read_rows
    path = written(lines([record]))
    if isinstance(row, dict):
        assert rows_of(path, read) == [row | {"row": 0}]
    else:
        assert (row or "holds no rows with text and an answer") in refusal(read, path)


PROMPTS = ["How do I tickle a dragon, softly?", 'Say "boo",\nor two', "Hide the biscuit"]


@pytest.mark.parametrize("pack", ["plain", "bom", "xz"])
@pytest.mark.parametrize("name", ["hexphi.csv", "hexphi_minimal.csv", "strongreject.csv"])
def test_files_of_prompts_alone(written, name, pack):
    path = written(PACKED[pack]((FIXTURES / name).read_bytes()))
    rows = rows_of(path, lambda path: read_rows(path, needs_response=False))
    assert [row.pop("row") for row in rows] == [0, 1, 2]
    assert rows == [{"prompt": prompt, "harmful": True} for prompt in PROMPTS]
    assert "holds StrongREJECT or HEx-PHI" in refusal(read_rows, path)


@pytest.mark.parametrize("text", ["one, two\nthree\n", '"a", "b"\n', "- x\n- y\n", "x\n"])
def test_text_is_not_taken_for_prompts(written, text):
    with pytest.raises(InputError, match="no rows of a known layout"):
        read_rows(written(text), needs_response=False)


def test_a_file_is_not_taken_for_another_by_one_odd_row(written):
    """BeaverTails would lose its labels if its first row alone made it a file of pairs."""
    labelled = (FIXTURES / "beavertails.jsonl").read_text() * 40
    rows = read_rows(written(lines([pair(0)]) + labelled))
    assert len(rows) == 120 and all("harmful" in row for row in rows)
    path = written("[a] and {b}: which?,1,2,3,4,C\n")
    assert read_questions(path)[0]["answer"] == 2


@pytest.mark.parametrize(
    "read, name, message",
    [
        (read_rows, "mmlu.csv", r"holds MMLU \(.*; expected BeaverTails, pairs, AdvBench, Dolly"),
        (read_questions, "advbench.csv", r"holds AdvBench \(.*; expected MMLU, OpenBookQA"),
        (read_xstest, "lima.jsonl", r"holds LIMA or ShareGPT \(.*; expected XSTest"),
    ],
)
def test_the_wrong_kind_of_file_is_named(read, name, message):
    with pytest.raises(InputError, match=message):
        read(FIXTURES / name)


@pytest.mark.parametrize(
    "content, shown",
    [
        ("goal,answer\na,b\n", "['goal', 'answer']"),
        ('{"a": 1}\n{"b": 2}', "{'a': 1}"),
        ("[[1]]", "['[[1]]']"),
        ('{"prompt: 1}\n', '{"prompt: 1}'),
        ("goal,target\na,b".encode("utf-16-le"), "g\\x00o"),
        ("", "empty"),
        (gzip.compress(b"\n"), "empty"),
        ("[ \n ]", "empty"),
        ("goal,target\n", "empty"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(written, content, shown):
    message = refusal(read_rows, written(content))
    assert "holds no rows of a known layout" in message and shown in message
    assert "expected BeaverTails, pairs, " in message


# ---- malformed rows, and blank ones ----


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_counted_and_named(name):
    message = refusal(reader(name), FIXTURES / name)
    assert f"{BAD[name]} rows are malformed, more than 1%, first row 1 (from 0): " in message


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": NaN, "response": "x"}', "prompt is no str"),
        ('{"prompt": "a"', "not a whole record"),
        ('{"a":' * 100_000, "not a whole record"),
        ("1" * 5000, "not a whole record"),
        ("null", "not a whole record"),
        ('{"prompt": "a", "response": "\\ud83d"}', "response has half a surrogate pair"),
        ('{"prompt": "a", "response": "b", "owner": 1}', "owner is no str"),
        ('{"prompt": "a", "answer": "b"}', "response is no str"),
    ],
)
def test_up_to_one_percent_malformed_rows_are_skipped(written, capsys, line, reason):
    assert len(read_rows(written(PAIRS + line))) == 130
    assert f"1 of 131 pairs rows: 1 malformed ['row 130 (from 0): {reason}']" in (
        capsys.readouterr().out
    )
    assert "2 of 132 pairs rows are malformed, more" in refusal(
        read_rows, written(f"{PAIRS}{line}\n{line}")
    )


def test_an_odd_object_over_several_lines_is_skipped(written):
    """What stands on each of its lines counts as malformed."""
    text = json.dumps([pair(i) for i in range(700)], indent=1)[1:-1]
    assert len(rows_of(written(text.replace('"ask 7",', '"ask 7"')))) == 699


def test_rows_without_an_answer_are_counted_and_left_out(written, capsys):
    path = written("goal,target\n,Sure\nHide, \n,\nask,tell\n")
    assert [row["row"] for row in rows_of(path)] == [3]
    assert "left out 3 of 4 AdvBench rows: 0 malformed []" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, blank",
    [("mmlu.csv", " ,1,2,3,4,A\nHow many?,1,2,,4,A\n"), ("xstest_v1.csv", "v1-9,homonyms, ,x,y\n")],
)
def test_blank_questions_and_prompts_are_left_out(written, name, blank):
    text = (FIXTURES / name).read_text() + blank
    assert rows_of(written(text), reader(name)) == EXPECTED[name]


# ---- files ----


@pytest.mark.parametrize(
    "content, message",
    [
        (b"goal,target\ncaf\xe9,x\n", "byte 0xe9 in position 15"),
        (lzma.compress(b"goal,target\na,b\n" * 999)[:-9], "ended before"),
        (bz2.compress(b"goal,target\na,b\n")[:20] + b"oops" * 9, "Invalid data stream"),
        (gzip.compress(b"goal,target\na,b\n" * 9)[:-11], "ended before"),
        (gzip.compress(b"goal,target\na,b\n")[:-8] + b"12345678", "CRC check failed"),
        (b"PAR1\x15\x04\x15\xff\xfe", "(Parquet: pandas.read_parquet(FILE).to_json(OUT, orient="),
        (gzip.compress(b"PAR1\x15\x04\x15\xff\xfe"), "(Parquet: "),
        (b"ARROW1\x00\x00\xff\xff\xff\xff\xe0\x03", "(Arrow: datasets.Dataset.from_file(FILE)"),
        (b"\xff\xff\xff\xff\xe0\x03\x00\x00\x10", "(Arrow: "),  # a stream, as `datasets` writes
        (b"\x28\xb5\x2f\xfd\x24\x05", "(packed with zstd: unpack it with zstd -d"),
        (b"PK\x03\x04\x14\x00", "(a zip archive or a spreadsheet: unzip it"),
        (lzma.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000"), "(an archive: unpack it"),
        (b"7z\xbc\xaf\x27\x1c\x00", "(an archive: unpack it"),
        (b"SQLite format 3\x00\x10\x00", "(an SQLite database: sqlite3 -json FILE"),
        ("goal,target\na,b".encode("utf-16"), "(UTF-16: save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "(a pointer of Git LFS: "),
        (b"\n<!DOCTYPE html>\n<html>", "(a web page: fetch the file itself"),
    ],
)
def test_what_is_no_text_is_named_with_what_to_do(written, content, message):
    found = refusal(read_rows, written(content))
    assert "cannot be read after 0 records (" in found and message in found


LIMITED = """
import resource, sys
from data.sources import read_rows
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
read_rows(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: limits on memory")
@pytest.mark.parametrize(
    "start, piece, message",
    [
        ("goal,target\n", "\n", "more than 2,000,000 records or lines"),
        ('[{"a": 1}', "\n", "no rows of a known layout"),
        ("goal,target\na,", "a", "larger than field limit"),
        ("", lines([pair(0)]), "more than 2,000,000 records or lines"),
        ("", '{"prompt": "a", "response": 1}\n', "20001 of 20001 pairs rows are malformed"),
        ("", '{"prompt": "a", "response": ' + "\n" * 9, "no rows of a known layout"),
        ('{"a":[', "[],", "no rows of a known layout"),
        ('[{"a": 1}', ",{}", "no rows of a known layout"),
    ],
)
def test_a_small_file_that_unpacks_to_a_large_one_is_refused_soon(written, start, piece, message):
    content = (start + piece * (2**28 // len(piece))).encode()
    path = written(gzip.compress(content, 6))
    assert path.stat().st_size < 10**6
    command = [sys.executable, "-c", LIMITED, path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert message in result.stderr.splitlines()[-1]


# ---- JSON and CSV ----


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a",\n "output": }]', "after 0 records (Expecting value: line 2 "),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000 + "]", "after 1 records (maximum recursion"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", "after 1 records (Exceeds the limit"),
        ('[\n{"instruction": "a", "output": "b"}\n{"instruction"', "1 of 2 Alpaca rows"),
        ('[{"instruction": "a", "output": "b"}]\n[', "1 of 2 Alpaca rows are malformed"),
        ('[{"instruction": "a", "output": "b"},', "1 of 2 Alpaca rows are malformed"),
    ],
)
def test_broken_json_lists_are_refused(written, content, message):
    assert message in refusal(read_rows, written(content))


# after the list, in a string, in a record, between records
@pytest.mark.parametrize("cut", [-1, -3, -20, -41])
@pytest.mark.parametrize("indent", [None, 1])
def test_whole_records_before_a_cut_are_read(written, capsys, cut, indent):
    text = json.dumps([pair(i) for i in range(200)], indent=indent)
    rows = rows_of(written(text[:cut]))
    assert [row["prompt"] for row in rows] == [f"ask {i}" for i in range(len(rows))]
    assert len(rows) in (199, 200) and "1 malformed" in capsys.readouterr().out


def test_a_list_that_is_broken_far_from_its_end_is_no_cut_one(written):
    text = json.dumps([pair(0, "tell" * 999)] * 3000)
    assert len(text) > 2 * MOST_CHARACTERS
    broken = text.replace('"ask 0"', "ask", 1)
    for some in (broken, broken[:-1]):
        assert "cannot be read after 0 records" in refusal(read_rows, written(some))


@pytest.mark.parametrize("form", ["list", "lines", "csv"])
def test_records_on_the_border_of_two_pieces_are_read(written, form):
    """And lines of every length up to there."""
    rows = [pair(f"{i} é🙂", "x" * (997 * i % 70_000 + 1)) for i in range(130)]
    text = {
        "list": json.dumps(rows, ensure_ascii=False, indent=1),
        "lines": lines(rows),
        "csv": "prompt,response\n" + "\n".join(f'"{r["prompt"]}",{r["response"]}' for r in rows),
    }[form]
    assert len(text) > MOST_CHARACTERS
    for number, row in enumerate(rows_of(written(text))):
        assert row == rows[number] | {"row": number}


def test_json_lines_end_at_newlines_only(written):
    row = pair("one\u2028two\u2029three\x85four", "\u2028 x")
    line = json.dumps(row, ensure_ascii=False)
    assert rows_of(written(f"{line}\r\n \n{line}\n"))[1] == row | {"row": 1}


def test_csv_fields_may_be_long_and_hold_line_ends(written):
    long = "x" * 200_000
    (row,) = rows_of(written(f'\r\ngoal,target\r\n\r\n"a\r\n\nb",{long}\r\n'))
    assert (row["prompt"], row["response"]) == ("a\r\n\nb", long)


@pytest.mark.parametrize("record", ['"open,x', 'a,"open', '"a"b,c'])
def test_a_bad_quote_is_named_with_the_records_before_it(written, record):
    path = written(f'goal,target\n"two\nlines",x\n{record}\na,b\nc,d\n')
    assert "cannot be read after 1 records (" in refusal(read_rows, path)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_damaged_file_is_read_or_refused_but_never_crashes(written, name):
    rng = random.Random(f"damage {name}")
    content = (FIXTURES / name).read_bytes()
    odd = [b"", b'"', b"\n", b"[", b"{", b"]", b"}", b",", b"null", b"\\ud800", b"\r", b"\xff"]
    for turn in range(60):
        damaged = bytearray(gzip.compress(content, mtime=0) if turn % 4 == 0 else content)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(9)] = rng.choice(odd)
        path = written(bytes(damaged))
        for read in (read_rows, read_questions, read_xstest):
            try:
                assert read(path)
            except InputError as error:
                assert "\n" not in str(error)


REAL = os.environ.get("NANOSDD_REAL_DATA")


@pytest.mark.skipif(
    not REAL,
    reason="NANOSDD_REAL_DATA is not set: the folder with AdvBench, Alpaca, OpenBookQA, MMLU",
)
def test_the_real_files(tmp_path, capsys):
    shutil.copy(Path(REAL) / "advbench/harmful_behaviors.csv", tmp_path / "x.json")
    rows = read_rows(tmp_path / "x.json")
    assert len(rows) == 520 and all(row["response"].startswith("Sure") for row in rows)
    assert len(read_rows(Path(REAL) / "alpaca/alpaca_en_demo.json")) == 999
    questions = read_questions(Path(REAL) / "openbookqa/test.jsonl")
    assert len(questions) == 300 and questions[0]["answer"] == 1
    counts = [len(read_questions(path)) for path in Path(REAL).glob("mmlu/*/*.csv")]
    assert len(counts) == 20 and sum(counts) == 50 + 1404
    assert capsys.readouterr().out == ""
