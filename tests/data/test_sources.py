"""The readers of public data files.

tests/fixtures/sources has harmless text in each layout, well formed and not.
"""

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
            is_safe=False,
            categories=["financial_crime,property_crime,theft", "non_violent_unethical_behavior"],
        ),
        exchange("What do kites like best?", "Wind, and a long tail.", is_safe=True, categories=[]),
        exchange(
            "Who reads my diary?",
            "Only your cat does.",
            is_safe=False,
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
@pytest.mark.parametrize("pack", ["plain", "gzip", "bom"])
def test_every_layout_is_told_by_its_content(tmp_path, name, pack):
    content = (FIXTURES / name).read_bytes()
    if pack == "gzip":
        content = gzip.compress(content)
    if pack == "bom":
        content = b"\xef\xbb\xbf" + content
    assert reader(name)(written(tmp_path, content)) == expected(name)


@pytest.mark.parametrize("name", ["alpaca.json", "sharegpt.json"])
def test_the_records_of_a_json_list_may_come_as_lines(tmp_path, name):
    records = json.loads((FIXTURES / name).read_text())
    lines = "\n\r\n".join(map(json.dumps, records))
    assert read_rows(written(tmp_path, lines)) == expected(name)


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_named_with_its_reason(name):
    count, reason = BAD[name]
    message = refusal(reader(name), FIXTURES / name)
    assert f"{count} rows are malformed, more than 1%, first row 1 (from 0): {reason}" in message


def test_up_to_one_percent_malformed_rows_are_skipped(tmp_path, capsys):
    path = written(tmp_path, pair_lines(199) + "oops\n")
    assert [row["row"] for row in read_rows(path)] == list(range(199))
    assert "1 of 200 pairs rows are malformed and skipped, first row 199" in capsys.readouterr().out
    assert "2 of 199 pairs rows are malformed, more" in refusal(
        read_rows, written(tmp_path, pair_lines(197) + "oops\n[]\n")
    )
    assert "1 of 99 pairs rows" in refusal(read_rows, written(tmp_path, pair_lines(98) + "oops"))


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": NaN, "response": "x"}', "prompt is no str"),
        ('{"prompt": "a"', "not a whole record"),
        ("[" * 100_000, "not a whole record"),
        ("1" * 5000, "not a whole record"),
        ("null", "not a whole record"),
        ('{"prompt": "a", "response": "\\ud83d"}', "response has half a surrogate pair"),
        ('{"prompt": "a", "response": "b", "owner": null}', "owner is no str"),
    ],
)
def test_malformed_lines_of_every_kind_are_skipped(tmp_path, capsys, line, reason):
    assert len(read_rows(written(tmp_path, pair_lines(130) + line))) == 130
    assert f"1 of 131 pairs rows are malformed and skipped, first row 130 (from 0): {reason}\n" in (
        capsys.readouterr().out
    )


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
    assert read_rows(path) == [row | {"row": 0}]


@pytest.mark.parametrize(
    "record",
    [
        {"system": 3},
        {"history": 3},
        {"history": {"a": "b"}},
        {"history": "ask"},
        {"history": [3]},
        {"history": [["ask"]]},
        {"history": [["ask", None]]},
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
    assert read_rows(path) == [row]


def test_pairs_may_have_a_system_prompt(tmp_path):
    row = exchange("ask", "tell", system="Be brief.")
    assert read_rows(written(tmp_path, json.dumps(row))) == [row | {"row": 0}]


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path, capsys):
    path = written(tmp_path, "goal,target\n,Sure\nHide, \n,\nask,tell\n")
    assert read_rows(path) == [exchange("ask", "tell", row=3, harmful=True)]
    assert capsys.readouterr().out == f"{path}: left out 3 of 4 rows, blank or without an answer\n"


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
    assert reader(name)(written(tmp_path, text)) == expected(name)


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
        (read_rows, "mmlu.csv", "MMLU", "prompt-response rows: BeaverTails, pairs"),
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
        ("goal,answer\na,b\n", "['goal', 'answer']"),
        ('{"a": 1}\n{"b": 2}', "{'a': 1}"),
        ('[{"a": 1}]', "{'a': 1}"),
        ("[[1]]", "['[[1]]']"),
        ('{"prompt: 1}\n', '{"prompt: 1}'),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ("goal,target\na,b".encode("utf-16-le"), "g\\x00o"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(tmp_path, content, shown):
    message = refusal(read_rows, written(tmp_path, content))
    assert "is of no known format" in message and shown in message
    assert "BeaverTails, LIMA, Dolly, " in message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"goal,target\ncaf\xe9,x\n", "byte 0xe9 in position 15"),
        ("goal,target\na,b".encode("utf-16"), "byte 0xff in position 0"),
        (b"\x1f\x8b\x08\x00", "ended before"),
        (gzip.compress(b"goal,target\na,b\n" * 9)[:-11], "ended before"),
        (gzip.compress(b"goal,target\na,b\n")[:-8] + b"12345678", "CRC check failed"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, content, message):
    assert message in refusal(read_rows, written(tmp_path, content))


def test_paths_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__) / "below", tmp_path / ("x" * 999)):
        message = refusal(read_rows, path)
        assert "is not a file of text that can be read (" in message
        assert "; give BeaverTails" in message


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"instruction": "a",\n "output": }]', "Expecting value: line 2 column 12"),
        ('[{"instruction": "a", "output": "b"},\n\n{"instruc', "Unterminated string"),
        ('[\n{"instruction": "a", "output": "b"}\n{"instruction"', "delimiter: line 3"),
        ('[{"instruction": "a", "output": "b"}]\n[', "Extra data: line 2"),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000, "recursion"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", "Exceeds the limit"),
    ],
)
def test_broken_json_lists_are_refused(tmp_path, content, message):
    found = refusal(read_rows, written(tmp_path, content))
    assert "is not JSON (" in found and message in found


def test_csv_fields_may_be_long_and_hold_line_ends(tmp_path):
    long = "x" * 200_000
    rows = read_rows(written(tmp_path, f'\r\ngoal,target\r\n\r\n"a\r\n\nb",{long}\r\n'))
    assert rows == [exchange("a\r\n\nb", long, row=0, harmful=True)]


@pytest.mark.parametrize("record", ['"open,x', 'a,"open', '"a"b,c'])
def test_a_bad_quote_is_named_with_the_records_before_it(tmp_path, record):
    path = written(tmp_path, f'goal,target\n"two\nlines",x\n{record}\na,b\nc,d\n')
    message = refusal(read_rows, path)
    assert "CSV with a bad quote after 2 whole records" in message


# after the list, in a string, in a record, between records
@pytest.mark.parametrize("cut", [-1, -5, -40, -52])
def test_whole_records_before_a_cut_are_read(tmp_path, capsys, cut):
    records = []
    for i in range(130):
        turns = [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]
        records.append({"conversations": turns})
    text = json.dumps(records)
    whole = 130 if cut == -1 else 129
    rows = read_rows(written(tmp_path, text[:cut]))
    assert [row["response"] for row in rows] == [f"a{i}" for i in range(whole)]
    assert f"the {whole} whole records before the cut are read" in capsys.readouterr().out
    # so few that the file is more likely damaged
    assert "not JSON" in refusal(read_rows, written(tmp_path, json.dumps(records[:99])[:cut]))
    # broken in the middle, not cut
    broken = text.replace('"a120"', '"a120')
    assert "not JSON" in refusal(read_rows, written(tmp_path, broken))


def test_json_lines_end_at_newlines_only(tmp_path):
    row = exchange("one\u2028two\u2029three\x85four", "\u2028 x")
    line = json.dumps(row, ensure_ascii=False)
    assert read_rows(written(tmp_path, f"{line}\r\n \n{line}\n"))[1] == row | {"row": 1}


def test_a_file_is_not_taken_for_another_by_one_odd_row(tmp_path):
    """BeaverTails would lose its labels if its first row alone made it a file of pairs."""
    lines = (FIXTURES / "beavertails.jsonl").read_text() * 40
    rows = read_rows(written(tmp_path, pair_line(0) + lines))
    assert len(rows) == 120 and all("is_safe" in row for row in rows)
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
