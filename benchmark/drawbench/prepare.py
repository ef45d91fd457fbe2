"""DrawBench's public CSV (columns Prompts and Category) -> a prompt file in AR-GRPO's JSON format.

    python -m benchmark.drawbench.prepare DrawBench.csv drawbench.json
    bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG --prompt_files drawbench.json

Each record also keeps its category. Every prompt stands there once; AR-GRPO's own file holds each of them five times,
with four images each: `--num_images_per_prompt 20` makes as many.
"""
import csv
import io
import json
import sys
from pathlib import Path

from utils.atomic import atomic_write_text
from utils.config import one_line_errors
from utils.files import read_text

COLUMNS = ("Prompts", "Category")


def read_drawbench(path: Path) -> list[tuple[str, str]]:
    """(prompt, category) of every row; ValueError names the file and the line that cannot be understood."""
    text = read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {' and '.join(missing)}: its first line must name the columns "
                             f"{' and '.join(COLUMNS)}, it names {', '.join(reader.fieldnames or ['none'])[:200]}")
        for row in reader:
            prompt, category = ((row[name] or "").strip() for name in COLUMNS)
            if not prompt or not category or None in row:
                raise ValueError(f"{path} line {reader.line_num}: a row needs a prompt and a category, and a prompt "
                                 "with a comma needs quotes")
            rows.append((prompt, category))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not valid CSV: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def prompt_records(rows: list[tuple[str, str]]) -> list[dict]:
    """AR-GRPO's records, with the category beside."""
    return [{"id": f"draw_bench_test_{i:05d}", "image_num": 0,
             "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": ""}],
             "category": category} for i, (prompt, category) in enumerate(rows)]


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("usage: python -m benchmark.drawbench.prepare DrawBench.csv OUT.json")
    rows = read_drawbench(Path(sys.argv[1]))
    out = Path(sys.argv[2])
    if out.suffix != ".json":  # the reader of prompt files goes by the suffix
        raise ValueError(f"{out}: the name must end in .json")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps(prompt_records(rows), indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} prompts of {len({category for _, category in rows})} categories in {out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
