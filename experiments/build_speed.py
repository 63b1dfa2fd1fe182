"""How fast slides are built and read: this checkout beside an older one, and beside openslide, in one run.

    python -m experiments.build_speed ../old SLIDE     # medians of rounds, of which each runs both in turn

in:  a folder with another checkout; a slide or image   out: a table     read next: slides/build.py
"""
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from common import UserError, cli, configure
from slides.reader import open_slide

# of any checkout: CPU milliseconds to read the whole slide in strips of 256 pixels, a tile of 256 x 256
READ = """
import sys, time
try:
    from slides.reader import open_slide
except ImportError:
    from reader import open_slide
slide, begun = open_slide(sys.argv[1]), time.process_time()
width, height = slide.size
for y in range(0, height - 255, 256):
    slide.read(0, y, width, 256)
print((time.process_time() - begun) * 1e3 / (height // 256 * width / 256))
"""
ROWS = ("base tiles a second", "CPU seconds of the build", "seconds of the build, with start", "peak MB of a process",
        "CPU ms to read a tile")

@dataclass
class Config:
    old: str = ""     # folder of the checkout to compare with
    slide: str = ""   # a slide or image
    rounds: int = 5
    regions: int = 100

def measured(folder, slide):
    """Build and read a slide with the checkout in a folder. out: the numbers of ROWS."""
    with TemporaryDirectory() as out:
        command = [sys.executable, "data.py", "build", f"--images={slide}", f"--out={out}/data"]
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said = process.stdout.read()
        used = os.wait4(process.pid, 0)[2]
        seconds = time.perf_counter() - begun
    rate = re.search(r"(\d+) a second", said)
    if not rate:
        raise UserError(f"{folder} did not build {slide}: run data.py build there to see why")
    read = subprocess.run([sys.executable, "-c", READ, slide], cwd=folder, capture_output=True, text=True, check=True)
    return int(rate[1]), used.ru_utime + used.ru_stime, seconds, used.ru_maxrss / 1024, float(read.stdout)

def random_regions(path, n, seed):
    """CPU milliseconds to read a region of 256 x 256 pixels at a random place: openslide's and ours."""
    import openslide
    theirs, ours, rng, spent = openslide.OpenSlide(path), open_slide(path), random.Random(seed), []
    places = [(rng.randrange(ours.size[0] - 255), rng.randrange(ours.size[1] - 255)) for _ in range(n)]
    for read in (lambda x, y: np.asarray(theirs.read_region((x, y), 0, (256, 256))),
                 lambda x, y: ours.read(x, y, 256, 256)):
        begun = time.process_time()
        for x, y in places:
            read(x, y)
        spent.append((time.process_time() - begun) * 1e3 / n)
    return spent

def line(name, one, other):
    print(f"{name:34}{median(one):10.4g}{median(other):10.4g}{median(b / a for a, b in zip(one, other)):8.2f}")

def main(argv):
    cfg = configure(Config, argv, words=("old", "slide"), doc=__doc__)
    if not os.path.isfile(f"{cfg.old}/data.py") or not os.path.isfile(cfg.slide):
        raise UserError(f"{cfg.old or 'OLD'} and {cfg.slide or 'SLIDE'}: give another checkout, and a slide or image")
    slide = os.path.abspath(cfg.slide)
    rounds = [[measured(folder, slide) for folder in (cfg.old, ".")] for _ in range(cfg.rounds)]
    print(f"{os.path.basename(slide):34}{'there':>10}{'here':>10}{'ratio':>8}")
    for k, name in enumerate(ROWS):
        line(name, *([side[k] for side in sides] for sides in zip(*rounds)))
    try:
        pairs = [random_regions(slide, cfg.regions, seed) for seed in range(cfg.rounds)]
        line("CPU ms a region, openslide and here", *zip(*pairs))
    except Exception as err:  # openslide is not installed, or does not know the file
        print(f"openslide: {err}")

if __name__ == "__main__":
    cli(main, __doc__)
