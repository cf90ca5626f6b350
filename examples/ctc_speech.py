"""Speech: a recurrent network that spells synthetic utterances, trained with the CTC loss.

    uv run examples/ctc_speech.py

The CTC loss is a sum over the frames of an utterance. While the network knows nothing, all frames
pull it the same way, towards silence. These first gradients are some twenty times as long as later
ones. Unless they are clipped, they limit the learning rate: above it the network ends in silence
for good. An utterance is a string of "letters" with noise, each two formants held for 60 to 160 ms.
The network hears log spectra of 20 ms and is told the letters, but not when they are spoken.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, make_nnx_task, parse_options

LETTERS, SHORTEST, LONGEST = 12, 3, 8  # the alphabet, and the letters of an utterance
RATE, HOP, FRAMES, BANDS = 8000, 160, 64, 40  # samples per second, per frame; the spectra
HIDDEN, BATCH = 48, 16
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 5": optaxclip.clip_by_global_norm(5.0),
    "AutoClip, 10 %": optaxclip.autoclip(10.0),
}


def speak(random):
    """Synthesizes an utterance: log spectra, letters counted from 1, and the number of each."""
    count = random.integers(SHORTEST, LONGEST + 1)
    letters = random.integers(0, LETTERS, count)
    frames = np.repeat(letters, random.integers(3, 9, count))
    low, high = 300 + 150 * (np.arange(LETTERS) % 4), 1200 + 700 * (np.arange(LETTERS) // 4)
    voice = random.uniform(0.95, 1.05)
    hertz = np.repeat(np.stack([low, high])[:, frames], HOP, axis=1) * voice
    noise = random.normal(0, 0.3, hertz.shape[1])
    sound = np.sin(2 * np.pi * np.cumsum(hertz, axis=1) / RATE).sum(0) + noise
    spectra = np.abs(np.fft.rfft(sound.reshape(-1, HOP) * np.hanning(HOP)))[:, : 2 * BANDS]
    heard = np.zeros((FRAMES, BANDS), np.float32)
    heard[: len(frames)] = np.log(1e-2 + spectra.reshape(len(frames), BANDS, 2).sum(-1))
    return heard, np.pad(letters + 1, (0, LONGEST - count)), len(frames), count


def make_utterances(count, seed):
    """Makes many utterances: an array of each of the four parts."""
    random = np.random.default_rng(seed)
    parts = zip(*(speak(random) for _ in range(count)), strict=True)
    return tuple(jnp.asarray(np.stack(part)) for part in parts)


class Speller(nnx.Module):
    """An LSTM that scores each letter, and the blank, at each frame."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(BANDS, HIDDEN, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, LETTERS + 1, rngs=rngs)

    def __call__(self, heard):
        return self.head(self.rnn(heard))


def loss_fn(model, batch):
    """Returns the CTC loss per utterance."""
    heard, letters, frames, count = batch
    past_frames = (jnp.arange(FRAMES) >= frames[:, None]).astype(jnp.float32)
    past_letters = (jnp.arange(LONGEST) >= count[:, None]).astype(jnp.float32)
    return optax.ctc_loss(model(heard), past_frames, letters, past_letters).mean()


def make_task(clip, spoken, held_out):
    """Trains the network by SGD with momentum, after the clip."""

    def build(rate, rngs):
        model = Speller(rngs)
        tx = optax.chain(clip, optax.sgd(rate, momentum=0.9))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train_step(model, optimizer, key):
        picked = jax.random.randint(key, (BATCH,), 0, len(spoken[0]))
        loss, grads = nnx.value_and_grad(loss_fn)(model, jax.tree.map(lambda x: x[picked], spoken))
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss}

    def evaluate(model):
        return loss_fn(model, held_out) / held_out[-1].mean()

    return make_nnx_task(build, train_step, evaluate)


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=300, rates=(0.01, 0.03, 0.1))
    goal = Goal("CTC loss, nats per letter", failed=np.log(LETTERS))
    data = make_utterances(512, 0), make_utterances(128, 1)
    return compare({name: make_task(clip, *data) for name, clip in CLIPS.items()}, goal, args)


if __name__ == "__main__":
    main()
