"""A workdir holds one run, which one process trains at a time."""

import errno
import os

import pytest

from ltjax.runs import workdir as workdirs
from ltjax.system.files import write_json
from ltjax.types import UserError

CONFIG = dict(name="run", data=dict(name="cifar10"), model=dict(name="resnet_cifar"), stages=(), attack=dict(seed=0))


def test_a_second_process_is_refused(tmp_path):
    with workdirs.locked(tmp_path):
        with pytest.raises(UserError, match="another process is at work in"):
            with workdirs.locked(tmp_path):
                pass


def test_a_mistake_leaves_no_empty_folder_behind(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError), workdirs.locked(folder):
        raise UserError("mistake")
    assert not folder.exists()


@pytest.mark.parametrize("change", [dict(attack=dict(seed=1)), dict(data=dict(name="cifar10", threads=3))])
def test_attacks_and_locations_may_change(tmp_path, change):
    write_json(tmp_path / "config.json", CONFIG)
    workdirs.check_same_config(tmp_path, {**CONFIG, **change})


def test_another_config_is_refused_with_what_differs(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(UserError, match=r"data\.imbalance: 1\.0 -> 50; seed: 0 -> 3"):
        workdirs.check_same_config(tmp_path, {**CONFIG, "data": dict(name="cifar10", imbalance=50), "seed": 3})


def test_a_full_disk_is_an_error_of_the_user_and_others_are_not(tmp_path):
    with pytest.raises(UserError, match="free some space"), workdirs.named_disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="Broken pipe"), workdirs.named_disk_errors(tmp_path):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
