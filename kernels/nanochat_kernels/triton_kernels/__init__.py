"""The Triton backend: every operation for NVIDIA GPUs of compute capability 8.0 and above.

One file per subject; `operations` has the names and signatures of the reference. The same kernels run on CPU tensors
in Triton's interpreter if TRITON_INTERPRET=1 is in the environment before triton is imported, and compile ahead of
time for absent GPUs (`ahead_of_time`). No launcher waits for the device or tunes anything at run time: tile sizes come
from the committed table in `configurations`, or from the caller.
"""
