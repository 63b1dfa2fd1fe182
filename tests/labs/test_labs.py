"""The checkers of the labs pass the core, and say what is wrong with stubs, typical mistakes, files that break."""
import ast
import inspect
import re
import subprocess

import pytest
from conftest import ROOT
from test_style import TREES

from common import UserError
from labs import check, core
from labs.cases import LABS

HEAD = "import numpy as np\nimport torch\nfrom invert import eps_error, per_token\nfrom labs.core import *\n"

def answer(folder, name, body):
    """A student's file: the function `name` with this body, else what the core has. out: path, line of the def."""
    signature = inspect.signature(getattr(core, name))
    file = folder / "mine.py"
    file.write_text(f"{HEAD}def {name}{signature}:\n" + "".join(f"    {line}\n" for line in body.split("\n")))
    return file, HEAD.count("\n") + 1

def verdict(lab, name, file):
    return check.judge(name, LABS[lab][name], check.load(str(file)), str(file))

@pytest.fixture
def here(monkeypatch):
    """The process that checks is this one."""
    def run(command, **options):
        check.main([word for word in command[3:] if not word.startswith("--seconds")] + ["--seconds=200"])
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(check.subprocess, "run", run)

@pytest.mark.parametrize("lab", LABS)
def test_core_passes(lab, here, tmp_path, capsys):
    """... and leaves a picture."""
    check.main([lab, "--core", f"--out={tmp_path}/a.png"])
    text = capsys.readouterr().out
    assert text.count(" passed\n") == len(LABS[lab]) and (tmp_path / "a.png").exists(), text

@pytest.mark.parametrize("lab", LABS)
def test_stubs_are_not_written_yet(lab, here, tmp_path, capsys):
    """Exit code 1, a hint and a line for each function; signatures are those of the core's adapters."""
    with pytest.raises(SystemExit) as end:
        check.main([lab, f"--out={tmp_path}/a.png"])
    text = capsys.readouterr().out
    assert end.value.code == 1 and text.count("not written yet: ") == len(LABS[lab]), text
    assert text.count(f"(lab{lab}.py, line ") == len(LABS[lab]) and not (tmp_path / "a.png").exists()
    stub = check.load(str(ROOT / "labs" / f"lab{lab}.py"))
    for name in LABS[lab]:
        wanted = inspect.signature(getattr(core, name))
        assert inspect.signature(getattr(stub, name)) == wanted, name

# what many answers begin with
POOL = "e = torch.nn.functional.adaptive_avg_pool2d(e, min(8, e.shape[-1]))\n"
UNDER = "k = 2 ** s\ng = e[i * k:(i + 1) * k, j * k:(j + 1) * k]\n"
PACK = "n = e[0].numel()\nat = slice(32 - n // 2, 32 - n // 2 + n)\nt, m = torch.zeros(64, len(e)), torch.zeros(64)\n"
READ = "a = torch.cat([alpha_bar, torch.ones(1)]).float()[t].view(-1, 1, 1, 1)\n"
SLOTS = "x = torch.where(mask[..., None], net.embed(tokens), net.pad)\n"
BLOCKS = "for b in net.blocks:\n    x = b(x)\nreturn net.norm_out(net.proj(net.norm(x)))"
LOSS = """a = {}
v = a ** .5 * eps - (1 - a) ** .5 * z0
z = q_sample(z0, t, eps, alpha_bar)
return (fn(z, t) - {{'eps': eps, 'x0': z0, 'v': v}}[pred]).square().flatten(1).mean(1)"""
DDIM = """z = z_T
for i in reversed(range(len(timesteps))):
    a = float(alpha_bar[{a}])
    p = {p}
    e = fn(z, {t})
    z = p ** .5 * (z - (1 - a) ** .5 * e) / a ** .5 + (1 - p) ** .5 * e
return z"""
NOW, TIMES = "timesteps[i]", "torch.full((len(z),), timesteps[i])"
PASTE = """out, k = torch.zeros(1, parts.shape[1], h, w), parts.shape[-1]
for part, (i, j) in zip(parts, ij):
    out[0, :, i:i + k, j:j + k] {} part
return out"""
S2 = """z0 = z0_hat(z)
x = Dec(z0)
e = unit(Enc(x + zeta * unit(A.up({}))) - Enc(x))
return z {} lam * unit(z0_hat(z + delta * e) - z0)"""
INVERT = """u, z = u.clone().requires_grad_(), model.encode(x)
adam = torch.optim.Adam([u], 0.1)
for t, e in zip(torch.linspace(950, 50, len(noise)).long().tolist(), noise):
    a = float(model.schedule.alpha_bar[t])
    loss = {} * (1 - a) * eps_error(model, u, s, z, t, e) {} 0.05 * alike(u)
    {}
    loss.sum().backward()
    adam.step()
return per_token(u.detach())"""
RIGHT = INVERT.format("a ** 0.5", "-", "adam.zero_grad()")

WRONG = [
    ("1", "halve", "t = x[0:-1:2, 0:-1:2] + x[1::2, 0:-1:2] + x[0:-1:2, 1::2] + x[1::2, 1::2]\nreturn (t + 2) // 4",
     "make x uint16"),
    ("1", "halve", "h, w = x.shape[0] // 2, x.shape[1] // 2\nx = x[:2 * h, :2 * w].reshape(h, 2, w, 2, 3)\n"
     "return x.mean((1, 3)).astype(np.uint8)", "rounded down"),
    ("1", "halve", "return x[:len(x) // 2 * 2:2, :x.shape[1] // 2 * 2:2]", "every second pixel"),
    ("1", "grid_under", "i, j = j, i\n" + UNDER + "return g if s < 4 else g.view(8, k // 8, 8, -1, 2).mean((1, 3))",
     "row and column are swapped"),
    ("1", "grid_under", UNDER + "return g[::max(k // 8, 1), ::max(k // 8, 1)]", "tiles are picked"),
    ("1", "grid_under", UNDER + "return g", "a float32 tensor (16, 16, 2), wanted a float32 tensor (8, 8, 2)"),
    ("1", "standardize", POOL + "return (e - e.mean((1, 2), True)) / e.std((1, 2), keepdim=True)", "over the places"),
    ("1", "standardize", "e = (e - e.mean(0)) / e.std(0)\n" + POOL + "return e", "pool first"),
    ("1", "standardize", POOL + "return (e - e.mean(0)) / e.var(0)", "a root is forgotten"),
    ("1", "standardize", POOL + "return e - e.mean(0)", "not divided by the deviation"),
    ("1", "pack_grid", PACK + "t[:n], m[:n] = e.flatten(1).T, 1\nreturn t, m > 0", "filled from 0 on"),
    ("1", "pack_grid", PACK + "t[at], m[at] = e.mT.flatten(1).T, 1\nreturn t, m > 0", "column by column"),
    ("1", "pack_grid", PACK + "t[at], m[at] = e.flatten(1).T, 1\nreturn t, m", "a float32 tensor (64,)), wanted (a"),
    ("1", "pack_grid", PACK.replace("32", "31") + "t[at], m[at] = e.flatten(1).T, 1\nreturn t, m > 0", "too early"),
    ("1", "pack_grid", PACK + "t[at], m[at] = e.reshape(n, -1), 1\nreturn t, m > 0", "channels are taken for places"),
    ("1", "pack_grid", PACK + "m[at] = 1\nreturn t, m > 0", "it is all zeros"),
    ("1", "pack_grid", PACK + "return [t, m]", "a list of a float32 tensor (64, 3), a float32 tensor (64,), wanted"),
    ("1", "pack_grid", "return pack(e)", "NameError"),
    ("1", "summarize", SLOTS.replace("net.pad", "net.embed(0 * tokens)")
     + "x = torch.cat([net.scale(s)[:, None], x], 1) + net.pos\n" + BLOCKS, "net.pad stands there"),
    ("1", "summarize", SLOTS + "x = torch.cat([x, net.scale(s)[:, None]], 1) + net.pos\n" + BLOCKS, "token comes last"),
    ("1", "summarize", "return net.blocks(tokens)", "it stops with NotImplementedError"),
    ("2", "alpha_bar", "return torch.cumprod(1 - torch.linspace(0.0015, 0.0195, T, dtype=torch.float64), 0)",
     "its root must"),
    ("2", "alpha_bar", "b = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2\n"
     "return torch.cumprod(torch.cat([torch.ones(1), 1 - b[:-1]]), 0)", "late by one"),
    ("2", "alpha_bar", "b = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T) ** 2\nreturn torch.cumprod(1 - b, 0)",
     "float32 tensor (1000,), wanted a float64"),
    ("2", "q_sample", READ + "return (1 - a) ** 0.5 * z0 + a ** 0.5 * eps", "noise and data are swapped"),
    ("2", "q_sample", READ + "return a * z0 + (1 - a) * eps", "the roots are forgotten"),
    ("2", "q_sample", "a = alpha_bar.float()[t].view(-1, 1, 1, 1)\nreturn a ** 0.5 * z0 + (1 - a) ** 0.5 * eps",
     "it means clean"),
    ("2", "q_sample", READ.replace("[t]", "[(t - 1).clamp(-1)]") + "return a ** 0.5 * z0 + (1 - a) ** 0.5 * eps",
     "off by one in time: alpha_bar[t - 1]"),
    ("2", "q_sample", "z0 *= 2\nreturn z0", "it writes into its argument z0"),
    ("2", "to_x0", "return {'x0': out, 'v': ab * z_t - (1 - ab) * out, 'eps': (z_t - (1 - ab) * out) / ab}[pred]",
     "the roots of ab"),
    ("2", "to_x0", "a, b = ab ** 0.5, (1 - ab) ** 0.5\n"
     "return {'x0': out, 'v': a * z_t + b * out, 'eps': (z_t + b * out) / a}[pred]", "the sign of the network's part"),
    ("2", "to_x0", "return (z_t - (1 - ab) ** 0.5 * out) / ab ** 0.5", "pred is not heard"),
    ("2", "diffusion_loss", "e = fn(q_sample(z0, t, eps, alpha_bar), t) - eps\nreturn e.square().mean()",
     "one mean of the whole batch"),
    ("2", "diffusion_loss", "e = fn(q_sample(z0, t, eps, alpha_bar), t) - eps\nreturn e.square().flatten(1).mean(1)",
     "the target is always eps"),
    ("2", "diffusion_loss", READ + "w = {'eps': eps, 'x0': z0, 'v': a ** 0.5 * eps - (1 - a) ** 0.5 * z0}[pred]\n"
     "return (fn(z0, t) - w).square().flatten(1).mean(1)", "the network sees z0"),
    ("2", "diffusion_loss", LOSS.format("alpha_bar.float()[t].view(-1, 1, 1, 1)"), "pred 'v' and t = -1"),
    ("2", "diffusion_loss", LOSS.format(READ[4:-1]) + ".detach()", "no gradients pass through it"),
    ("2", "with_guidance", "return cond + guidance * (null - cond)", "on the wrong branch"),
    ("2", "with_guidance", "return guidance * (cond - null)", "null is lost"),
    ("2", "with_guidance", "return cond + guidance * (cond - null)", "one guidance too strong"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[timesteps[i - 1] if i else 0])", t=TIMES),
     "it ends at alpha_bar[0]"),
    ("2", "ddim_sample", DDIM.format(a=NOW + " - 1", p="float(alpha_bar[timesteps[i - 1] - 1]) if i else 1", t=TIMES),
     "read a step too early"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[timesteps[i - 1]])", t=TIMES), "leads up to timesteps"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[timesteps[i - 1]]) if i else 1",
                                     t=f"torch.tensor([{NOW}])"), "wants t of shape (3,), one an image, not (1,)"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[timesteps[i - 1]]) if i else 1", t=NOW),
     "AttributeError: 'int' object"),
    ("3", "down", "return x[..., ::f, ::f]", "every f-th pixel"),
    ("3", "down", "return torch.nn.functional.avg_pool2d(x, f) * f * f", "the sum of a block"),
    ("3", "up", "return y.repeat_interleave(f, -1).repeat_interleave(f, -2) / f ** 2", "f^2 is missing"),
    ("3", "up", "return torch.cat([torch.cat([y] * f, -1)] * f, -2)", "tiled"),
    ("3", "starts", "return list(range(0, n - window + 1, window - overlap))", "the border stays bare"),
    ("3", "starts", "return list(range(0, n, window - overlap))", "ends beyond n"),
    ("3", "starts", "return tuple(range(0, n - window, window - overlap)) + (n - window,)",
     "wanted the list [0, 2, 4, 5]"),
    ("3", "average", PASTE.format("+="), "stands their sum"),
    ("3", "average", PASTE.format("="), "the last one stands"),
    ("3", "step_s2", S2.format("y - A.down(x)", "-"), "the sign of the correction"),
    ("3", "step_s2", S2.format("A.down(x) - y", "+"), "the sign of the error"),
    ("3", "step_s2", "x = Dec(z0_hat(z))\nreturn z + lam * unit(Enc(x + zeta * unit(A.up(y - A.down(x)))) - Enc(x))",
     "Eq. 4 is skipped"),
    ("3", "step_s2", S2.format("y - A.down(x)", "+").replace("zeta", "ZETA").replace("delta", "zeta")
     .replace("ZETA", "delta"), "delta and zeta are swapped"),
    ("3", "step_x0", "x = Dec(z0)\nreturn z0 + lam * (Enc(x + A.up(A.down(x) - y)) - Enc(x))", "the sign of the error"),
    ("3", "step_x0", "x = Dec(z0)\nreturn z0 + lam * Enc(A.up(y - A.down(x)))", "the error alone is encoded"),
    ("3", "step_x0", "x = Dec(z0)\nreturn z0 + lam * Enc(x + A.up(y - A.down(x)))", "Enc(x) is not taken off"),
    ("4", "alike", "return u.flatten(2).mean(2).square().sum(1)", "not divided by their lengths"),
    ("4", "alike", "v = u.flatten(2)\nv = v / v.norm(dim=2, keepdim=True)\nreturn (v.mT @ v).mean((1, 2))",
     "over axis 1"),
    ("4", "invert", INVERT.format("a", "-", "adam.zero_grad()"), "the root in the weight"),
    ("4", "invert", INVERT.format("a ** 0.5", "+", "adam.zero_grad()"), "the prior's sign"),
    ("4", "invert", INVERT.format("a ** 0.5", "-", "pass"), "the gradients add up"),
    ("4", "invert", RIGHT.replace("    adam.step()\n", ""), "u stays as it was"),
    ("4", "invert", RIGHT.replace("u.detach()", "u"), "it still has gradients"),
    ("4", "project", "return (x - up(y - down(x, f), f)).clamp(-1, 1)", "y - A x"),
    ("4", "project", "return x + up(y - down(x, f), f)", "not clipped"),
    ("4", "attend", "h = net.embed(bag)\na = net.score(net.value(h).tanh() * net.gate(h).sigmoid())\n"
     "return h, a.softmax(1)[:, 0]", "an axis of length 1"),
    ("4", "attend", "h = net.embed(bag)\na = net.score(net.value(h).sigmoid() * net.gate(h).tanh())\n"
     "return h, a[:, 0].softmax(0)", "tanh and sigmoid are swapped"),
    ("4", "attend", "with torch.no_grad():\n    return net.attend(bag)", "no gradients pass through it"),
    ("4", "abmil", "h, a = attend(net, bag)\nreturn net.out(h.mean(0)), a", "the plain mean over patches"),
    ("4", "abmil", "h, a = attend(net, bag)\nreturn net.out(h.amax(0)), a", "the highest of the patches"),
    ("4", "abmil", "h, a = attend(net, bag)\nnet.out(a @ h), a", "None (is a return missing?)"),
    # sizes, tables and dtypes that an answer takes for granted
    ("1", "grid_under", UNDER + "return g if s < 4 else g.reshape(8, k // 8, 8, k // 8, 2).mean((1, 3))",
     "with patch (0,0)"),
    ("1", "pack_grid", PACK.replace("len(e)", "3") + "t[at], m[at] = e.flatten(1).T, 1\nreturn t, m > 0",
     "with a single embedding"),
    ("1", "standardize", POOL + "return (e - e.mean(0)) / e.std(0)", "add 1e-8"),
    ("1", "pack_grid", PACK + "t[at] = e.flatten(1).T\nreturn t, t.any(1)", "an embedding of zeros fills its slot"),
    ("1", "summarize", SLOTS + "x = torch.cat([net.scale(s)[:, None], x], 1) + net.pos\nx = net.blocks[0](x)\n"
     + BLOCKS.split("\n")[-1], "some of net.blocks are left out"),
    ("2", "alpha_bar", "b = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T) ** 2\n"
     "return torch.cumprod(1 - b, 0).double()", "differ by little (is it rounded, or float32"),
    ("2", "q_sample", READ.replace("[t]", "[t[:1]]") + "return a ** 0.5 * z0 + (1 - a) ** 0.5 * eps",
     "one time for the whole batch"),
    ("2", "q_sample", "import labs.cases\nalpha_bar = labs.cases.TABLE\n" + READ
     + "return a ** 0.5 * z0 + (1 - a) ** 0.5 * eps", "alpha_bar is not heard"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[t]) if t > 0 else 1", t=TIMES)
     .replace("    a =", "    t = timesteps[i] - len(alpha_bar) // len(timesteps)\n    a ="), "whatever that is"),
    ("4", "attend", "h = net.embed(bag)\na = net.score(net.value(h).tanh() * net.gate(h).sigmoid())\n"
     "return h, a.squeeze().softmax(0)", "with a bag of 1"),
    # what is not seen in the numbers of one call
    ("1", "summarize", "net.pad.data.zero_()\nreturn net(tokens, mask, s)", "it writes into its argument net"),
    ("2", "ddim_sample", "timesteps.reverse()\nreturn z_T", "it writes into its argument timesteps"),
    ("2", "q_sample", READ + "return a ** 0.5 * z0 + (1 - a) ** 0.5 * torch.randn_like(z0)", "its own random numbers"),
    ("3", "average", "ij.pop()\nreturn parts", "it writes into its argument ij"),
    ("4", "alike", "v = torch.nn.functional.normalize(u.detach().flatten(2), dim=1)\nreturn (v.mT @ v).mean((1, 2))",
     "no gradients pass through it"),
    ("4", "abmil", "h, a = attend(net, bag)\nreturn net.out(a.detach() @ h), a", "no gradients pass through it"),
    ("4", "invert", RIGHT.replace("alpha_bar[t]", "alpha_bar[t - 1]"), "off by one in time"),
    ("4", "invert", RIGHT.replace(".long()", ".round().long()"), "rounded down"),
    # what only describes itself
    ("1", "halve", "from data import halve as core_halve\nreturn core_halve(x)[::-1]", "axis 0 is turned round"),
    ("2", "with_guidance", "cond = null + guidance * (cond - null)\nreturn cond.clamp(-1, 1)", "clipped to [-1,1]"),
    ("3", "down", "x = torch.nn.functional.avg_pool2d(x, f)\nx[:, 0] = 0\nreturn x", "differ, all at 0 of axis 1"),
]

@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("lab,name,body,text", WRONG, ids=[f"{name}-{text}"[:40] for _, name, _, text in WRONG])
def test_wrong_answers_are_told(lab, name, body, text, tmp_path):
    """... in one sentence, with the line where the answer is returned, or stops."""
    file, first = answer(tmp_path, name, body)
    why = verdict(lab, name, file)
    assert text in why and "\n" not in why and "(mine.py, line " in why, why
    assert first < int(why.rpartition("line ")[2][:-1]) <= first + body.count("\n") + 1, why

RIGHT_ANSWERS = [
    ("1", "halve", "h, w = x.shape[0] // 2, x.shape[1] // 2\nx = x[:2 * h, :2 * w].reshape(h, 2, w, 2, 3)\n"
     "return np.floor(x.mean((1, 3)) + 0.5).astype(np.uint8)"),
    ("1", "standardize", POOL + "m = e.mean(0)\nv = ((e - m) ** 2).sum(0) / (len(e) - 1)\n"
     "return (e - m) / (v.sqrt() + 1e-8)"),
    ("1", "summarize", "m = mask[..., None].float()\nx = m * net.embed(tokens) + (1 - m) * net.pad\n"
     "x = torch.cat([net.scale(s)[:, None] + net.pos[:, :1], x + net.pos[:, 1:]], 1)\n" + BLOCKS),
    ("2", "alpha_bar", "b = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T) ** 2\n"
     "return torch.from_numpy(1 - b).log().cumsum(0).exp()"),
    ("2", "q_sample", "a = [1 if k < 0 else float(alpha_bar[k]) for k in t]\n"
     "return torch.stack([p ** 0.5 * z + (1 - p) ** 0.5 * e for p, z, e in zip(a, z0, eps)])"),
    ("2", "ddim_sample", DDIM.format(a=NOW, p="float(alpha_bar[timesteps[i - 1]]) if i else 1", t=TIMES)
     .replace("fn(z,", "fn(z.float(),").replace("(z - (", "(z.double() - (") + ".float()"),
    ("3", "down", "return sum(x[..., i::f, j::f] for i in range(f) for j in range(f)) / f ** 2"),
    ("3", "starts", "return sorted({min(i, n - window) for i in range(0, n, window - overlap)})"),
    ("3", "step_s2", "z0 = z0_hat(z)\nx = Dec(z0)\nd = unit(A.up(A.down(x) - y))\ne = Enc(x - zeta * d) - Enc(x)\n"
     "return z + lam * unit((z0_hat(z + delta * unit(e / zeta)) - z0) / delta)"),
    ("4", "alike", "v = u / u.norm(dim=1, keepdim=True)\n"
     "return torch.einsum('behw,bexy->bhwxy', v, v).flatten(1).mean(1)"),
    ("4", "invert", RIGHT.replace("loss.sum()", "loss.mean()").replace("lpha_bar[t])", "lpha_bar[t].float())")),
    ("4", "abmil", "h, a = attend(net, bag)\nreturn (a[:, None] * net.out(h)).sum(0), a"),
]

@pytest.mark.parametrize("lab,name,body", RIGHT_ANSWERS, ids=[name for _, name, _ in RIGHT_ANSWERS])
def test_other_right_answers_pass(lab, name, body, tmp_path):
    """Written otherwise than the core, and rounded otherwise."""
    assert verdict(lab, name, answer(tmp_path, name, body)[0]) == ""

FILES = [("down = torch.nn.functional.avg_pool2d", ""),
         ("def Down(x, f):\n    return x\ndel down", "no function down, but Down"),
         ("def down(f, x):\n    return x", "in another order: they come as x, f"), ("down = 3", "no function down"),
         ("def down(x):\n    return x", "it cannot take the 2 arguments"),
         ("torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)", "")]

@pytest.mark.parametrize("text,why", FILES)
def test_files_that_hold_something_else(text, why, tmp_path):
    """Beside the core's functions, one line of a student's."""
    file = tmp_path / "mine.py"
    file.write_text(HEAD + text)
    assert why in verdict("3", "down", file) and bool(why) == bool(verdict("3", "down", file))

GUESSES = [("return 2 * cond", "everything is 2 times what it should be"), ("return -cond", "the sign is turned round"),
           ("return cond + 0.25", "everything is 0.25 too large"), ("return cond.flip(-1)", "axis 3 is turned round"),
           ("return cond.transpose(0, 1).reshape(cond.shape)", "in another order"),
           ("return cond / 0", "not finite"), ("return cond[:1]", "wanted a float32 tensor (3, 2, 4, 4)"),
           ("return cond.numpy()", "float32 numpy array"), ("yield cond", "a generator"),
           ("cond[0, 0, 0, 0] = 7\nreturn cond", "writes into its argument cond")]

@pytest.mark.parametrize("body,text", GUESSES)
def test_unknown_mistakes_are_described(body, text, tmp_path, monkeypatch):
    """By what came and what was wanted, of a function that should return cond."""
    monkeypatch.setattr(core, "with_guidance", lambda null, cond, guidance: 1 * cond)
    file, _ = answer(tmp_path, "with_guidance", body)
    monkeypatch.setitem(LABS["2"]["with_guidance"].__dict__, "mistakes", {})
    assert text in verdict("2", "with_guidance", file)

@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("lab,name", [(lab, name) for lab in LABS for name in LABS[lab]])
def test_every_known_mistake_is_recognised(lab, name):
    """Not one passes, and none is taken for another."""
    task, own = LABS[lab][name], getattr(core, name)
    for sentence, mistake in task.known():
        student = type("Student", (), {name: staticmethod(lambda *a, m=mistake: m(own, *a))})
        assert check.judge(name, task, student, "mine.py").startswith(sentence), sentence

BROKEN = [("def f(:\n", "SyntaxError"), ("import torch\nimport nothing_at_all\n", "ModuleNotFoundError"),
          ("x = 1 / 0\n", "ZeroDivisionError"), ("raise SystemExit(0)\n", "SystemExit"), ("x = '\0'\n", "SyntaxError")]

@pytest.mark.parametrize("text,why", BROKEN)
def test_a_file_that_does_not_import(text, why, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(check.Fault) as fault:
        check.load(str(file))
    assert why in fault.value.text and "\n" not in fault.value.text and "line" not in fault.value.text

def test_a_file_that_has_just_changed(tmp_path):
    """catches: bytecode of the file before, which has the same length and second."""
    for text in ("x = 1", "x = 2"):
        (tmp_path / "mine.py").write_text(text)
        assert f"x = {check.load(str(tmp_path / 'mine.py')).x}" == text

def test_a_loop_without_end(tmp_path, capfd):
    """In a process of its own: it is ended in time, the next function is checked all the same, and the line is told.
    What it prints is cut short; a thread that it began holds nobody; what cannot be compared is told, too."""
    file = tmp_path / "mine.py"
    loop = "while True:\n        try:\n            time.sleep(1)\n        except:\n            pass"
    file.write_text(f"{HEAD}import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
                    f"def down(x, f):\n    {loop}\ndef up(y, f):\n    while True:\n        print('up', y)\n"
                    "def average(parts, ij, h, w):\n    return torch.zeros(1).to_sparse()\n"
                    "def starts(n, window, overlap):\n    return input()\n")
    with pytest.raises(SystemExit) as end:
        check.main(["3", f"--file={file}", "--seconds=2"])
    out, err = capfd.readouterr()
    assert end.value.code == 1 and "Traceback" not in out + err, out + err
    assert "did not end within 2 s: does a loop end? (mine.py, line " in out, out
    assert out.count("did not end") == 2 and "is not shown" in out and len(out) < 5000, out
    assert "EOFError" in out and "average         failed: " in out and "2 of 6 pass" in out, out

def test_a_file_that_ends_python(tmp_path):
    (tmp_path / "stack").touch()
    assert check.died(3, tmp_path, check.Config(file="mine.py")) == "it ended Python (code 3)"
    assert "a recursion without end" in check.died(-11, tmp_path, check.Config(file="mine.py"))
    (tmp_path / "stack").write_text("Timeout (0:00:05)!\nFatal Python error: Segmentation fault\n")
    assert "did not end within 5 s" in check.died(-11, tmp_path, check.Config(file="mine.py", seconds=5))

@pytest.mark.parametrize("args,text", [(["5"], "got lab '5'"), ([], "got lab ''"), (["2", "--file=no.py"], "no.py"),
                                       (["2", "--run=no"], "--run=no"), (["2", "--seconds=0"], "--seconds=0")])
def test_bad_input(args, text):
    with pytest.raises(UserError, match=text):
        check.main(args)

@pytest.mark.parametrize("lab", LABS)
def test_pages_name_what_exists(lab):
    """Every function of the lab, and functions of the core."""
    text = (ROOT / "labs" / f"lab{lab}.md").read_text()
    assert not [name for name in LABS[lab] if f"`{name}`" not in text]
    for file, name in re.findall(r"`(\w+(?:/\w+)?\.py)::(\w+)`", text):
        assert name in [getattr(node, "name", "") for node in ast.walk(TREES[file])], (file, name)
    assert max(map(len, text.splitlines())) <= 120
