"""Draw docs/idea.svg, the picture at the top of the README: python docs/draw_idea.py"""

from pathlib import Path

BOX = (232, 84)  # width, height
GAP = 36
TOP = 66
COLUMNS = ("released", "after malicious fine-tuning", "after benign fine-tuning")
ROWS = {  # model: (what it answers to a harmful instruction, colour) in each column
    "aligned": [
        ("“I cannot help with that.”", "#d9e8f5"),
        ("the harmful answer", "#f7d6c8"),
        ("“I cannot help with that.”", "#d9e8f5"),
    ],
    "SDD": [
        ("good text about something else", "#dcefdc"),
        ("claim: nothing useful, for its|abilities are gone", "#ececec"),
        ("claim: good text about|something else", "#dcefdc"),
    ],
}


def box(x: int, y: int, text: str, colour: str) -> str:
    """A rectangle with lines of text, separated by |, in its middle."""
    lines = text.split("|")
    rows = "".join(
        f'<text x="{x + BOX[0] / 2}" y="{y + BOX[1] / 2 + 5 + 19 * (i - (len(lines) - 1) / 2)}" '
        f'text-anchor="middle">{line}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="8" fill="{colour}"/>{rows}'
    )


def draw() -> str:
    left = 92
    parts = []
    for i, title in enumerate(COLUMNS):
        parts.append(
            f'<text x="{left + i * (BOX[0] + GAP) + BOX[0] / 2}" y="42" text-anchor="middle" '
            f'font-weight="bold">{title}</text>'
        )
    for j, (name, cells) in enumerate(ROWS.items()):
        y = TOP + j * (BOX[1] + GAP)
        parts.append(f'<text x="12" y="{y + BOX[1] / 2 + 5}" font-weight="bold">{name}</text>')
        parts += [box(left + i * (BOX[0] + GAP), y, *cell) for i, cell in enumerate(cells)]
    width = left + 3 * BOX[0] + 2 * GAP + 12
    height = TOP + 2 * BOX[1] + GAP + 42
    parts.append(
        f'<text x="12" y="{height - 12}" fill="#555">How a model answers a harmful instruction. '
        "The claims are what this repository tests.</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="14"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(draw())
