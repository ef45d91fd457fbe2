"""CLIP score: the cosine of an image and its prompt, by any CLIP that transformers loads (AR-GRPO: ViT-B/32).

`CosineScorer` is what the CLIP-like rewards share: batches, one encoding per unique prompt, the product in float32; a
subclass says how pixels and prompts are encoded. Shapes: N images, U unique prompts, D width of the features.
"""
import math
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from reward_utils.pixels import clip_pixels, in_batches
from reward_utils.settings import RewardSettings
from reward_utils.weights import CHECKPOINTS, locate
from utils.files import one_line, parse_json, read_text

CACHED_PROMPTS = 65536  # 268 MB at D = 1024


def unit(features: Tensor) -> Tensor:
    """[N, D] -> rows of length 1, float32 or wider; a zero row becomes NaN, no direction being right for it."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / features.norm(dim=-1, keepdim=True)


class CosineScorer(nn.Module):
    """scorer(images uint8 [N, 3, H, W], N prompts) -> cosine float32 [N] on the CPU, on whatever device it lives."""

    def __init__(self, model: nn.Module, settings: RewardSettings, device: torch.device):
        super().__init__()
        self.model = model.to(device, getattr(torch, settings.reward_dtype))
        self.batch_size, self.preprocess = settings.reward_batch_size, settings.preprocess
        self.text_cache: dict[str, Tensor] = {}  # prompt -> [D] on the CPU, oldest first

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> what encode_images takes, float32 on the scorer's device."""
        raise NotImplementedError

    def encode_images(self, pixels: Tensor) -> Tensor:
        """-> [N, D], of any length"""
        raise NotImplementedError

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """-> [U, D], of any length"""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, D] of length 1, on the scorer's device."""
        pixels = self.pixels(images).to(next(self.model.parameters()).dtype)
        return unit(self.encode_images(pixels))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """N prompts -> [N, D] of length 1, on the CPU."""
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.text_cache]
        if unseen:
            features = in_batches(lambda part: unit(self.encode_prompts(part)), self.batch_size, unseen)
            self.text_cache.update(zip(unseen, features.cpu()))
        result = torch.stack([self.text_cache[prompt] for prompt in prompts])
        while len(self.text_cache) > CACHED_PROMPTS:
            del self.text_cache[next(iter(self.text_cache))]
        return result

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        def cosines(images, text):
            return (self.image_features(images) * text.to(self.device)).sum(dim=-1)

        return in_batches(cosines, self.batch_size, images, self.text_features(prompts)).float().cpu()


class ClipScorer(CosineScorer):
    """Cosine by a transformers CLIPModel, -1 to 1, about 0.2 to 0.35 in practice."""

    flag = "clip_model"

    def __init__(self, settings: RewardSettings, device: torch.device):
        from transformers import CLIPModel

        folder = locate(self.flag, settings)
        model = load_clip(self.flag, folder, CLIPModel)
        self.logit_scale = math.exp(model.logit_scale.item())  # before a cast: bfloat16 is off by 1 % after exp
        self.image_size = model.config.vision_config.image_size
        self.max_tokens = model.config.text_config.max_position_embeddings
        super().__init__(model, settings, device)
        self.tokenizer = load_tokenizer(folder, model.config.text_config.vocab_size)

    def pixels(self, images):
        return clip_pixels(images, self.image_size, self.preprocess, self.device)

    def encode_images(self, pixels):
        # not get_image_features: its return type changed between transformers 4 and 5
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def encode_prompts(self, prompts):
        tokens = self.tokenizer(prompts, padding=True, padding_side="right", truncation=True, return_tensors="pt",
                                max_length=self.max_tokens)["input_ids"]
        # no mask: attention is causal and the features are the end token's, which no padding precedes
        return self.model.text_projection(self.model.text_model(tokens.to(self.device)).pooler_output)


def load_clip(flag: str, folder: Path, model_class: type) -> nn.Module:
    """A transformers CLIP in float32 on the CPU from its hub-style folder, frozen.

    ValueError, in one line, for a folder that is not one, is damaged or lacks weights; no code of its is ever run.
    """
    from safetensors import SafetensorError

    mend = f"--{flag} takes a folder as `{CHECKPOINTS[flag].fetch}` makes it"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no CLIP in transformers' format (no config.json in it); {mend}")
    try:
        with _without_warnings():
            # float32 in so many words: transformers 5 would take the file's dtype; and the attention: a config.json can
            # name compiled code on the hub in its place
            model, info = model_class.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, attn_implementation="sdpa")
    except pickle.UnpicklingError as error:
        # torch's message would advise to run what is in it
        raise ValueError(f"{folder}: refused, its pytorch_model.bin is damaged or holds more than tensors (nothing in "
                         f"it was run); {mend}") from error
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, EOFError,
            SafetensorError) as error:
        reason = one_line(error)
        raise ValueError(f"{folder}: cannot be loaded as CLIP ({reason}); {mend}") from error
    # transformers leaves these weights random
    faults = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    faults += [f"{key} is {list(found)}, not {list(wanted)}" for key, found, wanted in sorted(info["mismatched_keys"])]
    if faults:
        raise ValueError(f"{folder}: not the CLIP of its config.json, {len(faults)} weights are missing or of another "
                         f"shape ({'; '.join(faults[:2])}); {mend}")
    return model.eval().requires_grad_(False)


@contextmanager
def _without_warnings():
    """Silences transformers' table of the weights that were not loaded: load_clip says it in a line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_tokenizer(folder: Path, vocab_size: int):
    """The folder's tokenizer; where it has none (PickScore_v1's), CLIP's own vocabulary, which open_clip ships."""
    from transformers import AutoTokenizer, CLIPTokenizer

    names = {path.name for path in folder.iterdir()} & {"tokenizer.json", "vocab.json", "merges.txt"}
    # looked for here: transformers makes a tokenizer of two words where the files are missing
    if names in (set(), {"vocab.json"}, {"merges.txt"}):
        tokenizer = CLIPTokenizer(*_clip_vocabulary())
        if len(tokenizer) != vocab_size:
            raise ValueError(f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt), and with "
                             f"{vocab_size} tokens the model's is not CLIP's own; fetch the folder again")
        return tokenizer
    try:
        for name in names - {"merges.txt"}:
            parse_json(read_text(folder / name), name)  # tokenizers raises a bare Exception instead
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason}); fetch {', '.join(sorted(names))} "
                         "again") from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {len(tokenizer)} tokens and its model {vocab_size}: they are of "
                         "different models")
    return tokenizer


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order), as in the vocab.json and merges.txt of CLIP's folders."""
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {renamed.get(token, token): i for token, i in bpe.encoder.items()}, list(bpe.bpe_ranks)
