"""Which bounds public implementations of adaptive clips keep, run from clones of their code.

Each is a function of the folder with the clones that returns `step(norm) -> bound`, the bound that
holds for the next norm. Nothing of theirs is in this repository; modules that they import but do
not need here are stood in for.
"""

import importlib.util
import pathlib
import sys
import types
from unittest import mock

import numpy as np


def _load(folder: str, path: str, **stand_ins):
    """A module from a file of a clone, with empty modules in place of what it imports from its own
    package.
    """
    modules = {}
    for name, members in stand_ins.items():
        parts = name.replace("__", ".").split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(modules[".".join(parts)]).update(members)
    spec = importlib.util.spec_from_file_location(
        pathlib.Path(path).stem, pathlib.Path(folder) / path
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(modules)
    spec.loader.exec_module(module)
    for name in modules:
        del sys.modules[name]
    return module


def _parameter(norm):
    """A PyTorch module with one parameter whose gradient has this norm."""
    import torch

    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), float(norm))
    return model


def zclip(folder):
    """bluorion-com/ZClip, without its default cap of 1.0."""
    clip = _load(folder, "ZClip/zclip/zclip.py").ZClip(max_grad_norm=None)

    def step(norm):
        clip.step(_parameter(norm))
        return clip.mean + clip.z_thresh * clip.var**0.5 if clip.initialized else np.inf

    return step


def autoclip(folder):
    """pseeth/autoclip, the version for PyTorch Ignite."""
    module, handlers, bounds = (
        _load(folder, "autoclip/autoclip.py", ignite__engine={"EventEnum": object}),
        [],
        [],
    )
    module.BackwardsEvents.BACKWARDS_COMPLETED = None
    engine = types.SimpleNamespace(on=lambda event: handlers.append)
    model = types.SimpleNamespace(parameters=lambda: model.now.parameters())
    module.add_autoclip_gradient_handler(engine, model, 10)

    def step(norm):
        model.now = _parameter(norm)
        with mock.patch(
            "torch.nn.utils.clip_grad_norm_", lambda parameters, bound: bounds.append(bound)
        ):
            handlers[0](engine)
        return bounds[-1]

    return step


def olmo(folder):
    """allenai/OLMo-core, SkipStepOptimizer."""
    import torch

    stand_in = {
        "get_default_device": lambda: torch.device("cpu"),
        "move_to_device": lambda x, device: x,
    }
    module = _load(
        folder, "OLMo-core/src/olmo_core/optim/skip_step_optimizer.py", olmo_core__utils=stand_in
    )
    optimizer = module.SkipStepOptimizer([torch.zeros(1)], {})

    def step(norm):
        optimizer.latest_loss, optimizer.latest_grad_norm = (
            torch.tensor(1.0),
            torch.tensor(float(norm)),
        )
        if len(optimizer._grad_norms) < optimizer.rolling_interval_length // 2:
            return np.inf
        std, mean = torch.std_mean(
            torch.stack(optimizer._grad_norms[-optimizer.rolling_interval_length :])
        )
        return float(mean + optimizer.sigma_factor * std)

    return step


def maxtext(folder):
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
    "ZClip": zclip,
    "AutoClip": autoclip,
    "OLMo-core SkipStepOptimizer": olmo,
    "MaxText skip_step_on_spikes": maxtext,
}
