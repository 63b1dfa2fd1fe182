"""What a caption says of a region, clause by clause: what lies in each of its quarters (ours).

A sentence's vector does not tell which tissue lies on which side, the vectors of its clauses do: docs/text.md.
in:  vectors of clauses, v (B,n,V)   out: mean embeddings of four quarters (B,E,2,2)     read next: grid.py
"""
import re

import torch
from torch.nn import GELU, Dropout, Linear, Module, Sequential
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from tqdm import tqdm

JOINTS = r"\. |; |, and |, | \| "    # what stands between clauses

def clauses(text):
    """"Mostly fat; no tumour." -> ["mostly fat", "no tumour"]."""
    parts = (part.strip().rstrip(".").lower() for part in re.split(JOINTS, text))
    return [part for part in parts if part]

# ----- 1. Quarters -----

def quarters(e):
    """The means of the four quarters of grids e (B,E,rows,columns): (B,E,2,2)."""
    return adaptive_avg_pool2d(e, 2)

def over(q, e):
    """Each of quarters q (B,E,2,2) all over its part of a grid as large as e."""
    return interpolate(q, e.shape[2:], mode="nearest")

# ----- 2. From clauses to quarters -----

class Listener(Module):
    """What each clause says alone, added up; then quarters from the sum. heard: 1 once it has learnt."""

    def __init__(self, vector, channels, width=256):
        super().__init__()
        self.clause = Sequential(Linear(vector, width), GELU(), Dropout(0.2), Linear(width, width))
        self.total = Sequential(GELU(), Dropout(0.2), Linear(width, 4 * channels))
        self.register_buffer("heard", torch.zeros(()))
        self.requires_grad_(False)                                      # nothing but `learn` trains it

    def forward(self, v, there):
        """in: clauses v (B,n,V), and which of them there are (B,n) bool. out: (B,E,2,2)."""
        said = (self.clause(v) * there[..., None]).sum(1)               # (B,width)
        return self.total(said).unflatten(1, (-1, 2, 2))

    def learn(self, v, there, aim, epochs=10, batch=256):
        """Regression, with the same numbers each time. in: as above, and the quarters (B,E,2,2) that are aimed at."""
        optimizer = torch.optim.AdamW(self.requires_grad_().train().parameters(), 1e-3, weight_decay=0.05)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for _ in tqdm(range(epochs), "what captions say"):
                for pick in torch.randperm(len(v)).split(batch):
                    loss = (self(v[pick], there[pick]) - aim[pick]).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()                               # none is left for another optimizer to find
        self.heard.fill_(1)
        return self.requires_grad_(False).eval()
