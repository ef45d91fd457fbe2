"""Device code without a GPU: tensors that live on `cuda` under torch's FakeTensorMode, which has shapes, dtypes and
devices but no numbers. Whatever mixes devices, reads a number on the host or turns a GPU tensor into numpy is an error.

Left out: backward passes, which are not possible this way; Triton's kernels, for which a check of their arguments
stands in; judges whose inputs or rules are read on the host (Qwen, GenEval's boxes).
"""
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmark.speed import rewards as reward_speed
from models import generate as generate_module
from models.decoder import Decoder
from models.generate import SamplingConfig, generate
from models.gpt import GPT, GPTConfig
from models.policy import Policy, Scorer
from models.text import TextEncoder
from models.vq import VQConfig, VQModel
from reward_utils.fid_reward import FadingMoments, Reference, leave_one_out
from reward_utils.inception import ShapesFeatures, extract_all
from reward_utils.inception_v3 import InceptionFeatures
from reward_utils.mask2former import load_mask2former, preprocess
from reward_utils.reference_image import MseScorer
from tests.tiny_geneval import write_mmdet
from tests.tiny_gpt import SAMPLING, C, L, T, V

CUDA = torch.device("cuda", 0)


pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="before torch 2.14 some operations on fake CUDA tensors ask for a driver")


class PlainSteps:
    """In place of StepGraphs: nothing can be captured here."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __call__(self, step, *key) -> None:
        step(*key)


class CheckedKernels:
    """In place of models.kernels: everything that a launch reads or writes lies on the GPU."""

    class Scratch:
        def __init__(self, config, num_rows, dtype, device):
            self.device = device

    @staticmethod
    def feed(config, layers, outer, cache, mask, scratch, tokens, position) -> Tensor:
        tensors = [*(part for layer in layers for part in layer), *outer, cache, tokens, position]
        assert {tensor.device for tensor in tensors} | {scratch.device} == {CUDA}
        assert mask is None or mask.device == CUDA and mask.dtype == torch.float32
        assert {layer.wqkv.dtype for layer in layers} == {cache.dtype}
        return torch.empty(len(tokens), config.dim, device=CUDA)

    @staticmethod
    def draw(logits, uniforms, index, tokens, logps, entropies, greedy) -> Tensor:
        assert {one.device for one in (logits, uniforms, index, tokens, logps, entropies)} == {CUDA}
        assert logits.dtype == torch.float32 and uniforms.dtype == torch.float64 and logits.is_contiguous()
        return torch.zeros(len(logits), dtype=torch.long, device=CUDA)


@contextmanager
def fake_cuda(fused: bool = False):
    """Inside, tensors made on `cuda` are fake, autocast believes in the GPU, and rollouts draw without graphs."""
    def decoder(config, num_rows, dtype, device, bucket, *_):
        made = Decoder(config, num_rows, dtype, device, bucket or (0 if fused else 64), fused=False)
        if fused:
            made.bucket = len(made.positions)
            made.kernels, made.scratch = CheckedKernels, CheckedKernels.Scratch(config, num_rows, dtype, device)
            if config.cls_token_num > 1:
                made.columns = torch.zeros(num_rows, 1, 1, len(made.positions), device=device)
        return made

    def unique(masks, dim, return_inverse):  # a wait for the device, once a rollout and before its steps
        return masks, torch.arange(len(masks), device=masks.device)

    with FakeTensorMode(), patch.object(torch.cuda, "is_available", lambda: True), \
            patch.object(torch.cuda, "is_bf16_supported", lambda *_: True), \
            patch.object(generate_module, "StepGraphs", PlainSteps), \
            patch.object(generate_module, "Decoder", decoder), patch.object(Tensor, "unique", unique):
        yield


def fake_gpt(model_type: str, **changes) -> GPT:
    extra = dict(cls_token_num=T, caption_dim=C, uncond_token_num=T) if model_type == "t2i" else {}
    config = dict(dim=32, n_layer=2, n_head=4, n_kv_head=2, multiple_of=16, vocab_size=V, block_size=L, num_classes=5,
                  model_type=model_type, grid_size=(3, 4)) | extra | changes
    with torch.device(CUDA):
        return GPT(GPTConfig(**config)).eval()


def fake_condition(model_type: str) -> tuple[Tensor, Tensor | None]:
    if model_type == "c2i":
        return torch.zeros(3, dtype=torch.long, device=CUDA), None
    return torch.zeros(3, T, C, device=CUDA), torch.ones(3, T, dtype=torch.bool, device=CUDA)


def on_fake_cuda(module: nn.Module) -> None:
    """Its parameters and buffers become fake ones on the GPU: `Module.to` cannot swap them."""
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = parameter if parameter is None else nn.Parameter(moved(parameter), False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = moved(buffer)


# ---- generation and scoring ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("model_type", ("c2i", "t2i"))
def test_rollouts_and_scores_stay_on_the_device(model_type, dtype, fused):
    names = SAMPLING if dtype is None else ("cfg2_interval", "all")
    with fake_cuda(fused):
        gpt, (condition, mask) = fake_gpt(model_type), fake_condition(model_type)
        for name in names:
            sampling = SamplingConfig(**SAMPLING[name])
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None), torch.no_grad():
                out = generate(gpt, condition, sampling, mask, list(range(6)), 2)
                rows = torch.arange(3, device=CUDA).repeat_interleave(2)
                scored = Scorer(gpt, sampling)(condition[rows], out.tokens, None if mask is None else mask[rows])
            for tensor in (out.tokens, out.logps, out.entropies, *scored):
                assert tensor.device == CUDA and tensor.shape == (6, L)
            assert out.logps.dtype == scored[0].dtype == torch.float32


def test_images_are_decoded_on_the_device():
    with fake_cuda():
        with torch.device(CUDA):
            vq = VQModel(VQConfig(codebook_size=V, encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=32,
                                  z_channels=32))
        for dtype in (torch.float32, torch.bfloat16):
            policy = Policy(fake_gpt("c2i"), vq.eval(), SamplingConfig(), decode_batch_size=2, vq_dtype=dtype)
            images = policy.decode(torch.zeros(3, L, dtype=torch.long, device=CUDA))
            assert images.device == CUDA and images.dtype == torch.uint8 and images.shape == (3, 3, 6, 8)


@pytest.mark.parametrize("plant,error", (
    (lambda hidden: hidden + torch.ones(hidden.shape[-1]), (RuntimeError, ValueError)),  # a tensor of the host's
    (lambda hidden: hidden if hidden.sum() > 0 else -hidden, DataDependentOutputException),  # the host reads a number
    (lambda hidden: torch.from_numpy(hidden.numpy()), (RuntimeError, TypeError))))
def test_planted_faults_are_caught(monkeypatch, plant, error):
    guide = generate_module.guide
    monkeypatch.setattr(generate_module, "guide", lambda *args: plant(guide(*args)))
    with fake_cuda():
        gpt, (condition, _) = fake_gpt("c2i"), fake_condition("c2i")
        with pytest.raises(error):
            generate(gpt, condition, SamplingConfig(cfg_scale=2.0), None, list(range(3)))


# ---- text, rewards, features -----------------------------------------------------------------------------------------

def test_captions_are_encoded_on_the_device():
    encoder = TextEncoder("models/pretrained/shapes/t5", max_length=8)
    encoder.model  # loaded, on the CPU
    encoder.device, encoder.rows_per_forward = CUDA, 4
    with fake_cuda():
        on_fake_cuda(encoder.model)
        embeddings, mask = encoder.encode(["a photo of a red star", "a photo of two blue circles"])
        assert embeddings.device == mask.device == CUDA
        assert embeddings.shape == (2, 8, encoder.width) and embeddings.dtype == torch.float32


# Exact resizing is PIL's, which reads the images on the host; HPS's is torch's on every device.
LOCAL = {"clip_text": "fast", "hpsv2_text": "exact", "pickscore": "fast", "aesthetic": "fast", "imagereward": "fast"}


@pytest.mark.parametrize("name,preprocess", LOCAL.items())
def test_rewards_score_images_of_the_device(tmp_path, name, preprocess):
    """Built on the CPU from files, as ever, then moved; scores come back to the CPU."""
    with reward_speed.random_rewards([name], reward_speed.SIZES["tiny"], tmp_path, "cpu", preprocess=preprocess,
                                     reward_batch_size=2) as reward_set:
        scorer = next(iter(reward_set.rewards.values())).scorer
        with fake_cuda():
            on_fake_cuda(scorer)
            scores = scorer(torch.zeros(3, 3, 64, 64, dtype=torch.uint8, device=CUDA), ["a", "b", "a"])
            assert scores.shape == (3,) and scores.device.type == "cpu" and scores.dtype == torch.float32


def test_pairs_of_images_are_compared_on_the_device(tmp_path):
    with reward_speed.random_rewards(["lpips"], reward_speed.SIZES["tiny"], tmp_path, "cpu") as reward_set:
        scorer = next(iter(reward_set.rewards.values())).scorer
        with fake_cuda():
            on_fake_cuda(scorer)
            images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=CUDA)
            assert scorer.score(images, images.cpu()).device == CUDA


def test_crops_are_rated_on_the_device(tmp_path):
    with reward_speed.random_rewards(["maniqa"], reward_speed.SIZES["tiny"], tmp_path, "cpu") as reward_set:
        scorer = next(iter(reward_set.rewards.values())).scorer
        with fake_cuda():
            on_fake_cuda(scorer)
            scores = scorer.net(torch.zeros(2, 3, 32, 32, device=CUDA))
            assert scores.device == CUDA and scores.shape == (2,)


def test_objects_are_found_on_the_device(tmp_path):
    """GenEval's detector, up to what reads numbers on the host (boxes, thresholds)."""
    detector = load_mask2former(write_mmdet(tmp_path / "detector.pth"))
    with fake_cuda():
        on_fake_cuda(detector)
        pixels, _ = preprocess(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=CUDA))
        output = detector.model(pixel_values=pixels)
        assert output.class_queries_logits.device == output.masks_queries_logits.device == CUDA


def test_what_an_image_adds_to_fid_is_computed_on_the_device():
    reference, counted = Reference(np.zeros(8), np.eye(8)), FadingMoments(8)
    with fake_cuda():
        on_fake_cuda(reference)
        on_fake_cuda(counted)
        scores = leave_one_out(torch.zeros(6, 8, dtype=torch.float64, device=CUDA), counted, reference)
        assert scores.device == CUDA and scores.shape == (6,)
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        assert MseScorer.score(images.to(CUDA), images).device == CUDA


@pytest.mark.parametrize("build,size", ((ShapesFeatures, 64), (InceptionFeatures, 75)))
def test_features_are_taken_on_the_device_and_come_back(build, size):
    net = build().eval()
    with fake_cuda():
        on_fake_cuda(net)
        images = torch.zeros(3, 3, size, size, dtype=torch.uint8)
        features, probs, spatial = extract_all(net, images.to(CUDA), batch_size=2)
        assert features.device.type == probs.device.type == "cpu" and features.dtype == torch.float32
        assert spatial is None or spatial.device.type == "cpu"
