"""Any registered reward from `python -m scripts.reward_server` on another GPU or host: equal to the local one.

    scores, failures = RemoteScorer("http://gpu7:8100", settings)(["hpsv2_text"], images, prompts, metadata)

Images travel as PNG and a call as one request, so that rewards of the whole batch (fid) see what they would see here.
"""
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_utils import wire
from reward_utils.pixels import to_pil
from reward_utils.remote import Endpoint, Failure, as_scores, number, post_all, read_json
from reward_utils.settings import RewardSettings
from utils.files import one_line


def server_urls(settings: RewardSettings) -> dict[str, str]:
    """{name: address} of settings.reward_servers."""
    urls = {}
    for entry in settings.reward_servers:
        name, equals, url = entry.partition("=")
        if not (name and equals and url):
            raise ValueError(f"reward_servers: {entry!r} is not of the form NAME=http://HOST:PORT")
        if name in urls:
            raise ValueError(f"reward_servers: {name} is given twice")
        urls[name] = url
    return urls


class RemoteScorer:
    """(names, images uint8 [N, 3, H, W], prompts, metadata) -> ({name: float32 [N]}, {name: {index: reason}})."""

    def __init__(self, url: str, settings: RewardSettings):
        self.endpoint = Endpoint.of(url, "/score", settings, "reward_server")
        self.health = Endpoint.of(url, "/health", settings, "reward_server")

    def names(self) -> list[str]:
        """The rewards that are served; ValueError if the server does not answer."""
        answer, = post_all(self.health, [b""], read_json)
        if isinstance(answer, Failure):
            raise ValueError(f"no reward server: {answer.reason}")
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise ValueError(f"{self.health}: that is no reward server")
        return answer["rewards"]

    def __call__(self, names: Sequence[str], images: Tensor, prompts: Sequence[str],
                 metadata: Sequence[dict]) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
        if not len(images):
            return {name: torch.zeros(0) for name in names}, {name: {} for name in names}
        body = {"images": [wire.base64_text(wire.png(image)) for image in to_pil(images)], "prompts": list(prompts),
                # without paths of reference images: the server refuses them, and the whole request with them
                "metadata": [wire.json_members({key: value for key, value in record.items() if key != "image"})
                             for record in metadata]}
        answer, = post_all(self.endpoint, [json.dumps(body).encode()], read_json)
        results = {name: as_scores(self.values(name, answer, len(images))) for name in names}
        return {name: one[0] for name, one in results.items()}, {name: one[1] for name, one in results.items()}

    def values(self, name: str, answer, count: int) -> list[float | Failure]:
        if isinstance(answer, Failure):
            return [answer] * count
        scores = _member(_member(answer, "scores"), name)
        if not isinstance(scores, list) or len(scores) != count:
            got = f"{len(scores)} scores" if isinstance(scores, list) else "no scores"
            return [Failure(f"{self.endpoint}: {got} of {name} for {count} images")] * count
        reasons = _member(_member(answer, "failures"), name)
        return [Failure(one_line(str(_member(reasons, str(i)) or "the server gave no score and no reason")))
                if score is None
                else number(score) for i, score in enumerate(scores)]


def _member(value, key: str):
    return value.get(key) if isinstance(value, dict) else None
