"""All-reduces of small tensors in one kernel: each rank reads what all the others have, through torch's symmetric memory.

A decode step adds up a few hundred KiB after every projection, where NCCL's several steps take longer than the bytes. It is there
for ranks of one machine whose devices reach one another, and for float32 and bfloat16. All ranks add in the same order.
"""

from __future__ import annotations

import os
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

# By number of ranks, bytes up to which it is used: each rank reads all of it from all others, and larger ones are faster in
# NCCL's way. Source: the bounds of vLLM's own kernel of this kind (csrc/custom_all_reduce.cuh), which with two ranks has none.
MOST_BYTES = {2: 2**20, 4: 2**19, 8: 2**18}
TYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 16  # bytes that a thread loads


def can_meet(device: torch.device, size: int, num_local: int) -> bool:
    """Whether this rank may try: all ranks are on its machine, and its device reads the memory of theirs, cuda:0 and on."""
    if device.type != "cuda" or size not in MOST_BYTES or size != num_local or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy_out"):
        return False
    return all(torch.cuda.can_device_access_peer(device, other) for other in range(size) if other != device.index)


class OneShot:
    """Made by all ranks together, after a vote that all of them can; raises RuntimeError where it does not work after all."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        if rank == 0:
            store.set("one_shot", f"vlserve-{uuid.uuid4().hex}")  # torch knows such groups by a name of the process
        store.wait(["one_shot"], timeout)
        self._name = store.get("one_shot").decode()
        self._ranks = dist.ProcessGroup(dist.PrefixStore("one_shot", store), rank, size)
        c10d._register_process_group(self._name, self._ranks)
        self._buffer = c10d._SymmetricMemory.empty_strided_p2p((MOST_BYTES[size],), (1,), torch.uint8, device, self._name)
        try:
            self._handle = c10d._SymmetricMemory.rendezvous(self._buffer, self._name)
        except RuntimeError as error:
            if "group info" not in str(error):
                raise
            # some versions of torch want to be told about the group themselves
            c10d._SymmetricMemory.set_group_info(self._name, rank, size, dist.PrefixStore("one_shot", store))
            self._handle = c10d._SymmetricMemory.rendezvous(self._buffer, self._name)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is of a kind and size that this adds up."""
        is_kind = x.dtype in TYPES and x.device == self._buffer.device and x.is_contiguous()
        start = int(x.storage_offset()) * x.itemsize
        return is_kind and 0 < x.nbytes <= len(self._buffer) and x.nbytes % ALIGNMENT == 0 and start % ALIGNMENT == 0

    def all_reduce(self, x: torch.Tensor) -> None:
        """The sum of every rank's x, in place; it may be part of a CUDA graph."""
        flat = x.view(-1)
        shared = self._buffer[: x.nbytes].view(x.dtype)
        # a thread has put its numbers into the shared buffer when it waits for the others: the result may go where they were
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(shared, flat, "sum", self._name, flat)
