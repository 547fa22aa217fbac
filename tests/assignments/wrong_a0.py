"""Classic mistakes of a prediction sheet, and two right sheets."""

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
    "I thought that irrelevant training would keep its hold, but one hundred examples undid it. "
    "The recipe was never removed from the weights, so a few steps are enough to bring it back. "
    "Another refusal with the same dose would show whether irrelevance matters at all."
)


def sheet(flaw="", predicted=(50, 20.5, 30, 0, -5)):
    found = [88.0, 90, 70, 1, -3.1]
    predicted = list(predicted)
    answer = TEXT
    predicted[0] = {"empty": None, "word": "about 50"}.get(flaw, predicted[0])
    if flaw == "shares":
        predicted = [0.5, 0.2, 0.3, 0, -5]
    found[0] = {"not run": None, "range": 890}.get(flaw, 88.0)
    if flaw == "short":
        answer = "It was surprising."
    if flaw == "same":
        predicted = found
    made = {"surprise": {"question": "?", "answer": answer}}
    for name, one, two in zip(NUMBERS, predicted, found):
        made[name] = {"question": "?", "unit": "?", "prediction": one, "found": two}
    return made


CAUSES = {
    "empty": "a prediction is missing",
    "word": "a prediction is a text; write a number",
    "shares": "predictions are shares; the table is in percent",
    "not run": "what you found is missing: run the town, then copy it from out/attack/table.txt",
    "range": "a percentage lies between 0 and 100, a mean log probability is at most 0",
    "short": "the explanation is shorter than 40 words",
    "same": "predict before you run: every prediction is what was found; being wrong costs nothing",
}
WRONG = [Wrong("prediction_sheet", partial(sheet, flaw), CAUSES[flaw]) for flaw in CAUSES]
RIGHT = [
    ("prediction_sheet", sheet),
    ("prediction_sheet", partial(sheet, predicted=(0.5, 100, 0, 3, -0.2))),
]
