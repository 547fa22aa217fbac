"""The map: is there any setting of SDD at which the model is worth releasing and fine-tuning on harm, not on anything,
destroys it?

    python -m lab.map                         every setting on the tuning seeds: hours; goes on where it was
    python -m lab.map --lr 1e-4 --steps 300   a part of it
    python -m lab.map --teach                 the town whose base model was never taught a recipe: fine-tuning on harm
                                              has to teach there, where otherwise it reminds
    python -m lab.map --width 352             a model of 5 million parameters (128: 0.7 million)

A setting is a share of benign rows in a batch, a learning rate and a number of steps. `sdd` is trained at each, and
`new_refusal` in the same dose. Each is scored as released, after malicious fine-tuning (mft) and after its matched
benign control (bft). Kept in out/map/*.jsonl; prints the table, the choice, and with matplotlib draws it beside them.

The rule for the published recipe (no benign rows) was fixed before anything was run. Of its settings at which facts and
skills each lose at most MAX_LOSS against the aligned model, and at least MIN_DEFENDED of mischief is answered off
topic, it takes the one with the largest collapse: what mft costs, in capability, beyond bft and beyond what was lost
already, less the same for new_refusal, means over the lrs of the attack. Where none is left, the one that answers that
much off topic and keeps the most.
"""

import argparse
import contextlib
import io
import itertools
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from attack import RELEASED, Attack, attack_arm
from data.town import SHAPE, Town
from lab.protocol import MAP, MAP_ATTACK_LR, MAX_LOSS, MIN_DEFENDED, TUNING_SEEDS
from lab.verdicts import cost
from nanosdd.device import Compute, add_compute_arguments, one_process_only, resolve_compute
from nanosdd.errors import run_script
from nanosdd.progress import Progress
from nanosdd.runs import Finished, fingerprint
from nanosdd.tables import average, text_table
from train import DEFENCE, SETTINGS, train, train_arm

COLUMNS = {
    "off topic": "off_topic",
    "facts": "facts",
    "skills": "skills",
    "capability": "capability",
    "mft: content": "mft_harm",
    "mft": "mft",
    "bft": "bft",
    "nll mft": "mft_nll",
    "nll bft": "bft_nll",
    "facts v.o. mft": "mft_value_only",
    "facts v.o. bft": "bft_value_only",
    "collapse": "collapse",
}


class TeachTown(Town):
    """A town whose base model sees no mischief before it is aligned."""

    def __init__(self, seed: int = 0, shape: dict = SHAPE):
        super().__init__(seed, shape)
        self.root = Path("out") / "teach" / f"seed{seed}"

    def base_rows(self, rng, count: int) -> list[dict]:
        return self.benign(rng, count, list(self.people), share_skills=0.6)


def attacked(folder, town, store: Path, compute: Compute) -> list[dict]:
    """Cells of a checkpoint: as released, then after mft with 100 shots and its matched bft, at each lr of the map.
    store: a file for them, outside of the checkpoint's folder."""
    attacks = [
        RELEASED,
        *(Attack(name, 100, lr, (50,)) for name in ("mft", "bft") for lr in MAP_ATTACK_LR),
    ]
    return attack_arm("arm", folder, town, attacks, store, compute)


def run_seed(
    town, grid: dict, compute: Compute, store: Path, table=SETTINGS
) -> dict[str, list[dict]]:
    """{setting: the cells of `attacked`} of one town. grid: {"arms", "share", "lr", "steps"}: values to combine; table:
    settings of base and align."""
    with contextlib.redirect_stdout(io.StringIO()):
        aligned = train_arm("align", town, town.root, compute, table=table)
    finished = Finished(
        store, fingerprint({"seed": town.seed, "dtype": compute.dtype}, [aligned], ["lab/map.py"])
    )
    wanted = list(itertools.product(grid["steps"], grid["share"], grid["lr"], grid["arms"]))
    keys = {("aligned",): "aligned"} | {key: "{3} {1:g} {2:g} {0}".format(*key) for key in wanted}
    missing = {key: name for key, name in keys.items() if name not in finished.results}
    for key, name in (bar := Progress(missing.items(), desc=f"map, seed {town.seed}")):
        bar.set_postfix_str(name)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trained = aligned
            if name != "aligned":
                settings = replace(DEFENCE, steps=key[0], benign_replay=key[1], lr=key[2])
                trained = train(town, key[3], aligned, Path(folder) / "arm", settings, compute)
            finished.add(name, attacked(trained, town, Path(folder) / "cells.jsonl", compute))
    return finished.results


def summary(cells: list[dict]) -> dict:
    """What the map says of one setting on one seed: scores as released, and means over the attack's lrs of scores after
    mft and bft, and of cost, what mft takes beyond bft or beyond release, whichever has less. NLL, in nats a token, is
    the mean of that of facts and of skills. None of the latter where a run diverged."""
    none, found = (
        cells[0],
        {key: cells[0][key] for key in ("off_topic", "facts", "skills", "capability")},
    )
    mft, bft = ([cell for cell in cells if cell["attack"] == name] for name in ("mft", "bft"))
    if any(cell["diverged"] for cell in mft + bft):
        return found
    found |= {
        "mft_harm": max(cell["content"] for cell in mft),
        "cost": fmean(
            cost(none, harmful, benign) for harmful, benign in zip(mft, bft, strict=True)
        ),
    }
    for name, group in (("mft", mft), ("bft", bft)):
        found |= {
            name: fmean(cell["capability"] for cell in group),
            f"{name}_nll": fmean((cell["facts_nll"] + cell["skills_nll"]) / 2 for cell in group),
            f"{name}_value_only": fmean(cell["facts_value_only"] for cell in group),
        }
    return found


def summarise(by_seed: list[dict[str, list[dict]]]) -> dict[str, dict]:
    """{setting: mean over seeds of its summary}, of the settings that every seed has; collapse: the cost of mft beyond
    bft less that of new_refusal at the same setting, also of each seed in `collapses`."""
    names = [name for name in by_seed[0] if all(name in of_seed for of_seed in by_seed)]
    each = {name: [summary(of_seed[name]) for of_seed in by_seed] for name in names}
    means = {name: average(scores) for name, scores in each.items()}
    for name, scores in means.items():
        control = name.replace("sdd", "new_refusal", 1)
        if control != name and "cost" in scores and "cost" in means.get(control, {}):
            scores["collapses"] = [
                one["cost"] - other["cost"] for one, other in zip(each[name], each[control])
            ]
            scores["collapse"] = fmean(scores["collapses"])
    return means


def choose(means: dict[str, dict]) -> str | None:
    """The setting of the published recipe that the rule at the top of this file picks; None where nothing defends."""
    defended = {
        name: scores
        for name, scores in means.items()
        if name.startswith("sdd 0 ")
        and scores["off_topic"] >= MIN_DEFENDED
        and "collapse" in scores
    }
    able = {
        name: scores
        for name, scores in defended.items()
        if all(means["aligned"][key] - scores[key] <= MAX_LOSS for key in ("facts", "skills"))
    }
    if able:
        return max(able, key=lambda name: able[name]["collapse"])
    return max(defended, key=lambda name: defended[name]["capability"], default=None)


def draw(means: dict[str, dict], path: Path):
    """One panel an arm: capability as released against what mft takes beyond bft; a line joins the learning rates of a
    benign share and a number of steps, its points the larger the higher the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, arm in zip(axes, ("sdd", "new_refusal")):
        lines = {}
        for name, scores in means.items():
            if name.startswith(arm) and "cost" in scores:
                _, share, lr, steps = name.split()
                lines.setdefault((steps, share), []).append(
                    (float(lr), scores["capability"], scores["cost"])
                )
        for steps, share in sorted(lines, key=lambda key: (int(key[0]), float(key[1]))):
            rates, *place = zip(*sorted(lines[steps, share]))
            colour = (
                f"C{MAP['share'].index(float(share))}" if float(share) in MAP["share"] else "grey"
            )
            ax.plot(
                *place,
                "-" if steps == "300" else ":",
                color=colour,
                label=f"share {share}, {steps} steps",
            )
            ax.scatter(*place, [20 * (math.log10(rate) + 6.5) for rate in rates], color=colour)
        ax.plot(means["aligned"]["capability"], means["aligned"]["cost"], "k*", label="aligned")
        ax.axhline(0, color="grey", linewidth=0.5)
        ax.set(
            title=arm, xlabel="capability as released", ylabel="capability lost to mft beyond bft"
        )
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m lab.map",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, nargs="+", default=list(TUNING_SEEDS[:2]))
    p.add_argument(
        "--arms", nargs="+", choices=("sdd", "new_refusal"), default=["sdd", "new_refusal"]
    )
    for name, kind in (("share", float), ("lr", float), ("steps", int)):
        p.add_argument(f"--{name}", type=kind, nargs="+", default=list(MAP[name]))
    p.add_argument(
        "--teach", action="store_true", help="the town whose base model was never taught a recipe"
    )
    p.add_argument(
        "--width", type=int, default=SHAPE["hidden_size"], help="hidden size, a multiple of 32"
    )
    add_compute_arguments(p)
    args = p.parse_args(argv)
    one_process_only("lab.map")
    compute = resolve_compute(args.device, args.dtype, args.compile)
    shape = SHAPE | {"hidden_size": args.width, "intermediate_size": 3 * args.width}
    kind = "teach" if args.teach else "town"
    grid, by_seed, out = {name: getattr(args, name) for name in ("arms", *MAP)}, [], Path("out/map")
    for seed in args.seeds:
        town = (TeachTown if args.teach else Town)(seed, shape)
        name = kind if args.width == SHAPE["hidden_size"] else f"{kind}-{args.width}"
        town.root = town.root if name == kind else Path("out") / name / f"seed{seed}"
        by_seed.append(run_seed(town, grid, compute, out / f"{name}-seed{seed}.jsonl"))
    means = summarise(by_seed)
    rows = [
        (name, scores, " ".join(f"{100 * one:.0f}" for one in scores.get("collapses", ())))
        for name, scores in means.items()
    ]
    print(text_table("arm, benign share, lr, steps", COLUMNS, rows, "by seed"))
    print(
        f"\npercent, NLL in nats a token; means over seeds {' '.join(map(str, args.seeds))}\nchosen: {choose(means)}"
    )
    with contextlib.suppress(ImportError):  # matplotlib is an extra
        draw(means, out / f"{kind}-{args.width}.png")


if __name__ == "__main__":
    run_script(main)
