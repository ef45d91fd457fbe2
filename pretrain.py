"""Pretrains what reinforcement learning starts from: tokenizer, feature network, text encoder and GPTs.

    python pretrain.py                                # every stage on the shapes world: rebuilds the shipped weights
    python pretrain.py --stage c2i                    # one stage; a killed stage continues where it was saved
    python pretrain.py --data IMAGENET/train --stage vq --vq_model VQ-16 --image_size 256 --output_dir my_weights

Stages, in order: vq (tokenizer on pixels), features (classifier for FID), text (tiny T5, shapes only), c2i, t2i.
Leaves out the adversarial and perceptual losses of full-size tokenizers and training on several devices: for ImageNet
scale start from LlamaGen's released weights.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dataset import shapes
from dataset.images import load_images
from dataset.labels import load_class_names
from models.checkpoint import load_vq, save_model
from models.generate import SamplingConfig
from models.gpt import GPT, GPT_SIZES, GPTConfig
from models.policy import Policy
from models.text import TextEncoder, make_tiny_t5
from models.vq import VQ_SIZES, VQConfig, VQModel
from reward_utils.inception import ShapesFeatures
from trainer_utils.pretraining import (
    STAGES,
    VALIDATION_SEED,
    PretrainConfig,
    autocast,
    batch_indices,
    device,
    fit,
    save_state,
    stage_settings,
    to_pixels,
)
from utils.config import one_line_errors, parse_args

NO_DROPOUT = dict(token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
SHAPES_GPT = {"c2i": dict(n_layer=4, n_head=6, dim=192, multiple_of=64, **NO_DROPOUT),
              "t2i": dict(n_layer=4, n_head=4, dim=256, multiple_of=64, cls_token_num=16, uncond_token_num=16,
                          caption_dim=64, **NO_DROPOUT)}


# ---------------------------------------------------------------------------------------------- tokenizer


def train_vq(config: PretrainConfig) -> None:
    torch.manual_seed(config.seed)
    vq = VQModel(VQConfig(**VQ_SIZES[config.vq_model])).to(device())
    images = load_images(config.data, "c2i", config.image_size, config.seed)
    captioned = images
    if config.data == "shapes":
        captioned = load_images("shapes", "t2i", config.image_size, config.seed + 1)
    steps, batch_size, *_ = stage_settings(config, "vq")
    usage = torch.zeros(vq.config.codebook_size, device=device())

    def loss_fn(step: int):
        indices = batch_indices(config, "vq", step, batch_size, len(images))
        halves = [images.batch(indices[: batch_size // 4])[0], captioned.batch(indices[batch_size // 4:])[0]]
        pixels = to_pixels(np.concatenate(halves))
        if step % 10 == 0:
            with torch.no_grad():
                latents = vq.latents(pixels)
                usage.add_(torch.bincount(vq.quantize.nearest(latents).flatten(), minlength=len(usage)))
                if step % 50 == 0 and 0 < step < steps // 2:
                    revive_unused_codes(vq, usage, latents)
                    usage.zero_()
        with autocast(config):
            reconstruction, codebook_loss = vq(pixels)
        error = (reconstruction.float() - pixels).abs()
        loss = (error * pixel_weights(pixels)).mean() + codebook_loss.float()
        return loss, {"l1": error.detach().mean(), "codes": (usage > 0).sum()}

    fit(config, "vq", vq, loss_fn)
    sample = batch_indices(config, "vq", steps, 256, min(256, len(captioned)))
    vq = without_near_copies(vq.eval(), to_pixels(captioned.batch(sample)[0])) if vq.config.local else vq.eval()
    save_model(Path(config.output_dir) / "vq", vq, dtype=torch.float16)
    held_out = load_images(config.data, "c2i", config.image_size, VALIDATION_SEED)
    held_out, _ = held_out.batch(range(min(256, len(images))))
    with torch.no_grad():
        ids = vq.encode(to_pixels(held_out))
        mse = F.mse_loss(vq.decode(ids).clamp(-1, 1), to_pixels(held_out)).item()
    print(f"vq: PSNR {10 * math.log10(4 / mse):.2f} dB on held-out images, {ids.unique().numel()} codes in use")


def pixel_weights(pixels: Tensor) -> Tensor:
    """Up-weights what differs from each image's median colour: plain L1 starves small objects. [N, 1, H, W]."""
    background = pixels.flatten(2).median(dim=2).values[..., None, None]  # [N, 3, 1, 1]
    return 1 + 4 * ((pixels - background).abs().amax(1, keepdim=True) > 0.2).float()


def revive_unused_codes(vq: VQModel, usage: Tensor, latents: Tensor) -> None:
    """Moves codes that no position chose since the last call onto the worst quantised latents of this batch.

    Random latents would be mostly background, and a background of many near-equal codes is noise that the GPT must
    model.
    """
    dead = (usage == 0).nonzero().squeeze(1)
    if not len(dead):
        return
    error = (vq.quantize.normalize(latents.permute(0, 2, 3, 1))
             - vq.quantize.lookup(vq.quantize.nearest(latents)).permute(0, 2, 3, 1))  # [N, h, w, E]
    pool = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [n, E]
    chosen = error.pow(2).sum(-1).flatten().multinomial(min(len(dead), len(pool)))
    vq.quantize.embedding.weight[dead[: len(chosen)]] = vq.quantize.normalize(pool[chosen])


@torch.no_grad()
def without_near_copies(vq: VQModel, pixels: Tensor, max_distance: float = 0.15) -> VQModel:
    """The same tokenizer without the codes that lie within `max_distance` (squared) of a more used one.

    Flat areas end up spread over many near-equal codes. On shapes, 512 codes become about 170, the token entropy falls
    by two nats, and reconstructions stay as good.
    """
    used = torch.bincount(vq.encode(pixels).flatten(), minlength=vq.config.codebook_size)
    codebook, kept = vq.quantize.codebook(), []
    for code in used.argsort(descending=True, stable=True).tolist():
        if not kept or (codebook[kept] - codebook[code]).pow(2).sum(-1).min() >= max_distance:
            kept.append(code)
    kept.sort()
    smaller = VQModel(dataclasses.replace(vq.config, codebook_size=len(kept))).to(pixels.device).eval()
    smaller.load_state_dict({**vq.state_dict(), "quantize.embedding.weight": codebook[kept]})
    return smaller


# ---------------------------------------------------------------------------------------------- feature network


def train_features(config: PretrainConfig) -> None:
    if config.data != "shapes":
        raise ValueError("--stage features is for the shapes world; other data use --features inception")
    torch.manual_seed(config.seed)
    net = ShapesFeatures().to(device())
    images = load_images("shapes", "c2i", config.image_size, config.seed)
    batch_size = stage_settings(config, "features").batch_size

    def loss_fn(step: int):
        batch, conditions = images.batch(batch_indices(config, "features", step, batch_size, len(images)))
        labels = torch.tensor([c.class_id for c in conditions], device=device())
        _, logits = net(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device()))
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(-1) == labels).float().mean()}

    fit(config, "features", net, loss_fn)
    path = Path(config.output_dir) / "features.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    held_out, conditions = load_images("shapes", "c2i", config.image_size, VALIDATION_SEED).batch(range(1000))
    with torch.no_grad():
        predicted = net.eval()(torch.from_numpy(held_out).permute(0, 3, 1, 2).to(device()))[1].argmax(-1).cpu()
    accuracy = (predicted == torch.tensor([c.class_id for c in conditions])).float().mean().item()
    print(f"features: {accuracy:.1%} of held-out images classified right")


# ---------------------------------------------------------------------------------------------- text encoder


def caption_attributes(record: dict) -> list[int]:
    """What the pooled caption features must tell: count, then (shape, colour) of two groups, then the relation."""
    values = [sum(group["count"] for group in record["include"])]
    for i in range(2):
        group = record["include"][i] if i < len(record["include"]) else {}
        values.append(1 + shapes.SHAPES.index(group["class"]) if group else 0)
        values.append(1 + shapes.COLORS.index(group["color"]) if "color" in group else 0)
    relations = [group["position"][0] for group in record["include"] if "position" in group]
    values.append(1 + ("left of", "right of", "above", "below").index(relations[0]) if relations else 0)
    return values


def train_text(config: PretrainConfig) -> None:
    """Trains the tiny T5 so that the MEAN over caption slots tells the scene linearly.

    In LlamaGen's GPT the caption slots carry no position, so image tokens attend to them uniformly: what the mean
    doesn't separate ("a square left of a star" and the reverse), the GPT can hardly use.
    """
    if config.data != "shapes" or config.t5_path is not None:
        raise ValueError("--stage text trains the shapes world's own encoder; other data take a --t5_path such as "
                         "google/flan-t5-xl")
    folder = Path(config.output_dir) / "t5"
    words = sorted({word for record in shapes.all_prompts() for word in record["prompt"].split()})
    make_tiny_t5(folder, words, seed=config.seed)
    # float32, where a GPU's default is bf16: these weights are trained
    encoder = TextEncoder(str(folder), max_length=config.t5_length, device=device(), dtype=torch.float32)
    model = encoder.model.requires_grad_(True).train()
    heads = nn.Linear(model.config.d_model, 5 + 2 * (5 + 9) + 5).to(device())
    sizes = [5, 5, 9, 5, 9, 5]
    batch_size = stage_settings(config, "text").batch_size

    def logits_of(records: list[dict]) -> tuple[Tensor, Tensor]:
        batch = encoder.tokenizer([r["prompt"] for r in records], padding=True, return_tensors="pt").to(device())
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask[..., None]
        target = torch.tensor([caption_attributes(r) for r in records], device=device())  # [N, 6]
        return heads((states * mask).sum(1) / mask.sum(1)), target

    def loss_fn(step: int):
        rng = np.random.default_rng((config.seed, step))
        logits, target = logits_of([shapes.sample_record(rng, "train") for _ in range(batch_size)])
        parts = logits.split(sizes, dim=-1)
        right = torch.stack([part.argmax(-1) == t for part, t in zip(parts, target.T)]).all(0).float().mean()
        return sum(F.cross_entropy(part, t) for part, t in zip(parts, target.T)), {"all_right": right}

    fit(config, "text", nn.ModuleList([model, heads]), loss_fn)
    with torch.no_grad():
        logits, target = logits_of(shapes.split_prompts("test"))
    right = torch.stack([part.argmax(-1) == t for part, t in zip(logits.split(sizes, -1), target.T)]).all(0)
    model.save_pretrained(folder)
    print(f"text: every attribute of {right.float().mean().item():.1%} of the held-out captions read from the mean")


# ---------------------------------------------------------------------------------------------- transformers


@dataclass
class TokenData:
    tokens: Tensor  # int64 [M, L]
    prompts: list[str]
    class_ids: list[int | None]


@torch.no_grad()
def tokenize(config: PretrainConfig, kind: str, vq: VQModel, seed: int, num_images: int) -> TokenData:
    images = load_images(config.data, kind, config.image_size, seed)
    tokens, conditions = [], []
    for start in tqdm(range(0, min(num_images, len(images)), 256), desc=f"tokenize {kind}", mininterval=5):
        batch, described = images.batch(range(start, min(start + 256, num_images, len(images))))
        with autocast(config):
            tokens.append(vq.encode(to_pixels(batch)).flatten(1).cpu())  # [256, L]
        conditions += described
    return TokenData(torch.cat(tokens), [c.prompt for c in conditions], [c.class_id for c in conditions])


def cached_tokens(config: PretrainConfig, kind: str, vq: VQModel) -> TokenData:
    """The training tokens; kept in the work folder, and made anew when the tokenizer or the data changed."""
    num_images = stage_settings(config, kind).num_images
    key = f"{config.data} {config.image_size} {num_images} {config.seed} {vq_fingerprint(vq)}"
    path = Path(config.work_dir) / f"tokens_{kind}.pt"
    if path.exists():
        stored = torch.load(path, weights_only=True)
        if stored.pop("key") == key:
            return TokenData(**stored)
    data = tokenize(config, kind, vq, config.seed + 2, num_images)
    save_state(path, {"key": key, **dataclasses.asdict(data)})
    return data


def vq_fingerprint(vq: VQModel) -> float:
    return sum(p.double().abs().sum().item() for p in vq.parameters())


def make_gpt(config: PretrainConfig, kind: str, num_tokens: int, num_classes: int, vq: VQModel) -> GPT:
    if config.gpt_model == "shapes":
        fields = SHAPES_GPT[kind]
    else:
        fields = {**GPT_SIZES[config.gpt_model], **({"cls_token_num": config.t5_length} if kind == "t2i" else {})}
    torch.manual_seed(config.seed)
    return GPT(GPTConfig(**fields, model_type=kind, vocab_size=vq.config.codebook_size, block_size=num_tokens,
                         num_classes=num_classes)).to(device())


def train_gpt(config: PretrainConfig, kind: str) -> None:
    vq = load_vq(Path(config.output_dir) / "vq").to(device()).eval()
    data = cached_tokens(config, kind, vq)
    encoder = None
    if kind == "t2i":
        path = config.t5_path or str(Path(config.output_dir) / "t5")
        encoder = TextEncoder(path, max_length=config.t5_length, device=device())
    num_classes = len(load_class_names(config.data)) if kind == "c2i" else 1000
    gpt = make_gpt(config, kind, data.tokens.shape[1], num_classes, vq)
    policy = Policy(gpt, vq, SamplingConfig(), encoder)
    encode = condition_table(policy, data, kind)
    settings = stage_settings(config, kind)

    def loss_fn(step: int):
        rows = torch.from_numpy(batch_indices(config, kind, step, settings.batch_size, len(data.tokens)))
        condition, mask = encode(rows)
        dropped = torch.rand(len(rows), device=device()) < gpt.config.class_dropout_prob
        null = gpt.null_condition(len(rows)).to(condition.dtype)
        condition = torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), null, condition)
        tokens = data.tokens[rows].to(device())
        with autocast(config):
            logits = gpt(condition, tokens[:, :-1], mask)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), {}

    fit(config, kind, gpt, loss_fn)
    save_model(Path(config.output_dir) / f"gpt_{kind}", gpt, dtype=torch.float16)
    print_condition_gap(config, policy, kind)
    if config.data == "shapes":
        print_strict(policy, kind, config.eval_images)


def condition_table(policy: Policy, data: TokenData, kind: str):
    """rows -> the condition batch of those images; each distinct caption is encoded once for the whole training."""
    if kind == "c2i":
        class_ids = torch.tensor(data.class_ids)
        return lambda rows: (class_ids[rows].to(device()), None)
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(data.prompts))}
    parts = [policy.text_encoder.encode(list(unique)[i: i + 256]) for i in range(0, len(unique), 256)]
    embeddings, masks = (torch.cat(part) for part in zip(*parts))  # [U, T, C], [U, T]
    index = torch.tensor([unique[prompt] for prompt in data.prompts])
    return lambda rows: (embeddings[index[rows]].to(device()), masks[index[rows]].to(device()))


@torch.no_grad()
def print_condition_gap(config: PretrainConfig, policy: Policy, kind: str) -> None:
    """Validation nats per image with the true, no, and another image's condition: is the condition used at all?"""
    data = tokenize(config, kind, policy.vq, VALIDATION_SEED, config.eval_images)
    encode, tokens = condition_table(policy, data, kind), data.tokens.to(device())
    rows, gpt = torch.arange(len(tokens)), policy.gpt.eval()

    def nats(condition: Tensor, mask: Tensor | None) -> float:
        logits = gpt(condition, tokens[:, :-1], mask)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item() * tokens.shape[1]

    condition, mask = encode(rows)
    true, none = nats(condition, mask), nats(gpt.null_condition(len(rows)), mask)
    shuffled = nats(*encode(rows.roll(1)))
    print(f"{kind}: validation nats per image: true condition {true:.2f}, none {none:.2f}, shuffled {shuffled:.2f} "
          f"(gap {shuffled - true:.2f})")


def print_strict(policy: Policy, kind: str, num_images: int) -> None:
    """The exact detector's strict score of samples, with its standard error, at guidance 1 and 2."""
    if kind == "c2i":
        conditions = [shapes.class_condition(i) for i in range(len(shapes.CLASS_NAMES))]
    else:
        rng = np.random.default_rng(VALIDATION_SEED)
        conditions = [shapes.prompt_condition(shapes.sample_record(rng, "test")) for _ in range(num_images // 4)]
    repeats = max(1, num_images // len(conditions))
    for scale in (1.0, 2.0):
        policy.sampling = SamplingConfig(cfg_scale=scale)
        scores = {}
        for start in range(0, len(conditions), 32):
            part = conditions[start: start + 32]
            seeds = range(start * repeats, (start + len(part)) * repeats)
            images = policy.decode(policy.sample(*policy.encode(part), seeds, repeats).tokens)
            for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
                record = part[i // repeats].metadata
                scores.setdefault(record["tag"], []).append(shapes.strict_score(shapes.detect(image), record))
        tasks = {task: float(np.mean(values)) for task, values in scores.items()}
        mean, error = np.mean(list(tasks.values())), 0.5 / math.sqrt(num_images)
        print(f"{kind}: strict {mean:.3f} (standard error at most {error:.3f}) at guidance {scale}: "
              + ", ".join(f"{task} {value:.2f}" for task, value in sorted(tasks.items())))


def run(config: PretrainConfig) -> None:
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    runners = {"vq": train_vq, "features": train_features, "text": train_text,
               "c2i": lambda c: train_gpt(c, "c2i"), "t2i": lambda c: train_gpt(c, "t2i")}
    for stage in STAGES if config.stage == "all" else (config.stage,):
        runners[stage](config)


if __name__ == "__main__":
    with one_line_errors():
        run(*parse_args((PretrainConfig,), description=__doc__))
