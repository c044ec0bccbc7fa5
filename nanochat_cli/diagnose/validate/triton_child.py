"""The Triton backend under its interpreter: `python -m nanochat_cli.diagnose.validate.triton_child CASES RESULTS`.

A separate process, because Triton decides at import whether to interpret, and the interpreter must not affect the
validating process. Reads cases as JSON, writes results as safetensors: tensors by `case number/operation.part`, and in
the metadata, as JSON by case number, the unsupported operations; `everything` without the backend.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import save_file

from nanochat_cli.diagnose.validate.matmul_case import MatmulCase, compute
from nanochat_kernels.backends import Unsupported


def main(cases_path: str, results_path: str) -> None:
    tensors, unsupported = {}, {}
    try:
        for number, fields in enumerate(json.loads(Path(cases_path).read_text(encoding="utf-8"))):
            results, missing = compute(MatmulCase(**fields), "triton")
            tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in results.items()}
            unsupported[str(number)] = json.dumps(missing)
            print(number, flush=True)  # the parent counts these lines for its progress bar
    except Unsupported as reason:
        tensors, unsupported = {}, {"everything": str(reason)}
    save_file(tensors, results_path, metadata=unsupported)


if __name__ == "__main__":
    main(*sys.argv[1:])
