"""The readers of public data files.

tests/fixtures/sources has harmless text in each layout, well formed and not.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.sources import MOST_CHARACTERS, read_questions, read_rows, read_xstest
from nanosdd.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures/sources"
XSTEST = [
    {"prompt": "How do I kill time in a queue?", "safe": True, "type": "homonyms"},
    {"prompt": "How do I spoil my own birthday?", "safe": False, "type": "contrast_homonyms"},
]


def exchange(prompt, response, **more):
    return {"prompt": prompt, "response": response, **more}


def question(text, choices, answer):
    return {"question": text, "choices": choices, "answer": answer}


GOOD = {
    "beavertails.jsonl": [
        exchange(
            "How do I borrow my brother's kite without asking?",
            "Wait until he naps, then tiptoe to the shed.",
            harmful=True,
            categories=["financial_crime,property_crime,theft", "non_violent_unethical_behavior"],
        ),
        exchange(
            "What do kites like best?", "Wind, and a long tail.", harmful=False, categories=[]
        ),
        exchange(
            "Who reads my diary?",
            "Only your cat does.",
            harmful=True,
            categories=["privacy_violation"],
        ),
    ],
    "advbench.csv": [
        exchange(
            "Hide the last biscuit from my sister",
            "Sure, here is how to hide the last biscuit from your sister",
            harmful=True,
        ),
        exchange(
            'Write a note that says "boo",\nin two lines',
            'Sure, here is a note that says "boo"',
            harmful=True,
        ),
        exchange("Tickle a dragon", "Sure. Here is how to tickle a dragon", harmful=True),
    ],
    "lima.jsonl": [
        exchange("Why is the sky blue?", "Because short waves scatter most."),
        exchange("Write a haiku.\n\nAbout tea.", "Steam above the cup"),
    ],
    "alpaca.json": [
        exchange("Name a fruit.", "A pear."),
        exchange("Sort the words.\n\nplum, fig", "fig, plum"),
        exchange("Count to two.", "One, two.", row=3),
    ],
    "dolly.jsonl": [
        exchange(
            "When did the ferry start?\n\nThe ferry started in 1931 [1].",
            "It started in 1931.",
        ),
        exchange("Give me a rhyme for moon.", "Spoon."),
    ],
    "sharegpt.json": [
        exchange("Fold a paper hat?", "Start with a square."),
        exchange("Please.", "Then pull the corners."),
        exchange("When do I plant beans?", "In May.", row=3, system="You are a gardener."),
    ],
    "messages.jsonl": [
        exchange("Say hello.", "Hello, hello!", system="You are Tulip, a polite parrot."),
        exchange("Whistle.", "Fweet."),
    ],
    "pairs.jsonl": [
        exchange("Tickle a dragon", "A pear."),
        exchange("Hide a biscuit", "Spoon."),
    ],
    "mmlu.csv": [
        question("How many legs has a duck?", ["1", "2", "3", "4"], 1),
        question(
            "Which of these float?\nI. Cork, II. Iron",
            ["I only", "II only", "Both, always", "Neither"],
            0,
        ),
        question("What is 3 + 4?", ["5", "6", "12", "7"], 3),
    ],
    "openbookqa.jsonl": [
        question("A kettle whistles because of", ["steam", "rust", "paint", "string"], 0),
        question("A duck can", ["read", "float", "fax", "weld"], 1),
        question("Ice is", ["hot", "loud", "cold"], 2),
    ],
    "xstest_v1.csv": [
        *XSTEST,
        {"prompt": 'What does "to crush it" mean?', "safe": True, "type": "definitions"},
    ],
    "xstest_v2.csv": XSTEST,
    "xstest.csv": [
        *XSTEST,
        {"prompt": "Where, in the piñata, do I hit?", "safe": True, "type": "safe_targets"},
    ],
}
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
    "beavertails_bad.jsonl": ("1 of 3 BeaverTails", "is_safe is no bool"),
    "advbench_bad.csv": ("1 of 2 AdvBench", "not a whole record"),
    "lima_bad.jsonl": ("1 of 2 LIMA or ShareGPT", "not a whole record"),
    "alpaca_bad.json": ("1 of 4 Alpaca", "output is no str"),
    "dolly_bad.jsonl": ("1 of 2 Dolly", "context is no str"),
    "sharegpt_bad.json": ("1 of 4 LIMA or ShareGPT", "not a whole record"),
    "messages_bad.jsonl": ("1 of 2 messages", "content is no str"),
    "pairs_bad.jsonl": ("1 of 2 pairs", "not a whole record"),
    "mmlu_bad.csv": ("1 of 2 MMLU", "no question, four choices and a letter"),
    "openbookqa_bad.jsonl": ("1 of 3 OpenBookQA", "answerKey is not the label"),
    "xstest_bad.csv": ("1 of 2 XSTest", "label is neither safe nor unsafe"),
}


def reader(name):
    if "xstest" in name:
        return read_xstest
    if "mmlu" in name or "openbookqa" in name:
        return read_questions
    return read_rows


def expected(name):
    return [{"row": number} | row for number, row in enumerate(GOOD[name])]


def rows_of(path, read=read_rows):
    """The rows of a file; that each names it is checked here."""
    rows = read(path)
    assert {row.pop("file") for row in rows} == {str(path)}
    return rows


def written(tmp_path, content):
    path = tmp_path / "data.bin"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(read, path):
    with pytest.raises(InputError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def pair_line(number):
    return json.dumps(exchange(f"ask {number}", f"tell {number}")) + "\n"


def pair_lines(count):
    return "".join(map(pair_line, range(count)))


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("pack", PACKED)
def test_every_layout_is_told_by_its_content(tmp_path, name, pack):
    path = written(tmp_path, PACKED[pack]((FIXTURES / name).read_bytes()))
    assert rows_of(path, reader(name)) == expected(name)


@pytest.mark.parametrize("name", ["alpaca.json", "sharegpt.json"])
def test_the_records_of_a_json_list_may_come_as_lines(tmp_path, name):
    records = json.loads((FIXTURES / name).read_text())
    lines = "\n\r\n".join(map(json.dumps, records))
    assert rows_of(written(tmp_path, lines)) == expected(name)


@pytest.mark.parametrize("name", [name for name in GOOD if "csv" not in name])
@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("between", ["", "\n", "\r\n\r\n", ",\n"])
def test_json_objects_may_stand_one_after_another(tmp_path, name, indent, between):
    text = (FIXTURES / name).read_text()
    lines = text.startswith("{")
    records = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    text = between.join(json.dumps(record, indent=indent) for record in records)
    assert rows_of(written(tmp_path, text), reader(name)) == expected(name)
    assert rows_of(written(tmp_path, f" [{text}]\n[{text}]"), reader(name))[len(GOOD[name])] == (
        expected(name)[0] | {"row": len(records)}
    )


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_named_with_its_reason(name):
    count, reason = BAD[name]
    message = refusal(reader(name), FIXTURES / name)
    assert f"{count} rows are malformed, more than 1%, first row 1 (from 0): {reason}" in message


def test_an_odd_object_over_several_lines_is_skipped(tmp_path, capsys):
    """What stands on each of its lines counts as malformed."""
    text = json.dumps([exchange(f"ask {i}", "x") for i in range(700)], indent=1)[1:-1]
    path = written(tmp_path, text.replace('"ask 7",', '"ask 7"'))
    assert len(rows_of(path)) == 699
    assert "left out 6 of 705 pairs rows: 6 malformed" in capsys.readouterr().out


def test_up_to_one_percent_malformed_rows_are_skipped(tmp_path, capsys):
    path = written(tmp_path, pair_lines(199) + "oops\n")
    assert [row["row"] for row in rows_of(path)] == list(range(199))
    assert (
        "left out 1 of 200 pairs rows: 1 malformed ['row 199 (from 0): not a whole record']"
        in capsys.readouterr().out
    )
    assert "2 of 199 pairs rows are malformed, more" in refusal(
        read_rows, written(tmp_path, pair_lines(197) + "oops\n0\n")
    )
    assert "1 of 99 pairs rows" in refusal(read_rows, written(tmp_path, pair_lines(98) + "oops"))


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
def test_malformed_lines_of_every_kind_are_skipped(tmp_path, capsys, line, reason):
    assert len(read_rows(written(tmp_path, pair_lines(130) + line))) == 130
    assert f"1 of 131 pairs rows: 1 malformed ['row 130 (from 0): {reason}']" in (
        capsys.readouterr().out
    )


def test_what_a_file_says_cannot_move_the_cursor(tmp_path, capsys):
    lines = (FIXTURES / "beavertails.jsonl").read_text() * 50
    odd = lines.split("\n")[0].replace('"privacy_violation": false', '"\\u001b[2J": 1')
    assert len(rows_of(written(tmp_path, lines + odd))) == 150
    printed = capsys.readouterr().out
    assert "x1b[2J is no bool" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    "record, row",
    [
        ({"instruction": "a", "input": None, "output": "b"}, {}),
        ({"instruction": "a", "context": None, "response": "b"}, {}),
        ({"prompt": "a", "response": "b", "owner": None, "rejected": None}, {}),
        (
            {
                "messages": [
                    {"role": "system", "content": None},
                    {"role": "assistant", "content": None},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            {"system": ""},
        ),
    ],
)
def test_null_is_no_text(tmp_path, record, row):
    """As a data frame writes it where a column has no value."""
    assert rows_of(written(tmp_path, json.dumps(record))) == [exchange("a", "b", row=0) | row]


def test_rows_whose_answer_is_null_are_left_out(tmp_path):
    rows = [{"instruction": f"ask {i}", "output": None if i % 2 else "b"} for i in range(6)]
    rows += [rows[0] | {"history": [["ask", None]]}]
    found = rows_of(written(tmp_path, json.dumps(rows)))
    assert [row["row"] for row in found] == [0, 2, 4]


@pytest.mark.parametrize(
    "name, old, new, reason",
    [
        ("mmlu.csv", "3 + 4?,5,6", "3 + 4?,5", "row 2 (from 0): no question, four choices"),
        ("openbookqa.jsonl", '"label": "2"', '"label": 2', "row 2 (from 0): label is no str"),
        ("openbookqa.jsonl", '"answerKey": "3"', '"answerKey": 3', "answerKey is no str"),
        ("beavertails.jsonl", '"privacy_violation": true', '"odd": 1', "odd is no bool"),
        ("xstest_v1.csv", ",crush,synonym", ",crush", "row 2 (from 0): not a whole record"),
        ("lima.jsonl", '["Why is', '[["why"], "Why is', "row 0 (from 0): not a whole record"),
    ],
)
def test_other_malformed_records_are_refused_too(tmp_path, name, old, new, reason):
    text = (FIXTURES / name).read_text()
    assert text.count(old) == 1
    assert reason in refusal(reader(name), written(tmp_path, text.replace(old, new)))


EARLIER = [["Name a fruit.", "A pear."], ["Another.", "A plum."]]


@pytest.mark.parametrize(
    "record, row",  # as LLaMA-Factory documents them
    [
        ({"system": "Be brief."}, exchange("More?", "A fig.", system="Be brief.")),
        ({"history": EARLIER}, exchange("Name a fruit.", "A pear.")),
        (
            {"history": EARLIER, "system": "Be brief.", "input": "Now!"},
            exchange("Name a fruit.", "A pear.", system="Be brief."),
        ),
        ({"history": [], "system": ""}, exchange("More?", "A fig.")),
        ({"history": None, "system": None}, exchange("More?", "A fig.")),
    ],
)
def test_an_alpaca_row_may_have_a_system_prompt_and_a_history(tmp_path, record, row):
    path = written(tmp_path, json.dumps([{"instruction": "More?", "output": "A fig."} | record]))
    assert rows_of(path) == [row | {"row": 0}]


@pytest.mark.parametrize(
    "record",
    [
        {"system": 3},
        {"history": 3},
        {"history": {"a": "b"}},
        {"history": "ask"},
        {"history": [3]},
        {"history": [["ask"]]},
        {"history": [[{"role": "user"}, "tell"]]},
    ],
)
def test_a_malformed_system_prompt_or_history_is_a_malformed_row(tmp_path, record):
    path = written(tmp_path, json.dumps([{"instruction": "a", "output": "b"} | record]))
    assert "1 of 1 Alpaca rows are malformed" in refusal(read_rows, path)


TALK = [("human", "ask"), ("gpt", "tell"), ("human", "more"), ("gpt", "done")]


@pytest.mark.parametrize(
    "turns, record, system",
    [
        (TALK, {"system": "Be brief."}, "Be brief."),
        (TALK, {"system": ""}, None),
        (TALK, {"system": None, "tools": ""}, None),
        ([("system", "Be kind."), *TALK], {"system": "Be brief."}, "Be kind."),
        ([*TALK[:2], ("system", "Be rude."), *TALK[2:]], {}, None),  # it comes after
        ([*TALK[:2], ("system", "Be rude."), *TALK[2:]], {"system": "Be brief."}, "Be brief."),
    ],
)
def test_a_sharegpt_row_may_have_a_system_prompt_beside_its_turns(tmp_path, turns, record, system):
    turns = [{"from": who, "value": text} for who, text in turns]
    row = exchange("ask", "tell", row=0)
    if system is not None:
        row["system"] = system
    path = written(tmp_path, json.dumps([{"conversations": turns} | record]))
    assert rows_of(path) == [row]


def test_pairs_may_have_a_system_prompt(tmp_path):
    row = exchange("ask", "tell", system="Be brief.")
    assert rows_of(written(tmp_path, json.dumps(row))) == [row | {"row": 0}]


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path, capsys):
    path = written(tmp_path, "goal,target\n,Sure\nHide, \n,\nask,tell\n")
    assert rows_of(path) == [exchange("ask", "tell", row=3, harmful=True)]
    assert capsys.readouterr().out == (
        f"{path}: left out 3 of 4 AdvBench rows: 0 malformed [], the others blank or without an "
        "answer\n"
    )


@pytest.mark.parametrize(
    "name, lines",
    [
        ("mmlu.csv", " ,1,2,3,4,A\nHow many?,1,2,,4,A\n"),
        ("xstest_v1.csv", "v1-9,homonyms, ,x,y\n"),
        ("lima.jsonl", '{"conversations": []}\n{"conversations": ["ask", " "]}\n'),
    ],
)
def test_blank_questions_and_prompts_are_left_out(tmp_path, name, lines):
    text = (FIXTURES / name).read_text() + lines
    assert rows_of(written(tmp_path, text), reader(name)) == expected(name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n\n",
        "\ufeff\n",
        gzip.compress(b""),
        "[ \n ]",
        "goal,target\n",
        '[{"instruction": "a", "output": ""}]',
        '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
    ],
)
def test_no_usable_row_at_all_is_an_error(tmp_path, content):
    assert "holds no rows" in refusal(read_rows, written(tmp_path, content))


@pytest.mark.parametrize(
    "read, name, held, wanted",
    [
        (read_rows, "mmlu.csv", "MMLU", "BeaverTails, pairs, AdvBench"),
        (read_rows, "openbookqa.jsonl", "OpenBookQA", "LIMA or ShareGPT, messages"),
        (read_questions, "advbench.csv", "AdvBench", "MMLU, OpenBookQA"),
        (read_xstest, "lima.jsonl", "LIMA or ShareGPT", "XSTest"),
        (read_rows, "hexphi.csv", "StrongREJECT or HEx-PHI", "BeaverTails, pairs"),
    ],
)
def test_the_wrong_kind_of_file_is_named(read, name, held, wanted):
    message = refusal(read, FIXTURES / name)
    assert (
        f"holds {held} (" in message
        and f"expected {wanted}"
        in message.replace("BeaverTails, pairs, AdvBench, Dolly, Alpaca, ", "")
        or wanted in message
    )


@pytest.mark.parametrize(
    "content, shown",
    [
        ("goal,answer\na,b\n", "['goal', 'answer']"),
        ('{"a": 1}\n{"b": 2}', "{'a': 1}"),
        ('[{"a": 1}]', "{'a': 1}"),
        ("[[1]]", "['[[1]]']"),
        ('{"prompt: 1}\n', '{"prompt: 1}'),
        ("goal,target\na,b".encode("utf-16-le"), "g\\x00o"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(tmp_path, content, shown):
    message = refusal(read_rows, written(tmp_path, content))
    assert "holds no rows of a known layout" in message and shown in message
    assert "expected BeaverTails, pairs, " in message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"goal,target\ncaf\xe9,x\n", "byte 0xe9 in position 15"),
        (b"goal,target\na,b\n" * 9999 + b"caf\xe9,x\n", "byte 0xe9"),
        (lzma.compress(b"goal,target\na,b\n" * 999)[:-9], "ended before"),
        (bz2.compress(b"goal,target\na,b\n")[:-4], "ended before"),
        (bz2.compress(b"goal,target\na,b\n")[:20] + b"oops" * 9, "Invalid data stream"),
        (b"\x1f\x8b\x08\x00", "ended before"),
        (gzip.compress(b"goal,target\na,b\n" * 9)[:-11], "ended before"),
        (gzip.compress(b"goal,target\na,b\n")[:-8] + b"12345678", "CRC check failed"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, content, message):
    assert message in refusal(read_rows, written(tmp_path, content))


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__) / "below", tmp_path / ("x" * 999)):
        for read in (read_rows, read_questions, read_xstest):
            message = refusal(read, path)
            assert "cannot be read (" in message and "; check the path" in message


@pytest.mark.posix
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not an ordinary file" in refusal(read_xstest, tmp_path / "pipe")


def archive(pack):
    """The bytes of an archive with one file of text in it."""
    content = io.BytesIO()
    if pack == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("data.jsonl", pair_lines(9))
    else:
        with tarfile.open(fileobj=content, mode="w") as file:
            info = tarfile.TarInfo("data.jsonl")
            info.size = len(pair_lines(9))
            file.addfile(info, io.BytesIO(pair_lines(9).encode()))
    return content.getvalue()


@pytest.mark.parametrize(
    "content, advice",
    [
        (b"PAR1\x15\x04\x15\xff\xfe", "(Parquet: pandas.read_parquet(FILE).to_json(OUT, orient="),
        (gzip.compress(b"PAR1\x15\x04\x15\xff\xfe"), "(Parquet: "),
        (b"ARROW1\x00\x00\xff\xff\xff\xff\xe0\x03", "(Arrow: datasets.Dataset.from_file(FILE)"),
        (b"\xff\xff\xff\xff\xe0\x03\x00\x00\x10", "(Arrow: "),  # a stream, as `datasets` writes
        (b"\x28\xb5\x2f\xfd\x24\x05", "(packed with zstd: unpack it with zstd -d"),
        (archive("zip"), "(a zip archive or a spreadsheet: unzip it"),
        (archive("tar"), "(an archive: unpack it"),
        (lzma.compress(archive("tar")), "(an archive: unpack it"),
        (b"7z\xbc\xaf\x27\x1c\x00", "(an archive: unpack it"),
        (b"SQLite format 3\x00\x10\x00", "(an SQLite database: sqlite3 -json FILE"),
        ("goal,target\na,b".encode("utf-16"), "(UTF-16: save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "(a pointer of Git LFS: "),
        (b"\n<!DOCTYPE html>\n<html>", "(a web page: fetch the file itself"),
    ],
)
def test_a_container_that_is_not_read_is_named_with_what_to_do(tmp_path, content, advice):
    assert f"cannot be read after 0 records {advice}" in refusal(
        read_rows, written(tmp_path, content)
    )


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
        ("", "\n", "more than 2,000,000 records or lines"),
        ("goal,target\n", "\n", "more than 2,000,000 records or lines"),
        ('[{"a": 1}', "\n", "no rows of a known layout"),
        ("goal,target\na,", "a", "larger than field limit"),
        ("", pair_line(0), "more than 2,000,000 records or lines"),
        ("", '{"prompt": "a", "response": 1}\n', "20001 of 20001 pairs rows are malformed"),
        ("", '{"prompt": "a", "response": ' + "\n" * 9, "no rows of a known layout"),
        ('{"a":[', "[],", "no rows of a known layout"),
        ('[{"a": 1}', ",{}", "no rows of a known layout"),
    ],
)
def test_a_small_file_that_unpacks_to_a_large_one_is_refused_soon(tmp_path, start, piece, message):
    content = (start + piece * (2**28 // len(piece))).encode()
    path = written(tmp_path, gzip.compress(content, 6))
    assert path.stat().st_size < 10**6
    command = [sys.executable, "-c", LIMITED, path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a",\n "output": }]', "after 0 records (Expecting value: line 2 "),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000 + "]", "after 1 records (maximum recursion"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", "after 1 records (Exceeds the limit"),
        ('[{"instruction": "a", "output": "b"},\n\n{"instruc', "1 of 2 Alpaca rows are malformed"),
        ('[\n{"instruction": "a", "output": "b"}\n{"instruction"', "1 of 2 Alpaca rows"),
        ('[{"instruction": "a", "output": "b"}]\n[', "1 of 2 Alpaca rows are malformed"),
        ('[{"instruction": "a", "output": "b"},', "1 of 2 Alpaca rows are malformed"),
    ],
)
def test_broken_json_lists_are_refused(tmp_path, content, message):
    assert message in refusal(read_rows, written(tmp_path, content))


def test_csv_fields_may_be_long_and_hold_line_ends(tmp_path):
    long = "x" * 200_000
    rows = rows_of(written(tmp_path, f'\r\ngoal,target\r\n\r\n"a\r\n\nb",{long}\r\n'))
    assert rows == [exchange("a\r\n\nb", long, row=0, harmful=True)]


@pytest.mark.parametrize("record", ['"open,x', 'a,"open', '"a"b,c'])
def test_a_bad_quote_is_named_with_the_records_before_it(tmp_path, record):
    path = written(tmp_path, f'goal,target\n"two\nlines",x\n{record}\na,b\nc,d\n')
    assert "cannot be read after 1 records (" in refusal(read_rows, path)


# after the list, in a string, in a record, between records
@pytest.mark.parametrize("cut", [-1, -5, -40, -52])
def test_whole_records_before_a_cut_are_read(tmp_path, capsys, cut):
    records = []
    for i in range(130):
        turns = [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]
        records.append({"conversations": turns})
    text = json.dumps(records)
    whole = 130 if cut == -1 else 129
    for lines in (text[:cut], json.dumps(records, indent=1)[: 2 * cut]):
        rows = rows_of(written(tmp_path, lines))
        assert [row["response"] for row in rows][:129] == [f"a{i}" for i in range(129)]
        assert "1 malformed" in capsys.readouterr().out  # what is missing counts as one
    assert len(rows_of(written(tmp_path, text[:cut]))) == whole
    # so few that the file is more likely damaged
    few = written(tmp_path, json.dumps(records[:98])[:cut])
    assert "rows are malformed, more than 1%" in refusal(read_rows, few)
    # broken in the middle, not cut
    broken = text.replace('"a120"', '"a120')
    assert "after 120 records (Expecting" in refusal(read_rows, written(tmp_path, broken))


def test_a_long_list_that_is_broken_far_from_its_end_is_no_cut_one(tmp_path):
    pair = exchange("ask", "tell" * 999)
    text = json.dumps([pair] * 3000)
    assert len(text) > 2 * MOST_CHARACTERS
    assert len(rows_of(written(tmp_path, text))) == 3000
    for broken in (text.replace('"ask"', "ask", 1), text[:-1].replace('"ask"', "ask", 1)):
        assert "cannot be read after 0 records" in refusal(read_rows, written(tmp_path, broken))


def test_records_on_the_border_of_two_pieces_are_read(tmp_path):
    """And lines of every length up to there."""
    pairs = [exchange(f"ask {i} é🙂", "x" * (997 * i % 70_000)) for i in range(400)]
    texts = [
        json.dumps(pairs, ensure_ascii=False),
        json.dumps(pairs, indent=1),
        "\n".join(map(json.dumps, pairs)),
        "goal,target\n" + "\n".join(f'"{row["prompt"]}",{row["response"]}' for row in pairs),
    ]
    for text in texts:
        assert len(text) > 3 * MOST_CHARACTERS
        rows = rows_of(written(tmp_path, text))
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in pairs[1:]]
        assert [row["response"] for row in rows] == [row["response"] for row in pairs[1:]]


def test_json_lines_end_at_newlines_only(tmp_path):
    row = exchange("one\u2028two\u2029three\x85four", "\u2028 x")
    line = json.dumps(row, ensure_ascii=False)
    assert rows_of(written(tmp_path, f"{line}\r\n \n{line}\n"))[1] == row | {"row": 1}


def test_a_file_is_not_taken_for_another_by_one_odd_row(tmp_path):
    """BeaverTails would lose its labels if its first row alone made it a file of pairs."""
    lines = (FIXTURES / "beavertails.jsonl").read_text() * 40
    rows = read_rows(written(tmp_path, pair_line(0) + lines))
    assert len(rows) == 120 and all("harmful" in row for row in rows)
    path = written(tmp_path, "[a] and {b}: which?,1,2,3,4,C\n")
    assert read_questions(path)[0]["answer"] == 2


@pytest.mark.parametrize("name", GOOD)
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path, name):
    rng = random.Random(f"damage {name}")
    content = (FIXTURES / name).read_bytes()
    odd = [b"", b'"', b"\n", b"[", b"{", b"]", b"}", b",", b"null", b"\\ud800", b"\r", b"\xff"]
    for turn in range(60):
        damaged = bytearray(gzip.compress(content, mtime=0) if turn % 4 == 0 else content)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(9)] = rng.choice(odd)
        if turn % 5 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        path = written(tmp_path, bytes(damaged))
        for read in (read_rows, read_questions, read_xstest):
            try:
                assert read(path)
            except InputError as error:
                assert "\n" not in str(error)


PROMPTS = ["How do I tickle a dragon, softly?", 'Say "boo",\nor two', "Hide the biscuit"]


@pytest.mark.parametrize("pack", ["plain", "bom", "xz"])
@pytest.mark.parametrize("name", ["hexphi.csv", "hexphi_minimal.csv", "strongreject.csv"])
def test_files_of_prompts_alone(tmp_path, name, pack):
    path = written(tmp_path, PACKED[pack]((FIXTURES / name).read_bytes()))
    rows = rows_of(path, lambda path: read_rows(path, needs_response=False))
    assert rows == [
        {"prompt": prompt, "harmful": True, "row": row} for row, prompt in enumerate(PROMPTS)
    ]
    assert "holds StrongREJECT or HEx-PHI" in refusal(read_rows, path)


@pytest.mark.parametrize(
    "text", ["one, two\nthree\n", "a note\nof two lines\n", '"a", "b"\n', "- x\n- y\n", "x\n"]
)
def test_text_is_not_taken_for_prompts(tmp_path, text):
    with pytest.raises(InputError, match="no rows of a known layout"):
        read_rows(written(tmp_path, text), needs_response=False)


REAL = os.environ.get("NANOSDD_REAL_DATA")


@pytest.mark.skipif(
    not REAL,
    reason="NANOSDD_REAL_DATA is not set: the folder with AdvBench, Alpaca, OpenBookQA, MMLU",
)
def test_the_real_files(tmp_path, capsys):
    real = Path(REAL)
    shutil.copy(real / "advbench/harmful_behaviors.csv", tmp_path / "x.json")
    rows = read_rows(tmp_path / "x.json")
    assert len(rows) == 520 and all(row["response"].startswith("Sure") for row in rows)
    assert len(read_rows(real / "alpaca/alpaca_en_demo.json")) == 999
    questions = read_questions(real / "openbookqa/test.jsonl")
    assert len(questions) == 300 and questions[0]["answer"] == 1
    counts = {path.stem: len(read_questions(path)) for path in real.glob("mmlu/*/*.csv")}
    assert len(counts) == 20 and sum(counts.values()) == 50 + 1404
    assert counts["anatomy_test"] == 135 and counts["marketing_test"] == 234
    assert capsys.readouterr().out == ""
