"""Promises of SECURITY.md that are properties of the source: read from the syntax trees, nothing is imported."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"tests", ".venv", ".git"}

# A call of the first may stand in the second alone.
ONLY_IN = {
    "json.loads": {"utils.files", "reward_utils.remote",  # the two that bound what comes from outside
                   # lines of the project's own logs
                   "trainer_utils.run_folder", "trainer_utils.report", "benchmark.shapes.sweep",
                   "benchmark.speed.gpu_check", "benchmark.speed.gpu_stages",
                   "utils.config", "scripts.run_workers",  # how a process of the job ended
                   "scripts.crosscheck.compare", "scripts.crosscheck.original"},  # what the other of the two wrote
    "json.load": set(),
    "urllib.request.urlopen": {"utils.download"},
    "subprocess.run": {"trainer_utils.report", "benchmark.shapes.sweep", "trainer_utils.pretraining",
                       "scripts.run_workers", "benchmark.speed.gpu_stages"},
    "pickle.dumps": {"reward_utils.legacy_pickle"},
    "yaml.compose": {"utils.files"},
}
NEVER = {
    "eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "importlib.import_module",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "torch.hub.load",
    "torch.jit.load", "torch.package.PackageImporter", "np.fromregex", "np.loadtxt", "np.genfromtxt",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.safe_load", "yaml.safe_load_all",
    "shutil.unpack_archive", "urllib.request.urlretrieve",
    "os.execvp", "runpy.run_path", "ssl._create_unverified_context"}
FOREIGN = {"dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "requests", "httpx", "aiohttp", "cv2",
           "imageio", "h5py", "pandas", "peft", "xmlrpc"}  # each is another reader that nobody here has bounded
# Distributed checkpoints lie in safetensors; the default storage keeps its table in a pickle, `.metadata`.
PICKLED_STORAGE = {"FileSystemReader", "FileSystemWriter", "FsspecReader", "FsspecWriter"}


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not SKIPPED & set(parts):
            yield ".".join(parts), path


def keyword(call, name):
    """The keyword's source text, or None."""
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def call_findings(module, call):
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if name in NEVER:
        yield f"calls {name}"
    if name in ONLY_IN and module not in ONLY_IN[name]:
        yield f"calls {name}, which only {', '.join(sorted(ONLY_IN[name])) or 'nothing'} may"
    wanted = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}.get(name)
    if wanted and keyword(call, wanted[0]) != wanted[1]:
        yield f"calls {name} without {wanted[0]}={wanted[1]}"
    if name == "Image.open" and keyword(call, "formats") is None and not module.startswith("scripts.crosscheck"):
        yield "calls Image.open without formats"
    if keyword(call, "shell") not in (None, "False"):
        yield "starts a shell"
    if keyword(call, "trust_remote_code") not in (None, "False"):
        yield "trusts remote code"
    if keyword(call, "weights_only") not in (None, "True") or keyword(call, "allow_pickle") not in (None, "False"):
        yield "lets a pickle run"
    if last == "from_pretrained":
        if name.startswith("Auto") and keyword(call, "trust_remote_code") != "False":
            yield f"calls {name} without trust_remote_code=False"
        attention = set(re.findall(r"[\w./]+", keyword(call, "attn_implementation") or "none"))
        if keyword(call, "dtype") and not attention <= {"sdpa", "eager", "backbone_config"}:
            yield f"calls {name} without naming the attention, so that a config.json may name code for it"
    if last in ("extract", "extractall") and "archive" in name:
        yield f"calls {name}"
    if last == "add_text":
        yield "writes text to TensorBoard"
    if last == "CDLL" and ast.unparse(call.args[0]) != "None":  # None: what is loaded already
        yield "loads a library"


def import_findings(node):
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{name}" for name in names]
        yield from (f"imports {name} by itself, which hides its calls" for name in names
                    if name in NEVER | set(ONLY_IN) | {"torch.load", "numpy.load", "PIL.Image.open"})
    yield from (f"imports {name}" for name in names if name.split(".")[0] in FOREIGN)
    yield from (f"imports {name}" for name in names if name.rpartition(".")[2] in PICKLED_STORAGE)


def checkpoint_findings(tree):
    """Every load and save of torch.distributed.checkpoint names its storage; the default one is a pickle's."""
    aliases = {"torch.distributed.checkpoint"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            aliases |= {alias.asname or alias.name for alias in node.names
                        if prefix + alias.name == "torch.distributed.checkpoint" and (alias.asname or prefix)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = ast.unparse(node.func.value), node.func.attr
            storage = {"load": "storage_reader", "save": "storage_writer", "async_save": "storage_writer"}.get(method)
            if owner in aliases and storage and keyword(node, storage) is None:
                yield f"calls {owner}.{method} without {storage}"


def findings(module, text):
    tree = ast.parse(text)
    found = list(checkpoint_findings(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += call_findings(module, node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found += import_findings(node)
        elif isinstance(node, ast.Attribute) and node.attr in PICKLED_STORAGE:
            found.append(f"uses {node.attr}")
        elif isinstance(node, ast.Constant) and node.value == ".metadata":
            found.append("names .metadata, a pickle")
    return found


def test_no_source_runs_what_it_reads():
    found = [f"{module} {finding}" for module, path in sources() for finding in findings(module, path.read_text())]
    assert not found, "\n".join(found)
    assert {"utils.files", "models.checkpoint", "train_c2i", "trainer_utils.pretraining"} <= dict(sources()).keys()


@pytest.mark.parametrize("text, finding", [
    ("torch.load(f)", "without weights_only=True"), ("torch.load(f, weights_only=False)", "lets a pickle run"),
    ("np.load(f)", "without allow_pickle=False"), ("np.load(f, allow_pickle=True)", "lets a pickle run"),
    ("pickle.loads(data)", "calls pickle.loads"), ("from pickle import loads", "imports pickle.loads"),
    ("yaml.safe_load(text)", "calls yaml.safe_load"), ("json.loads(text)", "which only"), ("eval(text)", "calls eval"),
    ("subprocess.call(x, shell=True)", "starts a shell"), ("os.system(x)", "calls os.system"),
    ("AutoModel.from_pretrained(x)", "without trust_remote_code=False"),
    ("AutoModel.from_pretrained(x, trust_remote_code=config.trust)", "trusts remote code"),
    ("T5.from_pretrained(x, dtype=d)", "without naming the attention"),
    ("T5.from_pretrained(x, dtype=d, attn_implementation=config.attention)", "without naming the attention"),
    ("Image.open(f)", "without formats"), ("import joblib", "imports joblib"), ("archive.extractall()", "extractall"),
    ("urllib.request.urlopen(x)", "which only"), ("writer.add_text('a', x)", "TensorBoard"),
    ("import torch.distributed.checkpoint as dcp\ndcp.load(x, checkpoint_id=y)", "dcp.load without storage_reader"),
    ("from torch.distributed import checkpoint\ncheckpoint.async_save(x)", "async_save without storage_writer"),
    ("dcp.FileSystemReader(x)", "uses FileSystemReader"), ("(folder / '.metadata').read_bytes()", "names .metadata"),
    ("from torch.distributed.checkpoint import FileSystemReader", "FileSystemReader")])
def test_the_rules_bite(text, finding):
    assert any(finding in one for one in findings("models.new", text)), findings("models.new", text)


def test_what_is_allowed_passes():
    text = ("import pickle\nimport torch.distributed.checkpoint as dcp\ndcp.load(x, storage_reader=reader)\n"
            "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nmodel.eval()\nre.compile(x)\n"
            "T5.from_pretrained(x, dtype=d, attn_implementation='sdpa')\nconfig.from_pretrained(x)\n"
            "Image.open(f, formats=('PNG',))\nexcept_this = pickle.UnpicklingError\n")
    assert findings("models.new", text) == []


def test_the_key_of_the_reward_server_is_compared_in_constant_time():
    text = (ROOT / "scripts" / "reward_server.py").read_text()
    tree = ast.parse(text)
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and "token" in ast.unparse(node)]
    assert not compared and "hmac.compare_digest(given," in text


SCRIPTS = sorted({*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("benchmark/**/*.sh"),
                  *ROOT.glob("scripts/*.sbatch"), ROOT / ".ci" / "run"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts(path):
    """No eval, no code from the network, temporary names from mktemp alone, nothing removed by an unquoted name."""
    code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(?:^|[;&|({]|\bthen|\bdo)\s*eval\b", code, re.MULTILINE) and "`" not in code
    assert not re.search(r"(?:curl|wget)\b", code) and not re.search(r"\|\s*(?:ba)?sh\b", code)
    assert not re.search(r"(?<!mktemp -p )/tmp/", code)
    for line in code.splitlines():
        for removed in re.findall(r"\brm -\S+ ([^;&|')]+)", line):
            assert all(not word.startswith("$") for word in removed.split()), line
