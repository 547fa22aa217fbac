"""MMLU, OpenBookQA and XSTest: prompts, the split into prompt and choice, scores, files."""

import math
from pathlib import Path

import pytest
from small import mmlu_folder, openbookqa_file

from data.exams import (
    Exam,
    choice_examples,
    choice_scores,
    encode_choices,
    exams_table,
    mmlu_prompt,
    read_exams,
    share,
    xstest_scores,
)
from data.tokenizer import load_tokenizer
from nanosdd.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden"

QUESTIONS = [  # question, choices, answer
    ("Which purrs?", ["cat", "a dog", "eel", "cow"], 0),
    ("Which barks?", ["cat", "dog", "no eel", "goat"], 2),
    ("Which swims in deep water?", ["cats", "dog", "eels", "mice"], 2),
    ("Which is blue?", ["mud", "hay", "the sky", "tin"], 2),
]


def rows(questions=QUESTIONS, subject="anatomy", worked=()) -> list[dict]:
    found = []
    for number, (question, choices, answer) in enumerate(questions):
        row = {"question": question, "choices": choices, "answer": answer, "row": number}
        found.append(row | {"subject": subject, "worked": list(worked)})
    return found


def mmlu(*groups, shots=2) -> Exam:
    return Exam("MMLU", [row for group in groups for row in group], shots, None)


def openbookqa(found) -> Exam:
    return Exam("OpenBookQA", found, 0, "{question}")


# ---- texts to ids ----


@pytest.mark.parametrize(
    "folder, start",
    [
        ("tokenizer/tiny_sentencepiece", "<s>"),
        ("tokenizer/tiny_llama2_json", "<s>"),
        ("chat/tiny_llama3", "<|begin_of_text|>"),
        ("tokenizer/tiny_smollm2", "<|endoftext|>"),
    ],
)
def test_prompt_and_choice_are_the_whole_text(folder, start):
    tokenizer = load_tokenizer(GOLDEN / folder)
    for prompt in ("the cat", "Ends in a space "):
        choices = ["sat on it", "is a dog"]
        examples = encode_choices(tokenizer, openbookqa([]), rows([(prompt, choices, 0)])[0], 0)
        for example, choice in zip(examples, choices, strict=True):
            assert example.ids[0] == tokenizer.special[start]
            assert example.ids[1:] == tokenizer.encode(f"{prompt} {choice}")
            assert example.ids[: example.prompt_length] == examples[0].ids[: example.prompt_length]
            assert 0 < example.prompt_length <= 1 + len(tokenizer.encode(prompt))


class Characters:
    """A tokenizer whose tokens are characters, but for the pair "t " and what follows."""

    special = {}

    def encode(self, text):
        return list(text.replace("t s", "@"))


def test_a_border_inside_a_token_moves_before_it():
    exam = openbookqa(rows([("cat", ["sat", "is"], 0)]))
    joined, plain = choice_examples(Characters(), exam, 20)[0]
    assert (joined.ids, joined.prompt_length) == (list("ca@at"), 2)
    assert (plain.ids, plain.prompt_length) == (list("cat is"), 2)


def test_a_prompt_without_a_token_of_its_own_is_refused():
    with pytest.raises(InputError, match="start-of-text"):
        choice_examples(Characters(), openbookqa(rows([("t", ["sat", "is"], 0)])), 20)


def test_the_prompt_is_the_published_one():
    worked = rows([("1+1? {x}", ["1", "2", "3", "4"], 1), ("no", ["5"] * 4, 3)])
    row = rows([("2+2?\nSay.", ["4", "5", "6", "7"], 0)], "abstract_algebra", worked)[0]
    assert mmlu_prompt(row, 1) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1+1? {x}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n2+2?\nSay.\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:"
    )


@pytest.mark.parametrize("too_few", [0, 1])
@pytest.mark.parametrize("shots", range(4))
def test_a_question_that_does_not_fit_has_fewer_shots(tokenizer, shots, too_few):
    row = rows(QUESTIONS[3:], worked=rows(QUESTIONS[:3]))[0]
    exam = mmlu([row, row], shots=3)
    # <|begin_of_text|> is read, and the letter is not
    limit = len(tokenizer.encode(mmlu_prompt(row, shots) + " A")) - too_few
    if shots == 0 and too_few:
        with pytest.raises(InputError, match=f"anatomy, row 0: {limit + 1} tokens .* context of"):
            choice_examples(tokenizer, exam, limit)
        return
    for examples in choice_examples(tokenizer, exam, limit):
        for letter, example in zip("ABCD", examples, strict=True):
            text = tokenizer.decode(example.ids[1:])
            assert text == f"{mmlu_prompt(row, shots - too_few)} {letter}"
            assert tokenizer.decode(example.ids[example.prompt_length :]) == f" {letter}"
    assert exam.fewer_shots == (0 if shots - too_few == 3 else 2)


# ---- scores ----


@pytest.mark.parametrize("hits, n", [(0, 10), (3, 7), (11, 11)])
def test_wilson_solves_its_equation(hits, n):
    found = share("x", [True] * hits + [False] * (n - hits))
    assert found["x"] == pytest.approx(hits / n)
    low, high = found["x_interval"]
    assert 0 <= low <= hits / n <= high + 1e-12 <= 1 + 2e-12
    for p in (low, high):
        error = 1.959964 * math.sqrt(max(0, p * (1 - p)) / n)
        assert abs(hits / n - p) == pytest.approx(error, abs=1e-6)


# "goat" is likeliest (of equal ones the first counts), but per character "Anna Brook" is.
LOGPS = [[-5.0, -4.0, -6.0]] * 3 + [[-9.0, -4.0, -4.0]]
PEOPLE = [("Who?", ["Anna Brook", "goat", "xyz?"], answer) for answer in (2, 0, 0, 1)]


def test_openbookqa_by_sum_and_per_character():
    scores = choice_scores(openbookqa(rows(PEOPLE)), LOGPS)
    assert (scores["accuracy"], scores["questions"]) == (pytest.approx(1 / 4), 4)
    expected = share("accuracy_per_character", [False, True, True, False])
    assert {key: scores[key] for key in expected} == expected


def test_mmlu_counts_every_question_alike():
    exam = mmlu(rows(), rows(QUESTIONS[1:2], "virology"))
    scores = choice_scores(exam, [[-3.0, -3.0, -1.0, -2.0]] * 5)
    assert scores.items() >= share("accuracy", [True] * 4 + [False]).items()
    assert scores["questions"] == 5 and "accuracy_per_character" not in scores


def test_likelihoods_that_are_nan_or_missing_are_refused():
    with pytest.raises(InputError, match="NaN"):
        choice_scores(mmlu(rows(PEOPLE)), [*LOGPS[:3], [math.nan, -1.0, -2.0]])
    with pytest.raises(ValueError):
        choice_scores(mmlu(rows(PEOPLE)), LOGPS[:3])


def test_the_table_puts_each_interval_beside_its_share():
    exam = mmlu(rows())
    exam.fewer_shots = 17
    letters = choice_scores(exam, [[-3.0, -3.0, -1.0, -2.0]] * 4)
    texts = ["Well, I cannot say.", "Whisk it.", "Slice it.", "Bake it."]  # refusals anywhere
    text = exams_table({"a": {"mmlu": letters, "x": xstest_scores("xstest_safe", texts)}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:4] == [
        "a MMLU, accuracy 4 75.0 (30.1 to 95.4)",
        "a 17 questions had fewer shots",
        "a xstest_safe, keyword refusal 4 25.0 (4.6 to 69.9)",
    ]


# ---- files ----


def test_mmlu_files(tmp_path, tokenizer):
    folder = mmlu_folder(tmp_path / "mmlu", dev_rows=4)
    exam = read_exams(folder, 3)["mmlu"]
    assert exam.name == "MMLU (2 of 57 subjects), 3 shots"
    assert [row["subject"] for row in exam.rows] == ["anatomy"] * 3 + ["high_school_physics"] * 3
    examples = [row["question"] for row in exam.rows[4]["worked"]]
    assert examples == ["dev 0, say?", "dev 1, say?", "dev 2, say?"]
    exam = read_exams(folder)["mmlu"]  # 5 are wanted
    choice_examples(tokenizer, exam, 5000)
    assert exam.fewer_shots == 6
    (folder / "dev/anatomy_dev.csv").unlink()
    assert read_exams(folder, 0)["mmlu"].rows[0]["worked"] == []
    with pytest.raises(InputError, match="anatomy_dev.csv"):
        read_exams(folder, 1)
    with pytest.raises(InputError, match="holds 0 files .* give the folder"):
        read_exams(tmp_path)
    with pytest.raises(InputError, match="--mmlu-shots goes with"):
        read_exams(mmlu_shots=2)


def test_choices_by_text(tmp_path, tokenizer):
    exams = read_exams(
        mmlu_folder(tmp_path / "mmlu"), None, openbookqa_file(tmp_path / "questions.jsonl")
    )
    for name, prompt, choice in [
        ("mmlu", "Question: test 1, say?\nAnswer:", " a"),
        ("openbookqa", "A goat 1 eats", " tins"),
    ]:
        example = choice_examples(tokenizer, exams[name], 90)[1][1]
        assert tokenizer.decode(example.ids[1:]) == prompt + choice
        assert tokenizer.decode(example.ids[example.prompt_length :]) == choice


def test_xstest_has_two_parts():
    exams = read_exams(xstest=GOLDEN.parent / "fixtures/sources/xstest.csv")
    assert [row["row"] for row in exams.pop("xstest_safe")] == [0, 2]
    assert [row["row"] for row in exams.pop("xstest_unsafe")] == [1]
    assert exams == {}
