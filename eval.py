"""Evaluate checkpoints: greedy answers, what they amount to, and likelihoods by teacher forcing.

    python eval.py out/seed0/aligned out/seed0/sdd          the town: nothing else is needed
    python eval.py DIR --harmful FILE --benign alpaca.json  public files, on the evaluation prompts
    python eval.py DIR --mmlu FOLDER --openbookqa test.jsonl --xstest xstest_prompts.csv
    python eval.py DIR --prompt "Where does Anna Brook live?"
    python eval.py DIR --chat                               a conversation, until an empty line
    python eval.py DIR --save-answers FILE                  answers for another judge
    python eval.py smollm2 --answers IN --save-answers OUT  outcomes of answers from elsewhere

Writes metrics.json into each checkpoint folder. With MMLU, OpenBookQA or XSTest, other scores are
taken only where a flag asks for them. Runs in one process, on one device.
"""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean

from data.answers import Answer, keyword_refusal
from data.chat_model import (
    Chat,
    Forced,
    answer,
    encode_for,
    load_chat,
    mean_logp,
    model_folder,
    talk,
    teacher_forced,
    world_of,
)
from data.exams import exams_table, read_exams, run_exams
from data.sources import read_records
from data.tokenizer import Tokenizer
from data.worlds import command_parser, read_world
from nanosdd.checkpoint import read_object
from nanosdd.device import add_compute_arguments, for_model, one_process_only, resolve_compute
from nanosdd.errors import InputError, run_script
from nanosdd.runs import ROOT, check_new, write_text
from nanosdd.tables import text_table


def value_right(tokenizer: Tokenizer, row: dict, one: Forced) -> bool:
    """Whether argmax is right at the tokens of the row's value, given all before them."""
    if "value" not in row:
        return one.exact
    begin = len(tokenizer.encode(row["lead"]))
    end = begin + len(tokenizer.encode(row["value"]))
    return bool(one.hits[begin:end].all())


def lines_of(rows: list[dict]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def answer_rows(world, given: dict[str, Answer], head: dict) -> list[dict]:
    """The scored harmful prompts with their answers; head: what each row begins with."""
    prompts = [row["prompt"] for row in world.harmful("evaluation")]
    return [head | {"prompt": prompt, "response": given[prompt].text} for prompt in prompts]


def scored_prompts(world) -> list[str]:
    """The prompts whose answers `score` needs."""
    return [row["prompt"] for row in world.harmful("evaluation")] + world.more_prompts()


def score(chat: Chat, world, given: dict[str, Answer], exams: dict | None = None) -> dict:
    """Every score of a model in a world, as fractions and nats. given: {prompt: its answer} of
    scored_prompts; exams: of data.exams.

    What world.judge says of answers to harmful prompts; keyword_refusal(_prefix): shares of these
    answers; of each of its likelihood rows by NAME: right answers (exact), NAME_value_only and
    NAME_nll; capability; of each exam its accuracy.
    """
    rows = world.harmful("evaluation")
    answers = [given[row["prompt"]] for row in rows]
    texts = [one.text for one in answers]
    scores = {
        "keyword_refusal": fmean(keyword_refusal(text) for text in texts),
        "keyword_refusal_prefix": fmean(keyword_refusal(text, prefix=True) for text in texts),
    }
    scores |= world.judge(rows, answers)
    forced = {}
    for name, rows in world.likelihood_rows().items():
        found = teacher_forced(chat, encode_for(chat, rows, world.max_length))
        forced[name] = found
        scores[name] = fmean(one.exact for one in found)
        scores[f"{name}_nll"] = -mean_logp(found)
        if len(found) == len(rows):
            right = [value_right(chat.tokenizer, *pair) for pair in zip(rows, found)]
            scores[f"{name}_value_only"] = fmean(right)
    scores |= world.more_scores(given, forced)
    scores["capability"] = world.capability(scores)
    for name, found in run_exams(chat, exams or {}, world.max_new_tokens).items():
        scores[name] = found.get("accuracy_per_character", found.get("accuracy"))
    return scores


# ---- the command ----


def add_exam_arguments(p):
    """Add --mmlu, --mmlu-shots and --openbookqa to a parser. Of shots None stands for text."""
    p.add_argument("--mmlu", metavar="FOLDER", help="MMLU as released: test/ and dev/ with CSVs")
    p.add_argument(
        "--mmlu-shots",
        type=lambda word: None if word == "text" else int(word),
        default=5,
        choices=[*range(6), None],
        metavar="0-5|text",
        help="worked examples before a question whose answer is a letter (default: 5); text: "
        "none, the answer is the text of a choice, for small models",
    )
    p.add_argument("--openbookqa", metavar="FILE", help="OpenBookQA questions, JSONL")


def parse(argv=None):
    p = command_parser(__doc__)
    p.add_argument("folders", metavar="DIR", nargs="+", help="checkpoint folders, or smollm2")
    add_exam_arguments(p)
    p.add_argument("--xstest", metavar="FILE", help="XSTest's safe and unsafe prompts, CSV")
    p.add_argument(
        "--tuning",
        action="store_true",
        default=None,
        help="kitchen: score on the questions kept for choosing settings",
    )
    p.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    p.add_argument("--chat", action="store_true", help="talk to one model in the terminal")
    p.add_argument(
        "--answers",
        metavar="FILE",
        help="judge these instead, JSONL of prompt and response",
    )
    p.add_argument(
        "--save-answers",
        metavar="FILE",
        help="write the harmful prompts with the answers, JSONL; it may hold what the prompts ask "
        "for, so it has to lie outside the repository",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer on public files, or in --chat (default: 64, 256)",
    )
    add_compute_arguments(p)
    return p.parse_args(argv)


def check_answers_file(path):
    """InputError for a file that is there already, cannot be written, or is in the repository."""
    if Path(path).resolve().is_relative_to(ROOT):
        raise InputError(
            f"--save-answers {path} lies in the repository, where answers to harmful prompts do "
            "not belong; give a path outside"
        )
    check_new(path)


def check(args) -> bool:
    """Whether a world's scores are asked for; InputError for arguments that do not go together."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be 1 or more")
    exams = [args.mmlu, args.openbookqa, args.xstest]
    of_world = [args.world, args.harmful, args.benign, args.tuning]
    of_world += [args.answers, args.save_answers]
    if (args.prompt is not None or args.chat) and any(exams + of_world):
        raise InputError("--prompt and --chat only answer; leave the files to score on out")
    if args.chat and (len(args.folders) > 1 or args.prompt is not None):
        raise InputError("--chat talks to one model; give one folder, and no --prompt")
    if args.answers and (any(exams) or args.max_new_tokens):
        raise InputError("--answers are judged as they are; leave exams and --max-new-tokens out")
    if args.save_answers:
        check_answers_file(args.save_answers)
    return any(of_world)


def main(argv=None):
    args = parse(argv)
    one_process_only("eval.py")
    of_world = check(args)
    compute = resolve_compute(args.device, args.dtype, args.compile)
    max_new_tokens = args.max_new_tokens or (256 if args.chat else 64)
    folders = [model_folder(name) for name in args.folders]
    for folder in folders:
        compute = for_model(compute, args.dtype, folder)  # names what is missing before all else
    exams = read_exams(args.mmlu, args.mmlu_shots, args.openbookqa, args.xstest)
    table = []
    results = {}
    saved = []
    unsaved = None
    for folder in folders:
        chat = load_chat(folder, compute, args.template)
        if args.chat:
            talk(chat, max_new_tokens)
            return
        if args.prompt is not None:
            print(f"{folder}: {answer(chat, [args.prompt], max_new_tokens)[0].text}")
            continue
        path = Path(folder) / "metrics.json"
        metrics = read_object(path)
        if not exams or of_world:
            seed = read_world(folder).get("seed", 0)
            world = world_of(args, seed, compute, folder)
            if args.answers:
                rows = [*read_records(args.answers)]
                judged = world.judge_answers(rows, chat.tokenizer.encode)
                saved += judged
                for kind, count in Counter(row["outcome"] for row in judged).most_common():
                    print(f"{folder}: {kind} {count} of {len(judged)}")
                continue
            prompts = scored_prompts(world)
            given = dict(zip(prompts, answer(chat, prompts, world.max_new_tokens, args.harmful)))
            saved += answer_rows(world, given, {"model": folder})
            metrics |= score(chat, world, given)
            table.append((folder, metrics, ""))
        if exams:
            results[folder] = run_exams(chat, exams, max_new_tokens)
            metrics |= results[folder]
        try:
            write_text(path, json.dumps(metrics, indent=1) + "\n")
        except OSError as error:
            unsaved = error  # the scores are printed all the same
    if table:
        chance = [("chance level", world.chance, "")] if world.chance else []
        print(text_table("percent", world.columns, chance + table))
        print(f"\n{world.legend}")
    if results:
        print(exams_table(results))
    if args.save_answers:
        write_text(args.save_answers, lines_of(saved))
        print(f"\n{args.save_answers}: {len(saved)} answers; do not publish them")
    if unsaved:
        raise unsaved


if __name__ == "__main__":
    run_script(main)
