"""Scores, sample answers and what bf16 keeps of an update, as lines of text."""

from statistics import fmean

from nanosdd.errors import escaped


def text_table(title: str, columns: dict, rows: list[tuple[str, dict, str]], notes="") -> str:
    """A table of scores: percent, two of them as 79/84; nats and cosines with two decimals.

    columns: {title: key, or a pair of keys, of the scores}; a score that is missing is left blank.
    rows: (name, scores, what is noted at the right). notes: the title of these notes.
    """
    table = [[title, *columns, notes]]
    for name, scores, note in rows:
        cells = [score_text(keys, scores) for keys in columns.values()]
        table.append([name, *cells, note])
    first, *widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for name, *cells, note in table:
        line = name.ljust(first)
        for cell, width in zip(cells, widths):
            line += f"  {cell:>{width}}"
        lines.append(f"{line}  {note}".rstrip())
    return "\n".join(lines)


def score_text(keys, scores: dict) -> str:
    """One cell: the score of a key, or the scores of several keys with / between them; after each
    ± and its standard deviation, where there is one."""
    parts = []
    for key in [keys] if isinstance(keys, str) else keys:
        form = ".2f" if key.endswith(("nll", "logp", "cosine", "nats")) else ".0%"
        found = [scores.get(key), scores.get(f"{key} sd")]
        numbers = [f"{score:{form}}".rstrip("%") for score in found if score is not None]
        if numbers:
            parts.append("±".join(numbers))
    return "/".join(parts)


def average(cells: list[dict]) -> dict:
    """The mean over cells of every score (a float) that all of them have."""
    found = {}
    for key, value in cells[0].items():
        values = [cell.get(key) for cell in cells]
        if isinstance(value, float) and None not in values:
            found[key] = fmean(values)
    return found


def samples_text(prompts: list[str], before: list | None, after: list) -> str:
    """The prompts with the answers before and after training."""
    text = ""
    for i, prompt in enumerate(prompts):
        text += f"prompt: {one_line(prompt)}\n"
        if before:
            text += f"before: {one_line(before[i].text)}\n"
        text += f"after:  {one_line(after[i].text)}\n\n"
    return text


def answers_text(cells: list[dict], prompts: list[str]) -> str:
    """Each prompt with its answers by the arms of the first seed, released and after most shots."""
    ends = (0, max(cell["shots"] for cell in cells))
    shown = []
    for cell in cells:
        if cell["chosen"] and cell["attack"] != "bft":
            if cell["seed"] == cells[0]["seed"] and cell["shots"] in ends and not cell["draw"]:
                shown.append(cell)
    text = ""
    for i, prompt in enumerate(prompts):
        text += one_line(prompt) + "\n"
        for cell in shown:
            name = f"{cell['arm']} {cell['attack']} {cell['shots']}"
            text += f"  {name:<24}  {one_line(cell['answers'][i])}\n"
        text += "\n"
    return text


def one_line(text: str) -> str:
    """A text in one line, control characters escaped."""
    return escaped(" ".join(text.split()))


def update_text(moved: float, kept: float, cosine: float) -> str:
    """What checkpoint.kept_update returns for bf16; a warning where bf16 loses the update."""
    text = (
        f"  the update moved {moved:.1%} of the weights; rounded to bf16, {kept:.1%} of those "
        f"still differ from the start, and what is kept has cosine {cosine:.2f} with the update"
    )
    if cosine < 0.9:
        text += "\n  warning: in bf16 little of this update shows; evaluate with --dtype fp32"
    return text
