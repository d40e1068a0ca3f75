"""run.py prints what ends a thread, except in Orbax, whose errors the main thread raises too."""

import subprocess
import sys
from pathlib import Path

CODE = """
import runpy, threading
runpy.run_path("run.py")["quieten"]()
for file in ("/packages/orbax/save.py", "/packages/ltjax/feed.py"):
    raising = compile(f"raise OSError('in {file}')", file, "exec")
    thread = threading.Thread(target=exec, args=(raising, {}))
    thread.start()
    thread.join()
"""


def test_a_crash_in_a_thread_is_printed_unless_it_is_orbaxs():
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    assert "OSError: in /packages/ltjax/feed.py" in ran.stderr
    assert "orbax" not in ran.stderr
