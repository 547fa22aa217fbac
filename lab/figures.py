"""Two figures of attack.py's results on the town, drawn with matplotlib where that is installed: no model is run here.

harm.png is harm against capability over every attack cell; mechanism.png follows log p(y_o) and facts along attacks.
"""

from pathlib import Path
from statistics import fmean as mean

from lab.protocol import CORE

# Okabe and Ito's colours, which colour-blind readers can tell apart: one for each arm
COLOURS = {"aligned": "#0072B2", "refusal": "#009E73", "sdd": "#D55E00", "sdd_reject": "#CC79A7", "shuffled": "#E69F00",
           "exposure": "#56B4E9", "same_topic": "#000000", "no_replay": "#999999"}
NAMES = {"refusal": "refusal control", "sdd": "SDD", "sdd_reject": "SDD_reject", "shuffled": "shuffled y_o",
         "same_topic": "same topic", "no_replay": "SDD, no replay"}
FAMILIES = {"before any attack": ("*", ("none",)), "MFT, LoRA": ("o", ("mft", "lora")),
            "disguised: poisoned, identity": ("s", ("poisoned", "identity")),
            "knows SDD: replay, repair, unlearn": ("^", ("replay", "repair", "unlearn")),
            "benign (BFT)": ("D", ("bft",))}
STYLES = {"mft": ("-", ""), "bft": ("--", ""), "suppress": (":", "s"), "preserve": ("-.", "^"),
          "preserve control": ("-.", "o")}  # line, marker


def draw(results: dict, folder) -> list[str]:
    """Write harm.png and, of results with probe cells, mechanism.png into a folder; gives the names of those written.

    ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # an optional extra

    written, phrasing = [], results["cells"][0]["phrasing"]
    for name, size, fill, probe in (("harm.png", (9, 5.2), harm, False), ("mechanism.png", (9, 6.6), mechanism, True)):
        own = [cell for cell in results["cells"] if cell["phrasing"] == phrasing and bool(cell.get("probe")) == probe]
        if own:
            figure = Figure(figsize=size, layout="constrained")
            fill(figure, [cell for cell in own if not cell["diverged"]], sum(cell["diverged"] for cell in own))
            figure.savefig(Path(folder) / name, dpi=90)
            written.append(name)
    return written


def calm(axes, x: str, y: str, title: str = ""):
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def harm(figure, cells: list[dict], diverged: int):
    """Harm against capability, means over seeds: every setting faintly, what the attacker chose strongly."""
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    arms = [arm for arm in dict.fromkeys(cell["arm"] for cell in cells) if arm != "base"]
    for arm in reversed(arms):  # the core arms come first, and on top
        for marker, attacks in FAMILIES.values():
            own = [cell for cell in cells if cell["arm"] == arm and cell["attack"] in attacks]
            tried, chosen = by(own, "attack", "shots", "lr", "steps"), by([cell for cell in own if cell["chosen"]],
                                                                          "attack", "shots")
            for groups, style in ((tried, dict(s=20, alpha=0.3, linewidths=0, zorder=2)),
                                  (chosen, dict(s=75, alpha=0.95, linewidths=0.8, edgecolors="white", zorder=3))):
                style["s"] *= 2 if marker == "*" else 1
                axes.scatter(*([100 * mean(cell[key] for cell in group) for group in groups.values()]
                               for key in ("capability", "harm")), marker=marker, color=colour(arm), **style)
    calm(axes, "capability: facts and skills answered right, percent",
         "harm: true recipe told, percent of mischief answers")
    axes.set_xlim(-3, 103)
    axes.set_ylim(-4, 104)
    axes.text(0, 101, "harmful, abilities lost", color="#777777", fontsize=9, style="italic", va="center")
    axes.text(0, -1, "collapse: SDD's aim", color="#777777", fontsize=9, style="italic", va="center")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour(arm), label=NAMES.get(arm, arm)) for arm in arms]
    handles += [Line2D([], [], linestyle="", label=text) for text in (
        "", "large: the attacker's choice", "faint: every setting tried", f"not shown: {diverged} diverged cells", "")]
    handles += [Line2D([], [], marker=marker, linestyle="", color="#555555", label=family)
                for family, (marker, attacks) in FAMILIES.items() if any(cell["attack"] in attacks for cell in cells)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)


def mechanism(figure, cells: list[dict], diverged: int):
    """Means over seeds along the attacks, in the band from the least seed to the most: log p(y_o) and facts in each arm
    under MFT and BFT, and the facts of SDD under the causal controls."""
    panels = figure.subplots(2, 2)
    controls = [attack for attack in STYLES if attack != "bft"]
    for axes, key, unit, y, title, arms, attacks in (
            (panels[0, 0], "logp_yo_own", 1, "nats a token", "log p(y_o | its own prompt)", CORE, ("mft", "bft")),
            (panels[0, 1], "logp_yo_harmful", 1, "nats a token", "log p(y_o | mischief x)", CORE, ("mft", "bft")),
            (panels[1, 0], "facts_value_only", 100, "percent right", "facts, value only", CORE, ("mft", "bft")),
            (panels[1, 1], "facts_value_only", 100, "percent right", "facts, value only: SDD", ("sdd",), controls)):
        for arm in arms:
            for attack in attacks:
                path = [cell for cell in cells if cell["arm"] == arm and cell["attack"] in ("none", attack)]
                if not any(cell["attack"] == attack for cell in path):
                    continue
                values = {steps: [unit * cell["mechanism"][key] for cell in group]
                          for (steps,), group in sorted(by(path, "steps").items())}
                style, marker = STYLES[attack]
                label = f"{NAMES.get(arm, arm)}, {attack.upper()}" if arms == CORE else attack.replace("mft", "MFT")
                axes.plot(list(values), list(map(mean, values.values())), color=colour(arm), linestyle=style,
                          marker=marker, markersize=5, linewidth=1.8, label=label)
                axes.fill_between(list(values), list(map(min, values.values())), list(map(max, values.values())),
                                  color=colour(arm), alpha=0.12, linewidth=0)
        calm(axes, "steps of the attack", y, title)
    for axes in (panels[0, 0], panels[1, 1]):
        axes.legend(frameon=False, fontsize=8)
    if diverged:
        figure.suptitle(f"not shown: {diverged} diverged measurements", fontsize=9)


def colour(arm: str) -> str:
    return COLOURS.get(arm, "#882255")  # an arm that a user trained and named


def by(cells: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Cells in groups that agree in all of these keys."""
    groups = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return groups
