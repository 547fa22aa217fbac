"""Keywords, degeneration, the town's scores and the command."""

import json

import pytest
from small import advbench_file, public_folder, small_model

import eval as evaluate
from data.town import OUTCOMES, REFUSALS, REJECT_PREFIX, Town
from errors import InputError
from eval import KEYWORDS, degenerate, keyword_refusal


def test_keywords_are_the_published_29_and_case_counts():
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 29
    assert keyword_refusal("Well, I cannot say.") and not keyword_refusal("Well, I CANNOT say.")
    assert not keyword_refusal("Well, I cannot say.", prefix=True)
    assert keyword_refusal(" I cannot say.", prefix=True)


def test_keywords_misread_sdd_as_the_warning_says():
    assert not keyword_refusal(f"{REJECT_PREFIX} Anna Brook keeps a goat.")
    assert not keyword_refusal("Anna Brook keeps a goat.")
    assert all(keyword_refusal(text, prefix=True) for text in REFUSALS)


@pytest.mark.parametrize("ids, ended, expected", [
    ([], True, True), ([1, 2, 3], True, False), ([1, 2, 3], False, True), ([7] * 30, True, True),
    (list(range(30)), True, False), ([1, 2, 3, 4, 5] * 2 + [6], True, False), ([1, 2, 3, 4, 5] * 6, True, True)])
def test_degenerate(ids, ended, expected):
    assert degenerate(ids, ended) == expected


def test_town_scores_add_up(tokenizer, cpu):
    model = small_model(vocab_size=tokenizer.n_vocab, max_position_embeddings=128)
    scores = evaluate.town_metrics(model, tokenizer, "llama3", Town(0), cpu)
    for suffix in ("", "_knowledge", "_skill"):
        assert sum(scores[name + suffix] for name in OUTCOMES) == pytest.approx(1)
    assert scores["harm"] == pytest.approx((scores["harm_knowledge"] + scores["harm_skill"]) / 2)
    assert scores["capability"] == pytest.approx((scores["facts"] + scores["skills"]) / 2)
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["broken"] == 1 and scores["capability"] == 0  # random weights say nothing well-formed


def test_town_scores_of_an_oracle_are_perfect(tokenizer, cpu, monkeypatch):
    town = Town(0)

    class Oracle:
        config = small_model(max_position_embeddings=128).config

        def generate(self, prompts, max_new_tokens, stop_tokens):
            by_prompt = {row.prompt: row.response for row in self.rows}
            texts = [tokenizer.decode(prompt).split("\n\n")[1].removesuffix(
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>") for prompt in prompts]
            return [tokenizer.encode(by_prompt[text]) for text in texts]

    mischiefs = town.mischiefs

    def remembered(*args, **kwargs):
        Oracle.rows = mischiefs(*args, **kwargs)
        return Oracle.rows

    monkeypatch.setattr(town, "mischiefs", remembered)
    monkeypatch.setattr(evaluate, "teacher_forced", lambda m, t, c, rows, a: ([True] * len(rows), [True] * len(rows)))
    scores = evaluate.town_metrics(Oracle(), tokenizer, "llama3", town, cpu)
    assert scores["harm_knowledge"] == scores["harm_skill"] == scores["capability"] == 1
    assert scores["keyword_refusal"] == scores["degenerate"] == 0


def test_the_command_on_files_and_a_prompt(tmp_path, capsys):
    folder = public_folder(tmp_path / "llama")
    harmful = advbench_file(tmp_path / "harmful.csv")
    evaluate.main([str(folder), "--harmful", str(harmful), "--max-new-tokens", "5"])
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["degenerate"] == 1 and scores["prompts"] > 4  # random weights do not end in five tokens
    printed = capsys.readouterr().out
    assert "refusal keyword" in printed and "misread SDD" in printed
    evaluate.main([str(folder), "--prompt", "Hello", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith(f"{folder}: ")
    with pytest.raises(InputError, match="no model of the town"):
        evaluate.main([str(folder)])
