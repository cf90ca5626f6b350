"""The same training on one device, data parallel on eight, and with all sharded (FSDP).

    uv run examples/sharded.py

The norm that a clip needs is that of the whole gradient. Under `jit` it is, however the arrays lie.
Under `shard_map` each device sees its own piece; from the types of the gradients optaxclip finds
over which axes they vary, and adds up over those. Optax's clip takes the norm of the piece, without
a word: each device then shortens its piece by a factor of its own, the step points elsewhere, and
the run is another one: its parameters end elsewhere, as the last lines say. Eight devices are
simulated here; several processes and restarts are in multi_host.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optaxclip
from comparison import Goal, Runs, chosen, draw, options, report
from data import LETTERS, library_text, windows

LENGTH, BATCH, WIDTH, AXIS = 8, 64, 64, "devices"

# name -> the clip, how the parameters lie, and whether the program is written for one device
# (shard_map)
RUNS = {
    "no clip, one device": (optaxclip.clip_by(jnp.inf), "one", False),
    "one device": (optaxclip.clip_by_global_norm(1.0), "one", False),
    "batch cut, jit": (optaxclip.clip_by_global_norm(1.0), "data", False),
    "FSDP, jit": (optaxclip.clip_by_global_norm(1.0), "fsdp", False),
    "FSDP, shard_map": (optaxclip.clip_by_global_norm(1.0), "fsdp", True),
    "FSDP, shard_map, Optax": (
        optax.chain(optaxclip.clip_by(jnp.inf), optax.clip_by_global_norm(1.0)),
        "fsdp",
        True,
    ),
}
DRAWN = "no clip, one device", "one device", "FSDP, shard_map", "FSDP, shard_map, Optax"


def init_params(key):
    a, b, c = jax.random.split(key, 3)
    hidden = jax.random.normal(b, (LENGTH * WIDTH, WIDTH)) / (LENGTH * WIDTH) ** 0.5
    out = jax.random.normal(c, (WIDTH, LETTERS)) / 8
    return {"in": jax.random.normal(a, (LETTERS, WIDTH)), "hidden": hidden, "out": out}


def loss_of(params, rows):
    """Predicts a character from the eight before it."""
    x = jnp.tanh(params["in"][rows[:, :-1]].reshape(len(rows), -1) @ params["hidden"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["out"], rows[:, -1]).mean()


def gathered_loss(params, rows):
    """The same from the pieces of one device; the gradient of a piece comes back as a piece."""
    whole = jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), params)
    return lax.pmean(loss_of(whole, rows), AXIS)


def program(clip, layout, manual):
    """Compiled start, step and evaluation. With FSDP matrices are cut by rows; else only the batch
    is.
    """
    mesh = jax.make_mesh((1 if layout == "one" else 8,), (AXIS,), axis_types=(AxisType.Auto,))

    def make_tx(rate):
        return optax.chain(clip, optax.sgd(rate, momentum=0.9))

    def init(rate, key):
        params = init_params(key)
        return params, make_tx(rate).init(params)

    def step(rate, state, rows):
        params, opt_state = state
        loss, grads = jax.value_and_grad(gathered_loss if manual else loss_of)(params, rows)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        seen = optaxclip.metrics(opt_state) | {"loss": loss}
        return (optax.apply_updates(params, updates), opt_state), seen

    shapes = jax.eval_shape(init, 0.0, jax.random.key(0))
    specs = jax.tree.map(lambda x: P(AXIS) if layout == "fsdp" and x.ndim == 2 else P(), shapes)
    if manual:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), specs, P(AXIS)), out_specs=(specs, P())
        )
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    step = jax.jit(
        step,
        in_shardings=(everywhere, placed, rows),
        out_shardings=(placed, everywhere),
        donate_argnums=1,
    )
    return (
        jax.jit(init, out_shardings=placed),
        step,
        jax.jit(lambda state, rows: loss_of(state[0], rows)),
    )


def train(name, rates, seeds, steps, text, held_out):
    """Trains at all rates with all seeds, one after the other. Returns what happened, and the last
    parameters.
    """
    init, step, evaluate = program(*RUNS[name])
    batch = jax.jit(lambda key, i: windows(text, jax.random.fold_in(key, i), BATCH, LENGTH))
    held_out, histories, ends = (
        np.asarray(windows(held_out, jax.random.key(99), 2000, LENGTH)),
        [],
        [],
    )
    with tqdm(total=len(rates) * seeds * steps, desc=f"{name:>22}", unit="step") as bar:
        for rate, seed in [(rate, seed) for rate in rates for seed in range(seeds)]:
            key, history = jax.random.key(seed), optaxclip.History()
            state = init(rate, key)
            for i in range(steps):
                state, seen = step(rate, state, np.asarray(batch(key, i)))
                history.append(seen)
                bar.update()
            histories.append(history.arrays())
            ends.append((jax.device_get(state[0]), float(evaluate(state, held_out))))
    seen = {
        key: np.stack([h[key] for h in histories]).reshape(len(rates), seeds, -1)
        for key in histories[0]
    }
    if "Optax" in name:
        del seen["clip/clipped"]  # Optax's clip does not tell
    return Runs(seen, np.reshape([score for _, score in ends], (len(rates), seeds))), [
        params for params, _ in ends
    ]


def distance(ends, others):
    """How far apart runs end, relative to the length of the parameters: the largest."""
    pairs = zip(ends, others, strict=True)
    return max(float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)) for a, b in pairs)


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=100, rates=(0.03, 0.1, 0.3))
    jax.config.update("jax_num_cpu_devices", 8)
    text, rates = library_text(), sorted(args.rates)
    trained = {
        name: train(name, rates, args.seeds, args.steps, *text) for name in chosen(args, RUNS)
    }
    results, ends = ({name: both[i] for name, both in trained.items()} for i in (0, 1))
    goal = Goal("Evaluation loss, nats a character", failed=np.log(LETTERS))
    print(report(results, rates, goal))
    draw({name: results[name] for name in DRAWN if name in results}, rates, goal, args.out)
    print(
        f"\nAt rate {rates[0]:g}, how far the parameters end from those of one device, over their"
        " norm, at most:\n"
    )
    first = {name: params[: args.seeds] for name, params in ends.items()}  # of the smallest rate
    others = [name for name in first if "one device" in first and not name.endswith("one device")]
    away = {name: distance(first[name], first["one device"]) for name in others}
    for name, value in away.items():
        print(f"{name:>24}: {value:.1e}")
    return results, away


if __name__ == "__main__":
    main()
