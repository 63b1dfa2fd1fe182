"""Heads for slides: attention over a bag of patch features, and how one head is trained (Z §4.5; L §7).

ABMIL, CLAM-SB and DSMIL at the published sizes by default; mean and max pooling are the floors they have to beat.

in:  a bag (N,K), one slide   out: logits (C,), attention (N,) or (N,C) whose columns sum to 1
run: python heads.py     read next: mil.py
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, generator

# ----- 1. Heads: bag (N,K) -> logits (C,), attention -----

def checked(bag, K):
    """raises: UserError for a bag that is not (N,K) with N at least 1. out: float32."""
    if bag.ndim != 2 or bag.shape[1] != K or not len(bag):
        raise UserError(f"got a bag of shape {tuple(bag.shape)}, this head takes (N,{K}) with at least one patch: give "
                        f"features of the kind it was trained on, and leave empty slides out")
    return bag.float()


class ABMIL(nn.Module):
    """Gated attention over embedded instances. source: Ilse et al. 2018, Eq. 9; sizes as CLAM without instance loss."""

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__()
        self.K, self.C = K, C
        self.embed = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.value, self.gate = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.score = nn.Linear(width // 2, 1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, C)

    def attend(self, bag):
        """out: h (N,width), attention (N,)."""
        h = self.embed(checked(bag, self.K))                               # (N,width)
        v = self.drop(torch.tanh(self.value(h))) * self.drop(torch.sigmoid(self.gate(h)))
        return h, self.score(v)[:, 0].softmax(0)

    def forward(self, bag):
        h, a = self.attend(bag)
        return self.out(a @ h), a

    def loss(self, bag, y):
        """in: y () int64, the class of the bag."""
        return F.cross_entropy(self(bag)[0], y)


class CLAM_SB(ABMIL):
    """ABMIL whose most and least attended instances must be told apart. source: Lu et al. 2021."""
    SAMPLES, SHARE = 8, 0.3  # published; the loss is 0.7 bag + 0.3 instances

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__(K, C, width, dropout)
        self.instance = nn.ModuleList(nn.Linear(width, 2) for _ in range(C))

    def loss(self, bag, y):
        h, a = self.attend(bag)
        loss, n = F.cross_entropy(self.out(a @ h), y), min(self.SAMPLES, len(h) // 2)
        if not n:                                                          # deviates: a bag of one has no least
            return loss
        order = a.argsort()
        logits = self.instance[int(y)](h[torch.cat([order[-n:], order[:n]])])              # (2n,2)
        target = torch.tensor([1] * n + [0] * n, device=h.device)
        return (1 - self.SHARE) * loss + self.SHARE * F.cross_entropy(logits, target)


class DSMIL(nn.Module):
    """Two streams: the highest instance of each class, and attention by likeness to it. source: Li et al. 2021.

    deviates: logits are the mean of both streams (with the bag stream alone, nothing but `loss` would train the other).
    """

    def __init__(self, K, C, width=128):
        super().__init__()
        self.K, self.C = K, C
        self.instance = nn.Linear(K, C)
        self.query = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Conv1d(C, C, K)
        for layer in (self.instance, self.query[0], self.query[2], self.out):
            nn.init.orthogonal_(layer.weight)  # published; it makes like queries of like instances from the start
            nn.init.zeros_(layer.bias)
        with torch.no_grad():  # deviates: random scores would choose the critical instances for many epochs
            self.instance.weight.mul_(0.01)
            self.out.weight.mul_(0.01)

    def streams(self, bag):
        """out: logits of the instance and of the bag stream, (C,) each; attention (N,C)."""
        x = checked(bag, self.K)
        top, critical = self.instance(x).max(0)                            # (C,), (C,)
        q = self.query(x)                                                  # (N,width)
        a = (q @ q[critical].T / q.shape[1] ** 0.5).softmax(0)             # (N,C)
        return top, self.out((a.T @ x)[None])[0, :, 0], a

    def forward(self, bag):
        top, whole, a = self.streams(bag)
        return (top + whole) / 2, a

    def loss(self, bag, y):
        top, whole, _ = self.streams(bag)
        target = F.one_hot(y, self.C).float()
        return (F.binary_cross_entropy_with_logits(top, target) + F.binary_cross_entropy_with_logits(whole, target)) / 2


class MeanPool(nn.Module):
    """A floor: the mean of all instances, embedded, then a linear layer; attention is even."""

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__()
        self.K, self.C = K, C
        self.embed = nn.Sequential(nn.Linear(K, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.out = nn.Linear(width, C)

    def forward(self, bag):
        h = self.embed(checked(bag, self.K))
        return self.out(h.mean(0)), torch.full_like(h[:, 0], 1 / len(h))

    def loss(self, bag, y):
        return F.cross_entropy(self(bag)[0], y)


class MaxPool(MeanPool):
    """A floor: the maximum over instances of each embedded channel; attention is the share of channels an instance has
    the maximum of. (The maximum of instance logits trains badly: an instance that starts low is never looked at.)"""

    def forward(self, bag):
        h, at = self.embed(checked(bag, self.K)).max(0)                    # (width,), (width,)
        return self.out(h), torch.bincount(at, minlength=len(bag)) / len(h)


HEADS = {"abmil": ABMIL, "clam": CLAM_SB, "dsmil": DSMIL, "mean": MeanPool, "max": MaxPool}
RECIPES = {"dsmil": dict(betas=(0.5, 0.9), weight_decay=1e-3)}  # published; the others: CLAM's
RECIPE = dict(betas=(0.9, 0.999), weight_decay=1e-5)


def build(name, K, C, width, dropout):
    """A head by name. raises: UserError for an unknown one."""
    if name not in HEADS:
        raise UserError(f"unknown head {name!r}: known are {', '.join(HEADS)}")
    return HEADS[name](K, C, width) if name == "dsmil" else HEADS[name](K, C, width, dropout)


# ----- 2. Training one head -----

def fit(name, train, val, scaler, C, cfg, seed):
    """Train a head, a bag a step, classes equally often, until the validation loss has not fallen for a while.

    in:  train, val: lists of (function that reads a bag (N,K), class number); scaler: mean and deviation (K,).
    out: the head at its lowest validation loss, in eval mode.
    """
    torch.manual_seed(seed)
    (mean, deviation), labels = scaler, torch.tensor([y for _, y in train])
    head = build(name, len(mean), C, cfg.width, cfg.dropout)
    opt = torch.optim.Adam(head.parameters(), lr=cfg.lr, **RECIPES.get(name, RECIPE))
    weight = 1 / torch.bincount(labels, minlength=C)[labels].double()
    best, since, kept = float("inf"), 0, None

    def loss(item):
        read, y = item
        return head.loss((read() - mean) / deviation, torch.tensor(y))
    for epoch in range(cfg.epochs):
        head.train()
        for k in torch.multinomial(weight, len(train), True, generator=generator(cfg.seed, seed, epoch)).tolist():
            opt.zero_grad()
            loss(train[k]).backward()
            opt.step()
        head.eval()
        with torch.no_grad():
            value = float(torch.stack([loss(item) for item in val]).mean())
        if not math.isfinite(value):
            raise UserError(f"head {name}: the validation loss is no longer finite: give a lower --lr than {cfg.lr}")
        since = since + 1
        if value < best:
            best, since, kept = value, 0, {k: v.clone() for k, v in head.state_dict().items()}
        if since >= cfg.patience:
            break
    head.load_state_dict(kept)
    return head


def main(argv):
    print(f"{'':<8}{'parameters at K = 1024, C = 2':>30}")
    for name, kind in HEADS.items():
        print(f"{name:<8}{sum(p.numel() for p in kind(1024, 2).parameters()):>30,}")
    logits, a = ABMIL(16, 2).eval()(torch.randn(5, 16))
    print(f"\ntiny forward on the CPU: a bag (5, 16) -> logits {tuple(logits.shape)}, attention that sums to "
          f"{a.detach().sum():.4f}")


if __name__ == "__main__":
    cli(main)
