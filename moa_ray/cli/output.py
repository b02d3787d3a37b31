"""Files that a command writes at its end."""

from __future__ import annotations

from pathlib import Path

from moa_ray.errors import RequestError


def check(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before the work, which may take an hour, and not after it.

    Raises:
        RequestError: If it cannot.
    """
    if path:
        try:
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise _refused(option, path, error) from None


def write(option: str, path: Path, text: str) -> None:
    """Write it.

    Raises:
        RequestError: If it cannot be written any more.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _refused(option, path, error) from None


def _refused(option: str, path: Path, error: OSError) -> RequestError:
    return RequestError(f"{option} cannot be written: {path}: {error.strerror}")
