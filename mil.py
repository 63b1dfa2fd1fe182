"""Slide labels from bags of patch features: the features, the heads, cross-validation (Z §4.5; L §7).

    python mil.py extract RUN --data=DIR --scales=0,2     features of every patch, by the trained U-Net
    python mil.py cv --features=DIR --labels=FILE         a table, features x heads
    python mil.py map --features=DIR --labels=FILE --slide=NAME --data=DIR     where a head looks

A slide is a bag of patches with one label. A head weighs the patches by attention and classifies their mean.
Files, joined scales, folds, tables and maps: slides/bags.py, experiments/ features, folds, crossval, maps.

in:  a bag (N,K), one slide   out: logits (C,), attention (N,) or (N,C) that sums to 1     read next: docs/
"""
import copy
import math

import torch
from torch.nn import Conv1d, Dropout, Linear, Module, ModuleList, ReLU, Sequential, Tanh
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.init import orthogonal_, zeros_

from common import UserError, cli, generator

# ----- 1. Heads: bag (N,K) -> logits (C,), attention -----

def checked(bag, K):
    """in: a bag. out: the same in float32. raises: UserError if it is not (N,K) with N at least 1."""
    if bag.ndim != 2 or bag.shape[1] != K or len(bag) == 0:
        raise UserError(f"got a bag of shape {tuple(bag.shape)}, this head takes (N,{K}) with at least one "
                        f"patch: give features of the kind it was trained on, and leave empty slides out")
    return bag.float()

class ABMIL(Module):
    """Gated attention over embedded patches. source: Ilse et al. 2018, Eq. 9; sizes as CLAM's."""
    adam = dict(betas=(0.9, 0.999), weight_decay=1e-5)  # as CLAM

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__()
        self.K, self.C = K, C
        self.embed = Sequential(
            Linear(K, width),
            ReLU(inplace=True),
            Dropout(dropout))
        self.value = Linear(width, width // 2)
        self.gate = Linear(width, width // 2)
        self.score = Linear(width // 2, 1)
        self.drop = Dropout(dropout)
        self.out = Linear(width, C)

    def attend(self, bag):
        """out: embedded patches (N,width), attention (N,)."""
        h = self.embed(checked(bag, self.K))                   # (N,width)
        value = self.drop(torch.tanh(self.value(h)))           # (N,width/2)
        gate = self.drop(torch.sigmoid(self.gate(h)))          # (N,width/2)
        a = self.score(value * gate)[:, 0].softmax(0)          # (N,)
        return h, a

    def forward(self, bag):
        h, a = self.attend(bag)
        return self.out(a @ h), a

    def loss(self, bag, y):
        """in: y () int64, the class of the bag."""
        logits, _ = self(bag)
        return cross_entropy(logits, y)

class CLAM_SB(ABMIL):
    """ABMIL whose most and least attended patches must be told apart. source: Lu et al. 2021."""
    SAMPLES, SHARE = 8, 0.3  # published; the loss is 0.7 bag + 0.3 patches

    def __init__(self, K, C, width=512, dropout=0.25):
        super().__init__(K, C, width, dropout)
        self.instance = ModuleList(Linear(width, 2) for _ in range(C))

    def loss(self, bag, y):
        h, a = self.attend(bag)
        loss = cross_entropy(self.out(a @ h), y)
        n = min(self.SAMPLES, len(h) // 2)
        if n == 0:  # deviates: a bag of one has no least attended patch
            return loss
        order = a.argsort()
        extremes = h[torch.cat([order[-n:], order[:n]])]       # (2n,width), most attended first
        logits = self.instance[int(y)](extremes)               # (2n,2)
        target = torch.tensor([1] * n + [0] * n, device=h.device)
        return (1 - self.SHARE) * loss + self.SHARE * cross_entropy(logits, target)

class DSMIL(Module):
    """Two streams: the highest patch of each class, and attention by likeness to it. source: Li et al. 2021.
    deviates: logits are the mean of both streams, as the loss is. It has no dropout, whatever is asked for."""
    adam = dict(betas=(0.5, 0.9), weight_decay=1e-3)  # published

    def __init__(self, K, C, width=128, dropout=0.0):
        super().__init__()
        self.K, self.C = K, C
        self.instance = Linear(K, C)
        self.query = Sequential(
            Linear(K, width),
            ReLU(inplace=True),
            Linear(width, width),
            Tanh())
        self.out = Conv1d(C, C, K)
        for layer in (self.instance, self.query[0], self.query[2], self.out):
            orthogonal_(layer.weight)  # published; like patches get like queries from the start
            zeros_(layer.bias)
        with torch.no_grad():  # deviates: random scores would choose the critical patches for many epochs
            self.instance.weight.mul_(0.01)
            self.out.weight.mul_(0.01)

    def streams(self, bag):
        """out: logits of the patch stream and of the bag stream, (C,) each; attention (N,C)."""
        x = checked(bag, self.K)                               # (N,K)
        top, critical = self.instance(x).max(0)                # (C,) scores, (C,) patch numbers
        q = self.query(x)                                      # (N,width)
        likeness = q @ q[critical].T / q.shape[1] ** 0.5       # (N,C)
        a = likeness.softmax(0)                                # (N,C)
        whole = self.out((a.T @ x)[None])[0, :, 0]             # (C,)
        return top, whole, a

    def forward(self, bag):
        top, whole, a = self.streams(bag)
        return (top + whole) / 2, a

    def loss(self, bag, y):
        top, whole, _ = self.streams(bag)
        target = one_hot(y, self.C).float()                    # (C,)
        return sum(binary_cross_entropy_with_logits(v, target) for v in (top, whole)) / 2

HEADS = {"abmil": ABMIL, "clam": CLAM_SB, "dsmil": DSMIL}

# ----- 2. Cross-validation -----

def fit(Head, train, val, scaler, C, cfg, seed):
    """Train a head, a bag a step, all classes equally often, until the validation loss has stopped falling.
    in:  Head, its class; train, val: lists of (bags, slide, class number), where bags[slide] is (N,K); scaler:
         mean and deviation (K,); cfg: width, dropout, lr, epochs, patience, seed.
    out: the head at its lowest validation loss, in eval mode. raises: UserError if it is not finite."""
    torch.manual_seed(seed)
    mean, deviation = scaler
    head = Head(len(mean), C, cfg.width, cfg.dropout)
    optimizer = torch.optim.Adam(head.parameters(), cfg.lr, **head.adam)
    labels = torch.tensor([y for _, _, y in train])
    counts = torch.bincount(labels, minlength=C)                       # (C,)
    odds = 1 / counts[labels].double()                             # (n,), rare classes are drawn more often
    best, since = math.inf, 0
    kept = None

    def loss_of(bags, slide, y):
        return head.loss((bags[slide] - mean) / deviation, torch.tensor(y))

    for epoch in range(cfg.epochs):
        head.train()
        rng = generator(cfg.seed, seed, epoch)
        order = torch.multinomial(odds, len(train), replacement=True, generator=rng)
        for k in order.tolist():
            optimizer.zero_grad()
            loss_of(*train[k]).backward()
            optimizer.step()
        head.eval()
        with torch.no_grad():
            losses = [loss_of(*item) for item in val]
            value = float(torch.stack(losses).mean())
        if not math.isfinite(value):
            raise UserError(f"{Head.__name__}: the validation loss is no longer finite: give a lower --lr")
        since += 1
        if value < best:
            best, since = value, 0
            kept = copy.deepcopy(head.state_dict())
        if since >= cfg.patience:
            break
    head.load_state_dict(kept)
    return head

def cross_validate(Head, sources, tested, labels, splits, cfg, repeat=0):
    """Score every slide by a head that never saw it. The test slides of a fold neither train the head, nor stop
    it, nor standardise its features.
    in:  sources, list of slides.bags.Bags to train on; tested, Bags to score; labels, experiments.folds.Labels;
         splits: [(train, val, test)], slide numbers, no patient in two of them; repeat: of the whole, for seeds.
    out: scores (n,C), NaN for slides in no test fold; fold (n,), -1 for these; [(head, scaler)], one per fold."""
    n, C = len(labels.names), len(labels.classes)
    scores = torch.full((n, C), math.nan)
    fold = torch.full((n,), -1)
    heads = []

    def items(numbers):
        return [(bags, labels.names[i], int(labels.y[i])) for bags in sources for i in numbers]

    for k, (train, val, test) in enumerate(splits):
        names = [labels.names[i] for i in train]
        scaler = sources[0].scaler(names, *sources[1:])
        mean, deviation = scaler
        seed = cfg.seed + 100 * repeat + k
        head = fit(Head, items(train), items(val), scaler, C, cfg, seed)
        for i in test:
            bag = tested[labels.names[i]]                              # (N,K)
            with torch.no_grad():
                logits, _ = head((bag - mean) / deviation)
            scores[i] = logits.softmax(0)
            fold[i] = k
        heads.append((head, scaler))
    return scores, fold, heads

# ----- 3. Features of patches (Z §4.5; L §7) -----

class Activations:
    """Features: what a block of the U-Net makes of a noised patch and its condition.
    in:  t, index that patches are noised to (Z 100, L 50); block: "middle" (L), or an index into the published
         output_blocks as text, by default 3 (Z) or the last; seed of the noise. raises: UserError."""

    def __init__(self, model, pyramids, ranks, t=100, block="", seed=0):
        self.model, self.pyramids, self.ranks = model, pyramids, ranks
        self.t, self.seed = t, seed
        blocks = len(model.unet.up)
        T = model.schedule.T
        names = ["middle", *map(str, range(blocks))]
        block = block or str(min(3, blocks - 1))
        if block not in names or not 0 <= t < T:
            raise UserError(f"--block={block} --t={t}: blocks are {', '.join(names)}; t is from 0 to {T - 1}")
        self.block = block if block == "middle" else int(block)

    def noise(self, slide, batch):
        """A tensor per patch (b,3,P/4,P/4), made of seed, slide, scale and place alone: batches, ranks and
        interruptions change nothing."""
        side = self.pyramids.patch // self.model.vae.factor
        shape = (self.model.unet.cfg.channels, side, side)
        noise = []
        for s, ij in zip(batch["s"].tolist(), batch["ij"].tolist()):
            rng = generator(self.seed, slide, s, *ij)
            noise.append(torch.randn(shape, generator=rng))    # (3,P/4,P/4)
        return torch.stack(noise).to(self.ranks.device)

    def of(self, slide, batch):
        """Encode, noise to t, one pass of the U-Net, the mean of a block over space.
        in: name of the slide; a collated batch of its patches, on the device. out: (b,K) float32."""
        model = self.model
        eps = self.noise(slide, batch)                         # (b,3,P/4,P/4)
        t = torch.full((len(eps),), self.t, device=eps.device)
        with self.ranks.autocast():
            z = model.encode(batch["x"]).float()               # (b,3,P/4,P/4)
            z_t = model.schedule.q_sample(z, t, eps)
            c = model.summarizer(batch["tokens"], batch["mask"], batch["s"]).float()  # (b,65,D)
            maps = model.unet.features(z_t, t, c, self.block)  # (b,K,h,w)
        return maps.float().mean((2, 3))

def main(argv):
    word = argv[0] if argv else "no command"
    if word in ("--help", "-h"):
        return print(f"{__doc__}\nsettings: python mil.py extract --help, and so on")
    if word not in ("extract", "cv", "map"):
        raise UserError(f"got {word!r}: write python mil.py extract, cv, map; see --help")
    from experiments import crossval, features, maps
    dict(extract=features, cv=crossval, map=maps)[word].main(argv[1:])

if __name__ == "__main__":
    cli(main, stopped="what is finished is kept, and the same command goes on with the rest")
