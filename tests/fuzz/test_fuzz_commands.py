"""Any command line of `python -m ltjax...` ends with code 0, or 2 and one line, and only writes to its folders."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltjax import compare
from ltjax.data.prepare import __main__ as prepare
from ltjax.interop import export, torch
from ltjax.runs import archive
from ltjax.system.files import write_json
from tests.fuzz.test_fuzz_runs import files
from tests.fuzz.test_fuzz_weights import folder_of_weights, state_dict_files

COMMANDS = {
    "archive": (archive.main, ()),
    "compare": (compare.main, ("--format=", "--stages", "--best", "--html=", "--nothing")),
    "export": (export.main, ("--format=", "--out=", "--image_size=", "--net=", "--replica=", "--nothing=")),
    "import": (torch.main, ("--model=", "--out=", "--net=", "--num_classes=", "--class_order=", "--nothing")),
    "prepare": (prepare.main, ("--source=", "--data_dir=", "--skip_damaged")),
}
VALUES = (
    *("weights", "run", "n.npz", "n.safetensors", "nothing", ".", "~/x", "gs://x", "out", "out/deeper", "a\nb", ""),
    *("safetensors", "markdown", "stablehlo", "8", "0", "-1", "8x8", "1e9", "net", "guide", "cifar100", "inat18"),
    *("resnet_cifar,depth=8,width=2", "resnet_cifar,depth=7", "vit", "resnet_cifar,depth=8,mean=(0,)", "[", "%s"),
)


@st.composite
def command_lines(draw, flags):
    words = draw(st.lists(st.sampled_from(VALUES), max_size=3))
    for flag in draw(st.lists(st.sampled_from(flags), max_size=4)) if flags else ():
        words.append(flag + draw(st.sampled_from(VALUES)) if flag.endswith("=") else flag)
    return draw(st.permutations(words))


@contextlib.contextmanager
def inside(folder):
    """Return a folder with a run, weights and state dicts, as the working directory and the home folder."""
    before, home = os.getcwd(), os.environ.get("HOME", "")
    (folder / "weights").mkdir()
    (folder / "run").mkdir()
    for name, content in folder_of_weights().items():
        (folder / "weights" / name).write_bytes(content)
    for name, content in files().items():
        write_json(folder / "run" / name, content)
    for name, content in (("n.npz", "a.npz"), ("n.safetensors", "a.safetensors")):
        (folder / name).write_bytes(state_dict_files()[content])
    os.environ["HOME"] = str(folder)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ["HOME"] = home


@pytest.mark.parametrize("name", COMMANDS)
@given(data=st.data())
def test_any_command_line_ends_with_0_or_with_one_line(name, data):
    main, flags = COMMANDS[name]
    words = data.draw(command_lines(flags))
    if name == "prepare" and not any(word.startswith("--source=") for word in words):
        words = [*words, "--source=nothing"]  # never download
    output, errors = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "inner"
        folder.mkdir()
        with inside(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(words)
        assert code in (0, 2)
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        assert len(lines) == (code == 2), errors.getvalue()
        assert "Traceback" not in errors.getvalue()
        assert [path.name for path in Path(top).iterdir()] == ["inner"]  # nothing beside the working directory


def test_a_command_line_that_is_right_ends_with_0():
    with tempfile.TemporaryDirectory() as top, inside(Path(top)), contextlib.redirect_stdout(io.StringIO()):
        assert export.main(["weights", "--format=safetensors", "--out=out"]) == 0
        assert torch.main(["n.npz", "--model=resnet_cifar,depth=8,width=2", "--out=other"]) == 0
        assert Path("out").is_file() and Path("other/weights.json").is_file()
