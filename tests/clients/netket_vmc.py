# /// script
# dependencies = ["netket==3.23.0", "jax==0.12.0.1"]
# ///
"""netket: natural gradients of a restricted Boltzmann machine with complex parameters."""

import jax.numpy as jnp
import netket as nk

from tests.clients.common import Trained, check


def train(optimizer):
    chain = nk.graph.Chain(6)
    hilbert = nk.hilbert.Spin(0.5, chain.n_nodes)
    machine = nk.models.RBM(alpha=1, param_dtype=complex)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=8)
    state = nk.vqs.MCState(sampler, machine, n_samples=64, seed=0, sampler_seed=1)
    energy = nk.operator.IsingJax(hilbert, chain, h=1.0)
    driver = nk.driver.VMC_SR(energy, optimizer, diag_shift=0.1, variational_state=state)
    log = nk.logging.RuntimeLog()
    driver.run(20, out=log, show_progress=False)
    return Trained(jnp.real(log.data["Energy"].Mean), driver._optimizer_state)


check(train, nk.optimizer.Sgd(0.1), bound=1.0)
