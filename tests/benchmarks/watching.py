"""What `optaxclip.watch` costs when it is left on, and what logging it costs.

    python -m tests.benchmarks.watching [--small] [--models cnn transformer] [--seconds 60]
        [--into docs/watching.md]

Prints the CPU time of a whole training step (forward, backward, clip, Adam) relative to one without
a watch: the median and quartiles of ratios of consecutive runs, in the order A B ... B A. It is not
the time on the clock, which depends on what else the machine does. Run it on one core, with
`taskset -c 0`, or threads that wait for one another count as well. "log every N" reads
`optaxclip.metrics`, jitted separately from the step, to the host at every N-th step, and writes a
line of CSV.
"""

import argparse
import functools
import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks.per_example import CNN, Model, Transformer, make_model
from tests.benchmarks.reporting import describe_device, format_quartiles, publish, table

CLIP = optaxclip.clip_by_global_norm(1.0)
CHAINS = {
    "no watch": CLIP,
    "no watch, again": CLIP,
    "watch": optax.chain(optaxclip.watch(), CLIP),
    "watch, histogram": optax.chain(optaxclip.watch(histogram=True), CLIP),
}
EVERY = (1, 10, 100)


def list_models(small: bool) -> dict:
    """Lists models by name, as functions, so that only the chosen ones are built."""
    rng = np.random.default_rng(0)
    n, width, words, length, side = (2, 32, 40, 4, 8) if small else (32, 256, 2000, 32, 32)

    def draw_text(tokens):
        return jnp.asarray(rng.integers(0, words, (max(tokens // length, 1), length)))

    def make_transformer(tokens):
        return make_model(Transformer(words, width // 2), draw_text(tokens), draw_text(tokens))

    def make_cnn():
        images = jnp.asarray(rng.normal(size=(n, side, side, 3)), jnp.float32)
        return make_model(CNN(width // 16), images, jnp.asarray(rng.integers(0, 10, n)))

    return {
        "cnn": make_cnn,
        "transformer": lambda: make_transformer(16 * n),
        "transformer, few tokens": lambda: make_transformer(4 * n),
    }


def make_training(model: Model, clip):
    """Makes a compiled step, `state -> (state, loss)`, and its first state."""
    tx = optax.chain(clip, optax.adam(1e-3))

    def loss_of(params):
        return jnp.mean(jax.vmap(model.loss, (None, 0))(params, model.batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = jax.tree.map(jnp.copy, model.params)
    return step, (params, tx.init(params))


def add_log(step, every: int | None):
    """Makes a step that logs each time that `every` steps are done."""
    count, sink, read = 0, io.StringIO(), jax.jit(optaxclip.metrics)

    def run(state):
        nonlocal count
        state, loss = step(state)
        count += 1
        if every and count % every == 0:
            row = jax.device_get(read(state[1]) | {"loss": loss})
            sink.write(",".join(f"{x:g}" for x in row.values()) + "\n")
        return state

    return run


def compare_runs(runs: dict, states: dict, seconds: float, burst: int) -> dict[str, list[float]]:
    """Measures the time of each run relative to the first one, in each round."""
    names = list(runs)
    ratios: dict = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while not ratios[names[0]] or time.perf_counter() < end:
        times = dict.fromkeys(names, 0.0)
        for order in (names, names[::-1]):
            for name in order:
                start = time.process_time()
                for _ in range(burst):
                    states[name] = runs[name](states[name])
                jax.block_until_ready(states[name])
                times[name] += time.process_time() - start
        for name in names:
            ratios[name].append(times[name] / times[names[0]])
    return ratios


def make_rows(model: Model, seconds: float, small: bool):
    """Makes one row per way to take steps."""
    every = {f"watch, log every {n}": n for n in EVERY}
    chains = CHAINS | dict.fromkeys(every, CHAINS["watch"])
    made = {name: make_training(model, clip) for name, clip in chains.items()}
    runs = {name: add_log(step, every.get(name)) for name, (step, _) in made.items()}
    states = {name: jax.block_until_ready(runs[name](state)) for name, (_, state) in made.items()}
    start = time.process_time()
    states["no watch"] = jax.block_until_ready(runs["no watch"](states["no watch"]))
    step_seconds = time.process_time() - start
    burst = 1 if small else max(1, round(0.1 / step_seconds))  # a tenth of a second
    for name, ratios in compare_runs(runs, states, seconds, burst).items():
        yield [name, format_quartiles(ratios), str(len(ratios))]


def race_steps(names: list[str], seconds: float, small: bool) -> str:
    """Makes the table of training steps on this machine."""
    lines = []
    for name in names:
        model = list_models(small)[name]()
        leaves = jax.tree.leaves(model.params)
        size = f"{sum(x.size for x in leaves) / 1e6:.2f} M"
        lines += [[name, size, str(len(leaves)), *row] for row in make_rows(model, seconds, small)]
    head = ["model", "parameters", "leaves", "", "CPU time of a step (quartiles)", "rounds"]
    return f"{table(head, lines)}\n{describe_device()}.\n"


def main(argv=None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--models", nargs="+", default=["cnn", "transformer"])
    parser.add_argument("--seconds", type=float, default=60.0, help="time to measure each model")
    parser.add_argument("--into", help="document to write the table into")
    args = parser.parse_args(argv)
    text = race_steps(args.models, 0 if args.small else args.seconds, args.small)
    publish(text, args.into, "watching")


if __name__ == "__main__":
    main()
