"""Writes docs/settings.md from the fields of the configurations; tests/test_docs.py holds that it is current.

    python -m docs.make_settings
"""
from pathlib import Path

from trainer_utils.composition import CONFIGS, PromptConfig
from utils.config import described
from utils.files import read_text

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- below: made by python -m docs.make_settings -->"


def table(cls: type) -> list[str]:
    title, rows = described(cls)
    lines = [f"## {title}", "", "| flag | values | default | may change on resume | what it does |",
             "|---|---|---|---|---|"]
    for flags, values, default, resume, text in rows:
        cells = [flags, values, default, "yes" if resume else "", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def page() -> str:
    """The part above the mark is written by hand."""
    by_hand = read_text(FOLDER / "settings.md").split(MARK)[0]
    return by_hand + "\n".join([MARK, "", *(line for cls in (*CONFIGS, PromptConfig) for line in table(cls))])


if __name__ == "__main__":
    (FOLDER / "settings.md").write_text(page(), encoding="utf-8")
