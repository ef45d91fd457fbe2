"""scripts/check_requirements.py and scripts/setup_env.sh, in a copy with its own requirements; no network."""
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import check_requirements as check  # noqa: E402  (scripts/ is no package)

PYTEST = importlib.metadata.version("pytest")


@pytest.fixture
def project(tmp_path):
    """A project of its own, in a folder with a space, all of whose requirements are installed."""
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup_env.sh", "check_requirements.py"):
        shutil.copy(SCRIPTS / name, root / "scripts" / name)
    (root / "requirements.txt").write_text("# comment\npytest>=1.0  # why\n")
    return root


def start_setup(root, **env):
    """Source the script as run scripts do, from another folder, and print what it chose."""
    clean = {key: value for key, value in os.environ.items() if key != "SKIP_SETUP" and not key.startswith("PIP_")}
    clean |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", **env}
    command = 'set -euo pipefail; source "$1/scripts/setup_env.sh"; "$BASH" -c \'echo "chose:$PYTHON"\''
    return subprocess.Popen(["bash", "-c", command, "bash", str(root)], cwd="/", env=clean, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def setup(root, **env):
    process = start_setup(root, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err


def write_venv_python(root, python_path=""):
    """A stand-in for .venv: this Python with one more folder of packages."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{python_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def write_wheel(folder, name="tinydep", version="1.2"):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.mark.parametrize("line,complaint", [
    ("pytest", None),
    ("PyTest >= 1.0, < 1000", None),
    (f"pytest=={PYTEST}", None),
    ("pytest>=1000", f"pytest>=1000 (installed: {PYTEST})"),
    ("pytest>=1,<1.5", f"pytest>=1,<1.5 (installed: {PYTEST})"),
    ("no-such-package-anywhere>=2", "no-such-package-anywhere>=2 (not installed)"),
])
def test_check_requirements_finds_missing_and_wrong_versions(tmp_path, capsys, line, complaint):
    path = tmp_path / "requirements.txt"
    path.write_text(f"# a comment\n\n{line}  # why\n")
    assert check.main([str(path)]) == (0 if complaint is None else 1)
    assert capsys.readouterr().out == ("" if complaint is None else complaint + "\n")


def test_versions_compare_as_numbers():
    assert check.release("2.11.0+cu130") == check.release("2.11") > check.release("2.9.1")
    assert check.release("3.0rc1") == (3,)


@pytest.mark.parametrize("line", ["package[extra]>=1", "package @ file:///x.whl", "package>=", "-r other.txt"])
def test_check_requirements_refuses_what_it_cannot_read(tmp_path, capsys, line):
    path = tmp_path / "requirements.txt"
    path.write_text(f"pytest\n{line}\n")
    assert check.main([str(path)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_nothing_is_made_when_nothing_is_missing(project):
    code, out, err = setup(project)
    assert (code, out, err) == (0, f"chose:{sys.executable}", "")
    assert not (project / ".venv").exists()


def test_skip_setup_takes_the_current_python(project):
    (project / "requirements.txt").write_text("no-such-package-anywhere\n")
    assert setup(project, SKIP_SETUP="1") == (0, f"chose:{sys.executable}", "")
    assert not (project / ".venv").exists()


def test_existing_venv_that_satisfies_is_used(project):
    (project / "requirements.txt").write_text("tinydep>=1\n")
    write_wheel(project)
    with zipfile.ZipFile(next(project.glob("*.whl"))) as wheel:
        wheel.extractall(project / "site")
    python = write_venv_python(project, project / "site")
    assert setup(project) == (0, f"chose:{python}", "")


def test_two_scripts_at_once_install_once(project, tmp_path):
    (project / "requirements.txt").write_text("tinydep>=1,<2\n")
    write_wheel(tmp_path)
    processes = [start_setup(project, PIP_FIND_LINKS=str(tmp_path)) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {f"chose:{project}/.venv/bin/python"}
    assert sum("setup: installing" in err for _, err in outputs) == 1


def test_failed_installation_names_what_is_missing(project):
    (project / "requirements.txt").write_text("pytest>=1000\nno-such-package-anywhere>=2\n")
    write_venv_python(project)
    code, out, err = setup(project)
    assert code != 0 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("setup: error") and "pytest>=1000" in last and "no-such-package-anywhere>=2" in last


def test_python_that_does_not_run_is_named(project):
    code, out, err = setup(project, PYTHON="/no/such/python")
    assert code != 0 and out == "" and "setup: error: /no/such/python does not run" in err
