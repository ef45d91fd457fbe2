"""Make AR-GRPO's prompt file from a COCO captions annotation file: one caption of each of `--num` images.

    python -m dataset.prepare_coco captions_train2017.json dataset/coco_captions_30000.json [--num 30000 --seed 42]

The annotations come with https://cocodataset.org (annotations_trainval2017.zip). Take a *train* file: COCO's val
captions are what LlamaGen and others evaluate on. Which 30,000 captions AR-GRPO used was never published, so the choice
here is a seeded draw, not theirs. Images are neither needed nor read.
"""
import json
import os
import random
from pathlib import Path

from utils.config import Parser, one_line_errors
from utils.files import parse_json, read_text


def captions_by_image(path: Path) -> dict[int, list[str]]:
    """image id -> its captions, in the file's order, white space made plain."""
    data = parse_json(read_text(path), str(path))
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"{path} has no list `annotations`: give a COCO captions_*.json file")
    captions: dict[int, list[str]] = {}
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str) \
                or not isinstance(annotation.get("image_id"), int):
            raise ValueError(f"{path} annotation {number} needs `image_id` and `caption`: is it a captions file?")
        caption = " ".join(annotation["caption"].split())
        if caption:
            captions.setdefault(annotation["image_id"], []).append(caption)
    return captions


def prompt_records(captions: dict[int, list[str]], num: int, seed: int) -> list[dict]:
    """`num` images drawn without replacement, one caption of each, in AR-GRPO's format."""
    if not 1 <= num <= len(captions):
        raise ValueError(f"--num {num}: the file has captions for {len(captions)} images")
    rng = random.Random(seed)
    records = []
    for image_id in rng.sample(sorted(captions), num):
        turns = [{"from": "human", "value": rng.choice(captions[image_id])}, {"from": "gpt", "value": ""}]
        records.append({"id": f"coco_{image_id:012d}", "conversations": turns})
    return records


def write_atomic(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    records = prompt_records(captions_by_image(args.annotations), args.num, args.seed)
    write_atomic(args.output, json.dumps(records, ensure_ascii=False, indent=1))
    print(f"wrote {len(records)} prompts to {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
