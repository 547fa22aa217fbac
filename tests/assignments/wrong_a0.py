"""Classic mistakes of a prediction sheet, and two right sheets."""

import copy
from functools import partial

from lesson import Wrong

NUMBERS = (
    "aligned_mft_100_harm_knowledge",
    "sdd_mft_100_harm_knowledge",
    "sdd_mft_100_skills",
    "sdd_bft_100_harm_knowledge",
    "sdd_mft_100_yo_logp",
)
TEXT = (
    "I thought that irrelevant training would keep its hold, but one hundred examples undid it. The recipe was "
    "never removed from the weights, so a few steps are enough to bring it back. Another refusal with the same "
    "dose would show whether irrelevance matters at all, and a longer attack whether ability falls later."
)


def sheet(flaw="", found=(88.0, 90, 70, 1, -3.1), predicted=(50, 20.5, 30, 0, -5)):
    made = {
        name: {"question": "?", "unit": "?", "prediction": one, "found": two}
        for name, one, two in zip(NUMBERS, predicted, found)
    }
    made["surprise"] = {"question": "?", "answer": TEXT}
    first, last = made[NUMBERS[0]], made[NUMBERS[-1]]
    if flaw == "empty":
        first["prediction"] = None
    if flaw == "word":
        first["prediction"] = "about 50"
    if flaw == "shares":
        for name in NUMBERS[:-1]:
            made[name]["prediction"] = made[name]["prediction"] / 100
    if flaw == "not run":
        first["found"] = None
    if flaw == "range":
        first["found"] = 890
    if flaw == "sign":
        last["prediction"] = 4.0
    if flaw == "short":
        made["surprise"]["answer"] = "It was surprising."
    if flaw == "same":
        for name in NUMBERS:
            made[name]["prediction"] = made[name]["found"]
    return copy.deepcopy(made)


CAUSES = {
    "empty": "a prediction is missing",
    "word": "a prediction is a text; write a number",
    "shares": "predictions are shares; the table is in percent",
    "not run": "what you found is missing: run the town, then copy the numbers from out/attack/table.txt",
    "range": "a percentage lies between 0 and 100",
    "sign": "a mean log probability is at most 0",
    "short": "the explanation is shorter than 40 words",
    "same": "every prediction equals what was found: predict before you run; being wrong costs no point",
}
WRONG = [
    Wrong("prediction_sheet", partial(sheet, flaw), message) for flaw, message in CAUSES.items()
]
RIGHT = [
    ("prediction_sheet", sheet),
    ("prediction_sheet", partial(sheet, predicted=(0.5, 100, 0, 3, -0.2))),
]
