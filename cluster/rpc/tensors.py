"""Tensors on the wire: raw little-endian bytes with dtype and shape, and nothing that executes.

The hosts that PyTorch runs on are little-endian, so bytes are copied as they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cluster.errors import InvalidRequestError
from cluster.v1 import common_pb2

_TO_WIRE = {
    torch.float32: common_pb2.Tensor.D_TYPE_FLOAT32,
    torch.float16: common_pb2.Tensor.D_TYPE_FLOAT16,
    torch.bfloat16: common_pb2.Tensor.D_TYPE_BFLOAT16,
    torch.int32: common_pb2.Tensor.D_TYPE_INT32,
    torch.int64: common_pb2.Tensor.D_TYPE_INT64,
}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}

_BF16_EXPONENT = 0x7F80
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def encode_tensor(tensor: torch.Tensor) -> common_pb2.Tensor:
    """The wire form of a tensor of one of the wire's dtypes, on any device."""
    host = tensor.detach().cpu().contiguous()
    return common_pb2.Tensor(
        dtype=_TO_WIRE[host.dtype],
        shape=host.shape,
        data=host.view(-1).view(torch.uint8).numpy().tobytes(),
    )


def decode_tensor(
    message: common_pb2.Tensor,
    *,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
) -> torch.Tensor:
    """The tensor on the CPU, in memory of its own.

    Args:
        name: of the field, for errors.
        dtypes: those that are accepted. Float tensors must be finite.
        shape: what the shape must be; ``None`` is any size.

    Raises:
        InvalidRequestError: naming the field, when dtype, shape, size or a value is wrong.
    """
    dtype = _FROM_WIRE.get(message.dtype)
    if dtype is None or dtype not in dtypes:
        raise InvalidRequestError(name, f"has dtype {message.dtype}, which is not accepted here")
    sizes = tuple(message.shape)
    fits = len(sizes) == len(shape) and all(
        size >= 0 and (wanted is None or size == wanted)
        for size, wanted in zip(sizes, shape, strict=True)
    )
    if not fits:
        raise InvalidRequestError(name, f"has shape {list(sizes)}, expected {list(shape)}")
    # Python integers do not overflow, and nothing is allocated before its bytes are there.
    if math.prod(sizes) * dtype.itemsize != len(message.data):
        raise InvalidRequestError(
            name, f"has {len(message.data)} bytes for shape {list(sizes)} of {dtype}"
        )
    if not message.data:
        return torch.empty(sizes, dtype=dtype)
    tensor = torch.frombuffer(bytearray(message.data), dtype=dtype).view(sizes)
    if dtype.is_floating_point and not _is_finite(message.data, dtype):
        raise InvalidRequestError(name, "has a value that is not finite")
    return tensor


def _is_finite(data: bytes, dtype: torch.dtype) -> bool:
    """By numpy, as PyTorch would set OpenMP's workers to it, who then take the cores away from
    those of the thread that computes."""
    if dtype is torch.bfloat16:  # which numpy does not know: what is not finite has this exponent
        exponents = np.frombuffer(data, dtype=np.uint16) & _BF16_EXPONENT
        return not (exponents == _BF16_EXPONENT).any()
    values = np.frombuffer(data, dtype=np.float32 if dtype is torch.float32 else np.float16)
    return bool(np.isfinite(values).all())
