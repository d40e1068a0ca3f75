"""Download an archive once."""

import contextlib
import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path
from posixpath import basename

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from ltjax.data import progress
from ltjax.system.wording import one_line
from ltjax.types import UserError


def download(url: str, folder: Path, difference: Callable[[Path], str]) -> Path:
    """Download `url` into `folder`, unless the right file is there already; return the file's path.

    `difference(path)` says how a file differs from the expected one, "" if it does not. The file gets its name only
    after this check. UserError if the download fails or the server sends another file.
    """
    path = folder / basename(url)
    if path.is_file() and not difference(path):
        return path
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=60) as response,
            open(part, "wb") as file,
            progress.bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), unit=("MB", 10**6)) as bar,
        ):
            length = response.headers.get("Content-Length")
            task = bar.add_task(path.name, total=int(length) if length else None)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.advance(task, len(chunk))
        if problem := difference(part):
            raise UserError(
                f"what {url} sent is not the official archive ({problem}): try again, or fetch the archive "
                "by other means and pass it as --source=FILE"
            )
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} to {folder} ({one_line(error)}): try again, or fetch the archive by other "
            "means and pass it as --source=FILE"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path
