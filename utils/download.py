"""Fetch a file of weights once, into a cache, checked by the digest in its name."""
import hashlib
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from utils.files import one_line

TIMEOUT_SEC = 30  # without any byte arriving
CHUNK = 1 << 20
MAX_BYTES = 1 << 30  # Inception takes 95 MB; a server may send without end


def download(url: str, path: Path, digest: str) -> Path:
    """Makes `path` of what `url` gives; digest: the first hexadecimal digits of its SHA-256.

    The file appears when it is whole and right. ValueError: it could not be had, and where to put it by hand.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, temporary, path.name)
        if not found.startswith(digest):
            raise ValueError(f"{url} gave another file: its SHA-256 begins with {found[:len(digest)]}, not {digest}")
        os.replace(temporary, path)
    except OSError as error:  # urllib's errors among them
        reason = one_line(error)
        raise ValueError(f"{url} could not be fetched ({reason}): fetch it elsewhere and put it at {path}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path, name: str) -> str:
    """-> the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as source, open(path, "wb") as file:
        size = int(source.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, desc=name, unit="B", unit_scale=True) as bar:
            while chunk := source.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
                if bar.n > MAX_BYTES:
                    raise OSError(f"more than {MAX_BYTES} bytes came")
        if size and bar.n != size:
            raise OSError(f"the connection ended after {bar.n} of {size} bytes")
    return digest.hexdigest()
