"""Speech: a recurrent network that spells synthetic utterances, trained with the CTC loss.

    uv run examples/ctc_speech.py

The CTC loss is a sum over all frames of an utterance, and as long as the network knows nothing all
frames pull the same way: towards silence. Those first gradients, some twenty times as long as later
ones, set the largest rate that does not end there for good, unless they are clipped. An utterance
is a string of "letters", each two formants held for 60 to 160 ms, with noise; the network hears log
spectra of 20 ms and is told the letters, not when they are spoken.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, nnx_task, options

LETTERS, SHORTEST, LONGEST, FRAMES, RATE, HOP = 12, 3, 8, 64, 8000, 160
BANDS, HIDDEN, BATCH = 40, 48, 16
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 5": optaxclip.clip_by_global_norm(5.0),
    "AutoClip, 10 %": optaxclip.autoclip(10.0),
}


def speak(random):
    """An utterance: log spectra, (FRAMES, BANDS), its letters from 1 on, and how many frames and
    letters it has.
    """
    count = random.integers(SHORTEST, LONGEST + 1)
    letters = random.integers(0, LETTERS, count)
    frames = np.repeat(letters, random.integers(3, 9, count))
    formants = np.stack(
        [300 + 150 * (np.arange(LETTERS) % 4), 1200 + 700 * (np.arange(LETTERS) // 4)]
    )
    hertz = np.repeat(formants[:, frames], HOP, axis=1) * random.uniform(
        0.95, 1.05
    )  # a speaker's voice
    sound = np.sin(2 * np.pi * np.cumsum(hertz, axis=1) / RATE).sum(0) + random.normal(
        0, 0.3, hertz.shape[1]
    )
    spectra = np.abs(np.fft.rfft(sound.reshape(-1, HOP) * np.hanning(HOP)))[:, : 2 * BANDS]
    heard = np.zeros((FRAMES, BANDS), np.float32)
    heard[: len(frames)] = np.log(1e-2 + spectra.reshape(len(frames), BANDS, 2).sum(-1))
    return heard, np.pad(letters + 1, (0, LONGEST - count)), len(frames), count


def utterances(count, seed):
    """Many of them, as arrays."""
    random = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(np.stack(part))
        for part in zip(*(speak(random) for _ in range(count)), strict=True)
    )


class Speller(nnx.Module):
    """An LSTM over the frames; a score for each letter, and for none, at each frame."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(BANDS, HIDDEN, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, LETTERS + 1, rngs=rngs)

    def __call__(self, heard):
        return self.head(self.rnn(heard))


def loss_of(model, batch):
    """The CTC loss of an utterance, the mean over the batch."""
    heard, letters, frames, count = batch
    past_frames = (jnp.arange(FRAMES) >= frames[:, None]).astype(jnp.float32)
    past_letters = (jnp.arange(LONGEST) >= count[:, None]).astype(jnp.float32)
    return optax.ctc_loss(model(heard), past_frames, letters, past_letters).mean()


def task(clip, spoken, held_out):
    """The network, trained with momentum and a clip."""

    def build(rate, rngs):
        model = Speller(rngs)
        return model, nnx.Optimizer(
            model, optax.chain(clip, optax.sgd(rate, momentum=0.9)), wrt=nnx.Param
        )

    def train_step(model, optimizer, key):
        picked = jax.random.randint(key, (BATCH,), 0, len(spoken[0]))
        loss, grads = nnx.value_and_grad(loss_of)(model, jax.tree.map(lambda x: x[picked], spoken))
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss}

    return nnx_task(build, train_step, lambda model: loss_of(model, held_out) / held_out[-1].mean())


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=300, rates=(0.01, 0.03, 0.1))
    data, goal = (
        (utterances(512, 0), utterances(128, 1)),
        Goal("CTC loss of a letter, nats", failed=np.log(LETTERS)),
    )
    return compare({name: task(clip, *data) for name, clip in CLIPS.items()}, goal, args)


if __name__ == "__main__":
    main()
