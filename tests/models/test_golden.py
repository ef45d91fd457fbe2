"""Models against numbers that the original LlamaGen code produced (tests/golden/README.md)."""
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.generate import SamplingConfig, generate
from models.gpt import GPT, GPTConfig
from models.vq import VQConfig, VQModel
from tests.golden.recipe import recipe_

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())
GPT_CASES = [name for name, case in CASES.items() if case["kind"] == "gpt"]
VQ_CASES = [name for name, case in CASES.items() if case["kind"] == "vq"]


def load_gpt_case(name):
    case, data = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    gpt = recipe_(GPT(GPTConfig(**case["config"])), case["salt"]).eval()
    condition = data["class_ids"].long() if "class_ids" in data else data["caption_embeddings"].float()
    mask = data["caption_mask"].bool() if "caption_mask" in data else None
    return gpt, data, condition, mask


@pytest.mark.parametrize("name", GPT_CASES)
def test_teacher_forced_logits(name):
    gpt, data, condition, mask = load_gpt_case(name)
    tokens = data["tokens"].long()
    logits = gpt(condition, tokens[:, :-1], mask)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[..., :16], data["teacher_forced_logits_first16"], atol=2e-4, rtol=0)
    logps = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(logps, data["teacher_forced_logprobs"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", GPT_CASES)
def test_greedy_decoding_is_token_exact(name):
    gpt, data, condition, mask = load_gpt_case(name)
    greedy = {key: re.fullmatch(r"greedy_tokens_cfg([\d.]+)_interval(-?\d+)", key) for key in data}
    greedy = {key: match.groups() for key, match in greedy.items() if match}
    assert greedy, "the case holds no greedy decoding"
    for key, (scale, interval) in greedy.items():
        sampling = SamplingConfig(cfg_scale=float(scale), cfg_interval=int(interval), greedy=True)
        assert torch.equal(generate(gpt, condition, sampling, mask).tokens, data[key].long()), key


@pytest.mark.parametrize("name", VQ_CASES)
def test_vq(name):
    case, data = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    vq = recipe_(VQModel(VQConfig(**case["config"])), case["salt"]).eval()
    size, n = case["options"]["size"], len(data["images_seed_check"])
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(case["seed"])) * 2 - 1
    torch.testing.assert_close(images[:, :, :2, :2], data["images_seed_check"], atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(vq.latents(images), data["latents"], atol=2e-4, rtol=0)
        ids = vq.encode(images)
        assert torch.equal(ids, data["code_ids"].long())
        torch.testing.assert_close(vq.decode(ids)[:, :, ::4, ::4], data["recon_sub4"], atol=5e-4, rtol=0)
        decoded = vq.decode(data["random_codes"].long())
        torch.testing.assert_close(decoded[:, :, ::4, ::4], data["decoded_sub4"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", VQ_CASES)
def test_the_codebook_search_is_float32_under_autocast(name):
    vq = recipe_(VQModel(VQConfig(**CASES[name]["config"])), CASES[name]["salt"]).eval()
    latents = load_file(GOLDEN / f"{name}.safetensors")["latents"].float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ids = vq.quantize.nearest(latents)
    assert torch.equal(ids, vq.quantize.nearest(latents))
