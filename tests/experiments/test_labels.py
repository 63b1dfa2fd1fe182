"""Slide labels from the command line: labels and folds, tables, features of every kind, maps. Claims: tests/whole."""
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, one_hot

import data
import mil
from common import UserError, generator, load_tensors, save_tensors
from data import Pyramids
from experiments import crossval, features, maps
from experiments import labels as claims
from experiments.folds import Labels, make_splits, rarest, read_splits, usual_folds
from large.beside import LABEL
from slides.bags import Bags
from slides.encoders import load_encoder
from toy import task as toy_task

# ----- 1. Labels and folds -----

def write_csv(path, *rows):
    path.write_text("\n".join(rows) + "\n")
    return path

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features of 40 slides of 20 patients, as other tools write them: planted bags; and their labels."""
    out = tmp_path_factory.mktemp("features")
    (out / "pt").mkdir()
    rng, rows = generator(0), ["case_id,slide_id,label"]
    for k in range(40):
        x = torch.randn(20 + k % 20, 8, generator=rng)
        if k % 2:
            x[k // 2, :3] += 5
        torch.save(x, out / "pt" / f"s{k:02d}.pt")
        rows.append(f"p{k // 2 % 20},s{k:02d},{'tumour' if k % 2 else 'benign'}")
    write_csv(out / "labels.csv", *rows)
    return out

def test_labels(tmp_path):
    """Classes in order of number, patients, and what is refused."""
    rows = "slide_id,label,case_id", "a,10,x", "b,2,x", "c,2,"
    labels = Labels(write_csv(tmp_path / "l.csv", *rows), ["a", "b", "c"])
    assert labels.classes == ["2", "10"] and labels.y.tolist() == [1, 0, 0] and labels.patients == ["x", "x", "c"]
    for names, lines, says in (("abcd", rows, "have features but no label: d;"),
                               ("ab", rows, "have a label but no features: c;"),
                               ("a", ["slide_id,class", "a,1"], "no column label"),
                               ("a", ["slide_id,label"], "or no row"),
                               ("a", ["slide_id,label", "a,1", "a,2"], "slide a has two different rows"),
                               ("a", ["slide_id,label", "a,"], "1 slides have features but no label: a"),
                               ("ab", ["slide_id,label", "a,1", "b,1"], "1 class")):
        with pytest.raises(UserError, match=says):
            Labels(write_csv(tmp_path / "m.csv", *lines), list(names))
    with pytest.raises(UserError, match="nowhere.csv cannot be read as CSV"):
        Labels(tmp_path / "nowhere.csv", ["a"])

def cohort(tmp_path, n, share):
    """n slides, three of each patient, of two classes drawn slide by slide."""
    rng = np.random.default_rng(0)
    rows = [f"p{k // 3},s{k},{int(rng.random() < share)}" for k in range(n)]
    return Labels(write_csv(tmp_path / "c.csv", "case_id,slide_id,label", *rows), [f"s{k}" for k in range(n)])

def test_folds_are_stratified_and_keep_patients_together(tmp_path):
    labels = cohort(tmp_path, 90, 0.3)
    splits = make_splits(labels, 5, 1.0, 0.2, seed=0)
    assert sorted(k for _, _, test in splits for k in test) == list(range(90))             # every slide is tested once
    for train, val, test in splits:
        assert sorted(train + val + test) == list(range(90))
        owner = [{labels.patients[k] for k in part} for part in (train, val, test)]
        assert not (owner[0] & owner[1] or owner[0] & owner[2] or owner[1] & owner[2])
        assert 15 <= len(test) <= 21 and 12 <= len(val) <= 17
        assert abs(labels.y[test].double().mean() - labels.y.double().mean()) < 0.06
    assert splits == make_splits(labels, 5, 1.0, 0.2, 0) != make_splits(labels, 5, 1.0, 0.2, 1)
    names = [str(k) for k in range(20)]
    rare = Labels(write_csv(tmp_path / "r.csv", "slide_id,label", *(f"{k},{int(k) % 4}" for k in names)), names)
    for train, val, test in make_splits(rare, 5, 1.0, 0.2, 0):                             # one of each class, where
        assert [sorted(rare.y[part].tolist()) for part in (val, test)] == [[0, 1, 2, 3]] * 2  # one can be spared
        assert sorted(train + val + test) == list(range(20)) and len(train) == 12
    few = make_splits(labels, 5, 0.5, 0.2, 0)
    for (train, val, test), (a, b, c) in zip(few, splits):
        assert test == c and set(train + val) < set(a + b) and 30 <= len(train + val) <= 42

def test_as_many_folds_as_the_rarest_class_allows(tmp_path):
    """... up to five, by patients and not by slides; each is a split that is accepted. catches: a rare class that stops
    the command, a fold without it."""
    for rare, folds in ((3, 3), (4, 4), (5, 5), (9, 5)):
        rows = [f"a{k},s{k},0" for k in range(20)] + [f"b{k // 2},r{k},1" for k in range(2 * rare)]
        names = [row.split(",")[1] for row in rows]
        labels = Labels(write_csv(tmp_path / "rare.csv", "case_id,slide_id,label", *rows), names)
        assert rarest(labels) == ("1", rare) and usual_folds(labels) == folds
        assert len(make_splits(labels, folds, 1.0, 0.2, 0)) == folds
    two = Labels(write_csv(tmp_path / "two.csv", "case_id,slide_id,label", *rows[:24]), names[:24])
    with pytest.raises(UserError, match="class 1 has slides of 2 patient.s.: training, early stopping and test"):
        usual_folds(two)

def test_splits_that_are_refused_or_read(tmp_path, folder):
    labels = Labels(folder / "labels.csv", [f"s{k:02d}" for k in range(40)])
    for args, says in (((cohort(tmp_path, 12, 0.5), 5, 1.0), r"class [01] has \d slides, \d patients, fewer than"),
                       ((labels, 4, 0.1), "fold 0: (train|val) has .* none of class")):
        with pytest.raises(UserError, match=says):
            make_splits(*args, 0.2, 0)
    rows = ",train,val,test", "0,s00,s04,s08", "1,s01,s05,s09"
    good = write_csv(tmp_path / "splits_0.csv", *rows, "2,s02,,")
    assert read_splits(good, labels) == read_splits(tmp_path, labels) == [([0, 1, 2], [4, 5], [8, 9])]
    odd = write_csv(tmp_path / "bool.csv", ",train,val,test", *(f"s{k:02d},{k < 3},{3 < k < 6},{k in (8, 9)}"
                                                                for k in range(40)))
    assert read_splits(odd, labels) == read_splits(good, labels)                           # CLAM's splits_0_bool.csv
    for row, words in ((",s10,,s10", "patient p5 is in train and in test"), (",s10,s11,", "patient p5 is in train and"),
                       (",s77,,", "names 1 slides without features or label: s77")):
        with pytest.raises(UserError, match=words):
            read_splits(write_csv(tmp_path / "bad.csv", *rows, row), labels)
    with pytest.raises(UserError, match="holds no splits_0.csv"):
        read_splits(folder, labels)

# ----- 3. Scores and tables -----

def auc(scores, labels):
    """The chance that a 1 outscores a 0, ties half, by all pairs."""
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    return float((gaps.sign() + 1).mean() / 2)

def test_weighted_auc_is_the_auc_of_repeated_slides():
    """Weights count slides: as many copies of them. Ties, folds, three classes. Catches: 1 - AUC, folds pooled."""
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.integers(0, 5, (40, 2)) / 4.0)
    y, fold = torch.tensor(rng.integers(0, 2, 40)), torch.arange(40) % 3 - 1               # -1: not scored
    weights = torch.tensor(rng.integers(0, 3, (4, 40))).double()
    weights[0] = 1
    got = crossval.weighted_auc(scores, y, fold, weights)
    for b in range(4):
        rows = [torch.arange(40).repeat_interleave(weights[b].long() * (fold == k)) for k in (0, 1)]
        want = sum(auc(scores[r, 1], y[r]) for r in rows) / 2
        assert float(got[b]) == pytest.approx(want, abs=1e-12)
    three, y = torch.rand(30, 3).double(), torch.arange(30) % 3
    want = sum(auc(three[:, c], (y == c).long()) for c in range(3)) / 3
    got = crossval.weighted_auc(three, y, torch.zeros(30).long(), torch.ones(1, 30).double())
    assert float(got) == pytest.approx(want)
    w = crossval.patient_draws(["a", "b", "a", "c"], 200, 0)                               # patients are drawn whole
    assert w.shape == (201, 4) and (w[0] == 1).all() and torch.equal(w[:, 0], w[:, 2])
    assert (w[1:, [0, 1, 3]].sum(1) == 3).all() and abs(float(w[1:].mean()) - 1) < 0.1

def cv(folder, out, *more):
    argv = ["cv", f"--features={folder / 'pt'}", f"--labels={folder / 'labels.csv'}", f"--out={out}", "--width=16",
            "--folds=2", "--epochs=6", "--lr=1e-2", "--workers=1", "--bootstrap=50", *more]
    mil.main(argv)
    return json.loads((out / "cv.json").read_text())["rows"]

def test_cv_command(folder, tmp_path, capsys):
    """The table; heads find what was planted; nothing is trained twice; test slides are scored by heads that did not
    see them."""
    more = "--heads=abmil,dsmil", "--seeds=2"
    rows = cv(folder, tmp_path, *more)
    said, files = capsys.readouterr().out, sorted(tmp_path.glob("*.safetensors"))
    assert "40 slides of 20 patients, classes benign (20), tumour (20)" in said
    assert [(r["head"], r["fraction"]) for r in rows] == [("abmil", 1.0), ("dsmil", 1.0)] and len(files) == 4
    assert rows[0]["auc"] > 0.8 and rows[0]["interval"][0] <= rows[0]["auc"] <= rows[0]["interval"][1]
    t, meta = load_tensors(tmp_path / "pt_abmil_1.0_0.safetensors")
    labels = Labels(folder / "labels.csv", meta["slides"])
    for k, (train, _, test) in enumerate(make_splits(labels, 2, 1.0, 0.2, 0)):
        assert (t["fold"][test] == k).all()
        scaler = Bags(folder / "pt").scaler([meta["slides"][i] for i in train])
        assert torch.equal(t[f"scaler.{k}"], torch.stack(scaler))          # of the training slides alone
    stamps = [f.stat().st_mtime_ns for f in files]
    assert cv(folder, tmp_path, *more) == rows and [f.stat().st_mtime_ns for f in files] == stamps
    cv(folder, tmp_path, *more, "--epochs=1")                              # other settings: trained again
    assert [f.stat().st_mtime_ns for f in files] != stamps

def test_folds_choose_their_features_by_the_slides_that_stop_training(tmp_path):
    """Noise, and features that tell the label. catches: a choice by the scores of test slides; one choice for all
    folds; the scores of another choice."""
    write_csv(tmp_path / "labels.csv", "slide_id,label", *(f"s{k:02d},{k % 2}" for k in range(40)))
    for kind in (0, 1):
        (tmp_path / f"k{kind}").mkdir()
        for k in range(40):
            x = torch.randn(6, 4, generator=generator(kind, k)) + 3 * kind * (k % 2)
            np.save(tmp_path / f"k{kind}/s{k:02d}.npy", x.numpy())
    folders = f"{tmp_path}/k0,{tmp_path}/k1"
    cfg = crossval.Config(folders, f"{tmp_path}/labels.csv", out=f"{tmp_path}/out", heads="abmil", folds=4, seeds=2,
                          epochs=4, width=8, bootstrap=5, workers=1)
    draws = crossval.tables(cfg)
    best, counts = crossval.chosen(cfg)
    assert counts == {"k0": 0, "k1": 8} and torch.equal(best, draws["k1", "abmil", 1.0]) and best[0] > 0.9
    expected = []
    for repeat in range(2):
        noise, good = (tmp_path / f"out/k{kind}_abmil_1.0_{repeat}.safetensors" for kind in (0, 1))
        (t, meta), (other, _) = load_tensors(noise), load_tensors(good)
        third, last = t["fold"] == 2, t["fold"] == 3
        t["val"][2] = -1                                                   # as if its head were better there,
        t["scores"][last] = one_hot(t["y"][last], 2).float()               # and right about test slides of another
        save_tensors(noise, t, meta)
        scores = torch.where(third[:, None], t["scores"], other["scores"])
        expected.append(crossval.weighted_auc(scores.double(), t["y"], t["fold"], torch.ones(1, 40).double()))
    mixed, counts = crossval.chosen(cfg)
    assert counts == {"k0": 2, "k1": 6} and float(mixed[0]) == pytest.approx(float(torch.stack(expected).mean()))
    assert mixed[0] < best[0]

def test_validation_loss_is_that_of_the_slides_that_stop_training(folder, tmp_path):
    """catches: the loss of training or test slides; of features that were not standardised."""
    cv(folder, tmp_path, "--heads=abmil")
    t, meta = load_tensors(tmp_path / "pt_abmil_1.0_0.safetensors")
    labels, bags = Labels(folder / "labels.csv", meta["slides"]), Bags(folder / "pt")
    for k, (_, stop, _) in enumerate(make_splits(labels, 2, 1.0, 0.2, 0)):
        head = mil.ABMIL(8, 2, meta["settings"]["width"]).eval()
        head.load_state_dict({key: t[f"head.{k}.{key}"] for key in head.state_dict()})
        mean, deviation = t[f"scaler.{k}"]
        with torch.no_grad():
            logits = torch.stack([head((bags[labels.names[i]] - mean) / deviation)[0] for i in stop])
        assert float(t["val"][k]) == pytest.approx(float(cross_entropy(logits, labels.y[stop])), rel=1e-5)

def test_the_clock_goes_on_while_the_first_takes_its_time(monkeypatch):
    """Results in order, whatever ends first; what fails is raised at once."""
    monkeypatch.setattr(crossval, "wait", lambda tasks, timeout: wait(tasks, timeout=0.01))
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(lambda s: time.sleep(s) or s, s) for s in (0.1, 0.0)]
        assert crossval.in_time(tasks) == [0.1, 0.0]
        ends = Event()
        tasks = [pool.submit(ends.wait), pool.submit(int, "x")]
        with pytest.raises(ValueError, match="invalid literal"):
            crossval.in_time(tasks)
        ends.set()

def test_folders_that_are_called_alike(folder, tmp_path, capsys):
    """As RUN/features of two runs. catches: one row for both, from the scores of the last."""
    (tmp_path / "pt").mkdir()
    for k, file in enumerate(sorted((folder / "pt").iterdir())):
        torch.save(torch.randn(4, 3, generator=generator(k)), tmp_path / "pt" / file.name)
    both = f"--features={folder / 'pt'},{tmp_path / 'pt'}"
    rows = cv(folder, tmp_path / "out", both, "--heads=abmil")
    assert [row["features"] for row in rows] == [f"{folder.name}/pt", f"{tmp_path.name}/pt"]
    assert rows[0]["auc"] != rows[1]["auc"] and len(list((tmp_path / "out").glob("*__pt_abmil_*"))) == 2

def test_shuffled_labels_are_not_learned(tmp_path):
    """Leakage: mean AUC over two shuffles within 0.5 ± 0.12, every head; it is over 0.7 where test slides train."""
    (tmp_path / "pt").mkdir()
    for k in range(120):
        np.save(tmp_path / "pt" / f"s{k:03d}.npy", torch.randn(4, 24, generator=generator(k)).numpy())
    found = []
    for shuffle in range(2):
        label = torch.randperm(120, generator=generator(shuffle)) % 2
        write_csv(tmp_path / "labels.csv", "slide_id,label", *(f"s{k:03d},{label[k]}" for k in range(120)))
        rows = cv(tmp_path, tmp_path / "out", "--heads=abmil,dsmil,clam", f"--seed={shuffle}", "--epochs=1")
        found.append([row["auc"] for row in rows])
    assert (torch.tensor(found).mean(0) - 0.5).abs().max() < 0.12, found

def test_cv_messages(folder, tmp_path):
    for more, words in ((["--heads=abmill"], "heads are abmil"), (["--folds=1"], "--folds=1: it must be at least 2"),
                        (["--fraction=1.5"], "are shares"), (["--folds=30"], "fewer than --folds=30"),
                        (["--dropout=1"], "are shares"), (["--lr=-1"], "must be at least 0"),
                        (["--labels="], "say what to learn from"),
                        (["--splits=x.csv", "--fraction=0.5"], "not with --splits"),
                        (["--lr=1e30"], "no longer finite")):
        with pytest.raises(UserError, match=words):
            cv(folder, tmp_path, *more)
    shutil.copytree(folder / "pt", tmp_path / "more")
    (tmp_path / "more" / "s00.pt").unlink()
    with pytest.raises(UserError, match=r"hold different slides \(s00\)"):
        cv(folder, tmp_path, f"--features={folder / 'pt'},{tmp_path / 'more'}")
    with pytest.raises(UserError, match="holds no features"):
        mil.main(["map"])

# ----- 4. Extraction, maps, the task, the experiments -----

@pytest.fixture(scope="module")
def three(task, tmp_path_factory):
    """The run, and the first three of the slides."""
    out = shutil.copytree(task, tmp_path_factory.mktemp("three") / "copy")
    index = json.loads((task / "task" / "index.json").read_text())
    (out / "task" / "index.json").write_text(json.dumps(index | {"slides": index["slides"][:3]}))
    return out

def extract(task, out, *more):
    mil.main(["extract", str(task / "run"), f"--data={task / 'task'}", f"--out={out}", "--device=cpu", "--amp=False",
              *more])
    return sorted(out.glob("*.safetensors"))

def test_extract_command(three, tmp_path, capsys):
    """One file a slide; what is there is kept; --batch changes nothing, for any kind. catches: noise of a batch."""
    files = extract(three, tmp_path / "a", "--scales=1,2", "--batch=7")
    assert "block 3, t = 100" in capsys.readouterr().out and len(files) == 3
    t, meta = load_tensors(files[1])
    assert t["features"].shape == (16, 16) and meta["widths"] == [8, 8] and t["coords"][6].tolist() == [256, 128]
    stamp = files[0].stat().st_mtime_ns
    files[2].unlink()
    assert extract(three, tmp_path / "a", "--scales=1,2") == files and files[0].stat().st_mtime_ns == stamp
    assert len(Bags(tmp_path / "a", "2")["train_0001"]) == 4               # one row per coarse patch
    with pytest.raises(UserError, match="train_0000.safetensors was made .*with other settings"):
        extract(three, tmp_path / "a", "--scales=1,2", "--t=50")
    for kind in ("drawn", "unet"):
        sets = []
        for batch in (3, 16):
            more = f"--kind={kind}", "--scales=2", "--steps=1", f"--batch={batch}"
            sets.append(load_tensors(extract(three, tmp_path / f"{kind}{batch}", *more)[0])[0]["features"])
        torch.testing.assert_close(*sets, atol=1e-4, rtol=1e-4)
    assert load_tensors(tmp_path / "drawn3" / "train_0000.safetensors")[1]["settings"]["noise"]  # older files: none
    assert (sets[0][0] - sets[0][1]).abs().max() > 1e-3

def test_embeddings_of_a_large_network_are_not_made_twice(three, tmp_path, monkeypatch):
    """At scale 0 they lie in the files; a coarser patch it has not seen. catches: embeddings of other patches; those of
    the toy's own encoder, which files hold rounded."""
    p, seen = Pyramids(three / "task", std=[0.5] * 96), []

    def network(image):
        seen.append(len(image))
        return image.mean((2, 3)).repeat(1, 32)                                            # (b,96)
    network.scaled = False
    monkeypatch.setattr(features, "load_encoder", lambda *args: network)
    files = [extract(three, tmp_path / s, "--kind=descriptor", f"--scales={s}")[1] for s in "01"]
    stored, coarse = (load_tensors(file)[0]["features"] for file in files)
    e = torch.stack([p.read(1, 0, n, ("e",))["e"][:, 0, 0] for n in range(len(stored))])
    assert torch.equal(stored, e) and sum(seen) == 3 * len(coarse)
    x = torch.stack([p.read(1, 1, n)["x"] for n in range(len(coarse))])
    torch.testing.assert_close(coarse, ((x + 1) / 2).mean((2, 3)).repeat(1, 32))
    network.scaled = True
    own = extract(three, tmp_path / "own", "--kind=descriptor", "--scales=0")[1]
    assert not torch.equal(load_tensors(own)[0]["features"], stored)

def test_other_kinds_of_features(three, tmp_path):
    p = Pyramids(three / "task", std=[0.5] * 96)
    t, _ = load_tensors(extract(three, tmp_path / "d", "--kind=descriptor", "--scales=1")[2])
    x = torch.stack([p.read(2, 1, n)["x"] for n in range(16)])
    torch.testing.assert_close(t["features"], load_encoder("stats", [0.5] * 96)((x + 1) / 2))
    sets = [load_tensors(extract(three, tmp_path / k, f"--kind={k}", "--scales=2", "--steps=1")[2])[0]["features"]
            for k in ("untrained", "unet", "drawn")]
    assert [s.shape for s in sets] == [(4, 8), (4, 8), (4, 96)] and not torch.allclose(sets[0], sets[1])
    for more, words in (("--kind=x", "known are unet"), ("--scales=2,0", "finest first"), ("--block=4", "are middle"),
                        ("--scales=9", "give some of 0 to 2"), ("--t=1000", "t is from 0 to 999")):
        with pytest.raises(UserError, match=words):
            extract(three, tmp_path / "e", more)
    with pytest.raises(UserError, match="say which run"):
        mil.main(["extract"])

def test_attention_map(task, tmp_path, capsys):
    """The slide and beside it the same with the attention drawn over the patches it belongs to; below, the scale."""
    extract(task, tmp_path / "f", "--kind=descriptor", "--scales=0,2")
    labels = write_csv(tmp_path / "l.csv", "slide_id,label", *(f"train_{k:04d},{k % 2}" for k in range(8)))
    argv = ["map", f"--features={tmp_path / 'f'}", f"--labels={labels}", "--folds=2", "--val=0.5", "--epochs=1",
            "--heads=dsmil", "--workers=1"]
    mil.main([*argv, "--slide=train_0003", f"--data={task / 'task'}"])
    said = capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "f_cv" / "map_train_0003_f_0+2_dsmil.png")).astype(int)
    assert picture.shape == (512 + LABEL, 1024, 3) and "label 1, P(0) = 0." in said
    below, picture = picture[512:], picture[:512]
    assert below[0, 512].min() > 250 > 150 > below[0, -1].min() and below[:, :100].min() < 128
    slide = toy_task.task_slide(3)[0].astype(int)
    assert np.array_equal(picture[:, :512], slide)
    change = np.abs(picture[:, 512:] - slide).reshape(8, 64, 8, 64, 3).mean((1, 3, 4))
    assert change.max() > 20 > change.min()
    Image.fromarray(slide.astype(np.uint8)).save(tmp_path / "slide.png")                   # the slide's own file
    mil.main([*argv, "--slide=train_0003", f"--image={tmp_path / 'slide.png'}"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "f_cv" / "map_train_0003_f_0+2_dsmil.png"))[:512], picture)
    for more, words in (("--slide=x", "features are of train_0000"), ("--slide=train_0001", "what to draw on")):
        with pytest.raises(UserError, match=words):
            mil.main([*argv, more])

def test_even_attention_leaves_no_colour():
    """Full colour is the highest attention, but at least twice the mean; the mean and less are left as they are.
    catches: an even attention all in red."""
    coords = torch.tensor([[0, 0], [64, 0], [0, 64], [64, 64]])
    for attention, want, most in (([1, 1, 1, 1], [[0, 0], [0, 0]], 2), ([2, 1, 0.5, 0.5], [[1, 0], [0, 0]], 2),
                                  ([1.5, 1.2, 0.8, 0.5], [[0.5, 0.2], [0, 0]], 2), ([4, 0, 0, 0], [[1, 0], [0, 0]], 4)):
        heat, top = maps.heat_of(torch.tensor(attention) / 4, coords, 64, (4, 4), 32)
        assert np.allclose(heat, np.kron(want, np.ones((2, 2)))) and top == most

def rising(attention, *places, real=maps.heat_of):
    """The heat of another attention: the last patch has most."""
    return real(torch.arange(1.0, len(attention) + 1) / sum(range(len(attention) + 1)), *places)

def test_folders_as_the_gdc_client_lays_them(tmp_path, capsys, monkeypatch):
    """UUID/NAME.png, a label table without both: four commands from there to a map; a map that does not fit."""
    monkeypatch.setattr(maps, "heat_of", rising)                           # where it is drawn counts here
    for k in range(8):
        (tmp_path / "in" / f"u{k}").mkdir(parents=True)
        pixels = np.random.default_rng(k).integers(30 + 40 * (k % 2), 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"u{k}" / f"s.{k}.png")
    labels = write_csv(tmp_path / "l.csv", "Slide ID;Label", *(f"s.{k};{k % 2}" for k in range(8)))
    (tmp_path / "foreign").mkdir()
    rows = [f"in/u{k}/s.{k}.png,0.5" for k in range(8)]
    images = write_csv(tmp_path / "i.csv", "path,mpp", *rows)              # --mpp=1: halved
    data.main(["build", f"--images={images}", f"--out={tmp_path / 'd'}", "--mpp=1", "--patch=16", "--scales=1"])
    mil.main(["extract", "--kind=descriptor", f"--data={tmp_path / 'd'}", f"--out={tmp_path / 'f'}"])
    more = [f"--features={tmp_path / 'f'}", f"--labels={labels}", "--folds=2", "--epochs=1", "--workers=1",
            "--heads=abmil", "--bootstrap=9"]
    mil.main(["cv", *more])
    assert "8 slides of 8 patients, classes 0 (4), 1 (4)" in capsys.readouterr().out
    for image in (f"--data={tmp_path / 'd'}", f"--image={tmp_path / 'in' / 'u3' / 's.3.png'}"):
        mil.main(["map", *more, "--slide=s.3", image])
        picture = np.asarray(Image.open(tmp_path / "f_cv" / "map_u3__s.3.png_f_abmil.png")).astype(int)[:-LABEL]
        gap = np.abs(picture - np.roll(picture, picture.shape[0], 1))[:, picture.shape[0]:]
        assert len(picture) == (64 if "image" in image else 32) and (gap[-9:, -9:] > 2).any()  # to the corner
    Image.new("RGB", (64, 40)).save(tmp_path / "in" / "part.png")
    x = torch.arange(64.0).reshape(16, 4) % 7
    for k in range(8):                                                     # CLAM's, in pixels of the slide itself
        torch.save({"features": x + k, "coords": torch.cartesian_prod(*[torch.arange(4) * 16] * 2)},
                   tmp_path / "foreign" / f"s.{k}.pt")
    more[0] = f"--features={tmp_path / 'foreign'}"
    mil.main(["map", *more, "--slide=u3/s.3.png", f"--image={tmp_path / 'in' / 'u3' / 's.3.png'}"])
    with pytest.raises(UserError, match="in the slide's own pixels, which .*d does not have: draw on the slide"):
        mil.main(["map", *more, "--slide=s.3", f"--data={tmp_path / 'd'}"])
    for k in range(8):                                                     # STAMP's, in micrometres
        held = {"feats": x + k, "coords": torch.cartesian_prod(*[torch.arange(4.0) * 8] * 2), "unit": "um"}
        torch.save(held | {"tile_size_um": 8.0}, tmp_path / "foreign" / f"s.{k}.pt")
    mil.main(["map", *more, "--slide=s.3", f"--data={tmp_path / 'd'}"])
    picture = np.asarray(Image.open(tmp_path / "foreign_cv" / "map_s.3_foreign_abmil.png")).astype(int)[:-LABEL]
    assert (np.abs(picture[:, 32:] - picture[:, :32])[-7:, -7:] > 2).any()
    with pytest.raises(UserError, match="with places in micrometres: only mil.py map takes these"):
        mil.main(["map", *more, "--slide=s.3", f"--image={tmp_path / 'in' / 'u3' / 's.3.png'}"])
    torch.save(held | {"tile_size_um": 8.0, "coords": held["coords"] + 40}, tmp_path / "foreign" / "s.3.pt")
    with pytest.raises(UserError, match=r"s.3.pt: tiles .* as far as \[64, 64\], lie outside .* at \[32, 32\]"):
        mil.main(["map", *more, "--slide=s.3", f"--data={tmp_path / 'd'}"])
    more[0] = f"--features={tmp_path / 'f'}"
    for name, says in (("none.png", "none.png"), ("part.png", "are of a part, 32 x 32")):
        with pytest.raises(UserError, match=says):
            mil.main(["map", *more, "--slide=s.3", f"--image={tmp_path / 'in' / name}"])

def test_patch_classifier_learns_and_stains_shift():
    """A shift of stain changes colour, and the order of grey levels in no channel."""
    x, y = torch.rand(60, 3, 16, 16) * 0.2, torch.arange(60) // 30
    shifted = claims.stain_shift(x)
    assert shifted.abs().max() <= 1 and (shifted - x).abs().mean() > 0.05
    assert torch.equal(x.flatten(2).argsort(2), shifted.flatten(2).argsort(2))
    x[30:, 0] += 0.8
    assert claims.balanced(claims.classifier(x, y, 2, 0, epochs=10), x, y) > 0.95
