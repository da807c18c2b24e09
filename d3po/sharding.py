"""Weights in pieces: of every tensor each process keeps its part (FSDP2, torch's `fully_shard`).

A network so cut up gathers the weights of one block, computes with them and lets them go; the way
back adds gradients up over the processes and leaves each process those of its pieces, so that the
optimizer's state is cut up as well (ZeRO-3, Rajbhandari et al. 2020). Every forward and backward
pass is an exchange, so all processes have to make equally many.

A piece is a DTensor: its shape is that of the whole, what it stores is this process's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fifa.config import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(device: torch.device, processes: int) -> DeviceMesh:
    """All processes in a row, each with a device of this kind; together."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh: DeviceMesh = init_device_mesh(device.type, (processes,))
    return mesh


def shard(network: Any, mesh: DeviceMesh) -> None:
    """Cut a diffusers network up in place and move the pieces to the device of the mesh.

    What is gathered at once is a block that diffusers names as one; what is outside of them goes
    together. Its parameters are new objects afterwards, its class a subclass.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise InputError("weights in pieces (FSDP2) need torch 2.6 or later") from None
    names = {
        *(network._no_split_modules or ()),
        *(getattr(network, "_repeated_blocks", None) or ()),
    }
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    for block in [*reversed(blocks), network]:  # inner ones first
        # The outermost too gives its weights back after a forward pass, which torch would spare:
        # the next pass may be under other weights.
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def in_pieces(tensor: Tensor) -> bool:
    """Whether this is a piece. (Asked so because torch before 2.5 has no name for its class.)"""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process stores of `tensor`, sharing its memory."""
    value: Any = tensor.detach()
    stored: Tensor = value.to_local() if in_pieces(tensor) else value
    return stored


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; together."""
    value: Any = tensor.detach()
    full: Tensor = value.full_tensor() if in_pieces(tensor) else value
    return full


def gathered(tensors: Mapping[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The whole tensors in CPU memory of the first process, one after the other; nothing elsewhere.

    Together. Without a mesh the tensors themselves.
    """
    if mesh is None:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if mesh.get_rank() == 0:
            found[name] = value.cpu()
    return found


def piece_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as `like` is; `value` where `like` is whole."""
    if not in_pieces(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Every process has the same whole tensor, so there is nothing to send.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@contextmanager
def holding(pieces: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the pieces have the values, then their own again.

    Their memory is where FSDP gathers from, so it is overwritten, not swapped. Gradients notice
    nothing: the way back gathers anew.
    """
    own = {name: local(piece).clone() for name, piece in pieces.items()}
    try:
        for name, piece in pieces.items():
            local(piece).copy_(local(values[name]))
        yield
    finally:
        for name, piece in pieces.items():
            local(piece).copy_(own[name])
