"""A canvas whose windows are shared over the ranks of torchrun.

Every rank holds the whole canvas and asks its networks about its own windows; sums go round. In float64 they hardly
depend on their order, so that two ranks draw what one draws.

run: torchrun --standalone --nproc_per_node=2 sample_joint.py out/toy --size=1024     read next: large/windows.py
"""
import torch.distributed as dist

from common import cli
from sample_joint import Canvas

class RankCanvas(Canvas):
    """Attributes: ij, the windows of this rank; shared: whether there are enough of them for every rank. If not, each
    rank does them all."""

    def __post_init__(self):
        super().__post_init__()
        rank, world, n = dist.get_rank(), dist.get_world_size(), len(self.ij)
        self.shared = n >= world
        if self.shared:
            self.ij = self.ij[n * rank // world:n * (rank + 1) // world]

    def share(self, total):
        if self.shared:
            dist.all_reduce(total)
        return total

def open_canvas(*args, **options):
    """A Canvas; under torchrun one whose windows are shared."""
    ranks = dist.is_available() and dist.is_initialized()
    return (RankCanvas if ranks else Canvas)(*args, **options)

def main(argv):
    canvas = open_canvas(32, 32, 16, 4)
    print(f"a canvas of 32 x 32 latents has windows of 16 x 16 at {canvas.ij}")

if __name__ == "__main__":
    cli(main, __doc__)
