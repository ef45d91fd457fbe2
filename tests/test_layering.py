"""The layers of the design and the sizes that keep files readable, read from the syntax trees; nothing is imported.

A new module needs a row in ALLOWED only where its package's row is too narrow for it.
"""
import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("utils", "models", "dataset", "reward_utils", "trainer_utils", "benchmark", "scripts")
EVERYTHING = None

# module or package -> the modules or packages of ours that it may import; the longest matching row counts
ALLOWED = {
    "train_c2i": EVERYTHING, "train_t2i": EVERYTHING, "sample_c2i": EVERYTHING, "sample_t2i": EVERYTHING,
    "pretrain": EVERYTHING, "test_t2i_rewards": EVERYTHING,
    "utils": {"utils"},
    "models": {"utils"},  # a model file without a row of its own is a leaf among models
    "models.decoder": {"models.gpt", "models.graphs", "models.head", "models.kernels"},
    "models.kernels": {"models.decoder", "models.generate", "models.gpt"},
    "models.generate": {"models.decoder", "models.gpt", "models.graphs", "models.kernels", "utils"},
    "models.lora": {"models.gpt", "models.head", "utils"},
    "models.policy": {"models.decoder", "models.generate", "models.gpt", "models.head", "models.streams", "models.vq",
                      "models.text"},
    "models.checkpoint": {"models.lora", "models.gpt", "models.vq", "models.text", "utils"},
    "models.build": {"models.checkpoint", "models.generate", "models.gpt", "models.policy", "models.text", "utils"},
    "dataset": {"dataset", "utils"},
    "dataset.encode_prompts": {"dataset", "models.text", "utils"},
    "reward_utils": {"reward_utils", "dataset", "utils"},
    "img_gen_grpo_rewards": {"reward_utils", "dataset", "utils"},
    "fid_evaluation": {"reward_utils.inception", "reward_utils.fid_math", "utils"},
    "trainer_utils": {"trainer_utils", "models", "dataset", "utils"},
    "trainer_utils.rollout": {"dataset", "img_gen_grpo_rewards", "models", "utils"},
    "trainer_utils.composition": {"trainer_utils", "models", "dataset", "utils", "img_gen_grpo_rewards",
                                  "reward_utils.settings"},
    "grpo_trainer": {"trainer_utils", "img_gen_grpo_rewards", "models", "dataset", "utils"},
    "benchmark": {"benchmark", "trainer_utils", "dataset", "reward_utils", "img_gen_grpo_rewards", "fid_evaluation",
                  "models", "utils"},
    "benchmark.speed": {"benchmark", "grpo_trainer", "trainer_utils", "dataset", "img_gen_grpo_rewards", "models",
                        "reward_utils", "utils"},
    "scripts": set(),
    "scripts.reward_server": {"reward_utils", "img_gen_grpo_rewards", "utils"},
    "scripts.crosscheck": {"reward_utils"},
}
ENTRY_POINTS = ("train_c2i", "train_t2i", "sample_c2i", "sample_t2i", "pretrain", "fid_evaluation",
                "test_t2i_rewards")
MAY_USE_TORCH_DISTRIBUTED = {"grpo_trainer", "utils.distributed", "scripts.run_workers"}  # the last: torchrun
# style.md: about 400 lines a file
MAX_FILE_LINES, MAX_LINE, MAX_PARAMETERS, MAX_FUNCTION_LINES = 450, 120, 8, 60
LONGER_FUNCTIONS = {("grpo_trainer", "GRPOTrainer.train"): 100}
# The tensors of one decode step (Triton's kernels have no limit); the terms of the objective, six by name alone.
MORE_PARAMETERS = {("models.kernels", "feed"): 9, ("trainer_utils.objective", "grpo_loss"): 10}


# ---- what is there ---------------------------------------------------------------------------------------------------

@functools.cache
def sources():
    """{module name: path} of the project's own code."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return {module_name(path): path for path in sorted(paths)}


@functools.cache
def checked_tests():
    return {module_name(path): path for path in sorted((ROOT / "tests").rglob("*.py")) if "golden" not in path.parts}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(module, path):
    """Dotted names that the file imports, anywhere in it; `from a import b` gives a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if node.level else []
            parents = parents[:len(parents) - node.level + 1]
            origin = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def own_imports(module, path, known):
    """Modules of ours among them: `from dataset.shapes import render` is dataset.shapes.render if that is a module."""
    found = set()
    for name in imported_names(module, path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} - {"", module}
    return found


def is_within(module, area):
    return module == area or module.startswith(area + ".")


def allowed_row(module):
    rows = [row for row in ALLOWED if is_within(module, row)]
    assert rows, f"{module}: no row in ALLOWED; say there what it may import"
    return ALLOWED[max(rows, key=len)]


def functions(node, prefix=""):
    """(qualified name, function) for every function of a tree, nested ones and methods too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = prefix + child.name
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from functions(child, name + ".")
        else:
            yield from functions(child, prefix)


def is_main_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def broken(check, files=None):
    """What check(module, path) finds in all files, one line each."""
    files = sources() if files is None else files
    return "\n".join(finding for module, path in files.items() for finding in check(module, path))


# ---- the rules -------------------------------------------------------------------------------------------------------

def forbidden_imports(module, path):
    allowed = allowed_row(module)
    if allowed is EVERYTHING:
        return
    for name in sorted(own_imports(module, path, sources())):
        if not any(is_within(name, area) for area in allowed):
            yield f"{module} imports {name}; allowed: {', '.join(sorted(allowed)) or 'nothing of ours'}"


def script_imports(module, path):
    """No script imports another: what they share has a room below them."""
    scripts = {*ENTRY_POINTS, *(name for name in sources() if is_within(name, "scripts"))}
    scripts -= {"fid_evaluation"}  # a library too, as ADM's evaluations are
    for name in sorted(own_imports(module, path, sources()) & scripts):
        yield f"{module} imports the script {name}"


def borrowed_tests(module, path):
    """Nor does a test file import another: what tests share is in conftest.py or a helper's file."""
    if path.name.startswith("test_"):
        for name in sorted(own_imports(module, path, sources() | checked_tests())):
            if name.rpartition(".")[2].startswith("test_") and is_within(name, "tests"):
                yield f"{module} imports {name}"


def distributed_uses(module, path):
    if module in MAY_USE_TORCH_DISTRIBUTED:
        return
    uses = any(is_within(name, "torch.distributed") for name in imported_names(module, path))
    uses |= any(isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
                for node in ast.walk(tree(path)))
    if uses:
        yield f"{module} uses torch.distributed; go through utils.distributed"


def oversizes(module, path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield f"{module} has {len(lines)} lines; at most {MAX_FILE_LINES}"
    yield from (f"{module}:{i} has {len(line)} characters; at most {MAX_LINE}"
                for i, line in enumerate(lines, start=1) if len(line) > MAX_LINE)
    for name, function in functions(tree(path)):
        length = function.end_lineno - function.lineno + 1
        if length > LONGER_FUNCTIONS.get((module, name), MAX_FUNCTION_LINES):
            yield f"{module}.{name} has {length} lines"
        args = function.args
        parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]
        count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
        is_kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
        if not is_kernel and count > MORE_PARAMETERS.get((module, name), MAX_PARAMETERS):
            yield f"{module}.{name} has {count} parameters; at most {MAX_PARAMETERS}, beyond that a config"


def broad_excepts(module, path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in types):
                yield f"{module}:{node.lineno} catches everything; name the errors"


def library_prints(module, path):
    """Entry points may print; a library module only in main() or under its main guard."""
    if module in ENTRY_POINTS or is_within(module, "scripts"):
        return
    allowed = {id(inner) for node in ast.iter_child_nodes(tree(path))
               if is_main_guard(node) or isinstance(node, ast.FunctionDef) and node.name == "main"
               for inner in ast.walk(node)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and id(node) not in allowed:
            yield f"{module}:{node.lineno} prints; library code returns, logs or raises"


@functools.cache
def shell_scripts():
    return [path.read_text(encoding="utf-8") for folder in (".", "benchmark", "scripts")
            for path in (ROOT / folder).glob("*.sh")]


def is_entry_point(module, path):
    """A script of the table, or a file with a main guard whose command stands in its docstring or a shell script."""
    if module in ENTRY_POINTS:
        return True
    texts = [ast.get_docstring(tree(path)) or "", *shell_scripts()]
    command = rf"(python|python3}}\") (-m {re.escape(module)}|{re.escape(str(path.relative_to(ROOT)))})\b"
    return any(map(is_main_guard, tree(path).body)) and any(re.search(command, text) for text in texts)


def reachable():
    """Modules that some entry point imports, directly or not; importing a.b runs a too."""
    todo = [module for module, path in sources().items() if is_entry_point(module, path)]
    seen = set()
    while todo:
        module = todo.pop()
        if module in seen or module not in sources():
            continue
        seen.add(module)
        todo += [*own_imports(module, sources()[module], sources()), module.rpartition(".")[0]]
    return seen


# ---- the tests -------------------------------------------------------------------------------------------------------

def test_imports_go_downwards():
    findings = broken(forbidden_imports)
    assert not findings, findings


def test_no_script_imports_a_script():
    findings = broken(script_imports)
    assert not findings, findings


def test_no_test_file_imports_another():
    findings = broken(borrowed_tests, checked_tests())
    assert not findings, findings


def test_torch_distributed_is_one_leaf():
    findings = broken(distributed_uses)
    assert not findings, findings


def test_sizes():
    findings = broken(oversizes, sources() | checked_tests())
    assert not findings, findings


def test_no_broad_except():
    findings = broken(broad_excepts, sources() | checked_tests())
    assert not findings, findings


def test_library_code_does_not_print():
    findings = broken(library_prints)
    assert not findings, findings


def test_every_module_is_reachable_from_an_entry_point():
    missing = {"train_c2i", "train_t2i", "sample_c2i", "sample_t2i", "pretrain"} - set(sources())
    if missing:
        pytest.skip(f"entry points not there yet: {', '.join(sorted(missing))}")
    lost = {module for module in sources() if tree(sources()[module]).body} - reachable()
    assert not lost, f"no entry point imports {', '.join(sorted(lost))}"


BAD_FILE = '''
import torch.distributed as dist
from . import gpt
from .vq import VQModel
import models.checkpoint

def f(a, b, c, d, e, f, g, *, h, i):
    try:
        print(torch.distributed.get_rank())
    except (ValueError, Exception):
        pass
'''


def test_the_rules_bite(tmp_path, monkeypatch):
    """Each rule finds its fault in a file that breaks them all, so that an empty finding means something."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    files = {}
    for name in ("vq", "gpt", "checkpoint", "generate"):
        path = tmp_path / "models" / f"{name}.py"
        path.write_text(BAD_FILE + "x = 1\n" * MAX_FILE_LINES + "y" * 121 + " = 1\n" if name == "generate" else "")
        files[f"models.{name}"] = path
    monkeypatch.setitem(globals(), "sources", lambda: files)
    assert [line.split(";")[0] for line in broken(forbidden_imports).splitlines()] == [
        "models.generate imports models.checkpoint", "models.generate imports models.vq"]
    assert "uses torch.distributed" in broken(distributed_uses)
    for word in (f"{MAX_FILE_LINES + 12} lines", "125 characters", "9 parameters"):
        assert word in broken(oversizes)
    assert "catches everything" in broken(broad_excepts) and "prints" in broken(library_prints)
    assert reachable() == set()
    files["train_c2i"] = tmp_path / "train_c2i.py"
    files["train_c2i"].write_text("def main():\n    from models.generate import f\n")
    assert reachable() == {"train_c2i", *(f"models.{name}" for name in ("generate", "vq", "gpt", "checkpoint"))}
