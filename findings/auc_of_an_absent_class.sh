#!/bin/sh
# The AUC of a fold that lacks a class is nan in scikit-learn, 0.5 in torcheval, 0 in torchmetrics - and a perfect model 2/3.
#
# Guess: undefined everywhere, as nan or an error, or left out of the mean over classes.
# What is: torchmetrics returns 0 with a warning, and for several classes takes that 0 into the macro mean.
# Versions: torchmetrics 1.9.0, torcheval 0.0.7, scikit-learn 1.9.1, torch 2.13.0.
# Seen:
#   only negatives: scikit-learn nan, torcheval 0.5, torchmetrics 0.0
#   three classes of which one does not occur, perfect scores: torchmetrics macro 0.667 (per class 1, 1, 0),
#     torcheval 0.833, scikit-learn nan
# Why it matters: folds over patients with a rare subtype lack a class now and then. Means over folds then are nan, or
#   too low by an amount that depends on the library, and the best model cannot reach 1.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q torchmetrics==1.9.0 torcheval==0.0.7 scikit-learn==1.9.1 torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import math
import warnings

import torch
from sklearn.metrics import roc_auc_score
from torcheval.metrics.functional import binary_auroc, multiclass_auroc
from torchmetrics.functional import auroc

warnings.filterwarnings("ignore")
scores, negatives = torch.tensor([0.1, 0.4, 0.6, 0.8]), torch.zeros(4, dtype=torch.long)
one_class = (roc_auc_score(negatives, scores), binary_auroc(scores, negatives).item(),
             auroc(scores, negatives, task="binary").item())
print("only negatives: scikit-learn {}, torcheval {}, torchmetrics {}".format(*one_class))
assert math.isnan(one_class[0]) and one_class[1:] == (0.5, 0.0)

labels = torch.tensor([0, 0, 1, 1])  # of the classes 0, 1, 2
perfect = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
macro = auroc(perfect, labels, task="multiclass", num_classes=3).item()
each = auroc(perfect, labels, task="multiclass", num_classes=3, average="none").tolist()
evaluated = multiclass_auroc(perfect, labels, num_classes=3).item()
learned = roc_auc_score(labels, perfect, multi_class="ovr", labels=[0, 1, 2])
print(f"absent class, perfect scores: torchmetrics {macro:.3f} {each}, torcheval {evaluated:.3f}, scikit-learn {learned}")
assert each == [1, 1, 0] and abs(macro - 2 / 3) < 1e-6
assert abs(evaluated - 5 / 6) < 1e-6
assert math.isnan(learned)
PY
