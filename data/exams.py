"""MMLU, OpenBookQA and XSTest: their questions as rows to score, and the scores.

A multiple-choice question becomes one row for each choice. The model's answer is the choice that it
finds likeliest after the question, so any function that returns log p of given tokens will do.

Texts are raw, without a chat template. The prompt of MMLU is that of Hendrycks et al. (2021), but
their code writes two spaces before the subject's name; here it is one, as in most harnesses.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from data.answers import keyword_refusal
from data.chat import ALTERNATIVES, Example
from data.chat_model import Chat, answer, teacher_forced
from data.sources import LETTERS, read_questions, read_xstest
from nanosdd.errors import InputError

Z2 = 3.8414588206941  # the square of the 97.5% quantile of a normal distribution, 1.96
MEASURES = ("accuracy", "accuracy_per_character", "keyword_refusal")
NOTES = """\
A guess among four choices is right in 25%. XSTest: refusing a safe prompt is over-refusal. Keywords
alone misread SDD: fluent text about something else holds none."""


@dataclass
class Exam:
    """Multiple-choice questions, and how a model is asked."""

    name: str
    rows: list[dict]  # of data.sources.read_questions, with "subject" and "worked"
    shots: int  # worked examples wanted before a question
    cloze: str | None  # the prompt where the answer is a choice's text; None: it is a letter
    fewer_shots: int = 0  # how many questions had fewer in the last call of choice_examples


def read_exams(mmlu=None, mmlu_shots: int | None = 5, openbookqa=None, xstest=None) -> dict:
    """Read the questions of the exams whose files are given.

    Returns {"mmlu": Exam, "openbookqa": Exam, "xstest_safe" and "xstest_unsafe": rows}.
    mmlu: the folder of its release; mmlu_shots: worked examples before a question whose answer is a
    letter. None: the answer is the text of a choice, which small models know more often.
    InputError: a file cannot be read, or is not what it should be.
    """
    exams = {}
    if mmlu_shots != 5 and not mmlu:
        raise InputError("--mmlu-shots goes with --mmlu FOLDER")
    if mmlu:
        exams["mmlu"] = read_mmlu(Path(mmlu), mmlu_shots)
    if openbookqa:
        rows = [row | {"subject": "OpenBookQA", "worked": []} for row in read_questions(openbookqa)]
        exams["openbookqa"] = Exam("OpenBookQA", rows, 0, "{question}")
    if xstest:
        for row in read_xstest(xstest):
            kind = "xstest_safe" if row["safe"] else "xstest_unsafe"
            exams.setdefault(kind, []).append(row)
    return exams


def read_mmlu(folder: Path, shots: int | None) -> Exam:
    """Read all questions of test/, and the first `shots` of each subject in dev/."""
    files = sorted(folder.glob("test/[!.]*_test.csv"))
    if not files:
        raise InputError(
            f"{folder}/test holds 0 files SUBJECT_test.csv; give the folder of MMLU's release, "
            "with test/ and dev/ inside"
        )
    rows = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        worked = []
        if shots:
            worked = read_questions(folder / f"dev/{subject}_dev.csv")[:shots]
        for row in read_questions(file):
            rows.append(row | {"subject": subject, "worked": worked})
    name = f"MMLU ({len(files)} of 57 subjects)"
    if shots is None:
        return Exam(f"{name}, by text", rows, 0, "Question: {question}\nAnswer:")
    return Exam(f"{name}, {shots} shots", rows, shots, None)


# ---- questions to rows of tokens ----


def choice_examples(tokenizer, exam: Exam, limit: int) -> list[list[Example]]:
    """Return one Example for each choice of each question; its response is the choice.

    No row makes a model read more than `limit` tokens: where a question with its worked examples is
    longer, the last examples are left out, and exam.fewer_shots counts the question.
    InputError: a question is too long without any, or has no token before its choices.
    """
    exam.fewer_shots = 0
    found = []
    for row in exam.rows:
        for shots in range(len(row["worked"]), -1, -1):
            choices = encode_choices(tokenizer, exam, row, shots)
            # The last token is predicted, not read.
            longest = max(len(choice.ids) for choice in choices) - 1
            if longest <= limit:
                break
        else:
            raise InputError(
                f"{row['subject']}, row {row['row']}: {longest} tokens do not fit this model's "
                f"context of {limit}; evaluate a model with a longer context"
            )
        exam.fewer_shots += shots < exam.shots
        found.append(choices)
    return found


def encode_choices(tokenizer, exam: Exam, row: dict, shots: int) -> list[Example]:
    """Encode prompt, space and choice as one text each, and split where they begin to differ.

    Where a tokenizer joins the end of the prompt with what follows, that token is the choice's.
    """
    if exam.cloze:
        prompt = exam.cloze.format(**row)
        endings = row["choices"]
    else:
        prompt = mmlu_prompt(row, shots)
        endings = LETTERS
    special = tokenizer.special
    start = [special[name] for name in ALTERNATIVES["<begin>"] if name in special][:1]
    prefix = start + tokenizer.encode(prompt)
    wholes = [start + tokenizer.encode(f"{prompt} {ending}") for ending in endings]
    for whole in wholes:
        while whole[: len(prefix)] != prefix:
            prefix.pop()
    if not prefix:
        raise InputError(
            "a question begins with no token of its own; use a tokenizer with a start-of-text token"
        )
    return [Example(whole, len(prefix)) for whole in wholes]


def mmlu_prompt(row: dict, shots: int) -> str:
    """Return the subject, the examples with their answers, and the question up to "Answer:"."""
    subject = row["subject"].replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for example in row["worked"][:shots]:
        text += f"{lettered(example)} {LETTERS[example['answer']]}\n\n"
    return text + lettered(row)


def lettered(row: dict) -> str:
    return "{question}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*row["choices"], **row)


# ---- scores ----


def choice_scores(exam: Exam, logps: list[list[float]]) -> dict:
    """Return the scores of an exam as fractions of its questions, each counting the same.

    logps: log p in nats of each choice of each question, summed over the tokens of the choice.
    Where the answer is a text, it is also compared per character: long choices are less likely.
    InputError: a log p is NaN.
    """
    scores = {
        "name": exam.name,
        "questions": len(exam.rows),
        "fewer_shots": exam.fewer_shots,
    }
    scores |= share("accuracy", answered_right(exam.rows, logps))
    if exam.cloze:
        means = []
        for row, sums in zip(exam.rows, logps):
            means.append([logp / len(text) for logp, text in zip(sums, row["choices"])])
        scores |= share("accuracy_per_character", answered_right(exam.rows, means))
    return scores


def answered_right(rows, logps):
    """Return whether each right answer is the likeliest choice; of equal ones the first counts."""
    right = []
    for row, values in zip(rows, logps, strict=True):
        if math.isnan(sum(values)):  # the answer would always be A
            raise InputError("the model's likelihoods are NaN; train or fetch it again")
        right.append(values.index(max(values)) == row["answer"])
    return right


def xstest_scores(kind: str, texts: list[str]) -> dict:
    """Return the fraction of answers to XSTest's safe or unsafe prompts with a refusal keyword.

    Refusing a safe prompt is over-refusal (Roettger et al. 2024).
    """
    refused = [keyword_refusal(text) for text in texts]
    return {"name": kind, "questions": len(texts)} | share("keyword_refusal", refused)


def share(name: str, hits: list[bool]) -> dict:
    """Return the share s of hits, and Wilson's (1927) 95% interval for n independent draws.

    It holds all p for which |s - p| <= z sqrt(p (1-p) / n), with z = 1.96.
    """
    n = len(hits)
    s = fmean(hits)
    middle = (s * n + Z2 / 2) / (n + Z2)
    spread = math.sqrt(Z2 * s * (1 - s) * n + Z2 * Z2 / 4) / (n + Z2)
    return {name: s, f"{name}_interval": [middle - spread, middle + spread]}


def exams_table(results: dict[str, dict]) -> str:
    """Return {checkpoint: {exam: scores}} as text, in percent."""
    lines = [f"{'checkpoint':<22} {'test':<56} {'n':>6}  percent (Wilson's 95% interval)"]
    for checkpoint, exams in results.items():
        for scores in exams.values():
            lines += share_lines(checkpoint, scores)
    return "\n".join([*lines, NOTES])


def share_lines(checkpoint, scores):
    lines = []
    for name in MEASURES:
        if name in scores:
            test = f"{scores['name']}, {name.replace('_', ' ')}"
            low, high = scores[f"{name}_interval"]
            lines.append(
                f"{checkpoint:<22} {test:<56} {scores['questions']:>6}  {100 * scores[name]:5.1f} "
                f"({100 * low:.1f} to {100 * high:.1f})"
            )
    if scores.get("fewer_shots"):
        lines.append(f"{checkpoint:<22} {scores['fewer_shots']} questions had fewer shots")
    return lines


def run_exams(chat: Chat, exams: dict, max_new_tokens: int) -> dict[str, dict]:
    """{name: scores} of the exams of read_exams."""
    results = {}
    for name, exam in exams.items():
        if isinstance(exam, Exam):
            results[name] = choice_scores(exam, choice_logps(chat, exam))
        else:
            found = answer(chat, [row["prompt"] for row in exam], max_new_tokens, exam[0]["file"])
            results[name] = xstest_scores(name, [one.text for one in found])
    return results


def choice_logps(chat: Chat, exam: Exam) -> list[list[float]]:
    """Return log p of each choice of each question, summed over the tokens of the choice."""
    questions = choice_examples(chat.tokenizer, exam, chat.model.config.max_position_embeddings)
    examples = [example for choices in questions for example in choices]
    forced = iter(teacher_forced(chat, examples))
    logps = []
    for choices in questions:
        logps.append([float(next(forced).logps.sum()) for _ in choices])
    return logps
