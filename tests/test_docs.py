"""README and docs/: short, current, and true as far as names, links, flags and printed next commands go."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.geneval.evaluate import EvaluateConfig
from benchmark.sampling import SampleConfig
from benchmark.speed.end_to_end import EndToEndConfig
from benchmark.speed.plan import PlanConfig
from benchmark.speed.rollout import RolloutSpeedConfig
from docs import make_settings
from sample_c2i import ClassSampleConfig
from sample_t2i import PromptSampleConfig
from scripts.reward_server import ServerConfig
from test_t2i_rewards import FolderConfig, PromptChoice, RewardChoice
from trainer_utils.composition import CONFIGS, PromptConfig
from utils.config import key_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "benchmark" / "RESULTS.md"]
FLAGS = key_names(*CONFIGS, PromptConfig) | {"config"}
MORE = {SampleConfig, ClassSampleConfig, PromptSampleConfig, EvaluateConfig, PlanConfig, ServerConfig, FolderConfig,
        PromptChoice, RewardChoice, EndToEndConfig, RolloutSpeedConfig}
KNOWN = FLAGS.union(*(key_names(cls) for cls in MORE))


def test_readme_reads_in_one_breath():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_settings_are_those_of_the_code(monkeypatch):
    for name in ("REWARD_MODELS", "DEQA_URL", "UNIREWARD_URL", "QWENVL_URL", "GENEVAL_URL"):
        monkeypatch.delenv(name, raising=False)
    assert (ROOT / "docs" / "settings.md").read_text() == make_settings.page(), "run python -m docs.make_settings"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def commands(page: Path) -> list[str]:
    """Lines of code blocks and inline code that call a program of ours."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    pattern = re.compile(r"(?:^|\s)(?:bash|python|torchrun|sbatch)\s")
    return [line.split("  #")[0] for line in (*blocks, *inline) if pattern.search(" " + line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_programs_and_flags_that_exist(page):
    missing = []
    for command in commands(page):
        for module in re.findall(r"python -m ([\w.]+)", command):
            path = ROOT.joinpath(*module.split("."))
            if module not in ("pytest",) and not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
                                                  or path.is_dir()):
                missing.append(module)
        scripts = re.findall(r"(?:bash|python|sbatch[^|]*?|torchrun[^|]*?) ((?:\w+/)*\w+\.(?:sh|py|sbatch))", command)
        missing += [script for script in scripts if not (ROOT / script).is_file()]
        if re.search(r"run_\w+_train\.sh|train_\w+\.py|speed\.plan|test\.sh|test_t2i|eval\.sh", command):
            missing += [flag for flag in re.findall(r"--(\w+)", command) if flag not in KNOWN and flag not in (
                "nproc_per_node", "nodes", "help")]
    assert missing == []


def lines_of(file: str, names: list[str]) -> int:
    """Lines of functions (`f`) and methods (`Class.f`) of a file; each must be there."""
    lines = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        for part in [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", []):
            if isinstance(part, ast.FunctionDef):
                name = part.name if part is node else f"{node.name}.{part.name}"
                lines[name] = part.end_lineno - part.lineno + 1
    return sum(lines[name] for name in names)


def test_the_route_of_a_step_is_short_and_listed():
    spine, rest = (ROOT / "docs" / "architecture.md").read_text().split("The rest of it")
    counts, files = [], set()
    for text in (spine, rest):
        rows = [re.findall(r"`([^`]+)`", line) for line in text.splitlines() if re.match(r"\| `[\w/]+\.py` \|", line)]
        counts.append(sum(lines_of(file, names) for file, *names in rows))
        files |= {file for file, *_ in rows}
        assert len(rows) <= 5 or text is rest
    assert counts[0] <= 300 and sum(counts) <= 600 and len(files) <= 10
    assert f"({counts[0]} lines of 5 files" in spine and rest.startswith(f" ({sum(counts)} lines of 10 files")


def test_a_script_ends_with_a_next_command_that_works(tmp_path):
    """As README's sequence: samples in GenEval's folders, then their evaluation."""
    environment = os.environ | {"PYTHON": sys.executable, "SKIP_SETUP": "1", "OMP_NUM_THREADS": "1"}

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sampled = run(f"bash test_t2i.sh models/pretrained/shapes/gpt_t2i 0 base 2.0 --prompts_per_task 1 "
                  f"--num_images_per_prompt 1 --results_dir {tmp_path}")
    following = sampled.strip().splitlines()[-1]
    assert following.startswith("next: bash benchmark/geneval/eval.sh ")
    assert "single_object" in run(following.removeprefix("next: "))
