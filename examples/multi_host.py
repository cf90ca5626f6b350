"""Training on several processes: sharded, an adaptive clip, skipped spikes, checkpoints.

    uv run examples/multi_host.py                # one process, four devices
    uv run examples/multi_host.py --simulate 2   # two processes, two devices each

On a cluster start it unchanged, once a host; `jax.distributed` finds the others by itself on Cloud
TPU and under Slurm, else name them: `--coordinator host0:1234 --processes 16 --process 3`.

Nothing in it tells the clip where the gradients lie: under `jit` a norm is that of the whole. What
is cut among the devices is cut by the shardings alone: with `--layout fsdp` parameters and moments,
with `--layout data` only the batch. Killed, it goes on from its last checkpoint, statistics of the
clip included, as if nothing had happened.
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
from data import library_text

LENGTH, BATCH, WIDTH = 8, 32, 64


def optimizer():
    """A step 20 times as long as usual is left out; one that is a spike among the usual is
    shortened.
    """
    clipped = optax.chain(optaxclip.zclip(warmup_steps=10), optax.adamw(3e-3))
    return optaxclip.skip_spikes(
        clipped, optaxclip.thresholds.running(20.0, feed=optaxclip.feeds.accepted)
    )


def init(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(a, (128, WIDTH)),
        "hidden": {
            "kernel": jax.random.normal(b, (LENGTH * WIDTH, WIDTH)) / 20,
            "bias": jnp.zeros(WIDTH),
        },
        "head": jax.random.normal(c, (WIDTH, 128)) / 10,
    }


def loss_of(params, rows, scale):
    """Predicts a character from the eight before it."""
    x = params["embed"][rows[:, :-1]].reshape(len(rows), -1)
    x = jax.nn.gelu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (
        scale
        * optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], rows[:, -1]).mean()
    )


def shardings_of(mesh, layout):
    """Of the parameters and of the optimizer's state: first axes cut among all devices, or all of
    it everywhere.
    """
    everywhere, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("devices"))
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: cut if layout == "fsdp" and x.ndim > 1 else everywhere, shapes)
    state = jax.eval_shape(optimizer().init, shapes)
    moments = optax.tree.map_params(
        optimizer(),
        lambda _, sharding: sharding,
        state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return params, moments


def trainer(tx, shardings):
    """The compiled step. Everything stays where the shardings put it."""

    def step(params, state, rows, scale):
        loss, grads = jax.value_and_grad(loss_of)(params, rows, scale)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))


def tell(step, loss, state):
    """Prints what all processes know."""
    seen = jax.device_get(optaxclip.metrics(state))
    if jax.process_index() == 0:
        norm, skipped = seen["skip/grad_norm"], seen["skip/steps"]
        print(f"step {step}: loss {loss:.3f}, norm {norm:.3f}, skipped {skipped}", flush=True)


def train(args):
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    text, tx = np.asarray(library_text(200_000)[0]), optimizer()
    shardings, rows_sharding = shardings_of(mesh, args.layout), NamedSharding(mesh, P("devices"))
    params = jax.jit(init, out_shardings=shardings[0])(jax.random.key(0))
    state = jax.jit(tx.init, out_shardings=shardings[1])(params)
    step = trainer(tx, shardings)
    with ocp.CheckpointManager(os.path.abspath(args.checkpoints)) as manager:
        first = manager.latest_step() or 0
        if first:
            here = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(first, args=ocp.args.StandardRestore(here))
        for i in range(first, args.steps):
            starts = np.random.default_rng(i).integers(0, len(text) - LENGTH - 1, (BATCH, 1))
            batch = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
            rows = jax.make_array_from_callback(
                batch.shape, rows_sharding, lambda where, batch=batch: batch[where]
            )
            params, state, loss = step(params, state, rows, 1e4 if i == args.bad_step else 1.0)
            if i % args.every == args.every - 1:
                tell(i + 1, float(loss), state)
                manager.save(i + 1, args=ocp.args.StandardSave((params, state)))
            if i + 1 == args.die_after:
                manager.wait_until_finished()
                os._exit(1)  # as if the machine had gone
        manager.wait_until_finished()
    return params


def simulate(args):
    """Starts this script once for each process, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = [x for x in sys.argv[1:] if x != "--simulate" and x != str(args.simulate)]
    own += [
        "--coordinator",
        address,
        "--processes",
        str(args.simulate),
        "--devices",
        str(4 // args.simulate),
    ]
    command = [sys.executable, __file__, *own, "--process"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(args.simulate)]
    sys.exit(max(process.wait() for process in running))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--simulate", type=int, help="so many processes on this machine, with four devices in all"
    )
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int, help="the number of this process")
    parser.add_argument(
        "--devices", type=int, default=4, help="simulated devices of a process, on CPU"
    )
    parser.add_argument("--layout", choices=["fsdp", "data"], default="fsdp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument(
        "--bad-step", type=int, default=30, help="a step whose loss is 10,000 times as large"
    )
    parser.add_argument("--die-after", type=int, help="stop there without a word, to see it go on")
    parser.add_argument("--checkpoints", default="multi_host_checkpoints")
    parser.add_argument("--out", help="where process 0 writes the parameters in the end (.npz)")
    args = parser.parse_args()
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
