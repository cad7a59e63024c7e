"""Tensors on the wire."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.errors import InvalidRequestError
from cluster.rpc.tensors import decode_tensor, encode_tensor
from tests.drafter_rpc_tools import tensor_of


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
def test_tensors_keep_their_bits(dtype):
    for shape in ((3, 5), (0, 4), ()):
        tensor = (torch.randn(shape) * 100).to(dtype)
        decoded = decode_tensor(
            encode_tensor(tensor), name="x", dtypes=(dtype,), shape=tuple(shape)
        )
        assert decoded.dtype == dtype
        assert torch.equal(decoded, tensor)


@pytest.mark.parametrize(
    "message",
    [
        tensor_of([2, 2], b"1234"),
        tensor_of([-2, -2], b"\0" * 16),
        tensor_of([2**40, 2**40], b"\0" * 16),
        tensor_of([4], b"\0" * 16),
        tensor_of([2, 2], b"\0" * 16, 0),
        tensor_of([2, 2], b"\0" * 16, 99),
    ],
)
def test_tensors_that_lie_are_refused(message):
    with pytest.raises(InvalidRequestError, match="x: "):
        decode_tensor(message, name="x", dtypes=(torch.float32,), shape=(None, None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(dtype, value):
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = value
    with pytest.raises(InvalidRequestError, match="finite"):
        decode_tensor(encode_tensor(tensor), name="x", dtypes=(dtype,), shape=(3, 5))
