#!/bin/sh
# torch.distributed with gloo treats a column of a table as if its numbers lay side by side.
#
# Guess: all_reduce of table[:, 0] adds the columns of all ranks, or says that the tensor must be contiguous.
# What is: it takes as many numbers as the column has, in the order of memory: the first entry is summed, the other three
#   stay as they were, and three entries of the first row that nobody named are summed instead. broadcast has the same
#   fault, and between a transposed and a plain matrix it hands over memory, so the values change places. No warning.
#   all_gather, which copies first, is right.
# Version: torch 2.13.0, CPU, two ranks.
# Seen, rank 0 (a table of ones on rank 0, of twos on rank 1):
#   all_reduce of table[:, 0]: column [3, 1, 1, 1], first row [3, 3, 3, 3]
#   broadcast of table[:, 0] from rank 1: column [2, 1, 1, 1], first row [2, 2, 2, 2]
#   broadcast of [[0, 2], [1, 3]], transposed on rank 0 only: rank 1 has [[0, 1], [2, 3]]
# Why it matters: sums of a confusion matrix's column, of one metric in a table of metrics by scale, or of every second
#   row are averaged over ranks this way; weights in channels_last on one rank and not on another are broadcast. Write
#   view = view.contiguous(), reduce, and copy back.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6
cat > two_ranks.py <<'PY'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def ints(x):
    return x.int().tolist()


def rank_main(rank, meeting):
    dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
    table = torch.full((4, 4), float(rank + 1))
    dist.all_reduce(table[:, 0])
    summed = ints(table[:, 0]), ints(table[0])
    table = torch.full((4, 4), float(rank + 1))
    dist.broadcast(table[:, 0], 1)
    sent = ints(table[:, 0]), ints(table[0])
    whole = torch.full((4,), float(rank + 1))
    dist.all_reduce(whole)
    assert ints(whole) == [3, 3, 3, 3]
    matrix = torch.arange(4.).reshape(2, 2).t() if rank == 0 else torch.zeros(2, 2)
    dist.broadcast(matrix, 0)
    gathered = [torch.zeros(2, 2), torch.zeros(2, 2)]
    dist.all_gather(gathered, torch.arange(4.).reshape(2, 2).t())
    assert ints(gathered[1]) == [[0, 2], [1, 3]]
    if rank == 0:
        print("all_reduce of table[:, 0]: column", summed[0], "first row", summed[1])
        print("broadcast of table[:, 0] from rank 1: column", sent[0], "first row", sent[1])
        assert summed == ([3, 1, 1, 1], [3, 3, 3, 3])
        assert sent == ([2, 1, 1, 1], [2, 2, 2, 2])
        assert ints(matrix) == [[0, 2], [1, 3]]
    else:
        print("broadcast of [[0, 2], [1, 3]], transposed on rank 0 only: rank 1 has", ints(matrix))
        assert ints(matrix) == [[0, 1], [2, 3]]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (folder + "/meeting",), 2)
PY
venv/bin/python two_ranks.py
