#!/bin/sh
# One row of 4 KB out of an HDF5 file of features costs 65 KB, or 2.2 MB if the data set can grow.
#
# Guess: features[i] reads the 4 KB of that row, or a few rows in a chunked data set.
# What is: a plain data set goes through a buffer of 64 KiB. A data set that can grow (maxshape=(None, 1024)) must have
#   chunks, and the guessed ones are 625 rows high and 32 columns wide: a row crosses 32 of them, of 80 KB each.
#   Neighbouring rows then come from the cache; rows in random order do not.
# Versions: h5py 3.16.0 (HDF5 2.0.0), numpy 2.4.6; 20,000 rows of 1024 float32.
# Seen, bytes read for a row of 4096:
#   plain, random order                        65,538
#   growing, guessed chunks, random order   2,202,492   chunks (625, 32)
#   growing, guessed chunks, 50 in a row       51,255
#   growing, chunks=(1, 1024), random order     6,872
# Why it matters: feature files of whole slides are written batch by batch, so they grow, and training reads single rows:
#   500 times the data. The remedy is chunks=(1, width) at writing.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q h5py==3.16.0 numpy==2.4.6
venv/bin/python - <<'PY'
import h5py
import numpy as np

rows, width, reads = 20000, 1024, 50


def bytes_read():  # by this process, so far; Linux
    return int(open("/proc/self/io").readline().split()[1])


def bytes_a_row(order, **options):
    with h5py.File("features.h5", "w") as file:
        file.create_dataset("features", data=np.ones((rows, width), np.float32), **options)
    with h5py.File("features.h5") as file:
        features = file["features"]
        features[0]
        before = bytes_read()
        for i in order:
            features[i]
        return (bytes_read() - before) / reads, features.chunks


shuffled = np.random.default_rng(1).permutation(rows)[:reads]
plain, _ = bytes_a_row(shuffled)
guessed, chunks = bytes_a_row(shuffled, maxshape=(None, width))
in_order, _ = bytes_a_row(range(1000, 1000 + reads), maxshape=(None, width))
chosen, _ = bytes_a_row(shuffled, maxshape=(None, width), chunks=(1, width))
print(f"plain, random order                     {plain:10,.0f}")
print(f"growing, guessed chunks, random order   {guessed:10,.0f}   chunks {chunks}")
print(f"growing, guessed chunks, 50 in a row    {in_order:10,.0f}")
print(f"growing, chunks=(1, 1024), random order {chosen:10,.0f}")
assert plain > 10 * 4096
assert guessed > 300 * 4096 and chunks == (625, 32)
assert chosen < 3 * 4096
PY
