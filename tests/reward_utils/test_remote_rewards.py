"""Remote judges against a scripted server: what is sent, and what is made of the answers. HTTP: test_remote_http.py."""
import base64
import io
import json
import math
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from reward_utils.deqa_client import DeQAClient
from reward_utils.geneval_client import GenEvalClient
from reward_utils.qwen_client import QwenClient
from reward_utils.remote_reward import RemoteScorer, server_urls
from reward_utils.settings import RewardSettings
from reward_utils.unireward_client import PROFILES, UniRewardClient
from tests.fake_server import KEY, SLACK_SEC, always_500, chat_answer, close, hang, settings

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 20, 24), dtype=np.uint8))
PROMPTS = ["a heron", "two cats", 'a "red" car', "a tree {prompt}", "ein Häuschen 🏠"]
RECORDS = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}]} for _ in PROMPTS]


# ---- every client, every misbehaviour --------------------------------------------------------------------------------

NAMES = ["clip_text", "maniqa"]
FLAT = IMAGES[:, :, :1, :1].expand(IMAGES.shape)  # quick to encode, also at 512 px
CALLS = {  # name -> (call(settings, url), an answer of these values for the request)
    "deqa": (lambda s, url: DeQAClient(s)(FLAT, PROMPTS, RECORDS), lambda values: {"outputs": values}),
    "deqa pickle": (lambda s, url: DeQAClient(s)(FLAT, PROMPTS, RECORDS),
                    lambda values: pickle.dumps({"outputs": values})),
    "geneval": (lambda s, url: GenEvalClient(s)(FLAT, PROMPTS, RECORDS), lambda values: {"rewards": values}),
    "unireward": (lambda s, url: UniRewardClient(s)(FLAT, PROMPTS, RECORDS),
                  lambda values: chat_answer(f"Final Score: {5 * values[0]}" if values else "")),
    "qwen": (lambda s, url: [one["rubric"] for one in QwenClient(s)(FLAT, PROMPTS, ["fake", "rubric"])],
             lambda values: chat_answer(f'```json\n{{"score": {values[0]}}}\n```' if values else "")),
    "server": (lambda s, url: [one["maniqa"] for one in RemoteScorer(url, s)(NAMES, FLAT, PROMPTS, RECORDS)],
               lambda values: {"scores": {name: values for name in NAMES}, "failures": {}}),
}
BAD = {
    "nan": lambda answer: answer([math.nan] * 5),
    "infinite": lambda answer: answer([math.inf] * 5),
    "too few": lambda answer: answer([]),
    "nothing": lambda answer: b"",
    "garbage": lambda answer: b"\x80\x04\xff{]",
    "null": lambda answer: b"null",
    "another shape": lambda answer: {"choices": [], "outputs": {"a": 1}, "rewards": "no", "scores": [1]},
    "words": lambda answer: answer(["high"] * 5),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", [*BAD, "hang", "close", "always 500"])
def test_no_misbehaviour_becomes_a_number(serve, name, kind):
    call, answer = CALLS[name]
    script = {"hang": hang, "close": close, "always 500": always_500}.get(
        kind, lambda handler, body, number: handler.answer(BAD[kind](answer)))
    server, start = serve(script), time.monotonic()
    deadline = 0.2 if kind == "hang" else 20.0
    scores, failures = call(settings(server.url, reward_retries=1, reward_deadline=deadline,
                                     legacy_pickle_servers="pickle" in name), server.url)
    assert time.monotonic() - start < min(deadline, 1) + SLACK_SEC
    assert scores.dtype == torch.float32 and scores.shape == (5,) and scores.isnan().all()
    assert set(failures) == set(range(5)) and all(isinstance(reason, str) and reason for reason in failures.values())


@pytest.mark.parametrize("name", CALLS)
def test_a_good_answer_after_bad_ones(serve, name):
    """500 twice, then scores: in order, without failures, and again on the second call."""
    call, answer = CALLS[name]
    single = name in ("unireward", "qwen")
    values, failed = [1.0, 0.0, 1.0, 0.0, 1.0], {}
    if not name.startswith("geneval"):
        values = [0.25, 0.5, 0.625, 0.75, 1.0]

    def script(handler, body, number):
        if failed.setdefault(body, 0) < 2:
            failed[body] += 1
            return handler.answer(b"", 500)
        if not single:
            return handler.answer(answer(values))
        texts = [part["text"] for part in json.loads(body)["messages"][0]["content"] if part["type"] == "text"]
        mine = [value for value, prompt in zip(values, PROMPTS) if prompt in texts[0]]
        return handler.answer(answer(mine or [1]))
    server = serve(script)
    for _ in range(2):
        scores, failures = call(settings(server.url, legacy_pickle_servers="pickle" in name), server.url)
        assert scores.tolist() == values and failures == {}


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("name", ["deqa", "deqa pickle", "geneval", "server"])
def test_a_wrong_number_of_scores_fails_all(serve, name, count):
    call, answer = CALLS[name]
    server = serve(lambda handler, body, number: handler.answer(answer([1.0] * count)))
    scores, failures = call(settings(server.url, legacy_pickle_servers="pickle" in name), server.url)
    assert scores.isnan().all() and f"{count} scores" in failures[0] and "5 images" in failures[4]


# ---- DeQA and GenEval ------------------------------------------------------------------------------------------------

def jpeg_bytes(image):
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="JPEG")  # PIL's default, AR-GRPO's
    return buffer.getvalue()


def decoded(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


def mean_levels(jpegs):
    """A judge whose answer tells the image: 0.2 .. 1 by brightness."""
    return [0.2 + 0.8 * float(np.asarray(Image.open(io.BytesIO(data))).mean()) / 255 for data in jpegs]


@pytest.mark.parametrize("count, parts", [(1, [1]), (64, [64]), (70, [35, 35]), (131, [44, 44, 43])])
def test_deqa_sends_equal_parts_and_keeps_the_order(serve, count, parts):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 8, 8).contiguous()

    def script(handler, body, number):
        jpegs = [base64.b64decode(one) for one in json.loads(body)["images"]]
        time.sleep(0.1 if len(jpegs) == parts[0] and number == 1 else 0)
        handler.answer({"outputs": mean_levels(jpegs)})
    server = serve(script)
    scores, failures = DeQAClient(settings(server.url))(images)
    assert sorted((len(body["images"]) for body in server.bodies()), reverse=True) == parts and not failures
    np.testing.assert_allclose(scores, 0.2 + 0.8 * np.arange(count) / 255, atol=2e-3)


def test_deqa_request(serve):
    server = serve(lambda handler, body, number: handler.answer([0.5, 0.2, 1.0, 0.75, 0.1999]))  # a bare list will do
    scores, failures = DeQAClient(settings(server.url))(IMAGES)
    np.testing.assert_allclose(scores, [0.5, 0.2, 1.0, 0.75, 0.1999], rtol=1e-6)
    (path, headers, _), (body,) = server.requests[0], server.bodies()
    assert path == "/" and headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert set(body) == {"images"} and decoded(body["images"][0]).size == (24, 20)
    assert [base64.b64decode(one) for one in body["images"]] == [jpeg_bytes(image) for image in IMAGES]
    assert failures == {}


def test_one_bad_score_fails_one_image(serve):
    values = [0.5, None, math.nan, 1.2, True]
    scores, failures = DeQAClient(settings(serve(
        lambda handler, body, number: handler.answer({"outputs": values})).url))(IMAGES)
    assert scores[0] == 0.5 and scores[1:].isnan().all() and set(failures) == {1, 2, 3, 4}
    assert "NoneType" in failures[1] and "nan" in failures[2] and "1.2, outside 0.199 to 1.001" in failures[3]


def test_a_failed_part_leaves_the_other(serve):
    images = IMAGES[:1].expand(70, -1, -1, -1)

    def script(handler, body, number):
        handler.answer({"outputs": [0.5] * 35}) if number == 1 else handler.answer(b"no", 400)
    scores, failures = DeQAClient(settings(serve(script).url, reward_concurrency=1))(images)
    assert (scores[:35] == 0.5).all() and set(failures) == set(range(35, 70))


def test_deqa_legacy_format(serve):
    def script(handler, body, number):
        handler.answer(pickle.dumps({"outputs": mean_levels(pickle.loads(body)["images"])}))
    server = serve(script)
    scores, failures = DeQAClient(settings(server.url, legacy_pickle_servers=True))(IMAGES)
    assert pickle.loads(server.requests[0][2]) == {"images": [jpeg_bytes(image) for image in IMAGES]}
    np.testing.assert_allclose(scores, mean_levels([jpeg_bytes(image) for image in IMAGES]), rtol=1e-6)
    assert failures == {}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_pickle_is_refused_and_not_run(serve, tmp_path):
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Malicious(made))).close()
    assert made.exists()  # it would work
    made.unlink()
    server = serve(lambda handler, body, number: handler.answer(pickle.dumps({"outputs": Malicious(made)})))
    for client in (DeQAClient, GenEvalClient):
        scores, failures = client(settings(server.url, legacy_pickle_servers=True))(IMAGES, PROMPTS, RECORDS)
        assert scores.isnan().all() and "refused a pickle" in failures[0] and len(failures) == 5
    assert not made.exists() and len(server.requests) == 2  # nor is it asked for again


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("graded, field", [(False, "rewards"), (True, "scores")])
def test_geneval_request_and_choice(serve, legacy, graded, field):
    answer = {"scores": [0.5, -2.0, 1.0], "rewards": [1.0, 0.0, 1.0], "strict_rewards": [0.0] * 3,
              "group_rewards": {"counting": [1.0, 0.0, -10.0]}, "group_strict_rewards": {"colors": [0.0] * 3}}
    server = serve(lambda handler, body, number: handler.answer(pickle.dumps(answer) if legacy else answer))
    records = [RECORDS[0], {}, {**RECORDS[2], "prompt": "kept"}, {"image": IMAGES[0], **RECORDS[3]}, {"tag": "colors"}]
    client = GenEvalClient(settings(server.url, legacy_pickle_servers=legacy, geneval_graded=graded))
    scores, failures = client(IMAGES, PROMPTS, records)
    assert scores[[0, 2, 3]].tolist() == answer[field] and scores[[1, 4]].isnan().all()
    assert set(failures) == {1, 4} and "no GenEval record" in failures[1]
    body = pickle.loads(server.requests[0][2]) if legacy else server.bodies()[0]
    assert set(body) == {"images", "meta_datas", "only_strict"} and body["only_strict"] is False
    images = body["images"] if legacy else [base64.b64decode(one) for one in body["images"]]
    assert images == [jpeg_bytes(IMAGES[i]) for i in (0, 2, 3)]
    assert body["meta_datas"] == [{"prompt": "a heron", **RECORDS[0]}, {"prompt": "kept", **RECORDS[2]},
                                  {"prompt": PROMPTS[3], **RECORDS[3]}]


def test_geneval_without_records_asks_nobody(serve):
    server = serve(always_500)
    scores, failures = GenEvalClient(settings(server.url))(IMAGES, PROMPTS, [{}] * 5)
    assert scores.isnan().all() and len(failures) == 5 and not server.requests


# ---- UnifiedReward and Qwen ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_unireward_request(serve, suffix):
    server = serve(lambda handler, body, number: handler.answer(chat_answer("Final Score: 4")))
    scores, failures = UniRewardClient(settings(server.url + suffix))(IMAGES[:1], PROMPTS[3:4])
    np.testing.assert_allclose(scores, [0.8], rtol=1e-6)
    (path, headers, _), (body,) = server.requests[0], server.bodies()
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer unireward" and not failures
    message, = body.pop("messages")
    assert body == {"model": "UnifiedReward-7b-v1.5", "temperature": 0}
    assert message["role"] == "user" and [part["type"] for part in message["content"]] == ["image_url", "text"]
    kind, encoded = message["content"][0]["image_url"]["url"].split(",")
    picture = decoded(encoded)
    assert kind == "data:image;base64" and picture.format == "PNG" and picture.size == (512, 512)
    expected = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).resize((512, 512))  # PIL's default filter
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    text = message["content"][1]["text"]
    assert text.startswith("<image>\n") and "'Final Score:'" in text
    assert text.splitlines()[-1] == "Text Caption: [a tree {prompt}]"


def test_unireward_answers(serve, monkeypatch):
    monkeypatch.setenv("UNIREWARD_API_KEY", KEY)
    texts = dict(zip(PROMPTS, ["**Final Score:** 4", "Final Score: 10", "I cannot tell.", "final score: 1.5",
                               "Final Score: 5"]))

    def script(handler, body, number):
        time.sleep(0.1 if number == 1 else 0)
        caption = json.loads(body)["messages"][0]["content"][1]["text"].splitlines()[-1]
        handler.answer(chat_answer(texts[caption.removeprefix("Text Caption: [").removesuffix("]")]))
    server = serve(script)
    client = UniRewardClient(settings(server.url, unireward_model="CodeGoat24/UnifiedReward-7b-v1.5"))
    for _ in range(2):
        scores, failures = client(IMAGES, PROMPTS, RECORDS)
        np.testing.assert_allclose(scores, [0.8, math.nan, math.nan, 0.3, 1.0], rtol=1e-6)
        assert set(failures) == {1, 2} and "10" in failures[1] and "I cannot tell" in failures[2]
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}


def test_unireward_profiles(serve, monkeypatch):
    with pytest.raises(ValueError, match="'UnifiedReward-9'.*UnifiedReward-7b"):
        UniRewardClient(settings("http://127.0.0.1:1", unireward_model="UnifiedReward-9"))
    monkeypatch.setitem(PROFILES, "UnifiedReward-9",
                        PROFILES["UnifiedReward-7b"]._replace(instruction="Rate: {prompt}", scale=10.0))
    server = serve(lambda handler, body, number: handler.answer(chat_answer("Final Score: 5")))
    client = UniRewardClient(settings(server.url, unireward_model="UnifiedReward-9"))
    scores, _ = client(IMAGES[:1], PROMPTS[:1])
    assert scores.tolist() == [0.5] and server.bodies()[0]["messages"][0]["content"][1]["text"] == "Rate: a heron"


def test_qwen_asks_all_questions_side_by_side(serve):
    together = threading.Barrier(4)

    def script(handler, body, number):
        together.wait(10)  # breaks, and answers nothing, unless four requests are under way
        text = json.loads(body)["messages"][0]["content"][0]["text"]
        score = "3.5" if "a heron" in text else "9" if "two cats" in text else '"none"' if "AI-gen" in text else "1"
        handler.answer(chat_answer(f'```json\n{{"description": "x", "score": {score}}}\n```'))
    server = serve(script)
    client = QwenClient(settings(server.url, qwenvl_name="judge"))
    scores, failures = client(IMAGES[:2], PROMPTS[:2], ["rubric", "fake"])
    assert list(scores) == ["rubric", "fake"] and scores["rubric"].tolist() == [3.5, 5.0] and not failures["rubric"]
    assert scores["fake"].isnan().all() and set(failures["fake"]) == {0, 1}
    for body in server.bodies():
        message, = body.pop("messages")
        assert body == {"model": "judge", "temperature": 0, "max_tokens": 256}
        assert [part["type"] for part in message["content"]] == ["text", "image_url"]
        assert base64.b64decode(message["content"][1]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")) in [
            jpeg_bytes(image) for image in IMAGES[:2]]


# ---- the reward server's client (its server: test_reward_server.py) --------------------------------------------------

def test_remote_scorer_request_and_reasons(serve):
    server = serve(lambda handler, body, number: handler.answer({
        "scores": {"clip_text": [0.1, None, None, 1e300, -2]}, "failures": {"clip_text": {"1": "too dark"}}}))
    records = [{"tag": "a", "image": IMAGES[0], "n": [1, (2, "x")], "deep": {"x": IMAGES[1], "y": None}},
               {"image": "/reference.png"}, *[{}] * 3]
    scores, failures = RemoteScorer(server.url + "/", settings(server.url))(NAMES, IMAGES, PROMPTS, records)
    np.testing.assert_allclose(scores["clip_text"], [0.1, math.nan, math.nan, math.nan, -2], rtol=1e-6)
    assert failures["clip_text"][1] == "too dark" and "no reason" in failures["clip_text"][2]
    assert "outside" in failures["clip_text"][3] and set(failures["clip_text"]) == {1, 2, 3}
    assert scores["maniqa"].isnan().all() and "no scores of maniqa" in failures["maniqa"][0]
    (path, _, _), (body,) = server.requests[0], server.bodies()
    assert path == "/score" and body["prompts"] == PROMPTS
    assert body["metadata"] == [{"tag": "a", "n": [1, [2, "x"]], "deep": {"y": None}}, {}, {}, {}, {}]
    assert all(decoded(one).format == "PNG" for one in body["images"])


def test_reward_servers_flag():
    flags = RewardSettings(reward_servers=["clip_text=http://a:1", "maniqa=http://b:2/x=y"])
    assert server_urls(flags) == {"clip_text": "http://a:1", "maniqa": "http://b:2/x=y"}
    for bad in (["clip_text"], ["=http://a:1"], ["a="], ["a=http://a:1", "a=http://b:1"]):
        with pytest.raises(ValueError, match="reward_servers"):
            server_urls(RewardSettings(reward_servers=bad))
