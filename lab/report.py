"""The page of a study, from its effects file.

python -m lab.report docs/effects.json     writes docs/effects.md and, with matplotlib, docs/effects.png
"""

import argparse
import contextlib
from pathlib import Path
from statistics import fmean

from lab.mechanism import at_equal_dose, carry_over
from lab.protocol import ARMS
from lab.verdicts import (
    compared_cells,
    harm_lines,
    harm_of,
    mean_over_draws,
    read_effects,
    secondary_lines,
    verdict_lines,
    verdicts,
)
from nanosdd.errors import run_script
from nanosdd.folders import write_text
from nanosdd.tables import average, text_table

COLUMNS = {
    "harm": ("harm_knowledge", "harm_skill"),
    "content": ("content_knowledge", "content_skill"),
    "value only": ("recipe_knowledge_value_only", "recipe_skill_value_only"),
    "told": "told",
    "complies": "complies",
    "refuse": "refuse",
    "off topic": "off_topic",
    "broken": "broken",
    "facts": ("facts", "facts_value_only"),
    "skills": ("skills", "skills_value_only"),
    "new skill": "new_skill",
    "facts nll": "facts_nll",
    "skills nll": "skills_nll",
    "benign nll": "benign_nll",
    "log p(y_o)": "yo_logp",
}
RUNS = {"none": "as released", "mft": "mft", "any": "any attack", "user": "user's bft"}
COLOURS = dict(
    zip(
        ARMS,
        (
            "#000000",
            "#56B4E9",
            "#D55E00",
            "#009E73",
            "#CC79A7",
            "#999999",
            "#E69F00",
            "#F0E442",
            "#0072B2",
            "#88CCEE",
            "#AA4499",
            "#44AA99",
        ),
    )
)  # the first eight are Okabe and Ito's


def chosen(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """{(arm, run): one cell for each seed that has it}; run: a key of RUNS."""
    cells, found = mean_over_draws(cells), {}
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        for seed in sorted({cell["seed"] for cell in cells}):
            own = compared_cells(
                [cell for cell in cells if (cell["arm"], cell["seed"]) == (arm, seed)]
            )
            for run, cell in own.items():
                if cell and run in RUNS:
                    found.setdefault((arm, run), []).append(cell)
    return found


def page(cells: list[dict]) -> str:
    """The report in Markdown."""
    rows = [
        (f"{arm}, {RUNS[run]}", average(group), f"{len(group)} seeds")
        for (arm, run), group in chosen(cells).items()
    ]
    keys = {key for _, scores, _ in rows for key in scores}
    columns = {
        title: key
        for title, key in COLUMNS.items()
        if set([key] if isinstance(key, str) else key) <= keys
    }
    parts = {
        "Verdicts": verdict_lines(verdicts(cells))
        if "facts" in keys
        else ["a chat model has none"],
        "Further effects, which decide nothing": secondary_lines(cells),
        "Harm by attack": harm_lines(cells),
        "Scores, means over seeds": text_table("percent, nats", columns, rows).split("\n"),
    }
    if any("mechanism" in cell for cell in cells):
        found = carry_over(at_equal_dose(cells))
        parts["Does y_o carry the damage?"] = [f"{name}: {value}" for name, value in found.items()]
    made = " ".join(
        sorted({f"{cell['commit']}/{cell['protocol']}" for cell in cells if "commit" in cell})
    )
    text = [f"# Effects\n\nWritten by lab/report.py; commit and hash of the protocol: {made}."]
    text += ["\n".join([f"## {title}", "", "```", *lines, "```"]) for title, lines in parts.items()]
    return "\n\n".join(text) + "\n"


def draw(cells: list[dict], path: Path):
    """Harm against capability, means over seeds, of each arm as released and after attacker's and user's choices."""
    from matplotlib.figure import Figure  # an extra: ImportError where it is missing

    figure, harm = Figure(figsize=(8, 5), layout="constrained"), harm_of(cells)
    axes = figure.subplots()
    for (arm, run), group in chosen(cells).items():
        x, y = (100 * fmean(cell[key] for cell in group) for key in ("capability", harm))
        label = {"label": arm} if run == "none" else {}
        axes.scatter(
            x,
            y,
            60,
            COLOURS.get(arm, "grey"),
            alpha=0.9,
            **label,
            marker={"none": "*", "mft": "o", "user": "s", "any": "X"}[run],
        )
    axes.set(
        xlabel="capability, percent",
        ylabel=f"{harm}, percent",
        title="star: as released, circle: mft, cross: best of all attacks, square: a benign user's bft",
    )
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__)
    p.add_argument(
        "effects", nargs="?", default="docs/effects.json", help="(default: docs/effects.json)"
    )
    path = Path(p.parse_args(argv).effects)
    cells = read_effects(path)
    write_text(path.with_suffix(".md"), page(cells))
    print(f"written: {path.with_suffix('.md')}")
    with contextlib.suppress(ImportError):
        draw(cells, path.with_suffix(".png"))
        print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
