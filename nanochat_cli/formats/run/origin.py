"""What an imported run has beside others: where it came from, and the chat template of its model. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import ConfigError, DataError, reason
from nanochat_cli.nesting import parse_json

ORIGIN_FILE = "origin.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Origin:
    """name: of the model there; format: GGUF or Hugging Face; location: absolute path; license: if it names one."""

    name: str
    format: str
    location: str
    license: str | None = None


def write_origin(run: Path, origin: Origin, chat_template: str | None) -> None:
    """Raises DataError."""
    try:
        write_atomically(run / ORIGIN_FILE, (json.dumps(asdict(origin), indent=2, ensure_ascii=False) + "\n").encode())
        if chat_template is not None:
            write_atomically(run / CHAT_TEMPLATE_FILE, chat_template.encode())
    except OSError as error:
        raise DataError(f"cannot write {run}: {reason(error)}; free space or choose another --out") from error


def read_origin(run: Path) -> Origin | None:
    """None for a run that was trained here. Raises DataError for a damaged file."""
    path = run / ORIGIN_FILE
    try:
        return Origin(**parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the origin of a run ({reason(error)}); remove it to go on without") from error


def read_chat_template(run: Path) -> str | None:
    """The Jinja template of a run's model; None if it was trained without. Raises DataError."""
    path = run / CHAT_TEMPLATE_FILE
    try:
        return path.read_bytes().decode("utf-8")  # read_text would change \r\n
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the chat template: {reason(error)}") from error


def require_trained_here(run: Path) -> None:
    """Raise ConfigError for an imported run: nothing says how its training would go on."""
    origin = read_origin(run)
    if origin is not None:
        raise ConfigError(f"{run} was imported from {origin.name}: there is no state of its training to resume")
