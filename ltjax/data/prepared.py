"""Open a data set that TFDS or `python -m ltjax.data.prepare` wrote, without TensorFlow."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ltjax.data.source import newest_version, prepare_command
from ltjax.system.files import load_json
from ltjax.system.wording import one_line
from ltjax.types import UserError

T = TypeVar("T")


def read(name: str, data_dir: Path, use: Callable[[Any, Path, tuple[str, ...]], T], *, flags: str = "") -> T:
    """Return `use(TFDS builder, folder, class names)` for the newest prepared version of a data set.

    UserError if it is missing or damaged, or if only TensorFlow can read it; the message shows the command that
    prepares it, with these `flags` besides --data_dir.
    """
    directory, command = newest_version(data_dir, name), prepare_command(name, data_dir) + flags
    if directory is None:
        raise UserError(f"{name} is not in {data_dir}: prepare it with `{command}`")
    try:
        return use(*_open(directory, prepare_command(name, "OTHER_DIR") + flags))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # TFDS, protobuf and array_record each raise their own kinds on a damaged folder
        raise UserError(
            f"{directory} is damaged or incomplete ({one_line(error)}): delete that folder, then run `{command}`"
        ) from error


def fields(record: bytes) -> Any:
    """Parse a serialised `tf.train.Example`: {name: its values}."""
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2.Example  # pyrefly: ignore
    return example.FromString(record).features.feature


def _modules(value: Any) -> Iterator[str]:
    """Yield the names of Python classes anywhere in a features.json."""
    if isinstance(value, dict):
        yield from (str(value[key]) for key in ("pythonClassName", "type") if isinstance(value.get(key), str))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _modules(part)


def _open(directory: Path, elsewhere: str) -> tuple[Any, Path, tuple[str, ...]]:
    import tensorflow_datasets as tfds

    for module in _modules(load_json(directory / "features.json")):
        if not module.startswith("tensorflow_datasets."):  # TFDS imports it, which runs its code
            raise UserError(
                f"{directory}/features.json names {module!r}, and only features of TFDS are read: delete that folder"
            )
    builder: Any = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{directory} is in the {file_format} format, which is not readable without TensorFlow: have TFDS write it "
            f"again with file_format='array_record', or prepare a copy elsewhere with `{elsewhere}`"
        )
    # Without this file TFDS would silently name the classes "0", "1", ...
    if not (directory / "label.labels.txt").is_file():
        raise FileNotFoundError("label.labels.txt is missing")
    return builder, directory, tuple(builder.info.features["label"].names)
