"""The readers of public data files. tests/fixtures/sources has harmless text in each layout, well formed and not."""

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from data.sources import read_questions, read_rows, read_xstest
from nanosdd.errors import InputError

FIXTURES = Path(__file__).parent.parent / "fixtures/sources"
GOOD = {
    "beavertails.jsonl": (
        read_rows,
        [
            {
                "prompt": "How do I borrow my brother's kite without asking?",
                "response": "Wait until he naps, then tiptoe to the shed.",
                "row": 0,
                "is_safe": False,
                "categories": [
                    "financial_crime,property_crime,theft",
                    "non_violent_unethical_behavior",
                ],
            },
            {
                "prompt": "What do kites like best?",
                "response": "Wind, and a long tail.",
                "row": 1,
                "is_safe": True,
                "categories": [],
            },
            {
                "prompt": "Who reads my diary?",
                "response": "Only your cat does.",
                "row": 2,
                "is_safe": False,
                "categories": ["privacy_violation"],
            },
        ],
    ),
    "advbench.csv": (
        read_rows,
        [
            {
                "prompt": "Hide the last biscuit from my sister",
                "response": "Sure, here is how to hide the last biscuit from your sister",
                "row": 0,
                "harmful": True,
            },
            {
                "prompt": 'Write a note that says "boo",\nin two lines',
                "response": 'Sure, here is a note that says "boo"',
                "row": 1,
                "harmful": True,
            },
            {
                "prompt": "Tickle a dragon",
                "response": "Sure. Here is how to tickle a dragon",
                "row": 2,
                "harmful": True,
            },
        ],
    ),
    "lima.jsonl": (
        read_rows,
        [
            {
                "prompt": "Why is the sky blue?",
                "response": "Because short waves scatter most.",
                "row": 0,
            },
            {"prompt": "Write a haiku.\n\nAbout tea.", "response": "Steam above the cup", "row": 1},
        ],
    ),
    "alpaca.json": (
        read_rows,
        [
            {"prompt": "Name a fruit.", "response": "A pear.", "row": 0},
            {"prompt": "Sort the words.\n\nplum, fig", "response": "fig, plum", "row": 1},
            {"prompt": "Count to two.", "response": "One, two.", "row": 3},
        ],
    ),
    "dolly.jsonl": (
        read_rows,
        [
            {
                "prompt": "When did the ferry start?\n\nThe ferry started in 1931 [1].",
                "response": "It started in 1931.",
                "row": 0,
            },
            {"prompt": "Give me a rhyme for moon.", "response": "Spoon.", "row": 1},
        ],
    ),
    "sharegpt.json": (
        read_rows,
        [
            {"prompt": "Fold a paper hat?", "response": "Start with a square.", "row": 0},
            {"prompt": "Please.", "response": "Then pull the corners.", "row": 1},
            {
                "prompt": "When do I plant beans?",
                "response": "In May.",
                "row": 3,
                "system": "You are a gardener.",
            },
        ],
    ),
    "messages.jsonl": (
        read_rows,
        [
            {
                "prompt": "Say hello.",
                "response": "Hello, hello!",
                "row": 0,
                "system": "You are Tulip, a polite parrot.",
            },
            {"prompt": "Whistle.", "response": "Fweet.", "row": 1},
        ],
    ),
    "pairs.jsonl": (
        read_rows,
        [
            {"prompt": "Tickle a dragon", "response": "A pear.", "row": 0},
            {"prompt": "Hide a biscuit", "response": "Spoon.", "row": 1},
        ],
    ),
    "mmlu.csv": (
        read_questions,
        [
            {
                "question": "How many legs has a duck?",
                "choices": ["1", "2", "3", "4"],
                "answer": 1,
                "row": 0,
            },
            {
                "question": "Which of these float?\nI. Cork, II. Iron",
                "answer": 0,
                "row": 1,
                "choices": ["I only", "II only", "Both, always", "Neither"],
            },
            {"question": "What is 3 + 4?", "choices": ["5", "6", "12", "7"], "answer": 3, "row": 2},
        ],
    ),
    "openbookqa.jsonl": (
        read_questions,
        [
            {
                "question": "A kettle whistles because of",
                "choices": ["steam", "rust", "paint", "string"],
                "answer": 0,
                "row": 0,
            },
            {
                "question": "A duck can",
                "choices": ["read", "float", "fax", "weld"],
                "answer": 1,
                "row": 1,
            },
            {"question": "Ice is", "choices": ["hot", "loud", "cold"], "answer": 2, "row": 2},
        ],
    ),
    "xstest_v1.csv": (
        read_xstest,
        [
            {
                "prompt": "How do I kill time in a queue?",
                "safe": True,
                "type": "homonyms",
                "row": 0,
            },
            {
                "prompt": "How do I spoil my own birthday?",
                "safe": False,
                "type": "contrast_homonyms",
                "row": 1,
            },
            {
                "prompt": 'What does "to crush it" mean?',
                "safe": True,
                "type": "definitions",
                "row": 2,
            },
        ],
    ),
    "xstest_v2.csv": (
        read_xstest,
        [
            {
                "prompt": "How do I kill time in a queue?",
                "safe": True,
                "type": "homonyms",
                "row": 0,
            },
            {
                "prompt": "How do I spoil my own birthday?",
                "safe": False,
                "type": "contrast_homonyms",
                "row": 1,
            },
        ],
    ),
    "xstest.csv": (
        read_xstest,
        [
            {
                "prompt": "How do I kill time in a queue?",
                "safe": True,
                "type": "homonyms",
                "row": 0,
            },
            {
                "prompt": "How do I spoil my own birthday?",
                "safe": False,
                "type": "contrast_homonyms",
                "row": 1,
            },
            {
                "prompt": "Where, in the piñata, do I hit?",
                "safe": True,
                "type": "safe_targets",
                "row": 2,
            },
        ],
    ),
}
BAD = {  # in each, the record in row 1 is malformed
    "beavertails_bad.jsonl": (
        read_rows,
        "1 of 3 BeaverTails rows are malformed",
        2,
        "no true or false is_safe",
    ),
    "advbench_bad.csv": (read_rows, "1 of 2 AdvBench rows are malformed", 4, "1 fields, not 2"),
    "lima_bad.jsonl": (
        read_rows,
        "1 of 2 LIMA or ShareGPT rows are malformed",
        2,
        "no string from",
    ),
    "alpaca_bad.json": (read_rows, "1 of 4 Alpaca rows are malformed", 7, "no string output"),
    "dolly_bad.jsonl": (read_rows, "1 of 2 Dolly rows are malformed", 2, "no string context"),
    "sharegpt_bad.json": (
        read_rows,
        "1 of 4 LIMA or ShareGPT rows are malformed",
        23,
        "no string from",
    ),
    "messages_bad.jsonl": (read_rows, "1 of 2 messages rows are malformed", 2, "no string content"),
    "pairs_bad.jsonl": (read_rows, "1 of 2 pairs rows are malformed", 2, "not JSON"),
    "mmlu_bad.csv": (
        read_questions,
        "1 of 2 MMLU rows are malformed",
        2,
        "the answer is none of A, B, C, D",
    ),
    "openbookqa_bad.jsonl": (
        read_questions,
        "1 of 3 OpenBookQA rows are malformed",
        2,
        "answerKey is not the label of one choice",
    ),
    "xstest_bad.csv": (
        read_xstest,
        "1 of 2 XSTest rows are malformed",
        3,
        "the label is neither safe nor unsafe",
    ),
}


def written(tmp_path, content):
    path = tmp_path / "data.bin"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(read, path):
    with pytest.raises(InputError) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def pair_line(number, **changes):
    return json.dumps({"prompt": f"ask {number}", "response": f"tell {number}"} | changes) + "\n"


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("pack", ["plain", "gzip", "crlf", "bom", "utf-16"])
def test_every_layout_is_told_by_its_content(tmp_path, name, pack):
    read, expected = GOOD[name]
    content = (FIXTURES / name).read_bytes()
    if pack == "crlf" and name != "mmlu.csv":  # whose question with a line end in it would change
        content = (
            content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").replace(b'",\r\nin', b'",\nin')
        )
    packed = {
        "gzip": gzip.compress,
        "bom": lambda c: b"\xef\xbb\xbf" + c,
        "utf-16": lambda c: c.decode().encode("utf-16"),
    }.get(pack, bytes)(content)
    assert read(written(tmp_path, packed)) == expected


@pytest.mark.parametrize("name", ["alpaca.json", "sharegpt.json"])
def test_the_records_of_a_json_list_may_come_as_lines(tmp_path, name):
    read, expected = GOOD[name]
    lines = "".join(
        json.dumps(record) + "\n\n" for record in json.loads((FIXTURES / name).read_text())
    )
    assert read(written(tmp_path, lines)) == expected


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_named_with_its_line_and_reason(name):
    read, count, line, reason = BAD[name]
    assert f"{count}, more than 1%, first line {line} (row 1: {reason})" in refusal(
        read, FIXTURES / name
    )


@pytest.mark.parametrize("name", BAD)
def test_up_to_one_percent_malformed_rows_are_listed_and_skipped(tmp_path, capsys, name):
    read, _, bad_line, reason = BAD[name]
    good, bad = (FIXTURES / name.replace("_bad", "")).read_text(), (FIXTURES / name).read_text()
    expected = GOOD[name.replace("_bad", "")][1]
    if name.endswith("json"):
        text = json.dumps(json.loads(good) * 70 + [json.loads(bad)[1]])
        line = 1
    else:
        lines, header = good.splitlines(True), []
        if good.startswith(("goal,", "id,")):
            header = [lines.pop(0)]
        text = "".join(header + lines * 70 + [bad.splitlines(True)[bad_line - 1]])
        line = len(header) + len(lines) * 70 + 1
    rows = read(written(tmp_path, text))
    assert len(rows) == len(expected) * 70 and rows[-1] == expected[-1] | {"row": rows[-1]["row"]}
    out = capsys.readouterr().out
    assert "skipped 1 of " in out and f" rows: line {line} (row " in out and f": {reason})\n" in out


def test_the_limit_is_one_percent_rounded_down(tmp_path, capsys):
    lines = [pair_line(i) for i in range(699)]
    for number in (3, 50, 201, 202, 420, 698):
        lines[number] = '{"prompt": 3}\n'
    rows = read_rows(written(tmp_path, "".join(lines)))
    assert len(rows) == 693 and [row["row"] for row in rows[2:5]] == [2, 4, 5]
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'data.bin'}: skipped 6 of 699 rows: "
        + ", ".join(f"line {i + 1} (row {i}: no string prompt)" for i in (3, 50, 201, 202, 420))
        + " and 1 more\n"
    )
    lines[0] = "not a record\n"
    message = refusal(read_rows, written(tmp_path, "".join(lines)))
    assert (
        "7 of 699 pairs rows are malformed, more than 1%, first line 1 (row 0: not JSON)" in message
    )
    assert (
        len(read_rows(written(tmp_path, "".join(lines) + pair_line(7)))) == 693
    )  # of 700 rows, 7 may be malformed


def test_a_file_of_fewer_than_100_rows_allows_no_malformed_one(tmp_path):
    lines = [pair_line(i) for i in range(98)] + ["[]\n"]
    assert "1 of 99 pairs rows" in refusal(read_rows, written(tmp_path, "".join(lines)))
    assert len(read_rows(written(tmp_path, "".join(lines) + pair_line(98)))) == 99


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path, capsys):
    path = FIXTURES / "sharegpt.json"
    read_rows(path)
    assert capsys.readouterr().out == f"{path}: left out 1 of 4 rows, blank or without an answer\n"
    rows = read_rows(written(tmp_path, "goal,target\n,Sure\nHide, \n,\nask,tell\n"))
    assert rows == [{"prompt": "ask", "response": "tell", "row": 3, "harmful": True}]
    assert "left out 3 of 4 rows" in capsys.readouterr().out
    read_rows(FIXTURES / "pairs.jsonl")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        '{"instruction": " ", "input": "here", "output": "x"}',
        '{"conversations": []}',
        '{"conversations": ["hi"]}',
        '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
        "[]",
        "[ \n ]",
        '[{"instruction": "a", "output": ""}]',
        "goal,target\n",
        "id,type,prompt,focus,note\n",
    ],
)
def test_no_usable_row_at_all_is_an_error(tmp_path, content):
    assert "holds no rows" in refusal(read_rows, written(tmp_path, content))


def test_blank_questions_and_prompts_are_left_out(tmp_path, capsys):
    lines = (FIXTURES / "mmlu.csv").read_text() + " ,1,2,3,4,A\nHow many?,1,2,,4,A\n"
    assert read_questions(written(tmp_path, lines)) == GOOD["mmlu.csv"][1]
    assert "left out 2 of 5 rows" in capsys.readouterr().out
    lines = (FIXTURES / "xstest_v1.csv").read_text() + "v1-9,homonyms, ,x,y\n"
    assert read_xstest(written(tmp_path, lines)) == GOOD["xstest_v1.csv"][1]


@pytest.mark.parametrize(
    "name, old, new, reason",
    [
        ("mmlu.csv", "3 + 4?,5,6", "3 + 4?,5", "row 2: 5 fields, not 6"),
        ("mmlu.csv", "7,D", "7,", "row 2: the answer is"),
        ("mmlu.csv", "7,D", "7,d", "row 2: the answer is"),
        (
            "openbookqa.jsonl",
            '"label": "2"',
            '"label": "3"',
            "row 2: answerKey is not the label of one choice",
        ),
        ("openbookqa.jsonl", '"answerKey": "3"', '"answerKey": 3', "row 2: no string answerKey"),
        (
            "beavertails.jsonl",
            '"privacy_violation": true',
            '"privacy_violation": 1',
            "row 2: category holds more than",
        ),
        (
            "beavertails.jsonl",
            '"is_safe": true',
            '"is_safe": "yes"',
            "row 1: no true or false is_safe",
        ),
        ("xstest_v1.csv", ",crush,synonym", ",crush", "row 2: 4 fields, not 5"),
        ("lima.jsonl", '["Why is', '[["why"], "Why is', "row 0: no string from"),
        (
            "messages.jsonl",
            '[{"role": "user", "content": "W',
            '["user", {"role": "user", "content": "W',
            "row 1: no str",
        ),
    ],
)
def test_other_malformed_records_are_refused_too(tmp_path, name, old, new, reason):
    text = (FIXTURES / name).read_text()
    assert text.count(old) == 1
    assert reason in refusal(GOOD[name][0], written(tmp_path, text.replace(old, new)))


def test_an_mmlu_letter_may_have_space_around_it(tmp_path):
    text = (FIXTURES / "mmlu.csv").read_text()
    assert read_questions(written(tmp_path, text.replace("7,D", "7, D "))) == GOOD["mmlu.csv"][1]


@pytest.mark.parametrize(
    "read, name, held, wanted",
    [
        (read_rows, "mmlu.csv", "MMLU", "prompt-response rows: BeaverTails, pairs"),
        (read_rows, "xstest.csv", "XSTest", "prompt-response rows"),
        (read_rows, "openbookqa.jsonl", "OpenBookQA", "rows"),
        (read_questions, "advbench.csv", "AdvBench", "multiple-choice questions: MMLU, OpenBookQA"),
        (read_xstest, "lima.jsonl", "LIMA or ShareGPT", "XSTest prompts"),
    ],
)
def test_the_wrong_kind_of_file_is_named(read, name, held, wanted):
    message = refusal(read, FIXTURES / name)
    assert f"holds {held} records; expected " in message and wanted in message


@pytest.mark.parametrize(
    "content, shown",
    [
        ("goal,answer\na,b\n", "line 1: ('goal', 'answer')"),
        ("\n\nplain text\n", "line 3: ('plain text',)"),
        ('{"a": 1}\n{"b": 2}', "line 1: ['a']"),
        ("[[1]]", "line 1: [1]"),
        ('[\n\n"x"]', "line 3: 'x'"),
        ('{"prompt: 1}\n', "not JSON"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(tmp_path, content, shown):
    message = refusal(read_rows, written(tmp_path, content))
    assert "is of no known format" in message and shown in message
    assert all(
        name in message
        for name in (
            "BeaverTails",
            "LIMA",
            "Dolly",
            "messages",
            "pairs",
            "Alpaca",
            "ShareGPT",
            "AdvBench",
            "XSTest",
            "MMLU",
            "OpenBookQA",
        )
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"goal,target\ncaf\xe9,x\n", "byte 15 is not UTF-8"),
        (b"\xef\xbb\xbfgoal,target\ncaf\xe9,x\n", "byte 18 is not"),
        (b"\xff\xfeg\0o", "byte 4 is not UTF-16"),
        ("goal,target\na,b".encode("utf-16-le"), "character 1 is NUL"),
        (b"goal,target\na,b\0c\n", "character 15 is NUL"),
        (b"\x1f\x8b\x08\x00", "is a truncated or corrupt gzip"),
        (gzip.compress(b"goal,target\na,b\n" * 9)[:-11], "is a truncated or corrupt gzip"),
        (gzip.compress(b"goal,target\na,b\n")[:-8] + b"12345678", "is a truncated or corrupt gzip"),
        (gzip.compress(b"goal,target\na,b\n") + b"more", "is a truncated or corrupt gzip"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, content, message):
    assert message in refusal(read_rows, written(tmp_path, content))


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__) / "below", tmp_path / ("x" * 999)):
        message = refusal(read_rows, path)
        assert "is not a file that can be read (" in message and "; give BeaverTails" in message


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a",\n "output": }]', "line 2: not JSON (Expecting value)"),
        ('[{"instruction": "a", "output": "b"},\n\n{"instruc', "line 3: not JSON"),
        ('[{"instruction": "a", "output": "b"},\n', "line 2: not JSON"),
        ('[{"instruction": "a"},]', "line 1: not JSON"),
        (
            '[\n{"instruction": "a", "output": "b"}\n{"instruction"',
            "line 3: not JSON (no comma or ])",
        ),
        ('[{"instruction": "a", "output": "b"}', "line 1: not JSON (no comma or ])"),
        (
            '[{"instruction": "a", "output": "b"}]\n[',
            "line 1: not JSON (more after the end of the list)",
        ),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000, "line 2: not JSON (maximum recursion"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", "line 2: not JSON (Exceeds the limit"),
    ],
)
def test_broken_json_lists_are_named_with_their_line(tmp_path, content, message):
    assert message in refusal(read_rows, written(tmp_path, content))


def test_csv_fields_may_be_long_and_hold_line_ends(tmp_path):
    long = "x" * 200_000
    rows = read_rows(written(tmp_path, f'\r\ngoal,target\r\n\r\n"a\r\n\nb",{long}\r\n'))
    assert rows == [{"prompt": "a\r\n\nb", "response": long, "row": 0, "harmful": True}]
    message = refusal(read_rows, written(tmp_path, 'goal,target\n"a\n\nb",c\n\nonly one\n'))
    assert "first line 6 (row 1: 1 fields, not 2)" in message


def test_csv_lines_may_end_in_carriage_returns(tmp_path):
    rows = read_rows(written(tmp_path, "goal,target\rask,tell\rwho,me\r"))
    assert [row["prompt"] for row in rows] == ["ask", "who"]


@pytest.mark.parametrize("record", ['"open,x', 'a,"open', '"a"b,c'])
def test_an_unclosed_quote_is_named_with_the_line_where_its_record_starts(tmp_path, record):
    message = refusal(
        read_rows, written(tmp_path, f'goal,target\n"two\nlines",x\n{record}\na,b\nc,d\n')
    )
    assert "line 4: the CSV record that starts there has an unclosed or misplaced quote" in message


@pytest.mark.parametrize(
    "cut", [-1, -5, -40, -52]
)  # after the list, in a string, in a record, between records
def test_whole_records_before_a_cut_are_read(tmp_path, capsys, cut):
    records = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}
        for i in range(130)
    ]
    text = json.dumps(records)
    (tmp_path / "s.json").write_text(text[:cut])
    whole = 130 if cut == -1 else 129
    assert [row["response"] for row in read_rows(tmp_path / "s.json")] == [
        f"a{i}" for i in range(whole)
    ]
    assert f"the {whole} whole records before it are read" in capsys.readouterr().out
    (tmp_path / "s.json").write_text(
        json.dumps(records[:99])[:cut]
    )  # so few that the file is more likely damaged
    with pytest.raises(InputError, match="cut short"):
        read_rows(tmp_path / "s.json")
    (tmp_path / "s.json").write_text(
        text.replace('"a120"', '"a120')
    )  # broken in the middle, not cut
    with pytest.raises(InputError, match="line 1"):
        read_rows(tmp_path / "s.json")


def test_json_lines_end_at_newlines_only(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive"
    content = (
        json.dumps({"prompt": "p", "response": "r"})
        + "\r\n \n"
        + json.dumps(
            {"prompt": text.replace("\x0b", ""), "response": "\u2028 x"}, ensure_ascii=False
        )
        + "\n"
    )
    rows = read_rows(written(tmp_path, content))
    assert rows[1] == {
        "prompt": "one\u2028two\u2029three\x85fourfive",
        "response": "\u2028 x",
        "row": 1,
    }


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": NaN, "response": "x"}', "no string prompt"),
        ("3", "no string prompt"),
        ("[[]]", "no string prompt"),
        ('{"prompt": "a", "response": ["x"]}', "no string response"),
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("null", "no string prompt"),
        ('{"prompt": "a", "response": "\\ud83d"}', "half a surrogate pair in response"),
    ],
)
def test_malformed_lines_of_every_kind_are_skipped(tmp_path, capsys, line, reason):
    lines = "".join(pair_line(i) for i in range(130))
    assert len(read_rows(written(tmp_path, lines + line))) == 130
    assert f"skipped 1 of 131 rows: line 131 (row 130: {reason})" in capsys.readouterr().out


def test_a_file_is_not_taken_for_another_by_one_odd_row(tmp_path, capsys):
    """BeaverTails would lose its labels if its first row alone, which lacks is_safe, made it a file of pairs."""
    lines = (FIXTURES / "beavertails.jsonl").read_text() * 40
    rows = read_rows(written(tmp_path, pair_line(0) + lines))
    assert len(rows) == 120 and all("is_safe" in row for row in rows)
    assert "line 1 (row 0: no object category)" in capsys.readouterr().out
    question = "[a] and {b}: which?,1,2,3,4,C\n"
    assert read_questions(written(tmp_path, question))[0]["answer"] == 2


@pytest.mark.parametrize("name", GOOD)
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path, name):
    rng = random.Random(f"damage {name}")
    content = (FIXTURES / name).read_bytes()
    for turn in range(60):
        damaged = bytearray(gzip.compress(content, mtime=0) if turn % 4 == 0 else content)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            edit = rng.randrange(4)
            if edit == 0:
                del damaged[at + 1 :]
            elif edit == 1:
                damaged[at] = rng.randrange(256)
            elif edit == 2:
                damaged[at : at + rng.randrange(9)] = b""
            else:
                damaged[at:at] = rng.choice(
                    [b'"', b"\n", b"[", b"{", b"]", b"}", b",", b"null", b"\\ud800", b"\r"]
                )
        path = written(tmp_path, bytes(damaged))
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
    real = Path(REAL)
    shutil.copy(real / "advbench/harmful_behaviors.csv", tmp_path / "x.json")
    rows = read_rows(tmp_path / "x.json")
    assert (
        len(rows) == 520
        and rows[-1]["row"] == 519
        and all(row["response"].startswith("Sure") for row in rows)
    )
    assert len(read_rows(real / "alpaca/alpaca_en_demo.json")) == 999
    questions = read_questions(real / "openbookqa/test.jsonl")
    assert (
        len(questions) == 300
        and {len(q["choices"]) for q in questions} == {4}
        and questions[0]["answer"] == 1
    )
    counts = {path.stem: len(read_questions(path)) for path in real.glob("mmlu/*/*.csv")}
    assert [count for name, count in counts.items() if name.endswith("dev")] == [5] * 10
    assert {name: count for name, count in counts.items() if name.endswith("test")} == {
        "abstract_algebra_test": 100,
        "anatomy_test": 135,
        "astronomy_test": 152,
        "business_ethics_test": 100,
        "college_physics_test": 102,
        "global_facts_test": 100,
        "high_school_geography_test": 198,
        "machine_learning_test": 112,
        "marketing_test": 234,
        "world_religions_test": 171,
    }
    assert capsys.readouterr().out == ""


def test_broken_lines_at_the_start_do_not_hide_the_format(tmp_path):
    lines = "".join(pair_line(i) for i in range(298))
    assert len(read_rows(written(tmp_path, "oops\nand again\n" + lines))) == 298
    records = "[null, " + ", ".join(pair_line(i) for i in range(150)) + "]"
    assert len(read_rows(written(tmp_path, records))) == 150
