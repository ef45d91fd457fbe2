"""A GPT of two layers on random weights, a condition for it, and settings to sample with."""
import torch

from models.gpt import GPT, GPTConfig
from tests.golden.recipe import recipe_

L, V, T, C = 12, 40, 6, 10


def tiny_gpt(model_type, **changes):
    extra = dict(cls_token_num=T, caption_dim=C, uncond_token_num=T) if model_type == "t2i" else {}
    config = GPTConfig(dim=32, n_layer=2, n_head=4, n_kv_head=2, multiple_of=16, vocab_size=V, block_size=L,
                       num_classes=5, model_type=model_type, grid_size=(3, 4), **extra, **changes)
    return recipe_(GPT(config), "policy")


def tiny_condition(model_type, num_prompts=3):
    if model_type == "c2i":
        return torch.tensor([1, 4, 0, 2, 3][:num_prompts]), None
    lengths = torch.tensor([2, T, 4, 1, 2][:num_prompts])
    mask = torch.arange(T) >= T - lengths[:, None]  # left-padded
    values = torch.randn(num_prompts, T, C, generator=torch.Generator().manual_seed(3))
    return values * mask[..., None], mask


SAMPLING = {
    "plain": dict(),
    "cfg2": dict(cfg_scale=2.0),
    "cfg4": dict(cfg_scale=4.0),
    "cfg2_interval": dict(cfg_scale=2.0, cfg_interval=3),
    "cfg3_interval0": dict(cfg_scale=3.0, cfg_interval=0),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.7),
    "cold": dict(temperature=0.6, cfg_scale=1.5),
    "all": dict(temperature=1.3, top_k=12, top_p=0.9, cfg_scale=4.0, cfg_interval=5),
}
