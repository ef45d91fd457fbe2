"""Parsers of judges' answers: AR-GRPO's own results, what counts differently, and stopping before an answer's end."""
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from reward_utils.answers import parse_all, parse_final_score, parse_score_json, score_is_written, shorten

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewards" / "text_parsers.json").read_text())

# what AR-GRPO's parser (json_repair 0.64.6) makes of further answers; None: it raises
ORIGINAL = [
    ('{score: 3}', 3), ('```\n{"score": 3}\n```', 3), ('```JSON\n{"score": 3}\n```', 3), ('{"score": 1+1+0.5}', 1),
    ('{"score": -1}', -1), ('{"score": 1e1}', 10), ('{"score": .5}', .5), ('{"score": +2}', 2), ('{"score": 3.}', 3),
    ('Here: {"score": 3} done', 3), ('{"score": 3 out of 5}', 3), ('{"score": 5 (perfect)}', 5), ('{"score"= 3}', 3),
    ('```json\n{"score": 3, "explanation": "cut off in the mid', 3), ('{"description": "a", "score": 3', 3),
    ('{"description": "a sign "score": 1", "score": 3}', 3), ('{"description": "x"\n"score": 3\n"y": "z"}', 3),
    ('{"description": "line\nbreak", "score": 3}', 3), ('{“score”: 3}', 3), ("{'description': 'it's', 'score': 3}", 3),
    ('{"explanation": "\\"score\\": 1", "score": 3}', 3), ('{"score": 3, // total\n "explanation": "x"}', 3),
    ('{"description": "has ```json inside", "score": 3}', 3), ('~~~json\n{"score": 2}\n~~~', 2),
    ('{"details": {"score": 1}, "score": 2}', 2), ('{"score": 2, "details": {"score": 1}}', 2),
    ('{"description": "a", "score"', None), ('{"description": "a", "score":', None), ('{"score": "high"}', None),
    ('{"score": ""}', None), ('{"Score": 3}', None), ('{"total_score": 3}', None), ('{"a": {"score": 3}}', None),
    ('The score: 4', None), ('"score": 4', None), ('4', None), ('[]', None), ('{}', None), ('{"score": [3]}', None),
    ('{"score": 1,000}', None), ('{"score": 3,5}', None), ('{"score": 3.5.1}', None), ('{"score": 3-4}', None),
    ('{"score": "1+1+0.5"}', None), ('{"score": three}', None), ('```json\nnothing\n```\n{"score": 2}', None),
    ('```json\n{"x": 1}\n```\n```json\n{"score": 2}\n```', None), ('[{"score": 1}, {"score": 2}]', None),
]
# where this parser differs on purpose
DIFFERENT = [
    ('[{"score": 2}]', 2), ('{"score": "4/5"}', 4), ('{"score": 3.5/5}', 3.5), ('{"score": true}', None),
    ('{"score": False}', None), ('{"score": Infinity}', None), ('{"score": "inf"}', None), ('{"score": "NaN"}', None),
    ('{"score": 1, "score": 2}', 1), ('{"score": 1e999}', None), ('{"score": 1' + '0' * 5000 + '}', None),
    ('[' * 100_000, None),
]


def check(parsed, expected):
    value, reason = parsed
    if expected is None:
        assert math.isnan(value) and reason.startswith("no score in the answer ") and len(reason) < 200
    else:
        assert (value, reason) == (expected, None)


@pytest.mark.parametrize("case", GOLDEN["qwen"], ids=lambda case: case["name"])
def test_qwen_answers_of_the_golden_file(case):
    check(parse_score_json(case["text"]), case["own"])


@pytest.mark.parametrize("text, expected", ORIGINAL + DIFFERENT, ids=lambda value: str(value)[:40])
def test_more_qwen_answers(text, expected):
    check(parse_score_json(text), expected)


def test_scores_are_cut_to_their_range():
    assert parse_score_json('{"score": 10}', 0, 5) == (5, None)
    assert parse_score_json('{"score": -1}', 0, 5) == (0, None)
    assert parse_score_json('{"score": 2.5}', 0, 5) == (2.5, None)


@pytest.mark.parametrize("case", GOLDEN["unified"], ids=lambda case: case["text"])
def test_final_scores(case):
    """AR-GRPO's number where it took one within 1..5 from the whole number that is written; markdown and case aside."""
    written = {"Final Score:10/10": None, "Final Score: 5.9": None, "Final Score: 0": None,
               "**Final Score:** 4": 4, "final score: 4": 4}
    expected = written.get(case["text"], case["original"])
    value, reason = parse_final_score(case["text"])
    if expected is None:
        assert math.isnan(value) and "not within 1 to 5" in reason
    else:
        assert (value, reason) == (expected, None)


@pytest.mark.parametrize("text, expected", [
    ("Final Score: **4**", 4), ("FINAL SCORE 3.5", 3.5), ("Final Score: 45", None), ("Final Score: high", None),
    ("Score: 4", None), ("", None), ("Final  Score:\n\n2\nbecause", 2), ("Final Score: 4/5", 4)])
def test_more_final_scores(text, expected):
    value, reason = parse_final_score(text)
    assert (value, reason) == (expected, None) if expected else math.isnan(value) and "final score" in reason


def test_a_batch_keeps_its_order_and_counts_what_was_cut(caplog):
    texts = ['{"score": 3}', "nothing", '{"score": 10}', '{"score": -1}']
    with caplog.at_level(logging.WARNING):
        scores, failures = parse_all(texts, parse_score_json, 0, 5)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.nan_to_num(-7), torch.tensor([3.0, -7.0, 5.0, 0.0]))
    assert list(failures) == [1] and "'nothing'" in failures[1]
    assert "2 of 4 scores" in caplog.text


ANSWERS = [case["text"] for case in GOLDEN["qwen"]] + [text for text, _ in ORIGINAL + DIFFERENT if len(text) < 1000]
ANSWERS += [f"```json\n{text}\n```" for text in ANSWERS]
CONTINUATIONS = ("", '"', "5", ".5", "\n```\n", '\n```json\n{"score": 9}\n```', ', "score": 9}', "}}", ' "a" b "c')


def test_what_is_written_after_a_complete_score_changes_nothing():
    stopped = 0
    for text in ANSWERS:
        for end in range(len(text) + 1):
            if score_is_written(text[:end]):
                value, _ = parse_score_json(text[:end])
                for rest in (text[end:], *CONTINUATIONS):
                    other, _ = parse_score_json(text[:end] + rest)
                    assert value == other or math.isnan(value) and math.isnan(other), (text[:end], rest)
                stopped += 1
                break
    assert stopped > 30  # the test is about something


def test_a_number_is_complete_only_when_something_follows():
    start = 'Sure.\n```json\n{"description": "a dog", "score": 3'
    assert not any(score_is_written(start + rest) for rest in ("", ".", ".5", " ", ",", ",5", "/5"))
    assert all(score_is_written(start + rest) for rest in ("}", ".5}", "\n}", ', "', ',\n"'))
    assert not score_is_written('{"score": 3}')  # a fence may follow, and would count


def test_long_answers_are_shortened():
    assert shorten("one\n two") == "'one two'"
    assert len(shorten("word " * 1000)) < 140 and shorten("word " * 1000).startswith("'word word")
