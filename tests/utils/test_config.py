"""utils/config.py: flags and YAML become dataclasses; each mistake is one line that names it."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Literal, Optional

import pytest

from benchmark.geneval.evaluate import EvaluateConfig
from benchmark.sampling import SampleConfig
from benchmark.speed.end_to_end import EndToEndConfig
from benchmark.speed.plan import PlanConfig
from benchmark.speed.rewards import SpeedConfig
from benchmark.speed.rollout import RolloutSpeedConfig
from benchmark.speed.vq import VQSpeedConfig
from models.generate import SamplingConfig
from reward_utils.score_folder import ScoreConfig
from scripts.reward_server import ServerConfig
from trainer_utils.composition import CONFIGS, PromptConfig
from trainer_utils.grpo_config import GRPOConfig
from trainer_utils.pretraining import PretrainConfig
from utils import config
from utils.config import changeable, key_names, one_line_errors, parse_args, resolved


@dataclass(frozen=True)
class Train:
    num_generations: int = field(default=4, metadata={"help": "images per prompt, 100% of them"})
    learning_rate: float = 1e-5
    bf16: bool = False
    shuffle: bool = True
    scale_rewards: Literal["group", "batch", "none"] = "group"
    save_total_limit: Optional[int] = 2
    max_gap: float = float("inf")

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"num_generations {self.num_generations}:\nGRPO compares at least 2")


@dataclass(frozen=True)
class Model:
    gpt_ckpt: "str | None" = None
    cfg_scale: float = field(default=1.0, metadata={"aliases": ["--gen_cfg_cfg_scale"]})
    reward_funcs: list[str] = field(default_factory=lambda: ["strict"])
    reward_weights: tuple[float, ...] | None = None


def parse(*argv: str):
    return parse_args((Train, Model), list(argv), "test")


def refused(capsys, *argv: str, types=(Train, Model)) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_args(types, list(argv), "test")
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)

    def write(text: str) -> str:
        (tmp_path / "tiny.yaml").write_text(text)
        return "tiny"

    return write


def test_defaults_and_flags():
    assert parse() == (Train(), Model())
    train, model = parse("--num_generations", "8", "--reward_funcs", "a", "b", "--reward_weights", "1", "-0.5")
    assert train.num_generations == 8
    assert model.reward_funcs == ["a", "b"] and model.reward_weights == (1.0, -0.5)


@pytest.mark.parametrize("words, value", [([], True), (["true"], True), (["False"], False), (["0"], False)])
def test_booleans_bare_and_spelled(words, value):
    assert parse("--bf16", *words)[0].bf16 is value
    assert parse("--shuffle", *words, "--num_generations", "3")[0].shuffle is value


def test_none_and_aliases():
    train, model = parse(
        "--save_total_limit", "none", "--scale_rewards", "none", "--gen_cfg_cfg_scale", "4", "--reward_weights", "None"
    )
    assert train.save_total_limit is None and train.scale_rewards == "none"
    assert model.cfg_scale == 4.0 and model.reward_weights is None


def test_flags_override_yaml_by_name_and_by_path(preset, tmp_path):
    text = "# a preset\nlearning_rate: 1e-4\nnum_generations: 6\nreward_funcs: [a, b]\nsave_total_limit: null\n"
    name = preset(text + "gen_cfg_cfg_scale: 2\nbf16: yes\n")
    for given in (name, str(tmp_path / "tiny.yaml")):
        train, model = parse("--num_generations", "8", "--config", given)
        assert train == Train(num_generations=8, learning_rate=1e-4, bf16=True, save_total_limit=None)
        assert model == Model(cfg_scale=2.0, reward_funcs=["a", "b"]) and isinstance(model.cfg_scale, float)


def test_empty_yaml_gives_the_defaults(preset):
    assert parse("--config", preset("# nothing\n")) == (Train(), Model())


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--num_generation", "8"], ["--num_generation;", "did you mean --num_generations?"]),
        (["--num-generations=8"], ["--num-generations;", "did you mean --num_generations?"]),
        (["c2i_shapes"], ["'c2i_shapes'", "--config"]),
        (["--num_generations"], ["--num_generations", "expected one argument"]),
        (["--num_generations", "8.5"], ["--num_generations", "whole number", "'8.5'"]),
        (["--learning_rate", "abc"], ["--learning_rate", "a number", "'abc'"]),
        (["--learning_rate", "nan"], ["--learning_rate", "'nan'"]),
        (["--learning_rate", "none"], ["--learning_rate", "'none'"]),
        (["--bf16", "maybe"], ["--bf16", "true or false", "'maybe'"]),
        (["--scale_rewards", "grup"], ["--scale_rewards", "group, batch, none", "'grup'"]),
        (["--num_generations", "1"], ["num_generations 1: GRPO compares at least 2"]),
        (["--config", "absent"], ["--config absent", "no such"]),
    ],
)
def test_wrong_flags(capsys, argv, parts):
    error = refused(capsys, *argv)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    "text, parts",
    [
        ("bf16: true\nlearning_rat: 1", ["tiny.yaml line 2", "'learning_rat'", "did you mean learning_rate?"]),
        ("learning_rate: abc", ["tiny.yaml line 1", "'learning_rate'", "a number", "'abc'"]),
        ("learning_rate: true", ["'learning_rate'", "True"]),
        ("learning_rate: [1, 2]", ["'learning_rate'", "[1, 2]"]),
        ("num_generations: 8.0", ["'num_generations'", "8.0"]),
        ("bf16: 1.0", ["'bf16'", "true or false"]),
        ("gpt_ckpt: 5", ["'gpt_ckpt'", "quotes"]),
        ("reward_weights: [1, x]", ["'reward_weights'", "'x'"]),
        ("cfg_scale: 1\ngen_cfg_cfg_scale: 2", ["line 2", "'cfg_scale' is given twice"]),
        ("- a\n- b", ["tiny.yaml", "key: value"]),
        ("a: [1", ["tiny.yaml", "YAML"]),
        ("gpt_ckpt: !!python/object/apply:os.getcwd []", ["tiny.yaml", "python/object"]),
    ],
)
def test_wrong_yaml(capsys, preset, text, parts):
    error = refused(capsys, "--config", preset(text))
    assert all(part in error for part in parts), error


def test_unknown_preset_names_the_closest(capsys, preset):
    preset("")
    assert "did you mean tiny?" in refused(capsys, "--config", "tinny")


def test_required_fields(capsys):
    @dataclass
    class Sample:
        ckpt: str

    assert "--ckpt" in refused(capsys, types=(Sample,))
    assert parse_args((Sample,), ["--ckpt", "5"], "")[0].ckpt == "5"


def test_stored_defaults_stand_below_preset_and_flags(preset, capsys):
    def stored(given):
        assert given["learning_rate"] == 1e-4 and "bf16" not in given
        return {"num_generations": 6, "learning_rate": 9.0, "cfg_scale": 3, "gpt_ckpt": "x", "foreign": 1}

    argv = ["--config", preset("learning_rate: 1e-4"), "--cfg_scale", "2"]
    train, model = parse_args((Train, Model), argv, defaults=stored)
    assert train == Train(num_generations=6, learning_rate=1e-4) and model == Model(gpt_ckpt="x", cfg_scale=2.0)

    def broken(given):
        return {"bf16": "perhaps"}

    with pytest.raises(SystemExit):
        parse_args((Train, Model), [], defaults=broken)
    assert capsys.readouterr().err == "error: stored setting 'bf16': expected true or false, got 'perhaps'\n"


def test_a_preset_of_another_script(preset, capsys):
    path = preset("num_generations: 8\ngen_cfg_cfg_scale: 2\nbf16: true")
    assert key_names(Model) == {"gpt_ckpt", "cfg_scale", "gen_cfg_cfg_scale", "reward_funcs", "reward_weights"}
    (train,) = parse_args((Train,), ["--config", path], ignored_keys={*key_names(Model), "num_generations"})
    assert train == Train(bf16=True)
    with pytest.raises(SystemExit):
        parse_args((Train,), ["--config", preset("cfg_scal: 2")], ignored_keys=key_names(Model))
    assert "unknown key 'cfg_scal'; did you mean cfg_scale?" in capsys.readouterr().err


def test_an_empty_config_is_none():
    assert parse("--config", "") == (Train(), Model())


def test_a_name_in_two_dataclasses_is_a_programming_error():
    @dataclass
    class Other:
        bf16: bool = True

    with pytest.raises(AssertionError, match="bf16"):
        parse_args((Train, Other), [], "")


def test_help_prints_percent_signs_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "100% of them (default: 4)" in out and "--gen_cfg_cfg_scale" in out


def test_resolved_is_flat_strict_json():
    flat = resolved(*parse("--reward_weights", "1", "2"))
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    assert flat["reward_weights"] == [1.0, 2.0] and flat["max_gap"] == "inf" and flat["gpt_ckpt"] is None


class Guarded(ValueError):
    exit_code = 1


@pytest.mark.parametrize("mistake, code", [
    (ValueError("two\nlines"), 2), (FileNotFoundError("two lines"), 2),  # bad input
    (OSError("two lines"), 1), (Guarded("two lines"), 1)])  # a failure on the way
def test_one_line_errors(capsys, monkeypatch, mistake, code):
    @one_line_errors()
    def main():
        raise mistake

    monkeypatch.delenv("ARGRPO_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code and capsys.readouterr().err == "error: two lines\n"
    monkeypatch.setenv("ARGRPO_DEBUG", "1")
    with pytest.raises(type(mistake)):
        main()


def test_one_line_errors_leaves_bugs_alone():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a bug")


# ---- what a field says of its flag -----------------------------------------------------------------------------------

ALL_CONFIGS = (*CONFIGS, PromptConfig, SampleConfig, PretrainConfig, ServerConfig, ScoreConfig, EvaluateConfig,
               RolloutSpeedConfig, EndToEndConfig, VQSpeedConfig, SpeedConfig, PlanConfig)


@pytest.mark.parametrize("cls", ALL_CONFIGS, ids=lambda cls: cls.__name__)
def test_every_flag_has_a_help_text(cls):
    assert [field.name for field in dataclasses.fields(cls) if field.init and not field.metadata.get("help")] == []


def test_what_may_change_on_resume_is_said_by_the_fields():
    names = changeable(*CONFIGS)
    leaner = {"gradient_checkpointing", "micro_batch_size", "head_chunk_tokens", "offload", "num_threads", "sharding"}
    assert leaner <= names and {"exit_step", "eval_steps", "max_bad_updates", "reward_servers"} <= names
    assert not names & {"learning_rate", "beta", "cfg_scale", "num_generations", "reward_funcs", "dtype", "gpt_ckpt",
                        "data_seed", "guidance_logprob", "lora_rank", "reward_dtype"}


def test_ranges_and_choices_are_held_wherever_a_configuration_is_made():
    for error, make in (("beta must be at least 0, got -1", lambda: GRPOConfig(beta=-1)),
                        ("scale_rewards must be one of group, batch, none, got 'all'",
                         lambda: GRPOConfig(scale_rewards="all")),
                        ("micro_batch_size must be at least 1, got 0", lambda: GRPOConfig(micro_batch_size=0)),
                        ("temperature must be a number above 0, got 0", lambda: SamplingConfig(temperature=0)),
                        ("learning_rate must be at least 0, got nan", lambda: GRPOConfig(learning_rate=math.nan))):
        with pytest.raises(ValueError, match=re.escape(error)):
            make()
    GRPOConfig(micro_batch_size="auto", epsilon_high=None, save_total_limit=None)


def test_help_keeps_the_lines_of_the_description_and_names_groups(capsys):
    with pytest.raises(SystemExit):
        parse_args((GRPOConfig,), ["--help"], "First line.\n\n    an example\n    another")
    text = capsys.readouterr().out
    assert "    an example\n    another" in text and "The objective and the training loop:" in text
    assert "--scale_rewards group|batch|none" in text and "default: 8)" in text


def test_relative_paths_of_presets_count_from_the_project(tmp_path, monkeypatch):
    """Those of flags count from the current folder."""
    weights = "models/pretrained/shapes/vq"
    monkeypatch.chdir(config.PROJECT)
    assert config.from_project(weights) == weights
    monkeypatch.chdir(tmp_path)
    assert config.from_project([weights, "shapes"]) == [str(config.PROJECT / weights), "shapes"]
    assert config.from_project("pretrained_models/c2i.pt") == str(config.PROJECT / "pretrained_models/c2i.pt")
    assert config.from_project("google/flan-t5-xl") == "google/flan-t5-xl"
    parsed = parse_args(CONFIGS, ["--config", "c2i_shapes", "--gpt_ckpt", "mine/gpt"])
    assert parsed[1].vq_ckpt == str(config.PROJECT / weights) and parsed[1].gpt_ckpt == "mine/gpt"
    assert config.same_setting(weights, str(config.PROJECT / weights)) and not config.same_setting("a/b", "a/c")
