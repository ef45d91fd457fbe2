"""What the speed benchmarks share: the flags that choose a model, and models with random weights, as values don't
change speed."""
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from models.gpt import GPT, GPT_SIZES, GPTConfig
from models.lora import LoRAConfig, add_adapters
from models.vq import VQ_SIZES, VQConfig, VQModel
from utils.config import flag

DOWNSAMPLE = 16  # of LlamaGen's VQ-16 tokenizer


@dataclass(frozen=True)
class ModelFlags:
    gpt_model: str = flag("GPT-B", "row of GPT_SIZES")
    gpt_type: Literal["c2i", "t2i"] = flag("c2i", "class to image, or text to image")
    image_size: int = flag(256, "pixels of a side")
    batch_size: int = field(default=8, metadata={"help": "images of a rollout, and of an update"})
    cfg_scale: float = flag(2.0, "guidance; 1: none")
    rounds: int = field(default=2, metadata={"help": "timed rounds"})
    device: str = flag(lambda: "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's choice"})

    def __post_init__(self):
        if self.gpt_model not in GPT_SIZES:
            raise ValueError(f"gpt_model must be one of {', '.join(GPT_SIZES)}, got {self.gpt_model!r}")
        if self.image_size < DOWNSAMPLE or self.image_size % DOWNSAMPLE:
            raise ValueError(f"image_size must be a multiple of {DOWNSAMPLE}, got {self.image_size}")
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def gpt(self) -> GPTConfig:
        extra = dict(cls_token_num=120) if self.gpt_type == "t2i" else {}
        return GPTConfig(**GPT_SIZES[self.gpt_model], model_type=self.gpt_type,
                         block_size=(self.image_size // DOWNSAMPLE) ** 2, **extra)


def random_gpt(config: GPTConfig, device: torch.device | str, gradient_checkpointing: bool = False,
               lora: LoRAConfig = LoRAConfig()) -> GPT:
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws a billion weights in no time
        gpt = GPT(config)
        torch.nn.init.normal_(gpt.output.weight, std=config.initializer_range)  # zero at a model's start: all alike
    gpt.gradient_checkpointing = gradient_checkpointing
    add_adapters(gpt, lora)
    return gpt.to(device).eval()


def random_vq(config: VQConfig, device: torch.device | str) -> VQModel:
    """As models.build loads it."""
    torch.manual_seed(0)
    with torch.device(device):
        vq = VQModel(config)
    return vq.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def vq_config(name: str) -> VQConfig:
    if name not in VQ_SIZES:
        raise ValueError(f"vq_model must be one of {', '.join(VQ_SIZES)}, got {name!r}")
    return VQConfig(**VQ_SIZES[name])


def random_condition(config: GPTConfig, num_prompts: int, device: torch.device) -> Tensor:
    if config.model_type == "c2i":
        return torch.arange(num_prompts, device=device) % config.num_classes
    return torch.randn(num_prompts, config.cls_token_num, config.caption_dim, device=device)


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"
