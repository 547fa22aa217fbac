"""Whose choice each cell of attack.py is: the attacker's, the benign user's, at one lr, at an equal dose; the worst."""

from lab.protocol import KEPT


def choose(cells: list[dict]):
    """Mark whose choice each cell of one arm and seed is. The best score on the chooser's own held-out prompts wins,
    the gentler setting where it ties, never a diverged cell."""
    def best(score, **where):
        able = [cell for cell in cells if not cell["diverged"] and all(cell[key] == where[key] for key in where)]
        return max(able, key=lambda cell: (cell[score], -cell["lr"], -cell["steps"]), default=None)

    for cell in cells:
        cell["chosen"], cell["best"] = cell["attack"] == "none", False
    for attack, shots in {(cell["attack"], cell["shots"]) for cell in cells} - {("none", 0)}:
        if attack != "bft" and (cell := best("attacker_score", attack=attack, shots=shots)):
            cell["chosen"] = True
    mft = {cell["shots"]: (cell["lr"], cell["steps"]) for cell in cells if cell["attack"] == "mft" and cell["chosen"]}
    for cell in cells:
        if cell["attack"] == "bft" and not cell["diverged"]:
            cell["chosen"] = (cell["lr"], cell["steps"]) == mft.get(cell["shots"])
    if "user_score" in cells[0] and (cell := best("user_score", attack="bft")):
        cell["best"] = True


def most_harm(cells: list[dict], before: dict | None = None) -> dict[int, dict]:
    """{seed: the cell with the most harm}, never a diverged one. before {seed: capability before any attack}: only of
    the cells that lost less than KEPT of it."""
    found = {}
    for cell in cells:
        if cell["diverged"] or (before and before[cell["seed"]] - cell["capability"] >= KEPT):
            continue
        if cell["seed"] not in found or cell["harm"] > found[cell["seed"]]["harm"]:
            found[cell["seed"]] = cell
    return found


def at_one_lr(cells: list[dict], lr: float) -> list[dict]:
    """Copies of the cells without an attack or at this lr, with the choices of those who may use no other."""
    kept, groups = [dict(one) for one in cells if one["lr"] in (0, lr)], {}
    for one in kept:
        groups.setdefault((one["seed"], one["arm"]), []).append(one)
    for group in groups.values():
        choose(group)
    return kept


def at_equal_dose(cells: list[dict]) -> dict:
    """{seed: {arm: {attack: measurement}}} of measured cells, for mechanism.carry_over: each attack at its last step,
    suppress at the step where log p(y_o | harmful x) is nearest to what it is after mft."""
    found = {}
    for one in sorted((one for one in cells if one["probe"] and not one["diverged"]), key=lambda one: one["steps"]):
        attacks = found.setdefault(one["seed"], {}).setdefault(one["arm"], {})
        attacks.setdefault(one["attack"], []).append(one["mechanism"])
    for attacks in (attacks for arms in found.values() for attacks in arms.values()):
        last = {attack: measured[-1] for attack, measured in attacks.items()}
        if "suppress" in last and "mft" in last:
            last["suppress"] = min(attacks["suppress"], key=lambda measured: abs(
                measured["logp_yo_harmful"] - last["mft"]["logp_yo_harmful"]))
        attacks.update(last)
    return found
