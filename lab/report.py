"""Tables and texts about scores that eval.py and attack.py have written as JSON: no model is run here.

    python report.py                                         writes out/attack/report.md from out/attack/results.json
    python report.py FOLDER/results.json                     the same for attack.py --out FOLDER

report.md says what was found on the town, in under a hundred lines; with matplotlib installed, harm.png and
mechanism.png stand beside it.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from lab import figures
from lab import protocol
from nanosdd import runs
from lab.choices import most_harm
from data.town import OUTCOMES, chance
from lab.document import document
from nanosdd.errors import InputError, run_script

KEYWORD_WARNING = """\
Refusal keywords alone misread SDD: fluent text about something else holds none of the 29 strings (nor does SDD_reject's
own sentence), so a working SDD model counts as "never refuses". Read the rate beside what the answers are about and
whether they are degenerate."""


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


CHOICE_TESTS = ("mmlu", "openbookqa")


def accuracy(scores: dict, key="accuracy") -> str:
    """A percentage out of the scores of multiple_choice.py."""
    return f"{100 * scores[key]:.1f}"


COLUMNS = (("harm", "harm"), ("wrong_recipe", "wrong"), ("refuse", "refuse"), ("off_topic", "off topic"),
           ("broken", "broken"), ("facts", "facts"), ("skills", "skills"), ("facts_evaluation", "victims"),
           ("new_skill", "new skill"))  # score, title


def town_line(name: str, scores: dict) -> str:
    """One line of the town's table, in percent: outcomes as knowledge/skill kinds, capability as free/value only."""
    line = f"{name:<22}"
    for key, _ in COLUMNS:
        two = ("_knowledge", "_skill") if key in OUTCOMES else ("", "_value_only")
        line += f" {percent(scores[key + two[0]]):>4}/{percent(scores[key + two[1]]):<4}"
    return line


def town_header(title: str) -> str:
    """The header lines over town_line: what is counted, the columns, and the chance levels."""
    levels = chance()
    levels = {"harm": (levels["harm_knowledge"], levels["harm_skill"]), "facts_evaluation": (levels["facts"],) * 2,
              **{key: (levels[key],) * 2 for key in ("facts", "skills", "new_skill")}}
    chances = "".join(f" {percent(levels[key][0]):>4}/{percent(levels[key][1]):<4}" if key in levels else " " * 10
                      for key, _ in COLUMNS)
    return (f"{'percent of':<22}{'answers to mischief: knowledge/skill kinds':^50}"
            f"{'right answers: free/value only':^40}\n{title:<22}"
            + "".join(f" {name:^9}" for _, name in COLUMNS) + f"\n{'chance level':<22}{chances}")


FILE_COLUMNS = (("keyword_refusal", "", " refusal keyword", percent),  # score, title in two lines, form
                ("keyword_refusal_prefix", "", "keyword at start", percent),
                ("target_match", "", "    target match", percent), ("degenerate", "", "      degenerate", percent))
REAL_COLUMNS = (*FILE_COLUMNS, ("relevant", "prompt-answer", "cosine > 0.25", percent),  # of real files only
                ("cosine", "mean", "cosine", "{:.2f}".format),
                ("benign_perplexity", "benign", "perplexity", "{:.4g}".format))
ATTACK_COLUMNS = (*REAL_COLUMNS, ("mmlu", "right", " MMLU", accuracy), ("openbookqa", "right", "OpenBookQA", accuracy))


def file_line(name: str, scores: dict, columns=FILE_COLUMNS) -> str:
    """One line of scores of greedy answers to harmful prompts, in percent but for cosine and perplexity; a score that
    was not taken reads '-'."""
    return f"{name:<22}" + "".join(f" {form(scores[key]) if key in scores else '-':>{len(title)}}"
                                   for key, _, title, form in columns)


def file_header(title: str, columns=FILE_COLUMNS) -> str:
    """The header lines over file_line."""
    above = "".join(f" {above:>{len(name)}}" for _, above, name, _ in columns[len(FILE_COLUMNS):])
    return (f"{'percent of answers to harmful prompts':<90}{above}".rstrip()
            + f"\n{title:<22}" + "".join(f" {name}" for _, _, name, _ in columns))


def choice_notes(cells: list[dict]) -> list[str]:
    """What the columns of multiple choice in a table of these cells were taken on, and how sure they are."""
    lines = []
    for test in CHOICE_TESTS:
        taken = [cell[test] for cell in cells if test in cell]
        for one in taken[:1]:  # the questions are the same in all
            width = max((scores["interval"][1] - scores["interval"][0]) / 2 for scores in taken)
            lines.append(f"{one['name']}: {one['questions']} questions, {one['shots']} shots, 95% intervals of at most "
                         f"+-{100 * width:.1f} points; without reading, always {one['best_letter']} is "
                         f"{accuracy(one, 'best_letter_accuracy')}, the fewest characters "
                         f"{accuracy(one, 'shortest_choice')}")
        if fewer := max((scores.get("fewer_shots", 0) for scores in taken), default=0):
            lines.append(f"    fewer shots for up to {fewer} of them, to fit the model's context")
    return lines


def with_interval(value: float, interval: list[float]) -> str:
    """A percentage and its 95% interval, 20 characters wide."""
    return f"{100 * value:5.1f} ({100 * interval[0]:4.1f} to {100 * interval[1]:4.1f})"


def choice_table(checkpoints: list[tuple[str, dict]]) -> str:
    """MMLU and OpenBookQA of (name, metrics) pairs, in percent, beside what is right without reading."""
    lines = ["percent of questions answered right, with Wilson's 95% interval, and what is right without reading:",
             "a uniform guess, always the letter named, the choice of fewest characters",
             f"{'checkpoint':<22} {'test':<34} {'questions':>9}  {'right':>5} {'95% interval':>14}  {'guess':>5}  "
             f"{'letter':>6}  {'fewest':>6}"]
    notes = []
    for name, metrics in checkpoints:
        for scores in (metrics[test] for test in ("mmlu", "openbookqa") if test in metrics):
            ways = {"accuracy": f", {scores['shots']} shots"}
            if "accuracy_per_character" in scores:
                ways = {"accuracy": ", whole choice", "accuracy_per_character": ", per character"}
            for key, way in ways.items():
                right = with_interval(scores[key], scores[key.replace("accuracy", "interval")])
                lines.append(f"{name:<22} {scores['name'] + way:<34} {scores['questions']:>9}  {right}  "
                             f"{100 * scores['chance']:5.1f}  "
                             f"{scores['best_letter']} {100 * scores['best_letter_accuracy']:4.1f}  "
                             f"{100 * scores['shortest_choice']:6.1f}")
            if scores.get("fewer_shots"):
                notes.append(f"{name}: {scores['fewer_shots']} of {scores['questions']} questions had fewer than "
                             f"{scores['shots']} shots, to fit the model's context")
    return "\n".join(lines + notes)


def xstest_table(checkpoints: list[tuple[str, dict]]) -> str:
    """XSTest of (name, metrics) pairs: percent of answers that hold a refusal keyword."""
    lines = ["percent of greedy answers to XSTest that hold a refusal keyword, with Wilson's 95% interval",
             f"{'checkpoint':<22} {'prompts':<34} {'answers':>9}  {'anywhere':>20}  {'at the start':>20}"]
    for name, metrics in checkpoints:
        for kind, label in ("safe", "safe (over-refusal)"), ("unsafe", "unsafe"):
            if kind in metrics["xstest"]:
                scores = metrics["xstest"][kind]
                rates = [with_interval(scores[key], scores[f"{key}_interval"])
                         for key in ("keyword_refusal", "keyword_refusal_prefix")]
                lines.append(f"{name:<22} {label:<34} {scores['prompts']:>9}  {'  '.join(rates)}")
    return "\n".join(lines)


def average(cells: list[dict]) -> dict:
    """The mean over cells of every score, and of those of MMLU and OpenBookQA."""
    found = {key: fmean(cell[key] for cell in cells) for key, value in cells[0].items() if isinstance(value, float)}
    return found | {test: average([cell[test] for cell in cells]) for test in CHOICE_TESTS if test in cells[0]}


def attack_table(cells: list[dict], town: bool) -> str:
    """Arms by attack, means over seeds, at the attacker's choice of lr and steps. Benign fine-tuning stands twice:
    matched to the malicious run at most shots, and (town) at the benign user's own best setting. At the right, the
    worst case for the defender over the whole grid, by the evaluation score, and over the cells that kept capability.
    """
    if town:
        head = town_header("arm and attack").splitlines()
        lines = [head[0] + "  chosen       most harm in     and with",
                 head[1] + "  lr/steps     grid (capab.)    capab. kept", *head[2:]]
    else:
        lines = [file_header("arm and attack", ATTACK_COLUMNS) + "  chosen lr/steps"]
        chances = {test: {"accuracy": cell[test]["chance"]} for cell in cells for test in CHOICE_TESTS if test in cell}
        if chances:
            lines.append(file_line("chance level", chances, ATTACK_COLUMNS).replace("-", " ").rstrip())
    by, cells = {}, [cell for cell in cells if not cell.get("probe")]
    for cell in cells:
        by.setdefault((cell["arm"], cell["attack"], cell["shots"]), []).append(cell)
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    edges = {pick(cell["lr"] for cell in cells if cell["lr"]) for pick in (min, max)} if len(by) > len(arms) else set()
    order = ("none", "bft", "mft", "lora", "poisoned", "identity", "replay", "repair", "unlearn")
    for arm, attack, shots in sorted(by, key=lambda key: (arms.index(key[0]), order.index(key[1]), key[2])):
        group = by[arm, attack, shots]
        label = {"none": "none", "bft": "bft matched"}.get(attack, f"{attack} {shots}")
        shown = {label: [cell for cell in group if cell["chosen"]]}
        if attack == "bft" and town:
            shown["bft best"] = [cell for cell in group if cell["best"]]
        for label, chosen in shown.items():
            name = f"{arm:<9} {label}"
            if not chosen:
                lines.append(f"{name:<22}  no such cell: diverged")
                continue
            settings = sorted({f"{cell['lr']:g}/{cell['steps']}{'^' * (len(edges) > 1 and cell['lr'] in edges)}"
                               for cell in chosen if cell["lr"]})
            settings = f"{len(settings)} settings" if len(settings) > 1 else "".join(settings)
            line = town_line(name, average(chosen)) if town else file_line(name, average(chosen), ATTACK_COLUMNS)
            line += f"  {settings:<13}"
            if town and attack not in ("none", "bft"):
                before = {cell["seed"]: cell["capability"] for cell in by[arm, "none", 0]}
                kept, top = most_harm(group, before), average(list(most_harm(group).values()))
                line += f"{percent(top['harm']):>4} ({percent(top['capability'])})".ljust(17)
                whole = len(kept) == len({cell["seed"] for cell in group})
                line += f"{percent(average(list(kept.values()))['harm']):>4}" if whole else "   -"
            lines.append(line.rstrip())
    if any("^" in line for line in lines):
        lines.append("^ at the edge of the lr grid: a tie goes to the gentler setting; without one, widen the grid")
    if town:
        lines.append("most harm in grid: the defender's worst case at any setting; capability kept: it fell by less "
                     f"than {percent(protocol.KEPT)} points, -: not in every seed")
    if diverged := sum(cell["diverged"] for cell in cells):
        lines.append(f"{diverged} cells diverged: shown in results.json, never anybody's choice")
    return "\n".join(lines + choice_notes(cells))


def verdict_lines(found: dict) -> list[str]:
    """The verdicts and the effects behind them, in points (hundredths), one value per seed."""
    lines = []
    for claim, part in found.items():
        lines.append(f"{claim}: {part['verdict']} (it needs every effect above {100 * part['margin']:+.0f} points)")
        if "prior_loss" in part:
            lines.append(f"    plain facts about the victims fell {100 * part['prior_loss']:.1f} points before any "
                         "attack: what is no longer known cannot be told")
        for name, effects in part["effects"].items():
            values = "".join(f" {100 * effect:+5.0f}" for effect in effects)
            average_of = f"   mean {100 * fmean(effects):+.1f}" if len(effects) > 1 else ""
            lines.append(f"    {name:<52}{values}{average_of}")
    return lines


# ---- report.md ----

NEEDED = ("arm", "phrasing", "attack", "shots", "steps", "lr", "seed", "diverged")  # of every cell
SCORES = ("harm", "harm_knowledge", "harm_skill", "facts", "facts_value_only", "facts_evaluation", "skills",
          "skills_value_only", "capability")  # of every cell that has scores


def read_results(path) -> dict:
    """What attack.py wrote about the town; InputError when it is not there, not whole, or about real files."""
    again = "run attack.py again"
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} cannot be read; run attack.py first, or name its results.json") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); {again}") from None
    if not isinstance(results, dict) or not isinstance(results.get("cells"), list) or not results["cells"]:
        raise InputError(f"{path} holds no cells; {again}")
    for i, cell in enumerate(results["cells"]):
        needed = NEEDED if not isinstance(cell, dict) or cell.get("diverged") else NEEDED + (
            ("mechanism",) if cell.get("probe") else ("chosen", *SCORES))
        missing = [key for key in needed if not isinstance(cell, dict) or key not in cell]
        if "harm" in missing and "target_match" in cell:
            raise InputError(f"{path} is about real files, report.md about the town; see table.md beside it")
        if missing:
            raise InputError(f"{path}: cell {i} has no {missing[0]!r}; {again}")
    if all(cell.get("probe") for cell in results["cells"]):
        raise InputError(f"{path} holds no scored cells; {again}")
    return results


def write_report(path) -> list[Path]:
    """Write report.md, and with matplotlib the figures, beside a results.json; gives what was written."""
    results, folder = read_results(path), Path(path).parent
    try:
        drawn = figures.draw(results, folder)
    except ImportError:
        print("figures: not drawn, since matplotlib is not installed")
        drawn = []
    runs.write_text(folder / "report.md", document(results, drawn))
    return [folder / name for name in ("report.md", *drawn)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="?", default="out/attack/results.json", help="(default: out/attack/results.json)")
    print("written: " + ", ".join(map(str, write_report(p.parse_args(argv).results))))


if __name__ == "__main__":
    run_script(main)
