"""The first call of an elementwise function: one thread makes it, so that oneMKL cannot choose a wrong kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QUESTION = r"""
#include <dlfcn.h>
#include <unistd.h>

/* oneMKL asks this once it needs an elementwise function, and works with the answer outside any lock. */
int mkl_serv_vml_cpu_detect(void) {
    int (*answer)(void) = (int (*)(void))dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), __func__);
    write(2, "asked\n", 6);
    usleep(200000); /* the other thread arrives meanwhile, if it is on its way */
    return answer();
}
"""
TABLE = """
import torch
import nanochat_kernels  # as everything does that computes with torch here

torch.set_num_threads(2)
torch.arange(8192, dtype=torch.float64).cos()
"""


def test_one_thread_alone_makes_the_first_call_into_mkl(tmp_path: Path):
    """Otherwise one of two rarely reads a half-made choice: half of a rotation table is then 1e-8 off (pytorch#188792).

    Compiled code in front of oneMKL holds every thread that asks for the processor: two, where they race.
    """
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs gcc or clang, which compiles what stands in front of oneMKL")
    source, library = tmp_path / "question.c", tmp_path / "question.so"
    source.write_text(QUESTION)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", TABLE], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    asked = ran.stderr.splitlines().count("asked")
    if not asked:
        pytest.skip("this torch has no oneMKL, or one that finds out about the processor in another way")
    assert asked == 1
