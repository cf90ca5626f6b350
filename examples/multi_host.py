"""Training on several processes: sharding, an adaptive clip, skipped spikes, checkpoints.

    uv run examples/multi_host.py                # one process, four devices
    uv run examples/multi_host.py --simulate 2   # two processes, two devices each

On a cluster start it unchanged, once per host. On Cloud TPU and under Slurm `jax.distributed` finds
the other hosts. Elsewhere name them: `--coordinator host0:1234 --processes 16 --process 3`.

Nothing tells the clip where the gradients are: under `jit` a norm is that of the whole gradient.
Only the shardings decide what is sharded: with `--layout fsdp` parameters and moments, with
`--layout data` only the batch. A killed run resumes from its last checkpoint, including the
statistics of the clip, and ends bit for bit where it would have ended.
"""

import argparse
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from data import load_text
from optaxclip import feeds, thresholds

LENGTH, BATCH, WIDTH = 8, 32, 64


def make_optimizer():
    """Shortens spikes, and skips a step whose norm is over 20 times the running mean."""
    clipped = optax.chain(optaxclip.zclip(warmup_steps=10), optax.adamw(3e-3))
    return optaxclip.skip_spikes(clipped, thresholds.running(20.0, feed=feeds.accepted))


def init_params(key):
    a, b, c = jax.random.split(key, 3)
    hidden = jax.random.normal(b, (LENGTH * WIDTH, WIDTH)) / 20
    return {
        "embed": jax.random.normal(a, (128, WIDTH)),
        "hidden": {"kernel": hidden, "bias": jnp.zeros(WIDTH)},
        "head": jax.random.normal(c, (WIDTH, 128)) / 10,
    }


def loss_fn(params, rows, scale):
    """Predicts a character from the eight before it."""
    x = params["embed"][rows[:, :-1]].reshape(len(rows), -1)
    x = jax.nn.gelu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], rows[:, -1])
    return scale * losses.mean()


def make_shardings(mesh, layout):
    """Returns the shardings of the parameters and of the optimizer state.

    With "fsdp" the first axes of matrices and of their moments are sharded over all devices.
    """
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("devices"))
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    params = jax.tree.map(
        lambda x: sharded if layout == "fsdp" and x.ndim > 1 else replicated, shapes
    )
    tx = make_optimizer()
    state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, shapes),
        params,
        transform_non_params=lambda _: replicated,
    )
    return params, state


def make_step(tx, shardings):
    """Returns a jitted step that keeps the shardings of parameters and state."""

    def step(params, state, rows, scale):
        loss, grads = jax.value_and_grad(loss_fn)(params, rows, scale)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))


def print_metrics(step, loss, state):
    """Prints, from one process, the metrics that all processes have."""
    seen = jax.device_get(optaxclip.metrics(state))
    if jax.process_index() == 0:
        norm, skipped = seen["skip/grad_norm"], seen["skip/steps"]
        print(f"step {step}: loss {loss:.3f}, norm {norm:.3f}, skipped {skipped}", flush=True)


def load_batch(text, i, sharding):
    """Loads the batch of a step. Each process makes only the rows of its own devices."""
    starts = np.random.default_rng(i).integers(0, len(text) - LENGTH - 1, (BATCH, 1))
    batch = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
    return jax.make_array_from_callback(batch.shape, sharding, lambda where: batch[where])


def train(args):
    """Trains from the last checkpoint, or from the start, and returns the parameters."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    text, tx = np.asarray(load_text(200_000)[0]), make_optimizer()
    shardings, of_rows = make_shardings(mesh, args.layout), NamedSharding(mesh, P("devices"))
    params = jax.jit(init_params, out_shardings=shardings[0])(jax.random.key(0))
    state = jax.jit(tx.init, out_shardings=shardings[1])(params)
    step = make_step(tx, shardings)
    with ocp.CheckpointManager(os.path.abspath(args.checkpoints)) as manager:
        first = manager.latest_step() or 0
        if first:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(first, args=ocp.args.StandardRestore(like))
        for i in range(first, args.steps):
            scale = 1e4 if i == args.bad_step else 1.0
            params, state, loss = step(params, state, load_batch(text, i, of_rows), scale)
            if i % args.every == args.every - 1:
                print_metrics(i + 1, float(loss), state)
                manager.save(i + 1, args=ocp.args.StandardSave((params, state)))
            if i + 1 == args.die_after:
                manager.wait_until_finished()
                os._exit(1)  # as if the machine had gone
        manager.wait_until_finished()
    return params


def simulate(args):
    """Starts this script once per process on this machine, and exits when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    count = str(args.simulate)
    # argparse takes the last value of an option, so the processes do not start others.
    own = [*sys.argv[1:], "--simulate", "0", "--coordinator", address, "--processes", count]
    command = [sys.executable, __file__, *own, "--devices", str(4 // args.simulate), "--process"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(args.simulate)]
    sys.exit(max(process.wait() for process in running))


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--simulate", type=int, help="processes to start on this machine, with 4 devices in all")
    add("--coordinator", help="host:port of process 0")
    add("--processes", type=int, help="the number of processes")
    add("--process", type=int, help="the index of this process")
    add("--devices", type=int, default=4, help="simulated devices per process, on a CPU")
    add("--layout", choices=["fsdp", "data"], default="fsdp")
    add("--steps", type=int, default=200)
    add("--every", type=int, default=20, help="steps between checkpoints")
    add("--bad-step", type=int, default=30, help="a step whose loss is 10,000 times as large")
    add("--die-after", type=int, help="exit abruptly after this step, to try a restart")
    add("--checkpoints", default="multi_host_checkpoints")
    add("--out", help="file (.npz) to which process 0 writes the last parameters")
    return parser.parse_args()


def main():
    args = parse_options()
    if args.simulate:
        simulate(args)
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.coordinator or os.environ.get("SLURM_JOB_ID") or os.environ.get("TPU_WORKER_HOSTNAMES"):
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    params = multihost_utils.process_allgather(train(args), tiled=True)
    if args.out and jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        np.savez(args.out, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    main()
