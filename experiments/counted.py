"""Run a command of any checkout, and count what it computes.

    python -m experiments.counted train.py smoke        # or, in an older checkout: python PATH/counted.py FILE.py ...

in:  a file and its arguments, in the checkout they belong to
out: what the command does; at last a line of JSON, FLOPs and the rows that the three networks saw   see: against.py
"""
import json
import os
import runpy
import sys
from functools import partial

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

class Counter(TorchDispatchMode):
    """Adds up what PyTorch's formulas say of each call. Its own FlopCounterMode follows modules, too, and fails where
    torch.autograd.grad is asked for the gradient of a leaf while one runs."""
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs or {}, out_val=out)
        return out

def main(argv):
    """Run argv[0] with the rest as its arguments. Only torch and ZoomLDM.from_run are asked for, in any checkout."""
    sys.path[0], sys.argv, rows = os.getcwd(), argv, {}
    from diffusion import ZoomLDM
    load = ZoomLDM.from_run

    def see(name, module, inputs):
        rows[name] = rows.get(name, 0) + len(inputs[0])

    def seen(folder):
        model = load(folder)
        parts = {"U-Net": model.unet, "encoder": model.vae.encoder, "decoder": model.vae.decoder}
        for name, part in parts.items():
            part.register_forward_pre_hook(partial(see, name))
        return model
    ZoomLDM.from_run = seen
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:     # the fused kernel counts as 0
        runpy.run_path(argv[0], run_name="__main__")
    print("\n" + json.dumps({"flops": counter.flops, "rows": rows}))

if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["--help"], ["-h"]):
        sys.exit(print(__doc__.strip()))
    main(sys.argv[1:])
