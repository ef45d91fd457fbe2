"""Command line and YAML presets -> dataclass instances, with one-line errors for users' mistakes.

The flags are the dataclasses' field names (`--num_generations 8`); `--config NAME_OR_PATH` reads a flat YAML mapping of
the same names as defaults, and flags override it. Every value, from either side, goes through one converter chosen by
the field's annotation: bool, int, float, str, Literal[...], Literal[...] | int, Optional of these, list[...] and
tuple[..., ...] of these.
Plain argparse only splits the words: HfArgumentParser would import transformers to print --help, and takes YAML values
unchecked. Leaves out: nested configurations, abbreviations of flags, and values read from the environment.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from utils.files import compose_yaml, one_line, yaml_value

PROJECT = Path(__file__).resolve().parent.parent
CONFIG_DIR = PROJECT / "configs"
DEBUG_VARIABLE = "ARGRPO_DEBUG"
STATUS_VARIABLE = "ARGRPO_STATUS_DIR"  # where scripts/run_workers.py looks for each process's error
INTERRUPTED = "stopped by Ctrl-C: what is finished is kept, the same command goes on from there"

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# annotation -> (words for the error, YAML types taken as they are, reader of text)
_SCALARS = {
    bool: ("true or false", (bool,), lambda text: _BOOLS[text.lower()]),
    int: ("a whole number", (int,), int),
    float: ("a number", (int, float), float),
    str: ("text (in YAML: put it in quotes)", (str,), str),
}


def flag(default: Any = dataclasses.MISSING, help: str = "", *, least: float | None = None, above: float | None = None,
         aliases: tuple[str, ...] = (), resume: bool = False, secret: bool = False):
    """A configuration field that says all about its flag; without a default the flag is required.

    default: a value, or a function that makes it (for lists, and for what the environment says). Choices are a Literal
    annotation; least, above: the range. `check_flags` holds both; None always passes. aliases: other names. resume:
    whether it may change when a run goes on. secret: never shown nor stored.
    """
    known = dict(help=help, least=least, above=above, aliases=aliases, resume=resume, secret=secret)
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, repr=not secret, metadata=known)


def check_flags(config) -> None:
    """ValueError for a value outside of its field's choices or range; for `__post_init__`."""
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, known = field.name, getattr(config, field.name), field.metadata
        kind, _ = _without_none(kinds[name])
        if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        if not isinstance(value, (int, float)):  # none, or a word such as auto
            continue
        if known.get("least") is not None and not value >= known["least"]:
            raise ValueError(f"{name} must be at least {known['least']}, got {value}")
        if known.get("above") is not None and not known["above"] < value < math.inf:
            raise ValueError(f"{name} must be a number above {known['above']}, got {value}")


def changeable(*dataclass_types: type) -> set[str]:
    """Names of the fields that may change when a run goes on."""
    return {field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.metadata.get("resume")}


def defaults_of(*dataclass_types: type) -> dict[str, Any]:
    """Field -> default, as `resolved` writes it; required fields are left out."""
    fields = [field for cls in dataclass_types for field in dataclasses.fields(cls) if not _is_required(field)]
    return {field.name: _json_ready(_default(field)) for field in fields}


class _Option(NamedTuple):
    """One field of one dataclass, seen as a flag and as a YAML key."""

    name: str
    kind: Any  # the resolved annotation
    owner: type
    field: dataclasses.Field
    aliases: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaint is one line of the form that all scripts have."""

    def error(self, message: str):
        _record_failure(2, message)
        self.exit(2, f"error: {one_line(message, None)}\n")  # argparse's own prints the whole usage first


def parse_args(dataclass_types: tuple[type, ...], argv: list[str] | None = None, description: str = "",
               defaults: Callable[[dict], dict] | None = None, ignored_keys: Collection[str] = ()) -> tuple:
    """One instance per dataclass type. A mistake ends the process: one line on stderr, exit status 2.

    defaults(given values) -> values for fields that neither flags nor the preset give; other names in it are passed
    over. ignored_keys: what a preset may hold for another script, see `key_names`.
    """
    options = _options(dataclass_types)
    parser = _build_parser(options, description)
    flags, unknown = parser.parse_known_args(argv)
    given = vars(flags)
    try:
        if unknown:
            raise ValueError(_unknown_flag(unknown[0], options))
        preset = given.pop("config", None)
        values = _read_preset(preset, options, ignored_keys) if preset else {}  # --config "": none
        for name, words in given.items():
            values[name] = _convert_at(f"flag --{name}", words, options[name].kind)
        stored = defaults(values) if defaults is not None else {}
        for name in options.keys() & stored.keys() - values.keys():
            values[name] = from_project(_convert_at(f"stored setting {name!r}", stored[name], options[name].kind))
        return tuple(_build(cls, options, values) for cls in dataclass_types)
    except ValueError as error:
        parser.error(str(error))


def from_project(value):
    """A preset's or checkpoint's relative path counts from the project's folder; other values are as they are.

    In that folder itself paths stay as they are written, and so does what is no path there, such as a hub's name.
    """
    if isinstance(value, list):
        return [from_project(item) for item in value]
    if not isinstance(value, str) or Path.cwd() == PROJECT or "/" not in value or Path(value).is_absolute():
        return value
    known = (PROJECT / value).exists() or value.startswith("pretrained_models/")
    return str(PROJECT / value) if known else value


def same_setting(first, second) -> bool:
    """Whether two settings are equal, paths counted from the project's folder."""
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return all(map(same_setting, first, second))
    if isinstance(first, str) and isinstance(second, str) and "/" in first + second:
        return os.path.join(PROJECT, first) == os.path.join(PROJECT, second)
    return first == second


def key_names(*dataclass_types: type) -> set[str]:
    """Every name that a preset for these types may hold, aliases included."""
    return set(_all_names(_options(dataclass_types)))


def resolved(*instances) -> dict[str, Any]:
    """All fields of all instances as one flat mapping that json.dumps takes as it is; secrets are left out."""
    flat: dict[str, Any] = {}
    for instance in instances:
        for field in dataclasses.fields(instance):
            assert field.name not in flat, f"two configurations share the field {field.name!r}"
            if not field.metadata.get("secret"):
                flat[field.name] = _json_ready(getattr(instance, field.name))
    return flat


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main (as `with` or as a decorator): ValueError and OSError become `error: ...` on stderr and
    Ctrl-C `stopped ...`, one line each, and the exit status of `exit_code`. ARGRPO_DEBUG=1 shows the traceback instead.
    Of several processes, each leaves its error where the launcher finds it, bugs' too."""
    try:
        with contextlib.ExitStack() as stack:
            stack.push(_record_error)
            yield
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        sys.stderr.write(f"{INTERRUPTED}\n" if isinstance(error, KeyboardInterrupt) else
                         f"error: {one_line(error, None)}\n")
        raise SystemExit(exit_code(error)) from None


def exit_code(error: BaseException) -> int:
    """2: a user's mistake, in flags or files; 1: a failure on the way; 130, as shells have it: Ctrl-C. An error that
    knows better carries an `exit_code`."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    mistake = isinstance(error, (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
                                 PermissionError))
    return getattr(error, "exit_code", 2 if mistake else 1)


def _record_error(kind: type | None, error: BaseException | None, traceback) -> None:
    """An exit callback: leaves an error for the launcher and lets it pass."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code:
            _record_failure(code, error.code if isinstance(error.code, str) else "")
    elif error is not None:
        message = str(error) if isinstance(error, (ValueError, OSError)) else f"{kind.__name__}: {error}"
        _record_failure(exit_code(error), message or kind.__name__, getattr(error, "consequence", False))


def _record_failure(code: int, message: str, consequence: bool = False) -> None:
    """code: the exit status to come; consequence: another process's end is behind it. The first record stays."""
    if not os.environ.get(STATUS_VARIABLE):
        return
    path = Path(os.environ[STATUS_VARIABLE]) / f"rank_{os.environ.get('RANK', 0)}"
    record = {"pid": os.getpid(), "time_sec": time.time(), "code": code, "message": one_line(message, None),
              "consequence": consequence}
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid():
            return
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record), encoding="utf-8")
        part.replace(path)


def _options(dataclass_types: tuple[type, ...]) -> dict[str, _Option]:
    options: dict[str, _Option] = {}
    taken = {"config", "help"}
    for cls in dataclass_types:
        kinds = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            aliases = tuple(alias.lstrip("-") for alias in field.metadata.get("aliases", ()))
            for name in (field.name, *aliases):
                assert name not in taken, f"{cls.__name__}.{field.name}: the flag --{name} is already taken"
                taken.add(name)
            options[field.name] = _Option(field.name, kinds[field.name], cls, field, aliases)
    return options


def _build_parser(options: dict[str, _Option], description: str) -> Parser:
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="%(prog)s [--config NAME_OR_PATH] [--FLAG VALUE ...]")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a preset of configs/ by name, or a YAML file")
    groups: dict[type, Any] = {}
    for option in options.values():
        if option.owner not in groups:
            groups[option.owner] = parser.add_argument_group(_title(option.owner))
        names = [f"--{name}" for name in (option.name, *option.aliases)]
        inner, _ = _without_none(option.kind)
        arity = {"nargs": "?", "const": "true"} if inner is bool else {"nargs": "+"} if _is_list(inner) else {}
        groups[option.owner].add_argument(
            *names, dest=option.name, metavar=_metavar(inner), help=_help(option.field), **arity
        )
    return parser


def described(cls: type) -> tuple[str, list[tuple[str, str, str, bool, str]]]:
    """(title, [(flags, values, default, whether it may change on resume, help), ...]) of a configuration, in words."""
    rows = []
    for option in _options((cls,)).values():
        flags = ", ".join(f"`--{name}`" for name in (option.name, *option.aliases))
        default = "required" if _is_required(option.field) else _shown_default(option.field)
        rows.append((flags, _metavar(_without_none(option.kind)[0]), default,
                     bool(option.field.metadata.get("resume")), option.field.metadata.get("help", "")))
    return _title(cls), rows


def _help(field: dataclasses.Field) -> str:
    text = field.metadata.get("help", "")
    if _is_required(field):
        return f"{text} (required)".replace("%", "%%")
    if field.metadata.get("secret"):  # its default comes from the environment
        return text.replace("%", "%%")
    return f"{text} (default: {_shown_default(field)})".replace("%", "%%")


def _shown_default(field: dataclasses.Field) -> str:
    default = None if field.metadata.get("secret") else _default(field)
    if default is None or default == []:
        return "none"
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _title(cls: type) -> str:
    """A group's heading: the first line of the class's docstring, or its name (dataclasses make one of the fields)."""
    text = cls.__doc__ or cls.__name__
    return cls.__name__ if text.startswith(f"{cls.__name__}(") else text.splitlines()[0].rstrip(".")


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _metavar(kind) -> str:
    """The value's name in --help; also refuses, at start-up, annotations that the converter does not know."""
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if _is_union(kind):
        return "|".join(map(_metavar, get_args(kind)))
    if _is_list(kind) and get_args(kind)[1:] in ((), (...,)):
        return _metavar(get_args(kind)[0])
    assert kind in _SCALARS, f"configuration fields cannot have the type {kind}"
    return kind.__name__.upper()


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown_flag(word: str, options: dict[str, _Option]) -> str:
    if not word.startswith("-"):
        return f"unexpected word {word!r}: options start with --, as in --config {word}"
    name = word.split("=")[0].lstrip("-")
    return f"unknown flag --{name}{_closest(name, ['config', *_all_names(options)], '--')}"


def _all_names(options: dict[str, _Option]) -> dict[str, str]:
    """Every accepted name (aliases included) -> the field's name."""
    return {name: option.name for option in options.values() for name in (option.name, *option.aliases)}


def _closest(name: str, names, prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{matches[0]}?" if matches else "; --help lists all names"


def _preset_path(name_or_path: str) -> Path:
    preset = CONFIG_DIR / f"{name_or_path}.yaml"
    if preset.is_file():
        return preset
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    names = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
    hint = _closest(name_or_path, names) if names else ""
    raise ValueError(f"--config {name_or_path}: no such file, and no such preset in {CONFIG_DIR}{hint}")


def _read_preset(name_or_path: str, options: dict[str, _Option], ignored_keys: Collection[str]) -> dict[str, Any]:
    path = _preset_path(name_or_path)
    names = _all_names(options)
    values: dict[str, Any] = {}
    for line, key, value in _yaml_items(path):
        if key in ignored_keys:
            continue
        if key not in names:
            raise ValueError(f"{path} line {line}: unknown key {key!r}{_closest(key, [*names, *ignored_keys])}")
        if names[key] in values:
            raise ValueError(f"{path} line {line}: {names[key]!r} is given twice")
        converted = _convert_at(f"{path} line {line}, key {key!r}", value, options[names[key]].kind)
        values[names[key]] = from_project(converted)
    return values


def _yaml_items(path: Path) -> list[tuple[int, str, Any]]:
    """(line, key, value) of a flat mapping, in order. Duplicate keys, which safe_load merges silently, stay visible."""
    root = compose_yaml(path)
    if root is None:  # an empty file, or comments only
        return []
    if root.id != "mapping":
        raise ValueError(f"{path} is no preset: expected lines of the form 'key: value'")
    return [(key.start_mark.line + 1, one_line(str(yaml_value(key, path))), yaml_value(value, path))
            for key, value in root.value]


def _convert_at(where: str, value, kind):
    try:
        return _convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(value, kind):
    """A YAML value or a flag's words, as the annotation asks."""
    inner, optional = _without_none(kind)
    words = value[0] if isinstance(value, list) and len(value) == 1 else value
    if optional and (words is None or (isinstance(words, str) and words.lower() == "none")):
        return None
    if _is_list(inner):
        items = value if isinstance(value, list) else [value]
        return get_origin(inner)(_convert(item, get_args(inner)[0]) for item in items)
    if _is_union(inner):
        words, scalar = get_args(inner)
        return value if value in get_args(words) else _scalar(value, scalar, f"{_metavar(words)} or ")
    if get_origin(inner) is Literal:
        return _choice(value, get_args(inner))
    return _scalar(value, inner)


def _choice(value, choices: tuple):
    for choice in choices:
        if str(choice) == str(value):  # flags are text even where the choices are numbers
            return choice
    raise ValueError(f"expected one of {', '.join(map(str, choices))}, got {value!r}")


def _scalar(value, kind: type, alternative: str = ""):
    expected, accepted, read = _SCALARS[kind]
    problem = f"expected {alternative}{expected}, got {value!r}"
    if isinstance(value, str):  # YAML reads 1e-4 as text, so text is read by the annotation there too
        try:
            result = read(value)
        except (ValueError, KeyError):
            raise ValueError(problem) from None
    elif isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):  # a bool is an int in Python
        try:
            result = kind(value)
        except OverflowError:  # a whole number beyond every float
            raise ValueError(f"expected {alternative}{expected}, got a number without end") from None
    else:
        raise ValueError(problem)
    if kind is float and math.isnan(result):
        raise ValueError(problem)
    return result


def _without_none(kind) -> tuple[Any, bool]:
    """Optional[X] -> (X, True); X -> (X, False)."""
    if not _is_union(kind):
        return kind, False
    inner = [part for part in get_args(kind) if part is not types.NoneType]
    union = len(inner) == 2 and get_origin(inner[0]) is Literal and inner[1] in _SCALARS
    assert union or len(inner) == 1, f"configuration fields cannot have the type {kind}"
    return Union[tuple(inner)], len(inner) < len(get_args(kind))


def _is_union(kind) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_list(kind) -> bool:
    return get_origin(kind) in (list, tuple)


def _build(cls: type, options: dict[str, _Option], values: dict[str, Any]):
    own = [option for option in options.values() if option.owner is cls]
    missing = [f"--{option.name}" for option in own if _is_required(option.field) and option.name not in values]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}: give it as a flag or in the --config file")
    return cls(**{option.name: values[option.name] for option in own if option.name in values})


def _json_ready(value):
    if dataclasses.is_dataclass(value):
        return resolved(value)
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)  # JSON has no infinity; the text reads back as the same float
    return value
