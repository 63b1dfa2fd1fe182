"""mil.py: heads by their formulas, training, cross-validation without leaks, features of the U-Net."""
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import mil
from common import UserError, generator, setup
from data import Pyramids
from diffusion import ZoomLDM
from experiments import features
from summarizer import Summarizer, SummarizerConfig
from unet import UNet, UNetConfig
from zoom_vae import VQVAE, VAEConfig

each = pytest.mark.parametrize("name", list(mil.HEADS))

@dataclass
class Cfg:
    """What `fit` takes."""
    width: int = 16
    dropout: float = 0.25
    lr: float = 3e-3
    epochs: int = 15
    patience: int = 15
    seed: int = 0

# ----- 1. Heads -----

@pytest.mark.parametrize("name, count", [("abmil", 788_739), ("clam", 790_791), ("dsmil", 153_860)])
@pytest.mark.parametrize("n", [1, 2, 37])
def test_interface(name, count, n):
    """The published number of parameters; logits (C,), attention that sums to 1 and goes with its instance, in training
    too; a bag of one. Catches: softmax over the wrong axis."""
    assert sum(p.numel() for p in mil.HEADS[name](1024, 2).parameters()) == count
    head, bag, order = mil.HEADS[name](12, 3), torch.randn(n, 12), torch.randperm(n)
    for mode in (True, False):
        logits, a = head.train(mode)(bag)
        assert logits.shape == (3,) and a.shape in ((n,), (n, 3)) and (a >= 0).all()
        torch.testing.assert_close(a.sum(0), torch.ones(a.shape[1:]))
    assert head.loss(bag, torch.tensor(2)).isfinite()
    again, b = head(bag[order])
    torch.testing.assert_close((logits, a[order]), (again, b))
    assert not torch.allclose(logits, head(bag + 1)[0])
    for bad in (torch.zeros(0, 12), torch.zeros(5, 11), torch.zeros(12)):
        with pytest.raises(UserError, match=r"takes \(N,12\) with at least one patch"):
            head(bad)

def test_heads_compute_their_formulas():
    """ABMIL: Ilse et al. Eq. 9. DSMIL: attention by likeness to the highest instance. Catches: a gate left out, the
    critical instance of the wrong class, a missing root."""
    x = torch.randn(9, 6)
    head = mil.ABMIL(6, 2, 8).eval()
    h = torch.relu(x @ head.embed[0].weight.T + head.embed[0].bias)
    v, u = (h @ layer.weight.T + layer.bias for layer in (head.value, head.gate))
    w = torch.exp((torch.tanh(v) * torch.sigmoid(u) * head.score.weight).sum(1))
    logits, a = head(x)
    torch.testing.assert_close(a, w / w.sum())
    torch.testing.assert_close(logits, ((w / w.sum())[:, None] * h).sum(0) @ head.out.weight.T + head.out.bias)
    head = mil.DSMIL(6, 3, 8).eval()
    scores, q, (top, whole, a) = head.instance(x), head.query(x), head.streams(x)
    for c in range(3):
        m = scores[:, c].argmax()
        want = torch.exp(q @ q[m] / 8 ** 0.5)
        torch.testing.assert_close(a[:, c], want / want.sum())
        assert top[c] == scores[m, c]
    want = sum(head.out.weight[:, c] @ (a[:, c] @ x) for c in range(3)) + head.out.bias
    torch.testing.assert_close(whole, want)
    torch.testing.assert_close(head(x)[0], (top + whole) / 2)

def test_clam_asks_for_the_most_and_least_attended():
    """0.7 bag + 0.3 instances, of the layer of the true class. Catches: targets exchanged, the wrong class's layer."""
    head, x = mil.CLAM_SB(6, 2, 8).eval(), torch.randn(40, 6)
    h, a = head.attend(x)
    order = a.argsort(descending=True)
    logit = head.instance[1](h[torch.cat([order[:8], order[-8:]])])
    nll = -torch.log_softmax(logit, 1)
    inside = torch.cat([nll[:8, 1], nll[8:, 0]]).mean()
    bag = -torch.log_softmax(head(x)[0], 0)[1]
    torch.testing.assert_close(head.loss(x, torch.tensor(1)), 0.7 * bag + 0.3 * inside)

def planted(n=60, K=8, shift=4.0, seed=0):
    """Bags of 20 to 40 noise instances; those of class 1 have one that is shifted. out: items, places of the keys."""
    rng = generator(seed)
    bags, items, keys = {}, [], []
    for k in range(n):
        x = torch.randn(20 + k % 20, K, generator=rng)
        key = int(torch.randint(len(x), (1,), generator=rng))
        if k % 2:
            x[key, :3] += shift
        bags[f"s{k}"] = x
        items.append((bags, f"s{k}", k % 2))
        keys.append(key)
    return items, keys

NEUTRAL = torch.zeros(8), torch.ones(8)

@each
def test_attention_points_to_the_planted_instance(name):
    items, keys = planted(60)                                              # 40 to train on, 20 to look at
    head = mil.fit(mil.HEADS[name], items[:34], items[34:40], NEUTRAL, 2, Cfg(lr=1e-2, epochs=6), 0)
    found, right = 0, 0
    with torch.no_grad():
        for (bags, slide, y), key in list(zip(items, keys))[40:]:
            logits, a = head(bags[slide])
            right += int(logits.argmax()) == y
            found += y and int((a if a.ndim == 1 else a[:, 1]).argmax()) == key
    assert found >= 9 and right >= 17, (found, right)                       # of 10 and 20

# ----- 2. Training and cross-validation -----

def test_fit():
    """It is deterministic, stops `patience` epochs after the best and keeps that, and draws the classes, 18 slides
    against 2, equally often. catches: patience counted from the start, the last epoch kept, unweighted draws."""
    items = [({k: torch.randn(3, 8)}, k, int(k < 2)) for k in range(20)]
    seen, at = Counter(), {}

    class Spy(mil.ABMIL):
        def train(self, mode=True):
            seen["epochs"] += mode
            return super().train(mode)

        def loss(self, bag, y):
            if self.training:
                seen[int(y)] += 1
                return super().loss(bag, y)
            at[seen["epochs"]] = self.out.weight.clone()
            return torch.tensor(float(abs(seen["epochs"] - 3)))     # falls for three epochs, then rises
    first = mil.fit(Spy, items, items, NEUTRAL, 2, Cfg(patience=4, epochs=40), 3).state_dict()
    seen.clear()
    head = mil.fit(Spy, items, items, NEUTRAL, 2, Cfg(patience=4, epochs=40), 3)
    assert all(torch.equal(v, first[k]) for k, v in head.state_dict().items()) and not head.training
    assert seen["epochs"] == 7 and torch.equal(head.out.weight, at[3])
    assert seen[0] + seen[1] == 140 and 50 < seen[1] < 90, seen
    with pytest.raises(UserError, match="ABMIL: the validation loss is no longer finite"):
        mil.fit(mil.ABMIL, items, items, NEUTRAL, 2, Cfg(lr=1e30), 3)

class Folder(dict):
    """Bags in memory. Like slides.bags.Bags, but the scaler tells which slides it was asked for."""

    def scaler(self, names, *others):
        self.asked = list(names)
        x = torch.cat([self[n] for n in names])
        return x.mean(0), x.std(0, correction=0)

def test_cross_validation_never_shows_a_test_slide():
    """Scores are those of the head of the slide's fold, on features standardised by training slides alone.
    catches: the head of another fold, a scaler of all slides, training on test slides."""
    items, _ = planted(12)
    bags = Folder(items[0][0])
    labels = SimpleNamespace(names=list(bags), classes=["a", "b"], y=torch.tensor([y for _, _, y in items]))
    splits = [(list(range(4, 10)), [10, 11], [0, 1, 2, 3]), (list(range(6)), [10, 11], [6, 7])]
    seen = []

    class Spy(mil.ABMIL):
        def loss(self, bag, y):
            seen.append(bag)
            return super().loss(bag, y)
    scores, fold, heads = mil.cross_validate(Spy, [bags], bags, labels, splits, Cfg(epochs=2))
    assert fold.tolist() == [0, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1] and scores[fold < 0].isnan().all()
    assert bags.asked == [f"s{k}" for k in range(6)]
    for k, at in ((0, 3), (1, 6)):
        head, (mean, deviation) = heads[k]
        want = head((bags[f"s{at}"] - mean) / deviation)[0].softmax(0)
        torch.testing.assert_close(scores[at], want)
        shown = {len(x) for x in seen[:16] if k == 0} | {len(x) for x in seen[16:] if k == 1}
        assert not shown & {len(bags[f"s{i}"]) for i in splits[k][2]}      # bags of planted() differ in length
    other, _, _ = mil.cross_validate(Spy, [bags], bags, labels, splits, Cfg(epochs=2), repeat=1)
    assert not torch.equal(other[0], scores[0])

# ----- 3. Features of the U-Net -----

@pytest.fixture(scope="module")
def source(toy):
    """Features by a model whose networks were never trained, but whose layers all act."""
    torch.manual_seed(0)
    vae, unet = VQVAE(VAEConfig(8, groups=4, codes=16)), UNet(UNetConfig(8, (1, 2), 1, (2,), 16, groups=4))
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    model = ZoomLDM(vae, Summarizer(SummarizerConfig(96, 16, 1, 16, 3)), unet, 0.5).eval()
    return mil.Activations(model, Pyramids(toy), setup("cpu", False))

def test_features_are_one_pass_of_the_unet(source):
    """Encode, noise by (seed, slide, scale, place), condition on the patch's own embeddings, mean over space; a fine
    patch is joined with the coarse one it lies in. Catches: another t, a shared noise, a parent too far right."""
    model, pyramids = source.model, source.pyramids
    x, coords, widths = features.slide_features(source, 1, (0, 2), 7)
    name = pyramids.slides[1]["name"]
    assert source.block == 3 and widths == [8, 8] and coords.dtype == torch.int32
    assert x.shape == (len(coords), 16) and len(x) <= pyramids.slides[1]["counts"][0]
    places = {s: {tuple(v): n for n, v in enumerate(pyramids.tensor(1, f"ij{s}").tolist())} for s in (0, 2)}
    with torch.no_grad():
        for row in (0, 6, len(x) - 1):
            j, i = (coords[row] // 64).tolist()
            for s, part in ((0, x[row, :8]), (2, x[row, 8:])):
                item = pyramids.item(1, s, places[s][i >> s, j >> s], ("x",))
                eps = torch.randn(3, 16, 16, generator=generator(0, name, s, i >> s, j >> s))
                z_t = model.schedule.q_sample(model.encode(item["x"][None]), torch.tensor([100]), eps[None])
                c = model.summarizer(item["tokens"][None], item["mask"][None], torch.tensor([s]))
                want = model.unet.features(z_t, torch.tensor([100]), c, 3).mean((2, 3))[0]
                torch.testing.assert_close(part, want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(x[0], x[1])
    other = mil.Activations(model, pyramids, source.ranks, 50, "middle")
    assert not torch.equal(features.slide_features(other, 1, (0, 2), 7)[0], x)
    for bad in (dict(block="4"), dict(t=1000)):
        with pytest.raises(UserError, match="blocks are middle, 0, 1, 2, 3; t is from 0 to 999"):
            mil.Activations(model, pyramids, source.ranks, **bad)

def test_a_patch_without_a_parent_is_left_out(source):
    """catches: patches joined with the last one, at -1."""
    pyramids = source.pyramids
    slide = pyramids.slides[0] | {"counts": [3, 1, 1]}
    ij = {"ij0": torch.tensor([[0, 1], [1, 2], [1, 3]]), "ij1": torch.tensor([[0, 1]])}
    few = SimpleNamespace(slides=[slide], tensor=lambda k, name: ij[name])
    numbers, places = features.families(few, 0, (0, 1))
    assert numbers.tolist() == [[0, -1], [1, 0], [2, 0]] and places.tolist() == ij["ij0"].tolist()
    few.slides[0]["counts"] = [3, 0, 1]
    assert features.slide_features(SimpleNamespace(pyramids=few), 0, (0, 1), 4) is None

def test_commands_are_named():
    for argv, words in (([], "no command"), (["train"], "'train'")):
        with pytest.raises(UserError, match=words):
            mil.main(argv)
