"""Uploading a folder to the Hugging Face hub, through huggingface_hub alone.

The library finds the token that a person has logged in with; nothing here reads, takes or prints one. A new repository
is private.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.huggingface.files import CARD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HIDDEN = [".*", "*.partial", "*.lock"]
"""What is never uploaded: locks and half-written files."""


def require_repository(name: str) -> None:
    """Raise ConfigError if `name` cannot be USER/NAME on the hub; asks nobody."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    example = "name it USER/NAME, such as --push ada/tiny-code"
    if name.count("/") != 1:
        raise ConfigError(f"--push {name}: {example}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push {name}: {_first_sentence(error)}; {example}") from error


def push_folder(folder: Path, name: str, message: str, api: "HfApi | None" = None) -> str:
    """Create the repository if it is missing, upload the folder as one commit, and return its address.

    Raises DataError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the client that this version uses
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi() if api is None else api
    login = "log in with `hf auth login`, with a token that may write"
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=HIDDEN)
    except LocalTokenNotFoundError as error:
        raise DataError(f"--push {name}: nobody is logged in to the hub; {login}") from error
    except OfflineModeIsEnabled as error:
        raise DataError(f"--push {name}: HF_HUB_OFFLINE is set; unset it to upload {folder}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = login if status in (401, 403) else f"{folder} is complete: try again"
        raise DataError(f"--push {name}: the hub refused ({status}: {_first_sentence(error)}); {advice}") from error
    except ValueError as error:  # the header of the card
        raise DataError(f"--push {name}: {' '.join(str(error).split())[:300]}; mend {folder / CARD}") from error
    except (HTTPError, OSError) as error:
        raise DataError(
            f"--push {name}: the hub cannot be reached ({_first_sentence(error)}); {folder} is complete: try again"
        ) from error
    return str(address)


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")[:200]
