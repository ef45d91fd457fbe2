"""One process at a time in a run's folder."""
import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from utils import lock
from utils.lock import LOCK, only_one

HOLD = "import sys, time; from pathlib import Path; from utils.lock import only_one\n" \
       "with only_one(Path(sys.argv[1]), 'it', 'wait', 'go'): print('in', flush=True); time.sleep(60)"


def enter(folder):
    with only_one(folder, "the run", "wait for its end", "go elsewhere"):
        return True


def test_the_second_is_told_who_the_first_is_and_a_kill_frees_it(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(ValueError) as error:
            enter(tmp_path)
        assert str(error.value) == (f"the run is in use by process {first.pid} on {socket.gethostname()}: wait for its "
                                    "end")
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert enter(tmp_path) and not (tmp_path / LOCK).exists()


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level("WARNING"):
        assert enter(tmp_path)
    assert "keeps no locks" in caplog.text


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), only_one(tmp_path, "the run", "wait", "go"):
        raise KeyError
    assert enter(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write to the folder .*file/run .*: go elsewhere"):
        enter(tmp_path / "file" / "run")
