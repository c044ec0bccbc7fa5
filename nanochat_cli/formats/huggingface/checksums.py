"""checksums.json of a Hugging Face folder: the SHA-256 of every file that a program computes with.

The card is not among them, since a person adds a licence there, and a GGUF file beside the model has a checksum of its
own. No torch.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.huggingface.files import CHECKSUMS, document

_KEY = "sha256"


def checksums(weights: Mapping[str, str], documents: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """What checksums.json says. weights: SHA-256 by file name; documents: contents by file name."""
    return {_KEY: {**weights, **{name: hashlib.sha256(content).hexdigest() for name, content in documents.items()}}}


def sha256_of(path: Path) -> str:
    """In hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_files(folder: Path) -> list[str] | None:
    """Names of files that are missing or not what was exported, in the order of checksums.json.

    None for a folder without that file. Raises DataError if it cannot be read.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    said = document(path).get(_KEY)
    if not isinstance(said, dict) or not all(Path(name).name == name for name in said):
        raise DataError(f"{path}: damaged (it has no {_KEY} of files of the folder); export or download it again")
    try:
        return [name for name, digest in said.items() if not _matches(folder / name, digest)]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({reason(error)})") from error


def _matches(path: Path, digest: object) -> bool:
    return path.is_file() and sha256_of(path) == digest


def require_intact(folder: Path) -> None:
    """Raise DataError for a file that is not what was exported; a folder without checksums passes."""
    for name in damaged_files(folder) or []:
        raise DataError(
            f"{folder / name}: does not match {CHECKSUMS}: damaged, or changed since; export or download it again "
            f"(remove {CHECKSUMS} if it was changed on purpose)"
        )
