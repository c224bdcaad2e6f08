# mypy: allow-untyped-defs
"""A kernel around the reduction of `maxsim`, for the test of its compiled form."""

import triton
import triton.language as tl

from lead_ds.kernels.maxsim.programs import row_argmax


@triton.jit
def row_argmax_kernel(x_ptr, top_ptr, at_ptr):
    """x [4, 8] -> maximum and first column of it [4]."""
    row, column = tl.arange(0, 4), tl.arange(0, 8)
    top, at = row_argmax(tl.load(x_ptr + row[:, None] * 8 + column[None, :]), column, False)
    tl.store(top_ptr + row, top)
    tl.store(at_ptr + row, at)
