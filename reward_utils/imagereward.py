"""ImageReward (Xu et al. 2023): BLIP's image encoder and its text encoder with cross-attention, then an affine head.

Built from transformers' Blip modules; `converted` brings ImageReward.pt's keys into theirs. What shapes cannot tell
(heads, layer-norm eps, bidirectional attention) is written out here: the wrong values would load without a word.

Legend: N pairs of image and prompt, V = 1 + patches, T tokens, D width.
"""
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_utils.pixels import clip_pixels, in_batches
from reward_utils.settings import RewardSettings
from reward_utils.weights import CHECKPOINTS, fill, load_state, locate
from utils.files import parse_json, read_text

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, as published
MAX_TOKENS = 35  # longer prompts are cut
HEAD_WIDTH = 64  # of both encoders
WHAT = "ImageReward (THUDM/ImageReward's ImageReward.pt)"

# of the contrastive pre-training, unused; and a buffer that transformers makes itself
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")
RENAMED = (
    (r"blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.text_encoder\.", "text."),
    (r"mlp\.layers\.", "mlp."),
)


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ImageReward.pt under the keys of ImageRewardNet; an unknown key stays, for the strict load."""
    return {_renamed(key): value for key, value in state.items() if not UNUSED.match(key)}


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        new, count = re.subn(f"^{pattern}", name, key)
        if count:
            return new
    return key


def sizes_of(state: dict[str, Tensor]) -> tuple[dict, dict, dict[str, tuple[int, int]]]:
    """Arguments of ImageRewardNet, read off the shapes of a converted state dict; KeyError names a missing key."""
    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    num_patches = state["vision.embeddings.position_embedding"].shape[1] - 1
    vocab, hidden = state["text.embeddings.word_embeddings.weight"].shape
    vision = {"hidden_size": width, "intermediate_size": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
              "num_hidden_layers": _num_layers(state, "vision.encoder.layers"),
              "num_attention_heads": max(1, width // HEAD_WIDTH),
              "image_size": patch * round(num_patches ** 0.5), "patch_size": patch}
    text = {"vocab_size": vocab, "hidden_size": hidden, "encoder_hidden_size": width,
            "intermediate_size": state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": _num_layers(state, "text.encoder.layer"),
            "num_attention_heads": max(1, hidden // HEAD_WIDTH),
            "max_position_embeddings": state["text.embeddings.position_embeddings.weight"].shape[0]}
    names = sorted((key.split(".")[1] for key in state if re.match(r"mlp\.\d+\.weight$", key)), key=int)
    return vision, text, {name: tuple(reversed(state[f"mlp.{name}.weight"].shape)) for name in names}


def _num_layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) + 1:].split(".")[0] for key in state if key.startswith(prefix + ".")})


class ImageRewardNet(nn.Module):
    """vision, text: fields of BlipVisionConfig and BlipTextConfig; mlp: {name in the Sequential: (inputs, outputs)}."""

    def __init__(self, vision: dict, text: dict, mlp: dict[str, tuple[int, int]]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        # eager: transformers has no other attention for BLIP's text encoder
        self.vision = BlipVisionModel(BlipVisionConfig(
            **vision, hidden_act="gelu", layer_norm_eps=1e-6, attention_dropout=0.0, attn_implementation="eager"))
        # is_decoder makes the cross-attention; the mask stays bidirectional, for forward() is not told so
        self.text = BlipTextModel(BlipTextConfig(
            **text, hidden_act="gelu", layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            is_decoder=True, attn_implementation="eager"), add_pooling_layer=False)
        # no activation in between; the numbers left out were dropouts
        self.mlp = nn.Sequential(OrderedDict((name, nn.Linear(*widths)) for name, widths in mlp.items()))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [N, 3, H, W], ids and mask (1 a token, 0 padding) int [N, T] -> score [N]."""
        # not pooler_output: it is normalised twice
        patches = self.vision(pixel_values=pixels).last_hidden_state  # [N, V, D]
        ones = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches,
                           encoder_attention_mask=ones).last_hidden_state  # [N, T, D]
        return (self.mlp(hidden[:, 0].to(self.mlp[0].weight.dtype)).squeeze(-1) - MEAN) / STD


def load_imagereward(path: Path) -> ImageRewardNet:
    """ImageReward.pt in float32 on the CPU, frozen; ValueError for a file that is not one."""
    state = converted(load_state(path, WHAT))
    try:
        net = ImageRewardNet(*sizes_of(state))
    except (KeyError, ValueError) as error:  # a missing key; sizes that make no model
        raise ValueError(f"{path}: not the weights of {WHAT} ({' '.join(str(error).split())[:200]})") from error
    return fill(net, state, path, WHAT)


class ImageRewardScorer(nn.Module):
    """scorer(images uint8 [N, 3, H, W], N prompts) -> float32 [N] on the CPU, about -2.3 to 2.

    Image and text meet in every layer of the text encoder, so a prompt is encoded anew for each image. The head stays
    in float32 whatever reward_dtype says.
    """

    def __init__(self, settings: RewardSettings, device: torch.device):
        super().__init__()
        path = locate("imagereward_model", settings)
        self.net = load_imagereward(path)
        self.tokenizer = load_bert_tokenizer(locate("bert_tokenizer", settings), self.net.text.config.vocab_size)
        self.max_tokens = min(MAX_TOKENS, self.net.text.config.max_position_embeddings)
        dtype = getattr(torch, settings.reward_dtype)
        self.net.vision.to(dtype)
        self.net.text.to(dtype)
        self.net.to(device)
        self.batch_size, self.preprocess = settings.reward_batch_size, settings.preprocess

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return in_batches(self.score, self.batch_size, images, list(prompts)).float().cpu()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One batch, uint8 [N, 3, H, W] and N prompts -> [N] on the scorer's device."""
        weight = self.net.vision.embeddings.patch_embedding.weight
        pixels = clip_pixels(images, self.net.vision.config.image_size, self.preprocess, weight.device,
                             crop="torchvision")
        # padded to the full length as the original does: a shorter batch would differ in the last bits
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.max_tokens,
                                return_tensors="pt").to(weight.device)
        return self.net(pixels.to(weight.dtype), tokens["input_ids"], tokens["attention_mask"])


def load_bert_tokenizer(folder: Path, vocab_size: int):
    """BERT's uncased tokenizer of a hub-style folder (tokenizer.json or vocab.txt); ValueError where it has none."""
    from transformers import BertTokenizerFast

    mend = f"--bert_tokenizer takes a folder as `{CHECKPOINTS['bert_tokenizer'].fetch}` makes it"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"{folder}: no tokenizer in it (tokenizer.json or vocab.txt); {mend}")
    try:
        if (folder / "tokenizer.json").is_file():  # looked into here: tokenizers raises a bare Exception instead
            parse_json(read_text(folder / "tokenizer.json"), "tokenizer.json")
        elif "[UNK]" not in read_text(folder / "vocab.txt").split():
            raise ValueError("vocab.txt lacks [UNK]")
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}); "
                         f"{mend}") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {len(tokenizer)} tokens and ImageReward {vocab_size}; {mend}")
    return tokenizer
