"""Checkpoints are read back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ltjax.runs import checkpoint
from ltjax.runs.checkpoint import Checkpoints, complete_steps, like
from ltjax.system import parallel
from ltjax.types import UserError

# If one array of a checkpoint cannot be read, Orbax closes its event loop while TensorStore still reads the others.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
STATE = {"kernel": jnp.arange(4096, dtype=jnp.float32), "step": jnp.zeros((), jnp.int32)}


def spoil(folder):
    """Flip a byte of every data file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_state_is_restored_with_its_record(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE, {"seconds": 1.5})
        checkpoints.wait()
        state, record = checkpoints.restore(like(STATE))
    assert record == {"seconds": 1.5}
    np.testing.assert_array_equal(state["kernel"], STATE["kernel"])


def test_no_program_is_compiled_for_each_array_of_a_replicated_state(tmp_path, caplog):
    replicated = NamedSharding(parallel.make_mesh(), PartitionSpec())
    state = {f"bias{size}": jax.device_put(np.ones(size, np.float32), replicated) for size in range(16, 96, 8)}
    with Checkpoints(tmp_path) as checkpoints, jax.log_compiles():
        checkpoints.save(3, state, {})
        checkpoints.wait()
    compiled = [line for line in caplog.messages if line.startswith("Compiling ")]
    assert 1 <= len(compiled) < len(state), compiled  # the copy of all arrays is one


@pytest.mark.parametrize("by", ["wait", "save"])
def test_a_checkpoint_that_cannot_be_read_back_is_an_error(tmp_path, by):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE, {})
        checkpoints._manager.wait_until_finished()
        spoil(tmp_path / "3")
        with pytest.raises(UserError, match=r"checkpoint of step 3 was written to .* and cannot be read"):
            checkpoints.wait() if by == "wait" else checkpoints.save(4, STATE, {})
    assert complete_steps(tmp_path) == [3]


def test_a_folder_named_like_a_pattern_is_noticed_after_the_first_save(tmp_path, monkeypatch):
    """Check the second line of defence behind `check_checkpoints`."""
    monkeypatch.setattr(checkpoint, "check_checkpoints", lambda folder: None)
    with Checkpoints(tmp_path / "run[s]") as checkpoints:
        checkpoints.save(3, STATE, {})
        with pytest.raises(UserError, match=r"written to .*run\[s\] and cannot be read"):
            checkpoints.wait()


def test_each_checkpoint_is_read_once(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        read, steps = checkpoints.restore_step, []
        monkeypatch.setattr(checkpoints, "restore_step", lambda step, target: steps.append(step) or read(step, target))
        for step in (1, 2, 3):
            checkpoints.save(step, STATE, {})
        checkpoints.wait()
        checkpoints.wait()
    assert steps == [1, 2, 3]
