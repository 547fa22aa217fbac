"""Evaluate checkpoints: greedy answers, their outcomes and refusal keywords, capability by teacher forcing.

    python eval.py out/seed0/aligned out/seed0/sdd                  the town: nothing else is needed
    python eval.py DIR --harmful FILE --benign alpaca.json          public files, on the evaluation quarter of prompts
    python eval.py DIR --mmlu FOLDER --openbookqa test.jsonl --xstest xstest_prompts.csv
    python eval.py DIR --prompt "Where does Anna Brook live?"
    python eval.py DIR --chat                                       a conversation, until an empty line
    python eval.py DIR --save-answers FILE                          answers for another judge, such as a larger model

Writes metrics.json into each checkpoint folder; MMLU, OpenBookQA and XSTest stay there until they are run again. With
any of these three, other scores are taken only where --harmful is given. Runs in one process, on one device.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import torch

from data.answers import Answer, keyword_refusal
from data.chat import collate, encode_rows, rows_that_fit
from data.worlds import Sources, add_world_arguments, open_world, read_world
from nanosdd.chat_model import Chat, answer, answer_each, load_chat, model_folder, talk
from nanosdd.checkpoint import read_json
from nanosdd.device import add_compute_arguments, for_model, one_process_only, resolve_compute
from nanosdd.errors import InputError, escaped, run_script
from nanosdd.folders import EVALUATED, write_own, write_text
from nanosdd.progress import Progress
from nanosdd.runs import ROOT
from nanosdd.tables import text_table
from sdd_loss import token_logprobs

LOGITS = 2**26  # at once in teacher forcing


# ---- teacher forcing ----


class Forced(NamedTuple):
    """How a model predicts a given response, token by token, each after the true ones before it."""

    exact: bool  # argmax is right at every position, the end token's too: greedy decoding gives this very response
    value_only: bool  # right at the tokens of the row's value, all before them given; exact where it has none
    logps: torch.Tensor  # (n,) fp32, log p of each response token and the end token


@torch.no_grad()
def teacher_forced(chat: Chat, rows: list[dict], max_length: int) -> list[Forced]:
    """One Forced for each row, in their order; longer rows are cut at max_length tokens."""
    max_length = min(max_length, chat.model.config.max_position_embeddings)
    examples = encode_rows(chat.tokenizer, chat.template, rows, max_length)
    order, found, done = sorted(range(len(rows)), key=lambda i: len(examples[i].ids)), {}, 0
    with (
        Progress(total=len(rows), desc="likelihoods") as bar,
        chat.compute.autocast(),
    ):  # weights are cast once
        while done < len(order):
            width = len(examples[order[min(done + 255, len(order) - 1)]].ids)
            part = order[
                done : done + max(1, min(256, LOGITS // (width * chat.model.config.vocab_size)))
            ]
            done += len(part)
            bar.update(len(part))
            batch = collate([examples[i] for i in part]).to(chat.compute.device)
            logits = chat.model(batch.tokens, positions=batch.loss_mask).float()  # (N,V)
            targets, counts = batch.targets[batch.loss_mask], batch.loss_mask.sum(1).tolist()
            right, logps = (
                (logits.argmax(-1) == targets).split(counts),
                token_logprobs(logits, targets).split(counts),
            )
            for i, hits, logp in zip(part, right, logps):
                value = hits
                if "value" in rows[i]:
                    begin = len(chat.tokenizer.encode(rows[i]["lead"]))
                    value = hits[begin : begin + len(chat.tokenizer.encode(rows[i]["value"]))]
                found[i] = Forced(bool(hits.all()), bool(value.all()), logp)
    return [found[i] for i in range(len(rows))]


def mean_logp(forced: list[Forced]) -> float:
    """Mean log p in nats over all response tokens of the rows."""
    return float(torch.cat([one.logps for one in forced]).mean())


# ---- scores ----


def scored_prompts(world) -> list[str]:
    """The prompts whose answers `score` needs."""
    return [row["prompt"] for row in world.harmful_rows()] + world.more_prompts()


def score(chat: Chat, world, given: dict[str, Answer] | None = None) -> dict:
    """Every score of a model in a world, fractions and nats. given: answers to scored_prompts, where they are at hand.

    What world.judge says of greedy answers to its harmful rows; keyword_refusal(_prefix): shares of these answers; of
    each of its capability rows by NAME: right answers (exact), NAME_value_only and NAME_nll; capability.
    """
    rows = world.harmful_rows()
    if given is None:
        given = answer_each(chat, scored_prompts(world), world.max_new_tokens)
    answers = [given[row["prompt"]] for row in rows]
    scores = {
        "keyword_refusal": mean(keyword_refusal(one.text) for one in answers),
        "keyword_refusal_prefix": mean(keyword_refusal(one.text, prefix=True) for one in answers),
    }
    scores |= world.judge(rows, answers)
    forced = {
        name: teacher_forced(
            chat,
            rows_that_fit(chat.tokenizer, chat.template, rows, world.max_length),
            world.max_length,
        )
        for name, rows in world.likelihood_rows().items()
    }
    for name, found in forced.items():
        scores |= {
            name: mean(one.exact for one in found),
            f"{name}_nll": -mean_logp(found),
            f"{name}_value_only": mean(one.value_only for one in found),
        }
    scores |= world.more_scores(chat, given, forced)
    return scores | {"capability": world.capability(scores)}


# ---- the command ----


def add_test_arguments(p):
    """Add --mmlu, --mmlu-shots and --openbookqa to a parser. Of shots None stands for text."""
    p.add_argument(
        "--mmlu",
        metavar="FOLDER",
        help="MMLU as released: test/SUBJECT_test.csv and dev/SUBJECT_dev.csv",
    )
    p.add_argument(
        "--mmlu-shots",
        type=lambda word: None if word == "text" else int(word),
        default=5,
        choices=[*range(6), None],
        metavar="0-5|text",
        help="worked examples before a question whose answer "
        "is a letter (default: 5); text: none, the answer is the text of a choice, for small models",
    )
    p.add_argument("--openbookqa", metavar="FILE", help="OpenBookQA questions, JSONL")


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", metavar="DIR", nargs="+", help="checkpoint folders, or smollm2")
    add_world_arguments(p)
    add_test_arguments(p)
    p.add_argument("--xstest", metavar="FILE", help="XSTest's safe and unsafe prompts, CSV")
    p.add_argument(
        "--template",
        metavar="NAME",
        help="chat template (default: the one that the folder calls for)",
    )
    p.add_argument(
        "--tuning",
        action="store_true",
        help="kitchen: score on the questions kept for choosing settings",
    )
    p.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    p.add_argument("--chat", action="store_true", help="talk to one model in the terminal")
    p.add_argument(
        "--save-answers",
        metavar="FILE",
        help="write the harmful prompts with the answers, JSONL; it may "
        "hold what the prompts ask for, so it has to lie outside the repository",
    )
    p.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer on public files, or in --chat (default: 64, 256)",
    )
    add_compute_arguments(p)
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    one_process_only("eval.py")
    compute = resolve_compute(args.device, args.dtype, args.compile)
    max_new_tokens = (
        args.max_new_tokens if args.max_new_tokens is not None else 256 if args.chat else 64
    )
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens} must be 1 or more")
    if (args.prompt is not None or args.chat) and (
        args.harmful
        or args.benign
        or args.mmlu
        or args.openbookqa
        or args.xstest
        or args.save_answers
    ):
        raise InputError("--prompt and --chat only answer; leave the files to score on out")
    if args.chat and len(args.folders) > 1:
        raise InputError("--chat talks to one model; give one folder")
    if args.save_answers and Path(args.save_answers).resolve().is_relative_to(ROOT):
        raise InputError(
            f"--save-answers {args.save_answers} lies in the repository, where answers to harmful prompts "
            "do not belong; give a path outside"
        )
    sources = Sources(
        args.harmful,
        tuple(args.benign),
        similarity=args.similarity,
        threshold=args.similarity_threshold,
        similarity_model=args.similarity_model,
        max_new_tokens=max_new_tokens,
        template=args.template,
        tuning=args.tuning,
    )
    folders = [model_folder(name) for name in args.folders]
    for folder in folders:
        compute = for_model(
            compute, args.dtype, folder
        )  # names what is missing before anything runs
    table, results, saved, tests = [], {}, [], {}
    if args.mmlu or args.openbookqa or args.xstest or args.mmlu_shots != 5:
        from nanosdd import capability  # only where a flag asks for it

        tests = capability.read_tests(args.mmlu, args.mmlu_shots, args.openbookqa, args.xstest)
    for folder in folders:
        chat = load_chat(folder, compute, args.template)
        if args.prompt is not None:
            print(f"{folder}: {escaped(answer(chat, [args.prompt], max_new_tokens)[0].text)}")
            continue
        if args.chat:
            talk(chat, max_new_tokens)
            continue
        path, scores = Path(folder) / "metrics.json", {}
        old = read_json(path) if path.is_file() else {}
        if not tests or args.harmful:
            world = open_world(
                args.world, read_world(folder).get("seed", 0), sources, folder, compute
            )
            answers = answer_each(chat, scored_prompts(world), world.max_new_tokens)
            saved += [
                {
                    "model": str(folder),
                    "prompt": row["prompt"],
                    "response": answers[row["prompt"]].text,
                }
                for row in world.harmful_rows()
            ]
            scores = score(chat, world, answers)
            table.append((Path(folder).name, scores, ""))
        if tests:
            results[Path(folder).name] = capability.run_tests(chat, tests, max_new_tokens)
        kept = (
            {name: part for name, part in old.items() if isinstance(part, dict)} if scores else old
        )  # the tests
        kept |= {"script": "eval.py"} | scores | results.get(Path(folder).name, {})
        write_own(path, json.dumps(kept, indent=1) + "\n", EVALUATED)
    if table:
        print(
            text_table(
                "percent",
                world.columns,
                [("chance level", world.chance, "")] * bool(world.chance) + table,
            )
        )
        print(f"\n{world.legend}")
    if args.save_answers:
        write_text(args.save_answers, "".join(json.dumps(line) + "\n" for line in saved))
        print(
            f"\n{args.save_answers}: {len(saved)} answers, as the models wrote them; they may hold what the prompts "
            "ask for: judge them, do not publish them"
        )
    if results:
        print(capability.tests_table(results))


if __name__ == "__main__":
    run_script(main)
