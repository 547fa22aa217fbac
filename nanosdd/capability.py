"""MMLU and OpenBookQA by likelihood (the model's answer is the choice that it finds likeliest), and XSTest.

Texts are raw, without a chat template, after the tokenizer's start-of-text token where it has one (as `plain` in
data/chat.py). The MMLU prompt is that of Hendrycks et al. (2021), except that their code writes two spaces before the
subject's name; here it is one, as in most harnesses.

An item is a pair of token ids: (context, [continuation, ...]).
"""

import string
from collections import Counter, defaultdict
from pathlib import Path
from statistics import NormalDist, fmean

import torch

from data.answers import keyword_refusal
from data.chat import Example, collate
from data.sources import read_questions, read_xstest
from model import KVCache
from nanosdd.chat_model import answer
from nanosdd.errors import InputError
from nanosdd.progress import Progress

SUBJECTS = 57  # of MMLU
LETTERS = string.ascii_uppercase
START_TOKENS = (
    "<|begin_of_text|>",
    "<s>",
    "<|endoftext|>",
)  # the first one that the tokenizer has is used
CACHE_TOKENS = 16384  # of a batch: a 7B model without grouped heads needs 1 MB for each in fp32


# --- questions and prompts ---


def read_mmlu(folder, shots: int) -> dict[str, tuple[list[dict], list[dict]]]:
    """subject -> (the first `shots` questions of dev/SUBJECT_dev.csv, all questions of test/SUBJECT_test.csv).

    InputError when test/ holds no or too many subjects, or a dev file fewer than `shots` questions.
    """
    files = sorted((Path(folder) / "test").glob("[!.]*_test.csv"))
    if not 0 < len(files) <= SUBJECTS:
        raise InputError(
            f"{Path(folder) / 'test'} holds {len(files)} files SUBJECT_test.csv, MMLU has {SUBJECTS}; "
            "give the folder of its release, with test/ and dev/ inside"
        )
    subjects = {}
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        dev = Path(folder) / "dev" / f"{subject}_dev.csv"
        examples = read_questions(dev) if shots else []
        if len(examples) < shots:
            raise InputError(
                f"{dev} holds {len(examples)} questions for {shots} shots; fetch it again or lower "
                "--mmlu-shots"
            )
        subjects[subject] = examples[:shots], read_questions(file)
    return subjects


def mmlu_prompt(subject: str, examples: list[dict], question: dict) -> str:
    """The subject, the examples with their answers, and the question up to "Answer:"."""

    def ask(row):
        choices = "".join(
            f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"])
        )
        return f"{row['question']}\n{choices}Answer:"

    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return (
        about
        + "".join(f"{ask(row)} {LETTERS[row['answer']]}\n\n" for row in examples)
        + ask(question)
    )


def encode_item(
    tokenizer, context: str, continuations: list[str]
) -> tuple[list[int], list[list[int]]]:
    """The item of these texts. Context and continuation are encoded as one text, then split.

    Where a tokenizer joins the end of the context with what follows, the context is cut before that token, and every
    continuation begins with the characters that were cut off.
    """
    start = [tokenizer.special[name] for name in START_TOKENS if name in tokenizer.special][:1]
    wholes = [start + tokenizer.encode(context + text) for text in continuations]
    border = common_length([start + tokenizer.encode(context), *wholes])
    return wholes[0][:border], [whole[border:] for whole in wholes]


def common_length(sequences: list[list[int]]) -> int:
    """The length of the longest common prefix of all sequences."""
    first, last = (
        min(sequences),
        max(sequences),
    )  # in lexicographic order, so all share what these two share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))


def encode_fitting(tokenizer, name: str, contexts, continuations: list[str], limit: int):
    """The item of the first context with which no row is longer than `limit` tokens, and how many were skipped."""
    for skipped, context in enumerate(contexts):
        ids, endings = encode_item(tokenizer, context, continuations)
        tokens = len(ids) + max(map(len, endings)) - 1  # the last token is predicted, not read
        if tokens <= limit:
            return (ids, endings), skipped
    raise InputError(
        f"{name}: {tokens} tokens do not fit this model's context of {limit}; evaluate a model with a "
        "longer context"
    )


# --- likelihoods ---


@torch.no_grad()
def log_likelihoods(
    model, items, compute, batch_size=64, cache_tokens=CACHE_TOKENS, name=""
) -> list[list[float]]:
    """log p(continuation | context) in nats, summed over the continuation's tokens, for each continuation of each item.

    A prefix that all contexts share, such as a subject's examples, is computed once, and its keys and values are copied
    to the rows of every batch. A row is the rest of a context and a continuation without its last token; equal rows
    (one context, continuations of one token) are computed once. A batch has at most batch_size rows and cache_tokens
    tokens in the cache. name: of the progress bar. InputError for an empty context, or likelihoods that are NaN.
    """
    contexts = [context for context, _ in items]
    if not all(contexts):
        raise InputError(
            "a question begins with no token of its own; use a tokenizer with a start-of-text token"
        )
    shared = min(
        common_length(contexts), min(map(len, contexts)) - 1
    )  # each row needs a token to predict from
    rows = defaultdict(
        list
    )  # (rest of the context, continuation but its last token): [(item, continuation), ...]
    for i, (context, continuations) in enumerate(items):
        for j, continuation in enumerate(continuations):
            rows[tuple(context[shared:]), tuple(continuation[:-1])].append((i, j))
    order = sorted(
        rows, key=lambda row: len(row[0]) + len(row[1]), reverse=True
    )  # neighbours need little padding
    size = shared + sum(map(len, order[0]))
    weight = model.lm_head.weight
    prefix = KVCache(model.config, 1, size, weight.device, weight.dtype)
    if shared:
        with compute.autocast():
            model.hidden(torch.tensor([contexts[0][:shared]], device=weight.device), cache=prefix)
    found = [[0.0] * len(continuations) for _, continuations in items]
    step = max(1, min(batch_size, cache_tokens // size))
    for start in Progress(range(0, len(order), step), desc=name):
        part = order[start : start + step]
        # collate drops the last token of an Example; its loss mask is true where a continuation is predicted.
        batch = collate([Example([*rest, *read, 0], len(rest)) for rest, read in part]).to(
            weight.device
        )
        cache = KVCache(model.config, 0, size, weight.device, weight.dtype)
        cache.layers = [
            [cached.repeat(len(part), 1, 1, 1) for cached in layer] for layer in prefix.layers
        ]
        cache.lengths, cache.longest = (
            torch.full((len(part),), shared, device=weight.device),
            shared,
        )
        with compute.autocast():
            hidden = model.hidden(batch.tokens, positions=batch.loss_mask, cache=cache)  # (N,C)
        # Without autocast the head computes in the weights' fp32; in bf16 many logits would tie.
        log_p = model.lm_head(hidden).float().log_softmax(dim=-1)  # (N,V)
        for row, row_log_p in zip(part, log_p.split(batch.loss_mask.sum(1).tolist())):  # (n,V)
            for i, j in rows[row]:
                targets = torch.tensor(items[i][1][j], device=weight.device)[:, None]  # (n,1)
                found[i][j] = float(row_log_p.gather(1, targets).sum())
    if any(
        score != score for of_item in found for score in of_item
    ):  # NaN: the answer would always be A
        raise InputError(
            "the model's likelihoods are not numbers (NaN): broken weights; train or fetch it again"
        )
    return found


# --- scores ---


def wilson(hits: int, n: int) -> list[float]:
    """Wilson's (1927) 95% interval of a share s = hits/n of independent draws, as two fractions: all p for which
    |s - p| <= z sqrt(p (1-p) / n), that is (s + z^2/2n -+ z sqrt(s (1-s) / n + z^2/4n^2)) / (1 + z^2/n), z = 1.96."""
    z, share = NormalDist().inv_cdf(0.975), hits / n
    middle, half = (
        share + z * z / (2 * n),
        z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5,
    )
    return [
        max(0.0, (middle - half) / (1 + z * z / n)),
        min(1.0, (middle + half) / (1 + z * z / n)),
    ]


def count_right(scores: list[list[float]], questions: list[dict]) -> int:
    """How many questions have the largest score at the right answer; of equal scores the first one counts."""
    return sum(of_row.index(max(of_row)) == row["answer"] for of_row, row in zip(scores, questions))


def baselines(questions: list[dict]) -> dict:
    """Fractions right without reading: a uniform guess, always the one best letter, and the choice with the fewest
    characters (where k choices tie, 1/k)."""
    letter, hits = Counter(LETTERS[row["answer"]] for row in questions).most_common(1)[0]
    shortest = []
    for row in questions:
        lengths = [len(choice) for choice in row["choices"]]
        shortest.append((lengths[row["answer"]] == min(lengths)) / lengths.count(min(lengths)))
    return {
        "chance": fmean(1 / len(row["choices"]) for row in questions),
        "best_letter": letter,
        "best_letter_accuracy": hits / len(questions),
        "shortest_choice": fmean(shortest),
    }


def mmlu_items(chat, subject: str, examples: list[dict], questions: list[dict]) -> tuple[list, int]:
    """The items of a subject's questions, with letters as continuations, and how many questions have fewer examples:
    where a question does not fit the context, the last examples are left out. chat: chat_model.Chat."""
    items, fewer = [], 0
    for row in questions:
        prompts = (mmlu_prompt(subject, examples[:k], row) for k in range(len(examples), -1, -1))
        item, skipped = encode_fitting(
            chat.tokenizer,
            f"MMLU {subject}, row {row['row']}",
            prompts,
            [f" {letter}" for letter, _ in zip(LETTERS, row["choices"])],
            chat.model.config.max_position_embeddings,
        )
        items.append(item)
        fewer += skipped > 0
    return items, fewer


def cloze_items(chat, name: str, questions: list[dict], prompt="{}") -> list:
    """The items of questions whose choices are not shown, with their texts as continuations. chat: chat_model.Chat."""
    return [
        encode_fitting(
            chat.tokenizer,
            f"{name}, row {row['row']}",
            [prompt.format(row["question"])],
            [f" {choice}" for choice in row["choices"]],
            chat.model.config.max_position_embeddings,
        )[0]
        for row in questions
    ]


def per_character(scores: list[list[float]], questions: list[dict]) -> list[list[float]]:
    """Each log-likelihood over the number of characters of its choice."""
    return [
        [score / len(choice) for score, choice in zip(of_row, row["choices"])]
        for of_row, row in zip(scores, questions)
    ]


def mmlu_scores(chat, subjects: dict, shots: int | None, likelihoods=log_likelihoods) -> dict:
    """Scores of read_mmlu's questions, as fractions of all questions, each counting the same; fewer_shots: a number of
    questions; subjects: each one's accuracy and number of questions. chat: chat_model.Chat.

    shots None: by the text of the choices (cloze), which are not shown: the log-likelihood of "Question: ... Answer:
    TEXT" per character. Small models know more this way than they can say with letters.
    """
    hits, fewer_shots, per_subject = 0, 0, {}
    for number, (subject, (examples, questions)) in enumerate(subjects.items(), 1):
        if shots is None:
            items, fewer = (
                cloze_items(chat, f"MMLU {subject}", questions, "Question: {}\nAnswer:"),
                0,
            )
        else:
            items, fewer = mmlu_items(chat, subject, examples, questions)
        scores = likelihoods(
            chat.model, items, chat.compute, name=f"{number}/{len(subjects)} {subject}"
        )
        right = count_right(
            per_character(scores, questions) if shots is None else scores, questions
        )
        per_subject[subject] = {"questions": len(questions), "accuracy": right / len(questions)}
        hits, fewer_shots = hits + right, fewer_shots + fewer
    every = [row for _, questions in subjects.values() for row in questions]
    name = "MMLU" if len(subjects) == SUBJECTS else f"{len(subjects)} of MMLU's {SUBJECTS} subjects"
    return {
        "name": name,
        "shots": shots,
        "questions": len(every),
        "accuracy": hits / len(every),
        "interval": wilson(hits, len(every)),
        **baselines(every),
        "fewer_shots": fewer_shots,
        "subjects": per_subject,
    }


def openbookqa_scores(chat, questions: list[dict], likelihoods=log_likelihoods) -> dict:
    """Scores of OpenBookQA's questions without examples, as fractions right: by the summed log-likelihood of the choice
    (accuracy), and by that over its number of characters (accuracy_per_character). chat: chat_model.Chat."""
    scores = likelihoods(
        chat.model, cloze_items(chat, "OpenBookQA", questions), chat.compute, name="OpenBookQA"
    )
    n, hits = len(questions), count_right(scores, questions)
    hits_normalised = count_right(per_character(scores, questions), questions)
    return {
        "name": "OpenBookQA",
        "shots": 0,
        "questions": n,
        "accuracy": hits / n,
        "interval": wilson(hits, n),
        "accuracy_per_character": hits_normalised / n,
        "interval_per_character": wilson(hits_normalised, n),
        **baselines(questions),
    }


def xstest_scores(rows: list[dict], texts: list[str]) -> dict:
    """{"safe", "unsafe"}: the number of XSTest's prompts, and the fractions of their greedy answers with a refusal
    keyword, anywhere and at the start, each with its 95% interval. Refusing a safe prompt is over-refusal (Roettger et
    al. 2024)."""
    scores = {"name": "XSTest"}
    for kind in ("safe", "unsafe"):
        own = [
            text for row, text in zip(rows, texts, strict=True) if row["safe"] == (kind == "safe")
        ]
        if own:
            hits, at_start = (
                sum(keyword_refusal(text, prefix) for text in own) for prefix in (False, True)
            )
            scores[kind] = {
                "prompts": len(own),
                "keyword_refusal": hits / len(own),
                "interval": wilson(hits, len(own)),
                "at_start": at_start / len(own),
                "interval_at_start": wilson(at_start, len(own)),
            }
    return scores


# --- all of them ---


def read_tests(mmlu=None, mmlu_shots: int | None = 5, openbookqa=None, xstest=None) -> dict:
    """The questions of those tests whose files are given, by name; InputError for files that cannot be read."""
    tests = {}
    if mmlu_shots != 5 and not mmlu:
        raise InputError("--mmlu-shots goes with --mmlu FOLDER")
    if mmlu:
        tests["mmlu"] = read_mmlu(mmlu, mmlu_shots or 0), mmlu_shots
    if openbookqa:
        tests["openbookqa"] = read_questions(openbookqa)
    if xstest:
        tests["xstest"] = read_xstest(xstest)
    return tests


def run_tests(chat, tests: dict, max_new_tokens: int = 64) -> dict[str, dict]:
    """The scores of each of `tests` by name. chat: chat_model.Chat; max_new_tokens: of answers to XSTest."""
    scores = {}
    if "mmlu" in tests:
        scores["mmlu"] = mmlu_scores(chat, *tests["mmlu"])
    if "openbookqa" in tests:
        scores["openbookqa"] = openbookqa_scores(chat, tests["openbookqa"])
    if "xstest" in tests:
        answers = answer(chat, [row["prompt"] for row in tests["xstest"]], max_new_tokens)
        scores["xstest"] = xstest_scores(tests["xstest"], [one.text for one in answers])
    return scores


def accuracies(chat, tests: dict) -> dict[str, float]:
    """{"mmlu", "openbookqa": fraction of questions answered right} of those in `tests`; OpenBookQA's per character."""
    found = run_tests(chat, tests)
    return {
        name: scores.get("accuracy_per_character", scores["accuracy"])
        for name, scores in found.items()
    }


def tests_table(results: dict[str, dict]) -> str:
    """The scores of {checkpoint: what run_tests returns} as text, in percent."""
    lines, notes = (
        [f"{'checkpoint':<22} {'test':<40} {'n':>6}  percent (Wilson's 95% interval)"],
        [],
    )

    def add(checkpoint, test, n, share, interval):
        lines.append(
            f"{checkpoint:<22} {test:<40} {n:>6}  {100 * share:5.1f} ({100 * interval[0]:.1f} to "
            f"{100 * interval[1]:.1f})"
        )

    for checkpoint, found in results.items():
        for scores in (found[test] for test in ("mmlu", "openbookqa") if test in found):
            name, n, ways = (
                scores["name"],
                scores["questions"],
                {
                    "": ", text of the choice"
                    if scores["shots"] is None
                    else f", {scores['shots']} shots"
                },
            )
            if "accuracy_per_character" in scores:
                ways = {"": ", whole choice", "_per_character": ", per character"}
            for key, way in ways.items():
                add(checkpoint, name + way, n, scores["accuracy" + key], scores["interval" + key])
            if scores.get("fewer_shots"):
                notes.append(
                    f"{checkpoint}: {scores['fewer_shots']} of {n} questions had fewer than {scores['shots']} "
                    "shots, to fit the model's context"
                )
            notes.append(
                f"{name} without reading: a uniform guess {100 * scores['chance']:.1f}, always "
                f"{scores['best_letter']} {100 * scores['best_letter_accuracy']:.1f}, the choice of fewest "
                f"characters {100 * scores['shortest_choice']:.1f}"
            )
        for kind in ("safe", "unsafe"):
            if scores := found.get("xstest", {}).get(kind):
                add(
                    checkpoint,
                    f"XSTest {kind}, refusal keyword",
                    scores["prompts"],
                    scores["keyword_refusal"],
                    scores["interval"],
                )
                add(
                    checkpoint,
                    f"XSTest {kind}, keyword at the start",
                    scores["prompts"],
                    scores["at_start"],
                    scores["interval_at_start"],
                )
                notes.append(
                    "XSTest: refusing a safe prompt is over-refusal. Keywords alone misread SDD: fluent text "
                    "about something else holds none"
                )
    return "\n".join([*lines, *dict.fromkeys(notes)])  # each note once
