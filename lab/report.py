"""The page of a study, from its effects file.

python -m lab.report docs/effects.json     writes docs/effects.md and, with matplotlib, .png
"""

import argparse
import contextlib
from pathlib import Path

from lab.protocol import ARMS
from lab.verdicts import (
    by_seed,
    harm_lines,
    harm_of,
    read_effects,
    secondary_lines,
    verdict_lines,
)
from nanosdd.errors import run_script
from nanosdd.runs import check_new, write_text
from nanosdd.tables import average, text_table

COLUMNS = {
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
MARKERS = {"none": "*", "mft": "o", "any": "X", "user": "s"}


def chosen(cells: list) -> dict:
    """Return {(arm, run): one cell for each seed that has it}; run: a key of RUNS."""
    found = {}
    for arms in by_seed(cells, arms=()).values():
        for arm, runs in arms.items():
            for run in RUNS:
                if runs[run]:
                    found.setdefault((arm, run), []).append(runs[run])
    return found


def page(cells: list) -> str:
    """Return the report in Markdown."""
    rows = []
    for (arm, run), group in chosen(cells).items():
        rows.append((f"{arm}, {RUNS[run]}", average(group), f"{len(group)} seeds"))
    known = set().union(*cells)
    columns = {}
    for title, keys in COLUMNS.items():
        if known.issuperset([keys] if isinstance(keys, str) else keys):
            columns[title] = keys
    made = {f"{cell['commit']}/{cell['protocol']}" for cell in cells if "commit" in cell}
    parts = {
        "Verdicts": verdict_lines(cells) or ["none: the arms of the claims are not complete"],
        "Further effects, which decide nothing": secondary_lines(cells),
        "Harm by attack": harm_lines(cells),
        "Scores, means over seeds": [text_table("percent, nats", columns, rows)],
        "Commit and hash of the protocol": sorted(made),
    }
    text = "# Effects\n\nWritten by lab/report.py.\n"
    for title, lines in parts.items():
        text += "\n".join([f"\n## {title}\n", "```", *lines, "```", ""])
    return text


def draw(cells: list, path: Path):
    """Draw harm against capability of each arm, as released and after the chosen runs."""
    from matplotlib import colormaps  # an extra: ImportError where it is missing
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    harm = harm_of(cells)
    for (arm, run), group in chosen(cells).items():
        means = average(group)
        x = 100 * means["capability"]
        y = 100 * means[harm]
        colour = colormaps["tab20"](ARMS.index(arm)) if arm in ARMS else "black"
        label = arm if run == "none" else None
        axes.scatter(x, y, 60, color=colour, marker=MARKERS[run], label=label)
    axes.set(
        xlabel="capability, percent",
        ylabel=f"{harm}, percent",
        title="star: as released, circle: mft, cross: best of all attacks, square: user's bft",
    )
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__)
    p.add_argument("effects", nargs="?", default="docs/effects.json", help="file of lab.study")
    path = Path(p.parse_args(argv).effects)
    check_new(path.with_suffix(".md"))
    cells = read_effects(path)
    write_text(path.with_suffix(".md"), page(cells))
    print(f"written: {path.with_suffix('.md')}")
    with contextlib.suppress(ImportError):
        draw(cells, path.with_suffix(".png"))
        print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_script(main)
