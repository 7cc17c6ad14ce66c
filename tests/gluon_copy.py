"""A small Gluon kernel with tensor descriptors, which copies rows through shared memory, and its launch function."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from gdn_kernels import launch

ROWS, COLS = 64, 64
# Triton 3.9 has new names for what 3.6 has
load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


@gluon.jit(do_not_specialize=["n_rows"])
def copy_rows(x_desc, out_desc, n_rows, BLOCK: gl.constexpr):
    block = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    row = gl.program_id(0) * BLOCK
    mbarrier.expect(arrived, x_desc.block_type.nbytes)
    load(x_desc, [row, 0], arrived, block)
    mbarrier.wait(arrived, 0)
    if row < n_rows:
        store(out_desc, [row, 0], block)
    tma.store_wait(0)
    mbarrier.invalidate(arrived)


class Config:
    num_warps = 4


def layout(dtype: torch.dtype = torch.bfloat16) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


def descriptor(tensor: torch.Tensor) -> Any:
    return launch.descriptor(tensor, tensor.shape, tensor.stride(), (ROWS, COLS), layout(tensor.dtype))


def copy(x: torch.Tensor) -> torch.Tensor:
    """``x``, ``[T, 64]``, without its first 8 rows."""
    out = launch.empty(x, len(x) - 8, COLS)
    given = descriptor(launch.view(x[8:], x))
    grid = (-(-len(out) // ROWS),)
    launch.run(copy_rows, grid, given, descriptor(out), len(out), config=Config, BLOCK=ROWS)
    return out
