"""Where reward weights are looked for: a path, REWARD_MODELS, the hub; and what is said when they are nowhere."""
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from reward_utils.settings import RewardSettings
from reward_utils.weights import CHECKPOINTS, load_state, locate


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """snapshot_download without a network: (repository, patterns) asked for; `files` are what it finds."""
    class Hub:
        asked, files = [], []

        def snapshot_download(self, repo, allow_patterns=None, ignore_patterns=None):
            self.asked.append((repo, allow_patterns))
            if not self.files:
                raise LocalEntryNotFoundError("no route to host")
            folder = tmp_path / "snapshots"
            folder.mkdir(exist_ok=True)
            for name in self.files:
                (folder / name).write_text("")
            return str(folder)
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def at(folder, **flags):
    return RewardSettings(reward_models=None if folder is None else str(folder), **flags)


@pytest.mark.parametrize("flag", CHECKPOINTS)
def test_what_is_nowhere_is_told_with_what_to_fetch_and_where_to_put_it(flag, hub, tmp_path):
    row = CHECKPOINTS[flag]
    for settings, place in ((at(tmp_path), str(tmp_path / row.local)), (at(None), "REWARD_MODELS is set")):
        with pytest.raises(ValueError) as error:
            locate(flag, settings)
        message = str(error.value)
        assert "\n" not in message and place in message
        assert row.fetch in message and f"REWARD_MODELS/{row.local}" in message and f"--{flag}" in message


@pytest.mark.parametrize("flag, given, name", [
    ("qwenvl_model", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct"),
    ("clip_model", "openai/clip-vit-large-patch14", "clip-vit-large-patch14"),
    ("clip_model", "openai/clip-vit-base-patch32", "clip-vit-base-patch32")])
def test_another_repository_is_found_by_its_name_and_fetched_by_its_id(flag, given, name, hub, tmp_path):
    settings = at(tmp_path, **{flag: given})
    with pytest.raises(ValueError, match=f"hf download {given} --local-dir REWARD_MODELS/{name};"):
        locate(flag, settings)
    assert hub.asked == [(given, None)]
    (tmp_path / name).mkdir()
    assert locate(flag, settings) == tmp_path / name and len(hub.asked) == 1


def test_one_file_of_a_repository(hub, tmp_path):
    """Alone in REWARD_MODELS, in a copy of its repository, or fetched without the rest."""
    name = "HPS_v2.1_compressed.pt"
    (tmp_path / "HPSv2").mkdir()
    given = at(None, hpsv2_model=str(tmp_path / "HPSv2"))
    with pytest.raises(ValueError, match=f"no {name} in the folder .*HPSv2; fetch: hf download"):
        locate("hpsv2_model", given)
    (tmp_path / "HPSv2" / name).write_text("")
    assert locate("hpsv2_model", given) == tmp_path / "HPSv2" / name
    hub.files = [name]
    assert locate("hpsv2_model", at(tmp_path)).name == name and hub.asked == [("xswu/HPSv2", [name])]
    (tmp_path / name).write_text("")
    assert locate("hpsv2_model", at(tmp_path)) == tmp_path / name and len(hub.asked) == 1


def test_a_file_that_is_in_no_repository_may_come_from_one_that_is_named(hub):
    hub.files = ["ckpt_koniq10k.pt"]
    assert locate("maniqa_model", at(None, maniqa_model="me/maniqa")).name == "ckpt_koniq10k.pt"


@pytest.mark.parametrize("given", ["/nowhere/clip", "./clip", "a/b/c", "weights/clip.pt", "clip"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(given, hub):
    with pytest.raises(ValueError, match=f"no such file or folder: --clip_model {given}; fetch:"):
        locate("clip_model", at(None, clip_model=given))
    assert hub.asked == []


def test_state_dicts_are_unwrapped_and_code_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    for wrapped in ({"a": torch.ones(2)}, {"state_dict": {"a": torch.ones(2)}}, {"model": {"a": torch.ones(2)}}):
        torch.save(wrapped, path)
        assert torch.equal(load_state(path, "a test")["a"], torch.ones(2))
    torch.save({"a": [1, 2]}, path)
    with pytest.raises(ValueError, match="no state dict of tensors"):
        load_state(path, "a test")
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="refused"):
        load_state(path, "a test")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as a test"):
        load_state(path, "a test")
