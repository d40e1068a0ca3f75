"""Locks against other processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ltjax.system.locks import locked
from ltjax.types import UserError

HOLD = """
import sys
from pathlib import Path
from ltjax.system.locks import locked
with locked(Path(sys.argv[1]), "busy"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_ends_with_a_killed_process(tmp_path, kind):
    path = tmp_path / "file" if kind == "file" else tmp_path
    (tmp_path / "file").touch()
    command, root = [sys.executable, "-c", HOLD, str(path)], Path(__file__).parents[2]
    holder = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another one is at work"), locked(path, "another one is at work"):
        pass
    holder.kill()
    holder.communicate()
    with locked(path, "another one is at work"):
        assert path.exists()
