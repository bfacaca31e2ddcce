"""Writing new keys and values into their slots of a paged cache, on the CPU."""

import llvmlite.ir as ir
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .checks import check_rows, check_tensor
from .compiled import kernel
from .scalars import get_int64


@intrinsic
def _copy(typingctx, target, source, size):
    """Copy `size` bytes between addresses."""

    def codegen(context, builder, signature, args):
        target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], ir.Constant(args[2].type, 1))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@kernel
def _write(tokens, heads, size, new, new_token, new_head, cache, block, position, head, block_size, blocks, slots):
    """Sizes and strides in bytes. Returns 0, or 1 + t if token t's slot does not exist."""
    for t in range(tokens):
        slot = get_int64(slots, t)
        if slot < -1 or slot >= blocks * block_size:
            return 1 + t
        if slot >= 0:
            target = cache + slot // block_size * block + slot % block_size * position
            for h in range(heads):
                _copy(target + h * head, new + t * new_token + h * new_head, size)
    return 0


def write_kv(
    key_THD: torch.Tensor,
    value_THDv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_T: torch.Tensor,
) -> None:
    """Copy token t's rows to slot_T[t] (int64) of both caches, [blocks, block_size, H, D or Dv].

    Slot s is position s % block_size of block s // block_size; -1 writes nothing. Any dtype; last dimensions are
    contiguous.
    """
    tokens = key_THD.shape[0]
    check_tensor("slot_T", slot_T, (tokens,), torch.int64)
    for name, new, cache in (("key", key_THD, key_cache), ("value", value_THDv, value_cache)):
        blocks, block_size, heads, width = cache.shape
        check_rows(name, new, (tokens, heads, width), cache.dtype)
        check_rows(f"{name}_cache", cache, cache.shape, cache.dtype)
        size = cache.element_size()
        steps = [step * size for step in cache.stride()]
        bad = _write(
            tokens, heads, width * size, new.data_ptr(), new.stride(0) * size, new.stride(1) * size,
            cache.data_ptr(), steps[0], steps[1], steps[2], block_size, blocks, slot_T.data_ptr(),
        )  # fmt: skip
        if bad:
            raise ValueError(f"slot_T: slot {int(slot_T[bad - 1])} is not in -1..{blocks * block_size - 1}")
