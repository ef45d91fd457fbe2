"""Every stage of pretrain.py end to end at tiny size, on the shapes world and on folders of images."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from dataset.images import load_images
from models.checkpoint import load_gpt, load_vq
from trainer_utils import pretraining


@pytest.fixture(scope="module")
def shapes_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return pretrain.PretrainConfig(output_dir=str(folder / "out"), work_dir=str(folder / "work"), steps=2, batch_size=4,
                                   num_images=24, eval_images=32, save_every=1, bf16=False)


def test_all_stages_on_shapes(shapes_config, capsys):
    pretrain.run(shapes_config)
    printed = capsys.readouterr().out
    for line in ("vq: PSNR", "features:", "text:", "c2i: validation nats", "t2i: validation nats", "t2i: strict"):
        assert line in printed
    out = pretrain.Path(shapes_config.output_dir)
    c2i = load_gpt(out / "gpt_c2i").config
    assert c2i.num_classes == 32 and c2i.vocab_size == load_vq(out / "vq").config.codebook_size <= 512
    t2i = load_gpt(out / "gpt_t2i")
    assert t2i.config.cls_token_num == t2i.config.uncond_token_num == 16
    assert sorted(path.name for path in out.iterdir()) == ["features.safetensors", "gpt_c2i", "gpt_t2i", "t5", "vq"]


def test_a_killed_stage_continues_with_the_same_weights(shapes_config, tmp_path):
    once = dataclasses.replace(shapes_config, stage="c2i", steps=4, work_dir=str(tmp_path / "once"))
    weights = []
    pretrain.run(once)
    weights.append(load_gpt(pretrain.Path(once.output_dir) / "gpt_c2i").state_dict())

    class Killed(Exception):
        pass

    def killing(path, state, save=pretrain.save_state):
        save(path, state)
        if state.get("step") == 2:
            raise Killed

    twice = dataclasses.replace(once, work_dir=str(tmp_path / "twice"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretraining, "save_state", killing)
        pretrain.run(twice)
    pretrain.run(twice)
    weights.append(load_gpt(pretrain.Path(twice.output_dir) / "gpt_c2i").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def write_image(path, size=(70, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3), np.uint8)).save(path)


def test_class_folders(shapes_config, tmp_path):
    for name in ("cats/a.png", "cats/b.jpg", "dogs/c.png", "dogs/d.png"):
        write_image(tmp_path / "data" / name)
    images = load_images(str(tmp_path / "data"), "c2i", 64)
    batch, conditions = images.batch([0, 3])
    assert batch.shape == (2, 64, 64, 3) and [c.class_id for c in conditions] == [0, 1]
    assert conditions[1].prompt == "a photo of dogs"
    config = dataclasses.replace(shapes_config, data=str(tmp_path / "data"), stage="vq",
                                 output_dir=str(tmp_path / "out"), work_dir=str(tmp_path / "work"))
    pretrain.run(config)
    pretrain.run(dataclasses.replace(config, stage="c2i"))
    assert load_gpt(tmp_path / "out" / "gpt_c2i").config.num_classes == 2


def test_captioned_folders(tmp_path):
    write_image(tmp_path / "txt" / "a.png")
    (tmp_path / "txt" / "a.txt").write_text("a noisy square\n")
    assert load_images(str(tmp_path / "txt"), "t2i", 32).batch([0])[1][0].prompt == "a noisy square"
    write_image(tmp_path / "jsonl" / "b.png")
    (tmp_path / "jsonl" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "noise"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: not a record"):
        load_images(str(tmp_path / "jsonl"), "t2i", 32)
    with pytest.raises(ValueError, match="neither 'shapes' nor a folder"):
        load_images(str(tmp_path / "none"), "t2i", 32)


def test_a_stage_with_other_settings_is_refused(shapes_config, tmp_path):
    first = dataclasses.replace(shapes_config, stage="features", work_dir=str(tmp_path / "work"),
                                output_dir=str(tmp_path / "not" / "there"))
    pretrain.run(first)
    assert (tmp_path / "not" / "there" / "features.safetensors").is_file()
    pretrain.run(dataclasses.replace(first, num_threads=1))
    with pytest.raises(ValueError, match=r"features.pt holds .*learning_rate: 0.01 -> 0.5.*another --work_dir"):
        pretrain.run(dataclasses.replace(first, learning_rate=0.5))


def test_the_text_encoder_trains_in_float32(shapes_config, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def text_encoder(*args, **kwargs):
        raise Asked(kwargs.get("dtype"))
    monkeypatch.setattr(pretrain, "TextEncoder", text_encoder)  # by itself it takes bf16 on a GPU
    with pytest.raises(Asked, match="torch.float32"):
        pretrain.run(dataclasses.replace(shapes_config, stage="text", output_dir=str(tmp_path)))
