"""The same training on one device, with the batch sharded over eight, and fully sharded (FSDP).

    uv run examples/sharded.py

A clip needs the norm of the whole gradient. Under `jit` it gets that, however the arrays are
sharded. Under `shard_map` each device sees only its own part. optaxclip reads from the types of the
gradients over which mesh axes they vary, and sums over these. Optax's clip takes the norm of the
part, without an error: each device shortens its part by a different factor, the step has another
direction, and the run ends at other parameters, as the last lines show. Eight devices are simulated
here. For several processes and restarts see multi_host.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optaxclip
from comparison import Goal, Runs, choose_methods, draw, format_report, parse_options
from data import LETTERS, load_text, sample_windows

LENGTH, BATCH, WIDTH, AXIS = 8, 64, 64, "devices"

unclipped, clip = optaxclip.clip_by(jnp.inf), optaxclip.clip_by_global_norm(1.0)
clip_of_optax = optax.chain(unclipped, optax.clip_by_global_norm(1.0))

# name -> the clip, the layout of the parameters, and whether the program is a shard_map
RUNS = {
    "no clip, one device": (unclipped, "one", False),
    "one device": (clip, "one", False),
    "data parallel, jit": (clip, "data", False),
    "FSDP, jit": (clip, "fsdp", False),
    "FSDP, shard_map": (clip, "fsdp", True),
    "FSDP, shard_map, Optax": (clip_of_optax, "fsdp", True),
}
DRAWN = "no clip, one device", "one device", "FSDP, shard_map", "FSDP, shard_map, Optax"


def init_params(key):
    a, b, c = jax.random.split(key, 3)
    hidden = jax.random.normal(b, (LENGTH * WIDTH, WIDTH)) / (LENGTH * WIDTH) ** 0.5
    out = jax.random.normal(c, (WIDTH, LETTERS)) / 8
    return {"in": jax.random.normal(a, (LETTERS, WIDTH)), "hidden": hidden, "out": out}


def loss_fn(params, rows):
    """Predicts a character from the eight before it."""
    x = jnp.tanh(params["in"][rows[:, :-1]].reshape(len(rows), -1) @ params["hidden"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["out"], rows[:, -1]).mean()


def sharded_loss_fn(params, rows):
    """Gathers the parts of the parameters. The gradient of a part is again a part."""
    whole = jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), params)
    return lax.pmean(loss_fn(whole, rows), AXIS)


def make_program(clip, layout, manual):
    """Returns jitted functions: init, step and evaluate. Under FSDP matrices are sharded by row."""
    mesh = jax.make_mesh((1 if layout == "one" else 8,), (AXIS,), axis_types=(AxisType.Auto,))

    def make_tx(rate):
        return optax.chain(clip, optax.sgd(rate, momentum=0.9))

    def init(rate, key):
        params = init_params(key)
        return params, make_tx(rate).init(params)

    def step(rate, state, rows):
        params, opt_state = state
        loss, grads = jax.value_and_grad(sharded_loss_fn if manual else loss_fn)(params, rows)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        seen = optaxclip.metrics(opt_state) | {"loss": loss}
        return (optax.apply_updates(params, updates), opt_state), seen

    def evaluate(state, rows):
        return loss_fn(state[0], rows)

    shapes = jax.eval_shape(init, 0.0, jax.random.key(0))
    specs = jax.tree.map(lambda x: P(AXIS) if layout == "fsdp" and x.ndim == 2 else P(), shapes)
    ins, outs = (P(), specs, P(AXIS)), (specs, P())
    if manual:
        step = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs)
    ins, outs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (ins, outs))
    step = jax.jit(step, in_shardings=ins, out_shardings=outs, donate_argnums=1)
    return jax.jit(init, out_shardings=outs[0]), step, jax.jit(evaluate)


def train(name, rates, seeds, steps, text, held_out):
    """Trains at all rates with all seeds, one after the other. Returns runs and last parameters."""
    init, step, evaluate = make_program(*RUNS[name])
    sample = jax.jit(lambda key, i: sample_windows(text, jax.random.fold_in(key, i), BATCH, LENGTH))
    held_out = np.asarray(sample_windows(held_out, jax.random.key(99), 2000, LENGTH))
    histories, scores, ends = [], [], []
    with tqdm(total=len(rates) * seeds * steps, desc=f"{name:>22}", unit="step") as bar:
        for rate, seed in itertools.product(rates, range(seeds)):
            key, history = jax.random.key(seed), optaxclip.History()
            state = init(rate, key)
            for i in range(steps):
                state, seen = step(rate, state, np.asarray(sample(key, i)))
                history.append(seen)
                bar.update()
            histories.append(history.arrays())
            scores.append(float(evaluate(state, held_out)))
            ends.append(jax.device_get(state[0]))
    shape = len(rates), seeds
    seen = {key: np.stack([h[key] for h in histories]).reshape(*shape, -1) for key in histories[0]}
    if "Optax" in name:
        del seen["clip/clipped"]  # of the clip that only measures; Optax's reports nothing
    return Runs(seen, np.reshape(scores, shape)), ends


def measure_distance(ends, others):
    """Measures how far apart runs end, relative to the norm of the parameters: the largest."""
    pairs = zip(ends, others, strict=True)
    return max(float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)) for a, b in pairs)


def measure_distances(ends):
    """Measures how far each sharded run ends from the one on one device."""
    if "one device" not in ends:
        return {}
    sharded = [name for name in ends if not name.endswith("one device")]
    return {name: measure_distance(ends[name], ends["one device"]) for name in sharded}


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=100, rates=(0.03, 0.1, 0.3))
    jax.config.update("jax_num_cpu_devices", 8)
    text, rates, results, ends = load_text(), sorted(args.rates), {}, {}
    for name in choose_methods(args, RUNS):
        results[name], params = train(name, rates, args.seeds, args.steps, *text)
        ends[name] = params[: args.seeds]  # at the smallest rate
    goal = Goal("Evaluation loss, nats per character", failed=np.log(LETTERS))
    print(format_report(results, rates, goal))
    draw({name: results[name] for name in DRAWN if name in results}, rates, goal, args.out)
    distances = measure_distances(ends)
    print(f"\nRelative distance of the parameters from those of one device, rate {rates[0]:g}:\n")
    for name, distance in distances.items():
        print(f"{name:>24}: {distance:.1e}")
    return results, distances


if __name__ == "__main__":
    main()
