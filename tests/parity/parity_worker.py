"""Runs in one framework's Python: reads a job and arrays, writes arrays. Never imports the other.

python parity_worker.py torch|paddle functions|model|step job.json in.npz out.npz
"""

import importlib
import json
import sys

import numpy as np


class Torch:
    def __init__(self):
        import torch

        self.lib = torch

    def tensor(self, array, grad=False):
        return self.lib.from_numpy(np.array(array)).requires_grad_(grad)

    def zoo(self, name):
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10)

    def double(self, model):
        return model.double()

    def named(self, model):
        return dict(model.named_parameters())


class Paddle:
    def __init__(self):
        import paddle

        self.lib = paddle

    def tensor(self, array, grad=False):
        return self.lib.to_tensor(array, stop_gradient=not grad)

    def zoo(self, name):
        return getattr(self.lib.vision.models, name)(num_classes=10)

    def double(self, model):
        return model.to(dtype="float64")

    def named(self, model):
        return {n: p for n, p in model.named_parameters() if not p.stop_gradient}


def functions(framework, name, job, arrays):
    """Value and gradient of every case, in float32 and float64."""
    out = {}
    for case, call in job.items():
        module, _, function = call["function"].partition(".")
        target = getattr(importlib.import_module(f"shared_core.for_{name}.{module}"), function)
        for dtype in ("float32", "float64"):

            def given(key, grad=False, dtype=dtype):
                array = arrays[key]
                array = array.astype(dtype) if array.dtype.kind == "f" else array
                return framework.tensor(array, grad)

            args = [given(key, n == 0 and call["grad"]) for n, key in enumerate(call["args"])]
            kwargs = call["kwargs"] | {k: given(key) for k, key in call["tensors"].items()}
            value = target(**kwargs)(*args) if call["construct"] else target(*args, **kwargs)
            out[f"{case}/{dtype}/value"] = value.detach().numpy()
            if call["grad"]:
                total = value
                if value.ndim:
                    total = (value * given(call["weights"])).sum()
                total.backward()
                out[f"{case}/{dtype}/gradient"] = args[0].grad.numpy()
    return out


def load(framework, name, model, arrays):
    adapter = importlib.import_module(f"shared_core.for_{name}.checkpoints")
    weights = {k[2:]: framework.tensor(arrays[k]) for k in arrays if k.startswith("w/")}
    adapter.fit_into(model, weights, path="parity")


def model(framework, name, job, arrays):
    """Weights of a zoo model (its own, or those given) and its logits in eval mode."""
    net = framework.zoo(job["model"])
    if any(key.startswith("w/") for key in arrays):
        load(framework, name, net, arrays)
    else:  # running statistics that are not 0 and 1
        rng = np.random.default_rng(0)
        for key, value in net.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                value.copy_(framework.tensor(rng.uniform(0.5, 1.5, value.shape).astype("float32")))
    net.eval()
    logits = net(framework.tensor(arrays["images"]))
    out = {f"w/{k}": v.detach().numpy() for k, v in net.state_dict().items()}
    return out | {"logits": logits.detach().numpy()}


def step(framework, name, job, arrays):
    """Loss and gradients of one training step in float64, and the statistics after it."""
    losses = importlib.import_module(f"shared_core.for_{name}.losses")
    net = framework.zoo(job["model"])
    load(framework, name, net, arrays)
    net = framework.double(net)
    net.train()
    logits = net(framework.tensor(arrays["images"].astype("float64")))
    loss = losses.kd_kl(logits, framework.tensor(arrays["teacher"]), temperature=4.0)
    loss = loss + losses.cross_entropy(logits, framework.tensor(arrays["labels"]))
    loss.backward()
    named = framework.named(net)
    out = {f"g/{k}": p.grad.numpy() for k, p in named.items()}
    suffixes = ("running_mean", "running_var", "_mean", "_variance")
    for key, value in net.state_dict().items():
        if key.endswith(suffixes):
            out[f"s/{key}"] = value.numpy()
    count = sum(int(np.prod(p.shape)) for p in named.values())
    every = sum(int(np.prod(p.shape)) for p in net.parameters())
    return out | {"loss": loss.detach().numpy(), "trainable": count, "parameters": every}


def main(name, task, job, source, target):
    framework = {"torch": Torch, "paddle": Paddle}[name]()
    with open(job) as file:
        settings = json.load(file)
    arrays = dict(np.load(source))
    np.savez(target, **globals()[task](framework, name, settings, arrays))
    other = {"torch": "paddle", "paddle": "torch"}[name]
    assert other not in sys.modules, f"{name}'s side imported {other}"


if __name__ == "__main__":
    main(*sys.argv[1:])
