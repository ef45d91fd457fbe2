"""Load, check and save the weights of GPTs and VQ tokenizers.

Reads LlamaGen's files (.pt and the like; weights under "model", "module", "state_dict", "ema" or bare, also with
Lightning's "model." before each name), .safetensors files, AR-GRPO's checkpoint folders (`gpt_model.` is stripped; the
reference model and the tokenizer are left out) and our own folders (model.safetensors + model.json). Nothing that could
run code is ever unpickled. A file must fit the model key by key, and hold finite numbers; weights become float32,
whatever precision the file has. Optimizer state is the trainer's business.

Export a GPT to LlamaGen's format (an own folder needs no further flags):
    python -m models.checkpoint SRC DST.pt [--gpt_model GPT-XL --gpt_type t2i --cls_token_num 120 ...]
"""
import argparse
import json
import logging
import os
import pickle
import re
import struct
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.gpt import GPT, GPT_SIZES, GPTConfig, rope_table
from models.lora import merged_state
from models.vq import VQ_SIZES, VQConfig, VQModel
from utils.config import Parser, one_line_errors
from utils.files import read_object, refuse_compressed

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    name: str
    config: type
    model: type
    sizes: dict
    flag: str  # how a user names the size
    prefix: str  # of this model's keys in an AR-GRPO checkpoint
    core: tuple[str, ...]  # keys that tell the sizes apart, whatever the vocabulary or the kind of condition
    marker: str  # a key that only this kind of model has


KINDS = {
    "gpt": Kind("gpt", GPTConfig, GPT, GPT_SIZES, "--gpt_model", "gpt_model.", ("layers.",), "tok_embeddings.weight"),
    "vq": Kind("vq", VQConfig, VQModel, VQ_SIZES, "--vq_model", "vq_model.", ("encoder.", "decoder."),
               "quantize.embedding.weight"),
}
PARTS = ("model", "module", "state_dict", "ema", "model_ema", "ema_model")  # where a file keeps weights
AVERAGES = PARTS[3:]
AR_GRPO_PARTS = ("gpt_model.", "vq_model.", "ref_model.")
USAGE = "quantize.codebook_used"  # a counter of code usage: no weight, and not in every file
# Buffers that LlamaGen recomputes; a state dict taken after sampling may hold them.
RECOMPUTED = re.compile(r"(?:^|\.)(?:freqs_cis|causal_mask)$|\.kv_cache\.")
RELEASES = "LlamaGen's weights are at https://huggingface.co/FoundationVision/LlamaGen (c2i) and " \
           "https://huggingface.co/peizesun/llamagen_t2i (t2i)"
MAX_LAYERS, MAX_SIZE = 1024, 1 << 20  # that a model.json may ask for
MAX_NAMES = 10  # keys named per complaint
# What torch.load is seen to raise on damaged or foreign files, beside UnpicklingError.
DAMAGE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, OverflowError,
          AssertionError, struct.error)


def load_gpt(path: str | Path, name_or_config: str | GPTConfig | None = None, use_ema: bool = False,
             **overrides) -> GPT:
    """A GPT in float32 and eval mode. `name_or_config`: a row of GPT_SIZES, a config, or None to read model.json.
    use_ema: of a file that holds an average of the weights beside them ("ema"), the average.

    `overrides` are GPTConfig fields on top of it (block_size, model_type, cls_token_num, ...). The block size leaves no
    trace in the weights, so a wrong one can't be noticed here.
    """
    return _load(KINDS["gpt"], Path(path), name_or_config, overrides, use_ema)


def load_vq(path: str | Path, name_or_config: str | VQConfig | None = None, use_ema: bool = False,
            **overrides) -> VQModel:
    """A VQ tokenizer in float32 and eval mode, also out of an AR-GRPO checkpoint. Arguments as in `load_gpt`."""
    return _load(KINDS["vq"], Path(path), name_or_config, overrides, use_ema)


def save_model(folder: str | Path, model: GPT | VQModel, dtype: torch.dtype | None = None,
               weights: dict[str, Tensor] | None = None, **extra) -> None:
    """Write model.safetensors (cast to `dtype`) and model.json (kind, config, and `extra` as it is) into `folder`.

    weights: what stands for the model's own, as a copy of an earlier moment.

    Plain writes: whoever needs them to be atomic writes to a temporary folder and renames it.
    """
    kind = _kind_of(model)
    assert not extra.keys() & {"kind", "config"}, "kind and config are written by save_model itself"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(_cpu_state(merged_state(model) if weights is None else weights, dtype), folder / "model.safetensors",
                  metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(f"cannot write {folder / 'model.safetensors'}: {_first_line(error)}") from None
    manifest = {"kind": kind.name, "config": asdict(model.config), **extra}
    (folder / "model.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def require_checkpoint(path: str | Path) -> None:
    """A ValueError that says where to get weights if there are none at `path`; reads none."""
    _weight_files(Path(path))


def read_manifest(path: str | Path) -> dict | None:
    """model.json of one of our folders (or of the model.safetensors inside); None if there is none."""
    path = Path(path)
    if path.is_file() and path.name != "model.safetensors":
        return None
    file = (path if path.is_dir() else path.parent) / "model.json"
    return read_object(file) if file.is_file() else None


def export_llamagen(model: GPT | VQModel, path: str | Path) -> None:
    """Write LlamaGen's own format, {"model": state dict}, in one atomic step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"model": _cpu_state(merged_state(model), None)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _kind_of(model: nn.Module) -> Kind:
    kind = next((kind for kind in KINDS.values() if isinstance(model, kind.model)), None)
    assert kind is not None, f"neither a GPT nor a VQModel (unwrap it first): {type(model).__name__}"
    return kind


def _cpu_state(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    state = {}
    for name, tensor in weights.items():
        state[name] = tensor.detach().to("cpu", dtype or tensor.dtype, memory_format=torch.contiguous_format)
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} is not finite as {state[name].dtype}: the model was not saved")
    return state


def _load(kind: Kind, path: Path, name_or_config, overrides: dict, use_ema: bool) -> nn.Module:
    files = _weight_files(path)
    config = _resolve_config(kind, path, name_or_config, overrides)
    model = _empty(kind, path, config)
    state = {}
    for file in files:
        state.update(_read_tensors(file, use_ema))
    state = _own_part(state, kind, path)
    usage = state.pop(USAGE, None)
    shapes = _shapes(model.state_dict())
    usage_shape = shapes.pop(USAGE, None)
    _check_fit(kind, path, config, shapes, state)
    # A copy each: files may hold views of one buffer, and popping frees the file's tensor at once.
    weights = {name: state.pop(name).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
               for name in shapes}
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{path}: {_listed(broken)} holds NaN or infinite numbers: this model has diverged, or its "
                         "file is damaged; take another checkpoint")
    if usage_shape is not None:
        fits = usage is not None and tuple(usage.shape) == usage_shape
        weights[USAGE] = usage.float() if fits else torch.zeros(usage_shape)
    model.load_state_dict(weights, assign=True)
    if isinstance(model, GPT):
        model.rope = rope_table(config)  # not in the state dict, so still on the meta device
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor was left without values"
    return model.eval()


def _empty(kind: Kind, path: Path, config) -> nn.Module:
    """The model on the meta device: no memory and no time for an initialisation that is overwritten."""
    try:
        with torch.device("meta"):
            return kind.model(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: its configuration describes no {kind.name} model: {_first_line(error)}") from None


def _resolve_config(kind: Kind, path: Path, name_or_config, overrides: dict):
    if isinstance(name_or_config, kind.config):
        return replace(name_or_config, **overrides)
    names = ", ".join(kind.sizes)
    if name_or_config is not None:
        if name_or_config not in kind.sizes:
            raise ValueError(f"unknown size {name_or_config!r}: {kind.flag} is one of {names}")
        return kind.config(**{**kind.sizes[name_or_config], **overrides})
    manifest = read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path} has no model.json that tells its size: give {kind.flag}, one of {names}")
    if manifest.get("kind") != kind.name or not isinstance(manifest.get("config"), dict):
        raise ValueError(f"{path}: model.json describes kind {manifest.get('kind')!r}, expected {kind.name!r} "
                         "with its config")
    # JSON has no tuples; configs compare equal and hash only with them
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in manifest["config"].items()}
    hints = get_type_hints(kind.config)
    try:
        if misfits := [key for key, value in fields.items() if key in hints and not _fits(key, value, hints[key])]:
            raise ValueError(f"no plausible {_listed(misfits)}")
        return kind.config(**{**fields, **overrides})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: model.json is not usable: {_first_line(error)}") from None


def _fits(key: str, value, kind) -> bool:
    """A configuration's value is of its type, and a size is one: not every size is held against the weights, and the
    model is built before any is."""
    if isinstance(kind, types.UnionType):
        return any(_fits(key, value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) <= MAX_LAYERS and all(_fits(key, item, int) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value <= (MAX_LAYERS if key in ("n_layer", "num_res_blocks") else MAX_SIZE)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _weight_files(path: Path) -> list[Path]:
    """The file itself, or the weights in a folder: one file, or the shards that an index names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: put the file there or correct the path. {RELEASES}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise ValueError(f"{path} holds no model.safetensors, so it is no checkpoint folder")


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):  # never outside the folder
        raise ValueError(f"{index} has no usable weight_map")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {_listed(missing)}, which {index.name} names")
    return [index.parent / name for name in names]


def _read_tensors(file: Path, use_ema: bool) -> dict[str, Tensor]:
    """The named tensors of one file; everything else in it (steps, optimizer, arguments) is dropped. Of a file with
    several sets of weights the first of PARTS, or with use_ema the average, and a line says which."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, *DAMAGE) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {_first_line(error)}") from None
    data = _unpickle(file)
    held = [key for key in PARTS if isinstance(data, dict) and isinstance(data.get(key), dict)]
    averages = [key for key in held if key in AVERAGES]
    if use_ema and not averages:
        raise ValueError(f"{file} holds no average of its weights (under {' or '.join(AVERAGES)}): leave out --use_ema")
    if held:
        taken = averages[0] if use_ema else held[0]
        if averages and (held != averages or len(averages) > 1):
            others = ", ".join(key for key in held if key != taken)
            logger.info("%s holds several sets of weights: took %s, not %s%s", file, taken, others,
                        "" if use_ema else " (--use_ema takes the average)")
        data = data[taken]
    entries = data.items() if isinstance(data, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no weights, neither bare nor under {', '.join(PARTS)}")
    return tensors


def _unpickle(file: Path):
    refuse_compressed(file)
    # LlamaGen's training checkpoints carry their command line; a Namespace is inert
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            why = f"its pickle wants to use {wanted[1]}" if wanted else "it is no plain file of tensors"
            raise ValueError(f"{file} was refused and nothing in it was run: {why}. Only tensors are loaded; if you "
                             "trust its source, convert it to safetensors") from None
        except DAMAGE as error:
            raise ValueError(f"{file} is damaged or no PyTorch checkpoint: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def _own_part(state: dict[str, Tensor], kind: Kind, path: Path) -> dict[str, Tensor]:
    """Strip wrappers' prefixes; of an AR-GRPO checkpoint keep this kind's part only."""
    plain = {}
    for name, tensor in state.items():
        name = name.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in plain:
            raise ValueError(f"{path} holds {name} twice, under different prefixes")
        plain[name] = tensor
    if kind.marker not in plain and f"model.{kind.marker}" in plain:  # Lightning's: the attribute that held it
        plain = {name.removeprefix("model."): t for name, t in plain.items() if name.startswith("model.")}
    if any(name.startswith(AR_GRPO_PARTS) for name in plain):
        others = tuple(part for part in AR_GRPO_PARTS if part != kind.prefix)
        plain = {name.removeprefix(kind.prefix): t for name, t in plain.items() if not name.startswith(others)}
    return {name: t for name, t in plain.items() if not RECOMPUTED.search(name)}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_fit(kind: Kind, path: Path, config, expected: dict[str, tuple], state: dict[str, Tensor]) -> None:
    found = _shapes(state)
    misfits = [f"{name} (file {list(found[name])}, model {list(shape)})" for name, shape in expected.items()
               if name in found and found[name] != shape]
    misfits += [f"{name} (file has {state[name].dtype})" for name, shape in expected.items()
                if found.get(name) == shape and not state[name].is_floating_point()]
    complaints = (("missing", [name for name in expected if name not in found]),
                  ("unexpected", [name for name in found if name not in expected]), ("misshapen", misfits))
    text = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in complaints if names)
    if text:
        raise ValueError(f"{path} does not fit the {kind.name} model{_hint(kind, config, expected, found)}; {text}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _hint(kind: Kind, config, expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    """What the file seems to be instead, for the flags that are most often wrong."""
    other = next((o for o in KINDS.values() if o is not kind and o.marker in found), None)
    if other is not None and kind.marker not in found:
        return f": it looks like a {other.name} checkpoint"
    hints = []
    core = _core(found, kind)
    if core != _core(expected, kind):
        for name, size in kind.sizes.items():
            with torch.device("meta"):
                candidate = kind.model(kind.config(**size))
            if _core(_shapes(candidate.state_dict()), kind) == core:
                hints.append(f"it looks like {name}: {kind.flag} {name}")
    if kind.name == "gpt":
        file_type = "t2i" if "cls_embedding.uncond_embedding" in found else "c2i"
        if file_type != config.model_type and any(name.startswith("cls_embedding.") for name in found):
            hints.append(f"it is a {file_type} model: --gpt_type {file_type}")
    return f" ({'; '.join(hints)})" if hints else ""


def _core(shapes: dict[str, tuple], kind: Kind) -> dict[str, tuple]:
    return {name: shape for name, shape in shapes.items() if name.startswith(kind.core)}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Export a GPT checkpoint to LlamaGen's .pt format.")
    parser.add_argument("source", type=Path, help="any GPT checkpoint that load_gpt reads")
    parser.add_argument("target", type=Path, help="the .pt file to write")
    parser.add_argument("--gpt_model", choices=list(GPT_SIZES), help="not needed for folders with a model.json")
    parser.add_argument("--gpt_type", choices=["c2i", "t2i"], dest="model_type")
    for field in ("cls_token_num", "vocab_size", "num_classes", "caption_dim"):
        parser.add_argument(f"--{field}", type=int)
    overrides = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    source, target, name = (overrides.pop(key, None) for key in ("source", "target", "gpt_model"))
    export_llamagen(load_gpt(source, name, **overrides), target)
    print(f"wrote {target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
