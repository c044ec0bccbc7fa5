"""A home folder for a user without one: no HOME, and no entry in /etc/passwd (as with `docker run --user 1234`).

Our own caches, and those of torch, Triton, datasets and matplotlib, need it; without one each fails in its own way.
"""

import os
import sys
import tempfile
from pathlib import Path


def has_home() -> bool:
    """Whether this user's home folder can be determined."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def provide_home() -> None:
    """If there is no home folder, set HOME to a private temporary one, for this process and its children, and warn."""
    if has_home():
        return
    home = Path(tempfile.gettempdir()) / f"nanochat-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077 or home.is_symlink():  # another user's
            home = Path(tempfile.mkdtemp(prefix="nanochat-"))
    except OSError:
        home = Path(tempfile.mkdtemp(prefix="nanochat-"))
    os.environ["HOME"] = str(home)
    print(
        f"warning: this user has no home folder: caches are kept in {home} (set HOME or NANOCHAT_CACHE)",
        file=sys.stderr,
    )
