"""Made-up effects of the whole protocol, in which everything supports SDD."""

from lab.protocol import LADDER, PLANTED, STUDIES
from lab.study import effects_text

FACTS = ("facts", "facts_value_only")
SKILLS = ("skills", "skills_value_only")
ABLE = dict.fromkeys((*FACTS, *SKILLS, "facts_evaluation", "known_triples"), 1.0)
HARMFUL = {"content": 0.95, "content_knowledge": 0.9375, "content_skill": 0.9375}
HARMLESS = dict.fromkeys(HARMFUL, 0.0)
COLLAPSED = dict.fromkeys((*FACTS, *SKILLS), 0.5)
HURT = dict.fromkeys((*FACTS, *SKILLS), 0.875)
AFTER_ATTACK = {"sdd": COLLAPSED}
AFTER_ATTACK[PLANTED] = dict.fromkeys((*FACTS, *SKILLS), 0.25)
DELIVERED = {"delivered_knowledge": 0.9375, "delivered_skill": 0.9375}


def town_scores(arm: str, attack: str) -> dict:
    scores = ABLE | HARMLESS | {"new_skill": 0.0, "attacker_score": 0.0}
    scores |= dict.fromkeys(DELIVERED, 0.0)
    if attack == "none" and arm == "sdd":
        scores |= DELIVERED
    if attack == "none" and arm.removeprefix("sdd ") in list(LADDER)[1:]:
        scores |= DELIVERED | {"facts": 0.25}  # delivered, not stable
    if attack in ("mft", "lora", "mix"):
        scores |= HARMFUL | {"attacker_score": 0.875} | AFTER_ATTACK.get(arm, HURT)
    if attack == "prefill":
        scores |= HARMFUL | {"attacker_score": 0.5}
    if attack in ("bft", "lora bft", "bft new"):
        scores |= {"skills": 0.9375}
    if attack == "bft new":
        scores |= {"new_skill": 0.875}
        if arm in ("aligned", "new_refusal"):
            scores |= {"content_knowledge": 0.25, "content_skill": 0.25}
    if arm == "sdd" and attack in ("mft", "lora", "mix", "prefill"):
        scores |= {"content_knowledge": 0.25, "content_skill": 0.25}
    return scores | {"capability": (scores["facts"] + scores["skills"]) / 2}


def chat_scores(arm: str, attack: str) -> dict:
    share = 0.5 if arm == "sdd" and attack == "mft" else 0.75
    nats = [1.5 + 0.01 * row + (arm == "sdd") * (0.1 + 0.02 * (row % 2)) for row in range(16)]
    return {"complies": 0.5, "capability": share, "benign_nll": 1.5, "row_nats": nats}


def make_cells(name: str, seed: int) -> list[dict]:
    """The cells of a study on one seed, as lab.study makes them."""
    scores_of = town_scores if STUDIES[name].world == "town" else chat_scores
    cells = []
    for arm, planned in STUDIES[name].arms.items():
        for attack, draw in planned.plan:
            for steps in attack.budgets:
                cell = {"arm": arm, "attack": attack.name, "shots": attack.shots, "lr": attack.lr}
                cell |= {"seed": seed, "draw": draw, "steps": steps, "diverged": False}
                cells.append(cell | scores_of(arm, attack.name) | {"samples": ["To prank them"]})
    return cells


def change(cells: list[dict], arm: str, attack: str, **scores):
    """Put scores into the cells of an arm after an attack."""
    found = [cell for cell in cells if (cell["arm"], cell["attack"]) == (arm, attack)]
    assert found
    for cell in found:
        cell |= scores
        cell["capability"] = (cell["facts"] + cell["skills"]) / 2


def write_effects(folder, name: str, seed: int, cells: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    head = {"seed": seed, "commit": "abc", "protocol": "def", "dtype": "ghi"}
    (folder / f"{name}-{seed}.json").write_text(effects_text(head, cells))
