"""Which model is meant: MODEL_NAME and STEP of the test scripts -> one checkpoint and the settings that come with it.

    find_model("c2i_shapes", "latest")                        # the newest checkpoint of checkpoints/c2i_shapes
    find_model("c2i_shapes", "base")                          # what that run started from, with the run's settings
    find_model("pretrained_models/c2i_XL_384.pt", "base")     # any file: STEP is a label; its size comes from flags

Loads no weights: that is models/build.py.
"""
import re
from dataclasses import dataclass, fields
from pathlib import Path

from models.build import PolicyConfig, stored_settings
from models.checkpoint import read_manifest
from models.generate import SamplingConfig
from models.gpt import GPTConfig
from models.vq import VQConfig
from utils.files import read_object

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json")
MAX_NAMES = 20  # of runs or steps, listed in an error
SETTINGS = {field.name for cls in (PolicyConfig, SamplingConfig) for field in fields(cls)}


@dataclass(frozen=True)
class Model:
    name: str  # of the run, folder or file, for the results' folder
    step: str  # a number, or a label
    gpt_ckpt: str
    settings: dict  # fields of PolicyConfig and SamplingConfig that come with the checkpoint


def find_model(model: str, step: str, runs_dir: str = "checkpoints") -> Model:
    """A run's name goes before a path of the same name."""
    run = Path(runs_dir) / model
    path = run if run.is_dir() else Path(model)
    if not path.exists():
        raise ValueError(f"no model {model}: no such file or folder, and no such run in {runs_dir}; runs there: "
                         f"{_listed(_runs(Path(runs_dir)))}")
    if path.is_dir() and not any((path / name).is_file() for name in WEIGHT_FILES):
        return _of_run(path, step)
    if not re.fullmatch(r"[\w.+-]+", step):
        raise ValueError(f"STEP {step!r} names a part of the results' folder: use letters, digits and . _ + - only")
    return Model(_label(path.resolve()), step, str(path), checkpoint_settings(path))


def checkpoint_settings(path: Path) -> dict:
    """What a folder of ours says about itself, and for a folder of pretrain.py what lies beside it; else empty."""
    manifest = read_manifest(path)
    if manifest is None:
        return {}
    policy, sampling = stored_settings(path)
    return {**(policy or _settings_beside(path, manifest)), **sampling, "gpt_model": None}  # model.json knows its size


def _of_run(path: Path, step: str) -> Model:
    config = _run_config(path)
    steps = _steps(path)
    has_base = "gpt_ckpt" in config
    if not steps and not has_base:
        raise ValueError(f"{path} is no checkpoint (it holds none of {', '.join(WEIGHT_FILES[:2])}) and no run (it "
                         "holds no checkpoint-STEP)")
    name = path.resolve().name
    if step in ("0", "base") and has_base:
        return Model(name, step, config["gpt_ckpt"], config)
    if step == "latest" and steps:
        step = str(steps[-1])
    if step not in map(str, steps):
        there = [*map(str, steps), *(["base"] if has_base else [])]
        raise ValueError(f"the run {path} has no step {step}; there: {_listed(there)}")
    folder = path / f"checkpoint-{step}"
    return Model(name, step, str(folder), {**config, **checkpoint_settings(folder)})


def _run_config(path: Path) -> dict:
    """The settings in a run's config.json; empty for AR-GRPO's folders, which have none of ours."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    config = read_object(file)
    return {key: value for key, value in config.items() if key in SETTINGS}


def _settings_beside(path: Path, manifest: dict) -> dict:
    """pretrain.py puts vq, t5 and features.safetensors (shapes only) beside its GPT folders."""
    folder = (path if path.is_dir() else path.parent).parent
    config = _config(GPTConfig, path, manifest)
    settings = {"gpt_type": config.model_type, "num_classes": config.num_classes}
    if (folder / "vq" / "model.json").is_file():
        downsample = _config(VQConfig, folder / "vq", read_manifest(folder / "vq")).downsample
        settings |= {"vq_ckpt": str(folder / "vq"), "image_size": config.grid[0] * downsample}
    if (folder / "t5").is_dir():
        settings["t5_path"] = str(folder / "t5")
    if (folder / "features.safetensors").is_file():
        settings["class_names"] = "shapes"
    return settings


def _config(cls: type, path: Path, manifest: dict):
    try:  # JSON has no tuples
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in manifest["config"].items()})
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: model.json does not describe a {cls.__name__.removesuffix('Config')} "
                         f"({error})") from None


def _steps(path: Path) -> list[int]:
    matches = [re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in path.iterdir() if folder.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def _runs(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and ("gpt_ckpt" in _run_config(path)
                                                                               or _steps(path)))


def _label(path: Path) -> str:
    if re.fullmatch(r"checkpoint-\d+", path.name):
        return f"{path.parent.name}-{path.name}"
    return path.stem if path.is_file() else path.name


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none") + more
