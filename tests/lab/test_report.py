"""The page and README's table hold what the committed effects say, and nothing else."""

import shutil
from pathlib import Path

import pytest
from synthetic import change, make_cells, write_effects

from lab.protocol import CHAT_DRAWS, PLANTED, REPORT_SEEDS, STUDIES, TUNING_SEEDS
from lab.report import chat_evidence, evidence, main, page, town_answer
from lab.verdicts import COLLAPSE, read_study
from nanosdd.errors import InputError

ROOT = Path(__file__).parent.parent.parent


def say(folder):
    """(the page, the lines that README has to quote) of effects; [] where seeds are not run yet."""
    studies = {name: read_study(name, folder) for name in STUDIES}
    text = page(studies)
    if "No answer yet" in text:
        return text, []
    return text, evidence(studies["town"]) + chat_evidence(studies["kitchen"])


def wrong_lines(said, written: str, readme: str) -> list[str]:
    """What pages hold in another form than the effects say."""
    text, table = said
    found = [] if written == text else ["report.md"]
    return found + [line for line in table if line not in readme.splitlines()]


def test_every_number_of_the_pages_is_recomputed_from_the_effects():
    written = (ROOT / "docs/report.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert wrong_lines(say(ROOT / "docs/effects"), written, readme) == []


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """A folder with effects and what is made of them. Copy it to change it."""
    folder = tmp_path_factory.mktemp("docs")
    names = {"town": REPORT_SEEDS, "kitchen": CHAT_DRAWS, "advbench": CHAT_DRAWS}
    for name, seeds in names.items():
        for seed in seeds:
            write_effects(folder / "effects", name, seed, make_cells(name, seed))
    main([str(folder / "effects"), "--out", str(folder)])
    return folder


def test_a_number_that_the_effects_do_not_say_is_found(docs, tmp_path):
    effects = shutil.copytree(docs / "effects", tmp_path / "effects")
    said = say(effects)
    table = said[1]
    assert len(table) == 15
    readme = "\n".join(["# nanoSDD", *table])
    written = (docs / "report.md").read_text()
    assert wrong_lines(said, written, readme) == []
    assert wrong_lines(said, written, readme.replace("50", "51")) != []
    edited = written.replace("+37.5", "+38.5", 1)
    assert wrong_lines(said, edited, readme) == ["report.md"]
    cells = make_cells("town", 10)
    change(cells, "sdd", "mft", facts=0.25)
    write_effects(effects, "town", 10, cells)
    assert "report.md" in wrong_lines(say(effects), written, readme)


def test_the_page_holds_verdicts_scores_and_limits(docs):
    text = (docs / "report.md").read_text()
    assert text.splitlines()[2].startswith("Yes, in the town: ")
    assert "\n- selective collapse: 8 and 0 of 8 (PASS)\n" in text
    assert f"{COLLAPSE}, above +5 points: PASS" in text
    scores = {}
    for line in text.splitlines():
        name, _, rest = line.partition("   ")
        scores.setdefault(name, rest.split())
    order = "aligned new_refusal constant shuffled sdd".split()
    assert scores["content/capability"] == order
    assert scores["mft 0.0003"] == ["95/88"] * 4 + ["95/50"]
    assert scores["the attacker's choice"] == ["95/88"] * 4 + ["95/50"]
    assert scores["most, 95% of capability kept"][4] == "95/100"  # by prefill
    assert scores["sdd none 0"][:3] == ["0/0", "94/94", "100/100"]
    assert "sdd less benign   mft      50 " in text
    for arm in STUDIES["town"].arms:
        assert f"\n{arm} none 0" in text


@pytest.mark.parametrize(
    "seeds, edit, wanted",
    [
        ((), {}, "No answer yet: 8 report seeds have not been run."),
        (REPORT_SEEDS[:3], {}, "No answer yet: 5 report seeds have not been run."),
        (
            REPORT_SEEDS,
            {"facts": 0.5},
            "(PASS)\n\nDoes it resist, on both kinds of mischief? PASS.",
        ),
        (REPORT_SEEDS, {"facts": 0.875, "skills": 0.875}, "No, not in the town: "),
        (REPORT_SEEDS, {"delivered_skill": 0.5}, "Not settled in the town (NOT TESTED (gate: sdd,"),
    ],
)
def test_the_first_lines_answer_the_question(tmp_path, seeds, edit, wanted):
    attack = "none" if "delivered_skill" in edit else "mft"
    for seed in seeds:
        cells = make_cells("town", seed)
        change(cells, "sdd", attack, **edit)
        write_effects(tmp_path, "town", seed, cells)
    assert wanted in town_answer(read_study("town", tmp_path))


def test_the_page_of_the_tuning_seeds_has_the_controls(tmp_path):
    for seed in TUNING_SEEDS:
        write_effects(tmp_path / "effects", "controls", seed, make_cells("controls", seed))
    text, _ = say(tmp_path / "effects")
    assert f"({PLANTED}, its least) " in text
    assert "\nsdd none 0  " in text
    assert "8 report seeds have not been run" in text


def test_the_figure_is_drawn_where_matplotlib_is(docs):
    pytest.importorskip("matplotlib")
    assert (docs / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["report.md", "report.png"])
def test_what_was_edited_by_hand_is_never_overwritten(docs, tmp_path, name):
    (tmp_path / name).write_text("And by me.\n")
    with pytest.raises(InputError, match=f"{name} exists; delete it"):
        main([str(docs / "effects"), "--out", str(tmp_path)])
    assert (tmp_path / name).read_text() == "And by me.\n"
