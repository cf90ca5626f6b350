"""The bounds of public implementations of adaptive clips, run from clones of their code.

Each function takes the folder with the clones and returns `step(norm) -> bound`, with the bound for
the next norm. None of their code is in this repository. Modules that they import but do not need
here are replaced by stand-ins.
"""

import importlib.util
import pathlib
import sys
import types
from unittest import mock

import numpy as np


def _load(folder: str, path: str, **stand_ins):
    """Loads a module from a file of a clone, with stand-ins for the modules that it imports."""
    modules = {}
    for name, members in stand_ins.items():
        parts = name.replace("__", ".").split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(modules[".".join(parts)]).update(members)
    file = pathlib.Path(folder, path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(modules)
    spec.loader.exec_module(module)
    for name in modules:
        del sys.modules[name]
    return module


def _make_module(norm):
    """Makes a PyTorch module with one parameter whose gradient has this norm."""
    import torch

    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), float(norm))
    return model


def run_zclip(folder):
    """bluorion-com/ZClip, without its default cap of 1.0."""
    clip = _load(folder, "ZClip/zclip/zclip.py").ZClip(max_grad_norm=None)

    def step(norm):
        clip.step(_make_module(norm))
        return clip.mean + clip.z_thresh * clip.var**0.5 if clip.initialized else np.inf

    return step


def run_autoclip(folder):
    """pseeth/autoclip, the version for PyTorch Ignite."""
    handlers, bounds = [], []
    module = _load(folder, "autoclip/autoclip.py", ignite__engine={"EventEnum": object})
    module.BackwardsEvents.BACKWARDS_COMPLETED = None
    engine = types.SimpleNamespace(on=lambda event: handlers.append)
    model = types.SimpleNamespace(parameters=lambda: model.now.parameters())
    module.add_autoclip_gradient_handler(engine, model, 10)

    def record(parameters, bound):
        bounds.append(bound)

    def step(norm):
        model.now = _make_module(norm)
        with mock.patch("torch.nn.utils.clip_grad_norm_", record):
            handlers[0](engine)
        return bounds[-1]

    return step


def run_olmo(folder):
    """allenai/OLMo-core, SkipStepOptimizer."""
    import torch

    devices = {"get_default_device": lambda: torch.device("cpu")}
    devices |= {"move_to_device": lambda x, device: x}
    path = "OLMo-core/src/olmo_core/optim/skip_step_optimizer.py"
    module = _load(folder, path, olmo_core__utils=devices)
    optimizer = module.SkipStepOptimizer([torch.zeros(1)], {})

    def step(norm):
        optimizer.latest_loss = torch.tensor(1.0)
        optimizer.latest_grad_norm = torch.tensor(float(norm))
        length = optimizer.rolling_interval_length
        if len(optimizer._grad_norms) < length // 2:
            return np.inf
        std, mean = torch.std_mean(torch.stack(optimizer._grad_norms[-length:]))
        return float(mean + optimizer.sigma_factor * std)

    return step


def run_maxtext(folder):
    """AI-Hypercomputer/maxtext, skip_step_on_spikes."""
    import jax
    import jax.numpy as jnp
    import optax

    stand_ins = {
        "maxtext.common.common_types": {"DecoderBlockType": None},
        "maxtext.utils.muon_utils": {"get_muon_weight_dimension_numbers": None},
    }
    module = _load(folder, "maxtext/src/maxtext/optimizers/optimizers.py", **stand_ins)
    tx = module.skip_step_on_spikes(optax.identity(), 128, 6.0)
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)

    def step(norm):
        nonlocal state
        _, state = update(jnp.full(1, norm), state, loss=jnp.ones(()), grad_norm=jnp.asarray(norm))
        mean, std = module._compute_rolling_stats(state["grad_norms"], state["count"], 128)
        return float(mean + 6.0 * std) if state["count"] >= 63 else np.inf

    return step


PEERS = {
    "ZClip": run_zclip,
    "AutoClip": run_autoclip,
    "OLMo-core SkipStepOptimizer": run_olmo,
    "MaxText skip_step_on_spikes": run_maxtext,
}
