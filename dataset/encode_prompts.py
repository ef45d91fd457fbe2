"""Encode all prompts of prompt files once, into a cache file that `models.text.TextEncoder(cache_path=...)` reads.

    python -m dataset.encode_prompts --prompts FILE [FILE ...] --encoder google/flan-t5-xl --output CACHE.safetensors

A run whose prompts are all in the cache never loads T5. The embeddings are stored in the dtype they were computed in
(bfloat16 on a GPU, float32 on a CPU, or --dtype): what comes out of the cache is bit for bit what went in. All of them
are held in memory until the file is written: about 2.5 GB for 30,000 captions of flan-t5-xl in bfloat16.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.prompts import load_prompts
from models.text import TextEncoder
from utils.config import Parser, one_line_errors

CHUNK = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def encode_prompts(encoder: TextEncoder, prompts: list[str], output: Path) -> int:
    """Write the cache; returns the number of distinct prompts after cleaning."""
    texts = list(dict.fromkeys(encoder.prepare(prompt) for prompt in prompts))
    rows = {}
    for start in tqdm(range(0, len(texts), CHUNK), desc="encoding", unit="batch"):
        rows |= {text: row.cpu() for text, row in encoder.rows(texts[start:start + CHUNK]).items()}
    encoder.save_cache(output, rows)
    return len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", nargs="+", required=True, help=".json, .jsonl, .txt or .yaml files")
    parser.add_argument("--encoder", default="google/flan-t5-xl", help="hub id or local folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_length", type=int, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--no_clean", action="store_true", help="skip LlamaGen's caption cleaning")
    args = parser.parse_args(argv)
    prompts = [condition.prompt for condition in load_prompts(args.prompts)]
    encoder = TextEncoder(args.encoder, args.max_length, args.device, DTYPES.get(args.dtype), not args.no_clean)
    count = encode_prompts(encoder, prompts, args.output)
    print(f"wrote {count} distinct prompts of {len(prompts)} to {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
