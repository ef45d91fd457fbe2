"""What a training run writes: config.json, metrics.jsonl, TensorBoard events, sample grids, checkpoints.

Everything that a later process relies on is written to a temporary name, flushed to the disk and renamed, so that a
kill at any moment leaves either the old file or the new one. A checkpoint carries the SHA-256 of each of its files; a
damaged one is named and passed over. Leaves out: what a checkpoint contains (the caller writes it), and the lock that
keeps a second process out (utils/lock.py).
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Collection
from pathlib import Path

from utils.atomic import TEMPORARY, atomic_write_bytes, atomic_write_text, fsync
from utils.config import same_setting
from utils.files import inside, parse_json, read_text

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_REPLACED = ".replaced"
_PICTURE_SIZE = 128  # pictures smaller than this are enlarged in the grids, so that captions fit under them
_CAPTION_LINES = 4  # for each paragraph of a caption


class RunFolder:
    """One run's folder. Constructing it on an existing run resumes that run, if the configuration allows it.

    may_change: settings that may differ from the stored ones. defaults: of settings that did not exist when the run
    began, which must still have them.
    """

    def __init__(self, path, config: dict, report_to=("tensorboard",), may_change: Collection[str] = (),
                 defaults: dict | None = None):
        self.path = Path(path)
        self._tensorboard = _wants_tensorboard(report_to)
        self._writer = None
        self._waiting: dict[str, list[str]] = {}  # file -> lines that the disk did not take
        self._first_step = 0  # TensorBoard hides what an earlier process logged from here on
        config = json.loads(json.dumps(config))  # tuples become lists, as in the stored one
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_changes(config, may_change, json.loads(json.dumps(defaults or {})))
            self._clean_up()
            atomic_write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise ValueError(
                f"cannot write to the run folder {self.path} ({error.strerror}): choose another --output_dir"
            ) from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl; numbers that JSON lacks (NaN, infinities) become null."""
        assert "step" not in metrics, "'step' is given by itself, not as a metric"
        numbers = {key: float(value) for key, value in metrics.items()}
        line = {"step": step, **{key: value if math.isfinite(value) else None for key, value in numbers.items()}}
        self._append("metrics.jsonl", line)
        if self._tensorboard:
            self._log_tensorboard(step, numbers)

    def event(self, event: str, **details) -> None:
        """Appends a line to events.jsonl: what is rare, and never forgotten (`truncate` leaves it)."""
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **details}
        self._append("events.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        """A full disk must not end a run: lines wait until there is room, and no half of one is left."""
        path, waiting = self.path / name, self._waiting.setdefault(name, [])
        waiting.append(json.dumps(line, allow_nan=False) + "\n")
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(waiting))
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            logger.warning("%s cannot be written (%s): its lines wait until it can", path, error.strerror)
        else:
            waiting.clear()

    def truncate(self, step: int) -> None:
        """Forgets what was logged after `step` (-1: everything): a killed run logs further than its checkpoint."""
        self.close()
        self._first_step = step + 1
        path, waiting = self.path / "metrics.jsonl", self._waiting.get("metrics.jsonl", [])
        waiting[:] = [line for line in waiting if (_step_of_line(line) or 0) <= step]
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        steps = [_step_of_line(line) for line in lines]
        if None in steps:
            logger.warning("%s: dropping unreadable lines (a kill in the middle of a write leaves one)", path)
        kept = [line + "\n" for line, number in zip(lines, steps) if number is not None and number <= step]
        try:
            atomic_write_text(path, "".join(kept))
        except OSError as error:  # readers take the later of two lines of a step
            logger.warning("%s keeps lines of steps that are done again (%s)", path, error.strerror)

    def save_checkpoint(self, step: int, write: Callable[[Path], None], total_limit: int | None = None) -> Path:
        """`write(folder)` fills a temporary folder, which becomes checkpoint-STEP once all of it is on the disk.
        When anything fails, the temporary folder goes and the older checkpoints stay."""
        try:
            write(self.open_checkpoint(step))
            return self.commit_checkpoint(step, total_limit)
        finally:
            self.abandon_checkpoint()

    def open_checkpoint(self, step: int) -> Path:
        """An empty temporary folder for the files of checkpoint-STEP; `commit_checkpoint` makes it one."""
        temporary = self.path / f"{TEMPORARY}checkpoint-{step}"
        temporary.mkdir()
        return temporary

    def commit_checkpoint(self, step: int, total_limit: int | None = None) -> Path:
        assert total_limit is None or total_limit >= 1, f"total_limit {total_limit} would keep no checkpoint"
        final = self.path / f"checkpoint-{step}"
        temporary = self.path / f"{TEMPORARY}{final.name}"
        _seal(temporary)
        _replace_folder(temporary, final)
        if total_limit is not None:
            self._delete_old(step, total_limit)
        return final

    def abandon_checkpoint(self) -> None:
        """Removes what was opened and not committed."""
        for temporary in self.path.glob(f"{TEMPORARY}checkpoint-*"):
            shutil.rmtree(temporary, ignore_errors=True)

    def latest_checkpoint(self, before: int | None = None) -> tuple[Path, int] | None:
        """The newest checkpoint whose checksums hold, and its step; of the steps below `before`."""
        for step, folder in sorted(self._checkpoints().items(), reverse=True):
            if before is not None and step >= before:
                continue
            damage = checkpoint_damage(folder)
            if damage is None:
                return folder, step
            logger.warning("checkpoint %s is damaged (%s): using the one before it, if there is any", folder, damage)
        return None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: a run that went back must not resume from them."""
        for later, folder in self._checkpoints().items():
            if later > step:
                shutil.rmtree(folder, ignore_errors=True)

    def attempt_from(self, step: int) -> int:
        """How often the run has gone back, by its last return to `step`; 0: never to there."""
        path, attempt = self.path / "events.jsonl", 0
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line of a killed run; other events
                line = json.loads(text)
                attempt = int(line["attempt"]) if line["to"] == step else attempt
        return attempt

    def save_grid(self, step: int, images, captions: list[str], columns: int) -> Path:
        """images: uint8 numpy [N, H, W, 3] -> samples/step_000123.png, each picture with its caption under it."""
        path = self.path / "samples" / f"step_{step:06d}.png"
        encoded = io.BytesIO()
        _grid(images, captions, columns).save(encoded, format="PNG")
        try:
            path.parent.mkdir(exist_ok=True)
            atomic_write_bytes(path, encoded.getvalue())
        except OSError as error:  # a picture less is no reason to stop
            logger.warning("%s was not written (%s)", path, error.strerror)
        return path

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # of events that a full disk did not take: told when they were written
                writer.close()

    def _log_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._first_step, flush_secs=10)
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
        except OSError as error:
            self._tensorboard = False
            logger.warning("TensorBoard's events end here: %s", error)

    def _refuse_changes(self, config: dict, may_change: Collection[str], defaults: dict) -> None:
        path = self.path / "config.json"
        if not path.exists():
            return
        try:
            stored = dict(parse_json(read_text(path), path.name))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --run_name") from error
        if "dtype" in config and "dtype" not in stored:  # until November 2026 bf16 said it alone
            stored["dtype"] = "bfloat16" if stored.get("bf16") else "float32"
        stored = {name: value for name, value in defaults.items() if name in config} | stored
        resized = ("images_per_update",) if stored.get("num_processes") != config.get("num_processes") else ()
        changes = [
            f"{key}: {_shown(stored, key)} -> {_shown(config, key)}"
            for key in sorted(stored.keys() | config.keys())
            if key not in may_change and key not in resized and not same_setting(stored.get(key), config.get(key))
        ]
        if changes:
            raise ValueError(
                f"{self.path} holds a run with another configuration ({'; '.join(changes)}): "
                "give the old values to resume it, or another --run_name to start a new run"
            )

    def _clean_up(self) -> None:
        """Mends what a killed process left: half-written files, and a checkpoint caught while it was replaced."""
        for leftover in self.path.glob(f"{TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        for old in self.path.glob(f"checkpoint-*{_REPLACED}"):
            final = old.with_name(old.name.removesuffix(_REPLACED))
            if final.exists():
                shutil.rmtree(old)
            else:
                old.rename(final)

    def _checkpoints(self) -> dict[int, Path]:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in self.path.iterdir()]
        return {int(match[1]): folder for match, folder in matches if match and folder.is_dir()}

    def _delete_old(self, saved: int, total_limit: int) -> None:
        others = {step: folder for step, folder in self._checkpoints().items() if step != saved}
        # A step beyond the one just saved was damaged, or this run would have resumed from it: it goes first.
        order = sorted(others, key=lambda step: (step < saved, step))
        for step in order[: max(0, len(order) - (total_limit - 1))]:
            shutil.rmtree(others[step])


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        checksums = parse_json(read_text(folder / CHECKSUMS), CHECKSUMS)
        if not checksums:
            return f"{CHECKSUMS} names no file"
        for name, expected in checksums.items():
            if _sha256(inside(folder, name, CHECKSUMS)) != expected:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or folder / CHECKSUMS).relative_to(folder)}: {error.strerror}"
    except (ValueError, AttributeError):  # not JSON, not text, or not a mapping
        return f"{CHECKSUMS} is unreadable"
    return None


def _seal(folder: Path) -> None:
    """Adds checksums.json and waits until all of the folder is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files, f"nothing was written into {folder}"
    checksums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def _replace_folder(temporary: Path, final: Path) -> None:
    # A folder cannot be renamed onto a full one, so a checkpoint of the same step steps aside first.
    old = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _step_of_line(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _shown(config: dict, key: str) -> str:
    return json.dumps(config[key]) if key in config else "(absent)"


def _wants_tensorboard(report_to) -> bool:
    names = {report_to} if isinstance(report_to, str) else set(report_to)
    if unknown := names - {"tensorboard", "none"}:
        raise ValueError(f"--report_to {' '.join(sorted(unknown))}: expected tensorboard or none")
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--report_to tensorboard: install tensorboard, or give --report_to none")
    return "tensorboard" in names


def _grid(images, captions: list[str], columns: int):
    from PIL import Image, ImageDraw, ImageFont

    assert images.ndim == 4 and images.shape[3] == 3 and str(images.dtype) == "uint8", "images: uint8 [N, H, W, 3]"
    assert len(captions) == len(images) > 0 and columns >= 1, f"{len(images)} images, {len(captions)} captions"
    scale = max(1, round(_PICTURE_SIZE / max(images.shape[1:3])))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    font = ImageFont.load_default(size=11)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    num_letters = max(8, int(width / measure("n", font=font)))
    texts = [_wrapped(caption, num_letters) for caption in captions]
    text_height = 6 + 14 * max(text.count("\n") + 1 for text in texts)
    gap = 6
    num_rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, num_rows * (height + text_height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for index, (pixels, text) in enumerate(zip(images, texts)):
        cell = Image.new("RGB", (width, height + text_height), "white")  # clips words wider than the picture
        cell.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
        ImageDraw.Draw(cell).multiline_text((1, height + 2), text, fill="black", font=font, spacing=2)
        row, column = divmod(index, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + row * (height + text_height + gap)))
    return sheet


def _wrapped(caption: str, num_letters: int) -> str:
    paragraphs = caption.splitlines() or [""]
    wrap = [textwrap.wrap(part, num_letters, max_lines=_CAPTION_LINES, placeholder=" ...") for part in paragraphs]
    return "\n".join(line for lines in wrap for line in lines)
