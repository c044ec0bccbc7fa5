"""The Triton backend under its interpreter: `python -m nanochat_cli.diagnose.validate.triton_child CASES RESULTS`.

A process of its own, because Triton decides whether to interpret when it is imported, and the interpreter must not
reach whoever validates. Reads cases as JSON, writes results as safetensors: tensors by `case number/operation.part`,
and in the metadata, as JSON by case number, which operations are not supported; `everything` without the backend.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import save_file

from nanochat_cli.diagnose.validate.product_case import Case, compute
from nanochat_kernels.backends import Unsupported


def main(cases_path: str, results_path: str) -> None:
    tensors, unsupported = {}, {}
    try:
        for number, fields in enumerate(json.loads(Path(cases_path).read_text(encoding="utf-8"))):
            found, missing = compute(Case(**fields), "triton")
            tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in found.items()}
            unsupported[str(number)] = json.dumps(missing)
            print(number, flush=True)  # whoever waits counts
    except Unsupported as reason:
        tensors, unsupported = {}, {"everything": str(reason)}
    save_file(tensors, results_path, metadata=unsupported)


if __name__ == "__main__":
    main(*sys.argv[1:])
