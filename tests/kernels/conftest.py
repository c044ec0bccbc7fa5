"""Every set of compiled kernels that this machine can run."""

import pytest

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu import native


@pytest.fixture(params=["portable", "avx2", "avx512"])
def kernel_set(request):
    try:
        native.select(request.param)
    except Unsupported as reason:
        pytest.skip(str(reason))
    yield
    native.select(None)
