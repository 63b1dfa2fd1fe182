"""The processes that torchrun starts, joined; a canvas whose windows they share.

Every rank holds the whole canvas and asks its networks about its own windows; sums go round. In float64 they hardly
depend on their order, so that two ranks draw what one draws.     read next: large/windows.py"""
import os
from datetime import timedelta

import torch.distributed as dist

from sample_joint import Canvas

class RankCanvas(Canvas):
    """Attributes: ij, the windows of this rank; shared: False if there are too few, and each rank does them all."""

    def __post_init__(self):
        super().__post_init__()
        rank, world, n = dist.get_rank(), dist.get_world_size(), len(self.ij)
        self.shared = n >= world
        if self.shared:
            self.ij = self.ij[n * rank // world:n * (rank + 1) // world]

    def share(self, total):
        if self.shared:
            total = total.contiguous()  # gloo (PyTorch 2.13) takes a view's numbers to lie side by side
            dist.all_reduce(total)
        return total

def open_canvas(*args, **options):
    """A Canvas; under torchrun one whose windows are shared."""
    ranks = dist.is_available() and dist.is_initialized()
    return (RankCanvas if ranks else Canvas)(*args, **options)

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
