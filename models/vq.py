"""VQ tokenizer: an image becomes a grid of codebook ids, and ids become an image again.

The architecture is LlamaGen's VQ-16 / VQ-8 (arXiv 2406.06525, after VQGAN, arXiv 2012.09841), with its state-dict
keys, so released files load strictly. Three extra config fields describe the small tokenizer of the shapes world.
Adversarial and perceptual training losses are left out: only pretrain.py trains a tokenizer, on plain pixels.

Shapes: N images, C channels, H W pixels, h w latent grid, E codebook dimension, K codebook size.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQConfig:
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True  # keeps LlamaGen's `quantize.codebook_used` buffer in the state dict
    commit_loss_beta: float = 0.25
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    dropout_p: float = 0.0
    # Not in LlamaGen:
    ch: int = 128  # width of the first level
    num_res_blocks: int = 2
    patch: int = 1  # pixel-unshuffle factor of the stem
    # GroupNorm and attention see the whole image, which spreads global content over every code and makes the codes
    # of a tiny world hard to model. Both off gives position-local codes.
    local: bool = False

    def __post_init__(self):
        object.__setattr__(self, "encoder_ch_mult", tuple(self.encoder_ch_mult))
        object.__setattr__(self, "decoder_ch_mult", tuple(self.decoder_ch_mult))
        if len(self.encoder_ch_mult) != len(self.decoder_ch_mult):
            raise ValueError("encoder_ch_mult and decoder_ch_mult must have the same number of levels, "
                             f"got {len(self.encoder_ch_mult)} and {len(self.decoder_ch_mult)}")

    @property
    def downsample(self) -> int:
        """Image pixels per latent position and side."""
        return self.patch * 2 ** (len(self.encoder_ch_mult) - 1)


VQ_SIZES = {
    "VQ-16": dict(encoder_ch_mult=(1, 1, 2, 2, 4), decoder_ch_mult=(1, 1, 2, 2, 4)),
    "VQ-8": dict(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),
    "VQ-shapes": dict(codebook_size=512, codebook_show_usage=False, encoder_ch_mult=(1, 2, 4),
                      decoder_ch_mult=(1, 2, 4), z_channels=64, ch=32, num_res_blocks=1, patch=2, local=True),
}


class LocalNorm(nn.Module):
    """RMS norm over the channels of each position; the position-local stand-in for GroupNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)  # [N, 1, h, w]
        return x * scale * self.weight[:, None, None]


def make_norm(channels: int, local: bool) -> nn.Module:
    return LocalNorm(channels) if local else nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, dropout_p: float, local: bool):
        super().__init__()
        self.norm1 = make_norm(in_channels, local)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, local)
        self.dropout = nn.Dropout(dropout_p)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = make_norm(channels, local=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (proj(h).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))  # [N, hw, C]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padding on the right and bottom only, as in VQGAN


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, then the change to the next one."""

    def __init__(self, channels: list[int], config: VQConfig, attention: bool, resample: nn.Module | None):
        super().__init__()
        pairs = list(zip(channels, channels[1:]))
        self.res = nn.ModuleList(ResnetBlock(i, o, config.dropout_p, config.local) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o) for _, o in pairs) if attention else nn.ModuleList()
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif isinstance(resample, Upsample):
            self.upsample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


def make_mid(channels: int, config: VQConfig) -> nn.ModuleList:
    blocks = [ResnetBlock(channels, channels, config.dropout_p, config.local) for _ in range(2)]
    return nn.ModuleList(blocks if config.local else [blocks[0], AttnBlock(channels), blocks[1]])


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.encoder_ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch ** 2, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        previous = config.ch
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.conv_blocks.append(Level([previous] + [width] * config.num_res_blocks, config,
                                          attention=last and not config.local,
                                          resample=None if last else Downsample(width)))
            previous = width
        self.mid = make_mid(previous, config)
        self.norm_out = make_norm(previous, config.local)
        self.conv_out = nn.Conv2d(previous, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # [N, z, h, w]


class Decoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.decoder_ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = make_mid(widths[-1], config)
        self.conv_blocks = nn.ModuleList()
        previous = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            self.conv_blocks.append(Level([previous] + [width] * (config.num_res_blocks + 1), config,
                                          attention=i == len(widths) - 1 and not config.local,
                                          resample=Upsample(width) if i else None))
            previous = width
        self.norm_out = make_norm(previous, config.local)
        self.conv_out = nn.Conv2d(previous, 3 * config.patch ** 2, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x  # [N, 3, H, W]


class VectorQuantizer(nn.Module):
    """Nearest neighbour in the codebook; with `codebook_l2_norm` both sides are unit vectors."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        bound = 1.0 / config.codebook_size
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        if config.codebook_l2_norm:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        if config.codebook_show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def normalize(self, vectors: Tensor) -> Tensor:
        """Unit vectors along the last dimension, or the input when the codebook isn't normalised."""
        return F.normalize(vectors, dim=-1) if self.config.codebook_l2_norm else vectors

    def codebook(self) -> Tensor:
        return self.normalize(self.embedding.weight)  # [K, E]

    def nearest(self, latents: Tensor) -> Tensor:
        """latents [N, E, h, w] -> ids int64 [N, h, w], searched in float32: bf16 autocast takes other codes."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self.normalize(latents.permute(0, 2, 3, 1).float())  # [N, h, w, E]
            codebook = self.codebook().float()
            distances = z.pow(2).sum(-1, keepdim=True) + codebook.pow(2).sum(-1) - 2 * z @ codebook.T  # [N, h, w, K]
            return distances.argmin(-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """ids [N, h, w] -> code vectors [N, E, h, w]."""
        return F.embedding(ids, self.codebook()).permute(0, 3, 1, 2)


class VQModel(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [-1, 1] -> continuous latents [N, E, h, w]."""
        side = self.config.downsample
        if images.shape[-2] % side or images.shape[-1] % side:
            raise ValueError(f"image height and width must be multiples of {side}, got {tuple(images.shape[-2:])}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [-1, 1] -> ids int64 [N, h, w]."""
        return self.quantize.nearest(self.latents(images))

    def decode(self, ids: Tensor) -> Tensor:
        """ids int [N, h, w] -> images float [N, 3, H, W] in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(ids)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Training pass: (reconstruction [N, 3, H, W], codebook loss), straight-through (arXiv 1711.00937, eq. 3)."""
        latents = self.latents(images)
        z = self.quantize.normalize(latents.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [N, E, h, w]
        codes = self.quantize.lookup(self.quantize.nearest(latents))
        loss = F.mse_loss(codes, z.detach()) + self.config.commit_loss_beta * F.mse_loss(z, codes.detach())
        return self.decoder(self.post_quant_conv(z + (codes - z).detach())), loss
