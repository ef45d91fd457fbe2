"""Scores out of what a judge wrote: Qwen's JSON answers and UnifiedReward's "Final Score".

    value, reason = parse_score_json('```json\\n{"score": 3.5}\\n```', low=0, high=5)      # 3.5, None
    value, reason = parse_final_score("I cannot tell.")                                   # nan, "no final score in ..."

An answer without a readable score is NaN with a reason, never a number. AR-GRPO repairs the JSON and takes whatever
float() makes of "score". The same answers count here, with these differences: "3.5/5" and a list of one object are
read; true, false, NaN and infinity are failures; of a repeated key the first counts (so that an answer may be cut off
once its score is there); a score outside its range is cut to it.
"""
import json
import logging
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

JSON_FENCE = re.compile(r"```json(?=\s*[{\[])", re.IGNORECASE)
VALUE_ENDS = re.compile(r"\s*(?:\}|,\s*[\"}])")  # not the comma of 1,000
SPACE = re.compile(r"\s*")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# what may follow the number in a string, and in an object that is no valid JSON (there AR-GRPO reads 1+1+0.5 as 1)
IN_STRING = re.compile(rf"\s*({NUMBER})\s*(?:/\s*\d+(?:\.\d+)?)?\s*", re.ASCII)
IN_RUINS = re.compile(rf"[\s~]*({NUMBER})\s*(?:[/+(a-zA-Z].*)?", re.ASCII | re.DOTALL)
# a key where a key can stand, and its value up to the next member or the end; a comma between digits ends nothing
KEY_IN_RUINS = re.compile(r"""(?:[{,\n]|["'”]\s)\s*["'“”]?score["'“”]?\s*[:=]\s*["'“”]?((?:[^,;}\]\n"'“”]|,(?=\d))*)""")
# of a text whose white space is single blanks
FINAL_SCORE = re.compile(r"Final ?Score ?:?\*{0,4} ?:? ?\*{0,4} ?(\d{1,20}(?:\.\d{1,20})?)", re.IGNORECASE | re.ASCII)
MAX_CHARACTERS = 1 << 16  # of an answer; some patterns below take its square in time, and a server may send anything
MAX_NUMBER = 200  # characters of a string that may be a number
DECODER = json.JSONDecoder(strict=False, parse_int=float)  # line breaks inside strings pass; 10**400 is infinite
NOT_JSON = (json.JSONDecodeError, RecursionError)

Parsed = tuple[float, str | None]  # a finite score and None, or NaN and the reason


def parse_score_json(text: str, low: float = -math.inf, high: float = math.inf) -> Parsed:
    """The member "score" of a JSON object in `text`, cut to [low, high]; or NaN and why there is none.

    The object stands in the first ```json fence, else in the first bare fence, else anywhere.
    """
    if len(text) > MAX_CHARACTERS:
        return math.nan, f"no score in the answer of {len(text)} characters, {shorten(text)}"
    body = _body(text)
    found, value = _strict_score(body)
    if found:
        number = _number(value, IN_STRING)
    elif _load(body)[0]:
        number = math.nan  # a number, a list, an object without a score
    else:
        # without runs of white space, over which the pattern would take the square of their length
        lines = "\n".join(filter(None, (" ".join(line.split()) for line in body[body.find("{"):].split("\n"))))
        ruins = KEY_IN_RUINS.search(lines) if "{" in body else None
        number = _number(ruins.group(1), IN_RUINS) if ruins else math.nan
    if math.isnan(number):
        return math.nan, f"no score in the answer {shorten(text)}"
    return min(max(number, low), high), None


def parse_final_score(text: str) -> Parsed:
    """UnifiedReward's "Final Score: 4" in [1, 5], markdown and case aside; anything outside 1 to 5 is a failure."""
    if len(text) > MAX_CHARACTERS:
        return math.nan, f"no final score in the answer of {len(text)} characters, {shorten(text)}"
    match = FINAL_SCORE.search(" ".join(text.split()))
    if match is None:
        return math.nan, f"no final score in the answer {shorten(text)}"
    value = float(match.group(1))
    if not 1 <= value <= 5:
        return math.nan, f"final score {match.group(1)} is not within 1 to 5 in the answer {shorten(text)}"
    return value, None


def parse_all(texts: Sequence[str], parse: Callable[[str], Parsed], low: float,
              high: float) -> tuple[Tensor, dict[int, str]]:
    """Answers -> scores float32 [N] cut to [low, high], NaN where `parse` failed, and {index: reason} of those."""
    parsed = [parse(text) for text in texts]
    raw = torch.tensor([value for value, _ in parsed], dtype=torch.float32)
    outside = int(((raw < low) | (raw > high)).sum())
    if outside:
        log.warning("%d of %d scores lay outside %g to %g and were cut to it", outside, len(texts), low, high)
    return raw.clamp(low, high), {i: reason for i, (_, reason) in enumerate(parsed) if reason is not None}


def score_is_written(text: str) -> bool:
    """Whether parse_score_json(text + anything) equals parse_score_json(text): the judge may stop writing.

    Only inside a ```json fence: without one, a fence that comes later would take precedence.
    """
    return JSON_FENCE.search(text) is not None and _strict_score(_body(text))[0]


def shorten(text: str, length: int = 120) -> str:
    """The answer on one line, quoted, its middle left out where it is long."""
    text = " ".join(text.split())
    half = length // 2
    return repr(text if len(text) <= length else f"{text[:half]} ... {text[-half:]}")


def _body(text: str) -> str:
    fence = JSON_FENCE.search(text)
    if fence is None:
        parts = text.split("```")
        return (parts[1] if len(parts) > 2 else text).strip().removeprefix("\ufeff")
    return text[fence.end():].partition("```")[0].strip()


def _strict_score(body: str) -> tuple[bool, object]:
    """(True, value) once the object's own "score" is complete in well-formed JSON, whatever comes after it."""
    valid, items = _load(body) if body.startswith("[") else (False, None)
    if valid and len(items) == 1:
        body = json.dumps(items[0])
    end = 0
    try:
        while body[end:end + 1] == ("," if end else "{"):
            key, end = DECODER.raw_decode(body, _skip(body, end + 1))
            end = _skip(body, end)
            if not isinstance(key, str) or body[end:end + 1] != ":":
                break
            value, end = DECODER.raw_decode(body, _skip(body, end + 1))
            if key == "score":
                return VALUE_ENDS.match(body, end) is not None, value
            end = _skip(body, end)
    except NOT_JSON:
        pass
    return False, None


def _skip(body: str, start: int) -> int:
    return SPACE.match(body, start).end()


def _load(body: str) -> tuple[bool, object]:
    try:
        return True, DECODER.decode(body)
    except NOT_JSON:
        return False, None


def _number(value: object, written: re.Pattern) -> float:
    """A finite number of JSON, or a string that `written` matches; NaN for everything else."""
    if isinstance(value, str):
        # what stands behind a number in ruins is of no account
        match = written.fullmatch(value[:MAX_NUMBER] if written is IN_RUINS else value) if len(
            value) <= MAX_NUMBER or written is IN_RUINS else None
        value = float(match.group(1)) if match else math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)
