"""The description of the machine is plain JSON with what a result needs to be judged."""

import json
import sys

from nanochat_cli import __version__
from nanochat_cli.environment import describe_environment


def test_an_environment_is_json_and_names_versions_and_cores():
    found = json.loads(json.dumps(describe_environment()))
    assert found["nanochat"] == __version__
    assert found["python"] == sys.version.split()[0]
    assert found["cores"] >= 1
    assert set(found["versions"]) >= {"torch", "numpy", "tokenizers"}
    assert {"git", "platform", "processor", "device", "date"} <= set(found)
