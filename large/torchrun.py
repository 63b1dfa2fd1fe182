"""Join the processes that torchrun started, over gloo on CPUs and nccl on GPUs.

run: torchrun --standalone --nproc_per_node=2 train.py toy
"""
import os
from datetime import timedelta

import torch.distributed as dist

from common import UserError, cli

def join(rank, world, device):
    """Start the process group of `world` ranks, of which this one is `rank`."""
    wait, store = timedelta(hours=2), None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun on one node, whose store outlives a restart of the ranks (PyTorch 2.13): they must not find the
        # addresses of those that are dead
        store = next(dist.rendezvous("env://", timeout=wait))[0]
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)

def main(argv):
    raise UserError("this file is a part of others: torchrun --standalone --nproc_per_node=2 train.py toy")

if __name__ == "__main__":
    cli(main, __doc__)
