"""Every container and prefix that weights arrive in, and an error by name for everything that does not fit."""
import argparse
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import export_llamagen, load_gpt, load_vq, main, read_manifest, save_model
from models.gpt import GPT, GPT_SIZES, GPTConfig
from models.vq import VQ_SIZES, VQConfig, VQModel
from utils.config import one_line_errors

SIZE = dict(dim=16, n_layer=2, n_head=2)
FIELDS = dict(multiple_of=8, vocab_size=11, block_size=6, grid_size=(2, 3), num_classes=5)
C2I = GPTConfig(**SIZE, **FIELDS)
T2I = replace(C2I, model_type="t2i", cls_token_num=3, uncond_token_num=4, caption_dim=7)
VQ = VQConfig(codebook_size=9, codebook_embed_dim=4, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), z_channels=8,
              ch=32, num_res_blocks=1)
USAGE = "quantize.codebook_used"


def filled(model):
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def gpt():
    return filled(GPT(C2I))


@pytest.fixture(scope="module")
def vq():
    return filled(VQModel(VQ))


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same_weights(model, reference):
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor.float()), name


def error_of(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- containers and prefixes

@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"module": s}, lambda s: {"state_dict": s}, lambda s: s,
    lambda s: {"model": prefixed(s, "module.")}, lambda s: {"state_dict": prefixed(s, "_orig_mod.")},
    lambda s: prefixed(s, "module._orig_mod."), lambda s: {"module": prefixed(s, "module.module.")},
    lambda s: {name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in s.items()},
    lambda s: {"model": s, "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(gpt_model="GPT-B")},
    lambda s: {**s, "freqs_cis": torch.ones(3), "layers.0.attention.kv_cache.k_cache": torch.ones(3), "epoch": 4},
], ids=range(11))
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_containers(tmp_path, gpt, wrap, zipped):
    torch.save(wrap(gpt.state_dict()), tmp_path / "c2i.pt", _use_new_zipfile_serialization=zipped)
    assert_same_weights(load_gpt(tmp_path / "c2i.pt", C2I), gpt)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_suffixes_and_vq(tmp_path, gpt, vq, suffix):
    for model, load, config in ((gpt, load_gpt, C2I), (vq, load_vq, VQ)):
        path = tmp_path / f"weights{suffix}"
        save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
        assert_same_weights(load(str(path), config), model)


def test_a_loaded_model_computes_the_same(tmp_path, gpt, vq):
    export_llamagen(gpt, tmp_path / "gpt.pt")
    loaded = load_gpt(tmp_path / "gpt.pt", C2I)
    classes, tokens = torch.tensor([1, 4]), torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(classes, tokens), gpt(classes, tokens))
    assert not loaded.training and loaded.output.weight.requires_grad
    export_llamagen(vq, tmp_path / "vq.pt")
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_vq(tmp_path / "vq.pt", VQ).encode(images), vq.encode(images))


def test_views_of_one_buffer_become_separate_weights(tmp_path, gpt):
    state = gpt.state_dict()
    state["layers.1.ffn_norm.weight"] = state["layers.0.ffn_norm.weight"]
    torch.save(state, tmp_path / "tied.pt")
    layers = load_gpt(tmp_path / "tied.pt", C2I).layers
    with torch.no_grad():
        layers[0].ffn_norm.weight.zero_()
    assert layers[1].ffn_norm.weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32_with_the_same_values(tmp_path, gpt, dtype):
    torch.save({"model": {name: t.to(dtype) for name, t in gpt.state_dict().items()}}, tmp_path / "half.pt")
    assert_same_weights(load_gpt(tmp_path / "half.pt", C2I), filled(GPT(C2I)).to(dtype))


def test_usage_counter_is_optional_both_ways(tmp_path, vq):
    without = {name: t for name, t in vq.state_dict().items() if name != USAGE}
    torch.save(without, tmp_path / "without.pt")
    assert not load_vq(tmp_path / "without.pt", VQ).state_dict()[USAGE].any()
    torch.save({**without, USAGE: torch.ones(3)}, tmp_path / "other.pt")
    assert load_vq(tmp_path / "other.pt", VQ).state_dict()[USAGE].shape == vq.state_dict()[USAGE].shape
    export_llamagen(vq, tmp_path / "with.pt")
    assert USAGE not in load_vq(tmp_path / "with.pt", VQ, codebook_show_usage=False).state_dict()


def ar_grpo_state(gpt, vq):
    reference = prefixed({name: torch.zeros_like(t) for name, t in gpt.state_dict().items()}, "ref_model.gpt_model.")
    state = {**prefixed(gpt.state_dict(), "gpt_model."), **prefixed(vq.state_dict(), "vq_model."), **reference,
             **prefixed(vq.state_dict(), "ref_model.vq_model.")}
    return {name: tensor.clone() for name, tensor in state.items()}


def test_ar_grpo_folder(tmp_path, gpt, vq):
    save_file(ar_grpo_state(gpt, vq), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"gpt_model": "GPT-XL"}')
    assert_same_weights(load_gpt(tmp_path, C2I), gpt)
    assert_same_weights(load_vq(tmp_path, VQ), vq)
    assert "gpt_model GPT" not in error_of(load_gpt, tmp_path), "no guess from a foreign config.json"


def test_ar_grpo_shards(tmp_path, gpt, vq):
    state = ar_grpo_state(gpt, vq)
    weight_map = {name: f"model-0000{i % 2}.safetensors" for i, name in enumerate(state)}
    for shard in sorted(set(weight_map.values())):
        save_file({name: state[name] for name in state if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(load_gpt(tmp_path, C2I), gpt)
    (tmp_path / "model-00001.safetensors").unlink()
    assert "lacks model-00001.safetensors" in error_of(load_gpt, tmp_path, C2I)
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": "../outside.safetensors"}}'):
        index.write_text(broken)
        assert "model.safetensors.index.json" in error_of(load_gpt, tmp_path, C2I)


# ---- our own folders and the export

@pytest.mark.parametrize("config", [C2I, T2I])
def test_own_folder_needs_no_size(tmp_path, config):
    model = filled(GPT(config))
    save_model(tmp_path / "new" / "checkpoint-3", model, step=3, image_size=64)
    loaded = load_gpt(tmp_path / "new" / "checkpoint-3")
    assert loaded.config == config
    assert_same_weights(loaded, model)
    assert load_gpt(tmp_path / "new" / "checkpoint-3" / "model.safetensors").config == config
    assert load_gpt(tmp_path / "new" / "checkpoint-3", token_dropout_p=0.0).config.token_dropout_p == 0.0
    manifest = read_manifest(tmp_path / "new" / "checkpoint-3")
    assert (manifest["kind"], manifest["step"], manifest["image_size"]) == ("gpt", 3, 64)
    assert read_manifest(tmp_path) is None


def test_own_vq_folder_in_half_precision(tmp_path, vq):
    save_model(tmp_path, vq, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = load_vq(tmp_path)
    assert loaded.config == VQ
    assert_same_weights(loaded, filled(VQModel(VQ)).half())
    assert "describes kind 'vq', expected 'gpt'" in error_of(load_gpt, tmp_path)


def test_weights_that_do_not_fit_the_dtype_are_not_saved(tmp_path):
    model = filled(GPT(C2I))
    with torch.no_grad():
        model.output.weight[0, 0] = 1e6
    assert "output.weight is not finite as torch.float16" in error_of(save_model, tmp_path, model, torch.float16)


@pytest.mark.parametrize("manifest, message", [
    ("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "describes kind None"),
    ({"kind": "gpt"}, "with its config"), ({"kind": "gpt", "config": {"dimm": 3}}, "dimm"),
    ({"kind": "gpt", "config": {"dim": 30, "n_head": 7}}, "must divide"),
])
def test_broken_model_json_is_named(tmp_path, gpt, manifest, message):
    save_model(tmp_path, gpt)
    (tmp_path / "model.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    text = error_of(load_gpt, tmp_path)
    assert message in text and "model.json" in text


@pytest.mark.parametrize("config", [C2I, T2I])
def test_export_round_trip_by_command_line(tmp_path, config, capsys):
    model = filled(GPT(config))
    save_model(tmp_path / "own", model)
    main([str(tmp_path / "own"), str(tmp_path / "out" / "llamagen.pt")])
    stored = torch.load(tmp_path / "out" / "llamagen.pt", weights_only=True)
    assert stored.keys() == {"model"} and stored["model"].keys() == model.state_dict().keys()
    assert_same_weights(load_gpt(tmp_path / "out" / "llamagen.pt", config), model)
    assert os.listdir(tmp_path / "out") == ["llamagen.pt"]
    with pytest.raises(SystemExit) as error, one_line_errors():
        main([str(tmp_path / "out" / "llamagen.pt"), str(tmp_path / "again.pt")])
    assert error.value.code == 2 and "--gpt_model" in capsys.readouterr().err


def test_command_line_takes_a_size_and_its_fields(tmp_path, monkeypatch):
    size = dict(SIZE, multiple_of=8, block_size=4)
    monkeypatch.setitem(GPT_SIZES, "GPT-tiny", size)
    model = filled(GPT(GPTConfig(**size, model_type="t2i", cls_token_num=120, vocab_size=11, caption_dim=7)))
    export_llamagen(model, tmp_path / "a.pt")
    main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--gpt_model", "GPT-tiny", "--gpt_type", "t2i",
          "--cls_token_num", "120", "--vocab_size", "11", "--caption_dim", "7"])
    assert_same_weights(load_gpt(tmp_path / "b.pt", model.config), model)


# ---- files that don't fit

def test_every_misfit_is_named_at_once(tmp_path, gpt):
    state = gpt.state_dict()
    del state["norm.weight"]
    state["layers.0.extra"] = torch.ones(1)
    state["output.weight"] = torch.ones(3, 16)
    state["layers.1.attention.wo.weight"] = torch.ones(16, 16, dtype=torch.int8)
    torch.save({"model": state}, tmp_path / "odd.pt")
    text = error_of(load_gpt, tmp_path / "odd.pt", C2I)
    for part in ("odd.pt", "1 missing: norm.weight", "1 unexpected: layers.0.extra",
                 "2 misshapen: output.weight (file [3, 16], model [11, 16])",
                 "layers.1.attention.wo.weight (file has torch.int8)"):
        assert part in text
    assert "looks like" not in text


def test_long_lists_are_capped(tmp_path, gpt):
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "foreign.pt")
    text = error_of(load_gpt, tmp_path / "foreign.pt", C2I)
    count = len(gpt.state_dict())
    assert f"{count} missing" in text and f"and {count - 10} more" in text


def test_size_hint(tmp_path, monkeypatch, gpt, vq):
    monkeypatch.setitem(GPT_SIZES, "GPT-tiny", dict(SIZE, multiple_of=8, block_size=4))
    monkeypatch.setitem(VQ_SIZES, "VQ-tiny", dict(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), z_channels=8, ch=32,
                                                  num_res_blocks=1))
    export_llamagen(gpt, tmp_path / "gpt.pt")
    text = error_of(load_gpt, tmp_path / "gpt.pt", replace(C2I, n_layer=3, vocab_size=12))
    assert "looks like GPT-tiny: --gpt_model GPT-tiny" in text
    assert "GPT-tiny" not in error_of(load_gpt, tmp_path / "gpt.pt", replace(C2I, vocab_size=12))
    export_llamagen(vq, tmp_path / "vq.pt")
    assert "--vq_model VQ-tiny" in error_of(load_vq, tmp_path / "vq.pt", replace(VQ, z_channels=4))


def test_type_hint_and_swapped_files(tmp_path, gpt, vq):
    export_llamagen(filled(GPT(T2I)), tmp_path / "t2i.pt")
    export_llamagen(vq, tmp_path / "vq.pt")
    export_llamagen(gpt, tmp_path / "gpt.pt")
    assert "--gpt_type t2i" in error_of(load_gpt, tmp_path / "t2i.pt", C2I)
    assert "--gpt_type c2i" in error_of(load_gpt, tmp_path / "gpt.pt", T2I)
    assert "looks like a vq checkpoint" in error_of(load_gpt, tmp_path / "vq.pt", C2I)
    assert "looks like a gpt checkpoint" in error_of(load_vq, tmp_path / "gpt.pt", VQ)


def test_names_and_paths(tmp_path, gpt):
    export_llamagen(gpt, tmp_path / "gpt.pt")
    assert "GPT-XXL" in error_of(load_gpt, tmp_path / "gpt.pt", "GPT-XS")
    assert "--gpt_model" in error_of(load_gpt, tmp_path / "gpt.pt")
    assert "gone.pt" in error_of(load_gpt, tmp_path / "gone.pt", "GPT-B")
    assert "no checkpoint folder" in error_of(load_gpt, tmp_path, "GPT-B")


def test_one_key_under_two_prefixes(tmp_path, gpt):
    torch.save({**gpt.state_dict(), "module.norm.weight": torch.ones(16)}, tmp_path / "twice.pt")
    assert "norm.weight twice" in error_of(load_gpt, tmp_path / "twice.pt", C2I)


# ---- hostile, damaged and foreign files

class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused(tmp_path, gpt, protocol):
    target, path = tmp_path / "owned", tmp_path / "hostile.pt"
    torch.save({"model": gpt.state_dict(), "extra": Hostile(target)}, path, pickle_protocol=protocol)
    text = error_of(load_gpt, path, C2I)
    assert "hostile.pt was refused and nothing in it was run" in text
    path.write_bytes(pickle.dumps({"model": Hostile(target)}, protocol=protocol))
    assert "refused" in error_of(load_gpt, path, C2I)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_foreign_files(tmp_path, gpt, zipped):
    path = tmp_path / "cut.pt"
    torch.save({"model": gpt.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    foreign = (b"", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)))
    for content in (whole[:len(whole) // 2], whole[:-1], whole[:10], *foreign):
        path.write_bytes(content)
        assert "cut.pt" in error_of(load_gpt, path, C2I)
    for content in ([1, 2], torch.ones(3), {"model": 3}, {"optimizer": {"a": torch.ones(1)}}, {0: torch.ones(1)}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert "holds no weights" in error_of(load_gpt, path, C2I)


def test_damaged_safetensors(tmp_path, gpt):
    path = tmp_path / "cut.safetensors"
    save_file(gpt.state_dict(), path)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:5], b"", b"x" * 100):
        path.write_bytes(content)
        assert "cut.safetensors" in error_of(load_gpt, path, C2I)


# ---- several sets of weights, other prefixes, numbers that are none --------------------------------------------------

@pytest.mark.parametrize("use_ema,taken", ((False, "model"), (True, "ema")))
def test_a_file_with_an_average_says_which_weights_it_gave(tmp_path, gpt, caplog, use_ema, taken):
    average = filled(GPT(C2I))
    with torch.no_grad():
        average.norm.weight.mul_(3)
    torch.save({"model": gpt.state_dict(), "ema": average.state_dict(), "steps": 7}, tmp_path / "both.pt")
    with caplog.at_level("INFO"):
        loaded = load_gpt(tmp_path / "both.pt", C2I, use_ema=use_ema)
    assert_same_weights(loaded, average if use_ema else gpt)
    assert f"took {taken}, not" in caplog.text and ("--use_ema" in caplog.text) == (not use_ema)


def test_an_average_alone_is_read_in_silence(tmp_path, gpt, caplog):
    torch.save({"ema": gpt.state_dict()}, tmp_path / "ema.pt")
    with caplog.at_level("INFO"):
        for use_ema in (False, True):
            assert_same_weights(load_gpt(tmp_path / "ema.pt", C2I, use_ema=use_ema), gpt)
    assert not caplog.records
    torch.save({"model": gpt.state_dict()}, tmp_path / "plain.pt")
    assert "leave out --use_ema" in error_of(load_gpt, tmp_path / "plain.pt", C2I, use_ema=True)


def test_lightnings_prefix_is_taken_off(tmp_path, gpt):
    state = prefixed(gpt.state_dict(), "model.") | {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, tmp_path / "lightning.ckpt")
    assert_same_weights(load_gpt(tmp_path / "lightning.ckpt", C2I), gpt)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_numbers_that_are_none_are_refused_by_name(tmp_path, gpt, vq, value):
    for model, load, config, name in ((gpt, load_gpt, C2I, "layers.1.feed_forward.w2.weight"),
                                      (vq, load_vq, VQ, "decoder.conv_in.bias")):
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state[name].view(-1)[-1] = value
        torch.save({"model": state}, tmp_path / "broken.pt")
        message = error_of(load, tmp_path / "broken.pt", config)
        assert name in message and "broken.pt" in message and "NaN" in message
