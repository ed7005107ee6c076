"""Nested dictionaries of tensors and primitives as bytes, and back, without pickle.

The tensors are a safetensors file; the nesting is JSON in its header, behind a checksum of it and of all tensors.
Reading executes nothing, and a string that is truncated, oversized or changed by as little as a bit is refused. The
checksum (CRC-32, 11 ms for 40 MB) finds accidents; it is no protection against an attacker, who can compute it as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

__all__ = ["WireError", "pack", "text_length", "unpack"]

_STRUCTURE = "structure"
_DIGITS = 8
_text = json.JSONEncoder(separators=(",", ":")).encode


class WireError(ValueError):
    """A byte string is not what :func:`pack` writes."""


def pack(value: Any) -> bytes:
    """Return ``value`` as bytes.

    Args:
        value: any nesting of ``dict`` (keys ``str`` or ``int``), ``list``, ``tuple``, ``Tensor``, ``str``, ``int``,
            ``float``, ``bool`` and ``None``.

    Raises:
        TypeError: for any other type; its place in the nesting is named.

    Example:
        >>> import torch
        >>> unpack(pack({"step": 3, "state": {0: {"m": torch.ones(2)}}}))["state"][0]["m"].tolist()
        [1.0, 1.0]
    """
    tensors: dict[str, Tensor] = {}
    structure = _text(_flatten(value, tensors, "value"))
    return safetensors_torch.save(tensors, {_STRUCTURE: _checksum(structure, tensors) + structure})


def text_length(values: list[str | int | float]) -> int:
    """Return how many bytes of the header of :func:`pack` some primitives take, a constant for each of them aside.

    Example:
        >>> text_length([1, 10.0]) - text_length([1, 2.0])
        1
    """
    text = _text(values)
    return len(text) + text.count('"') + text.count("\\")  # both are escaped, for it is a string in another JSON


def unpack(data: bytes) -> Any:
    """Undo :func:`pack`.

    Raises:
        WireError: when ``data`` is truncated, oversized, changed or not written by :func:`pack`.
    """
    try:
        tensors = safetensors_torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = header["__metadata__"][_STRUCTURE]
        found, structure = text[:_DIGITS], text[_DIGITS:]
        if found != (expected := _checksum(structure, tensors)):
            raise ValueError(f"their checksum is {expected}, and they say {found}")
        return _nest(json.loads(structure), tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise WireError(
            f"Expected bytes written by fl_lightning.wire.pack, got {len(data)} bytes that cannot be read: {error}. "
            "Were they cut off or changed on the way? Then send them again."
        ) from error


def _checksum(structure: str, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(structure.encode())
    for index in range(len(tensors)):
        tensor = tensors[str(index)]
        value = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:0{_DIGITS}x}"


def _flatten(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = _portable(value)
        return {"#": key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) or hasattr(value, "items"):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"Expected str or int as a key at {place}, got {key!r}. Rename the key.")
        return {"d": [[key, _flatten(item, tensors, f"{place}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "l" if isinstance(value, list) else "t"
        return {kind: [_flatten(item, tensors, f"{place}[{index}]") for index, item in enumerate(value)]}
    raise TypeError(
        f"Expected tensors, primitives, dict, list or tuple, got {type(value).__name__} at {place}. "
        "Only tensors and primitives cross the border between server and client: convert it first."
    )


def _portable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # safetensors refuses two tensors of one storage; a row of a stacked tensor is such a view
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() else tensor


def _nest(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, body),) = structure.items()
    if kind == "#":
        return tensors[body]
    if kind == "d":
        return {key: _nest(item, tensors) for key, item in body}
    items = [_nest(item, tensors) for item in body]
    return items if kind == "l" else tuple(items)
