"""Speech with the CTC loss: three digits in a row, spoken by a formant synthesizer.

It is synthetic because not every machine has recordings of speech.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tests.benchmarks.trainings import Training, init_weights, make_momentum, spoil

RATE, HOP, FRAME, BANDS = 8000, 200, 256, 16  # samples per second, from frame to frame, per frame
DIGITS, FRAMES = 3, 40  # per utterance
# The first three formants in Hz of American vowels, spoken by men (Peterson and Barney, 1952).
VOWELS = {
    "i": (270, 2290, 3010),
    "I": (390, 1990, 2550),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "A": (640, 1190, 2390),
    "r": (490, 1350, 1690),
}
# Zero to nine: the first and the last vowel, and how loud the hiss of the first consonant is.
SOUNDS = ["io3", "uA0", "uu2", "ri1", "or1", "aI1", "II3", "eA3", "eI0", "ai0"]


def speak(digit: int, rng: np.random.Generator) -> np.ndarray:
    """Synthesizes a pause and a digit: the harmonics of a voice, filtered by the formants."""
    first, last, hiss = SOUNDS[digit]
    count = int(RATE * rng.uniform(0.16, 0.28))
    way = np.linspace(0, 1, count)[:, None]
    formants = (1 - way) * np.array(VOWELS[first]) + way * np.array(VOWELS[last])
    pitch = rng.uniform(90, 220) * (1 - 0.1 * way) * np.arange(1, 30)
    far = (pitch[..., None] - formants[:, None] * rng.uniform(0.9, 1.15)) / 80
    voice = np.sin(2 * np.pi * np.cumsum(pitch, axis=0) / RATE) * (1 / (1 + far**2)).sum(-1)
    burst = rng.normal(size=count) * np.exp(-np.arange(count) / 300) * float(hiss)
    pause = np.zeros(int(RATE * rng.uniform(0.02, 0.08)))
    return np.concatenate([pause, voice.sum(-1) * np.sin(np.pi * way[:, 0]) + burst])


def listen(samples: np.ndarray) -> np.ndarray:
    """Returns the log energy of each band, (frames, bands)."""
    starts = np.arange(0, len(samples) - FRAME, HOP)
    frames = samples[starts[:, None] + np.arange(FRAME)] * np.hanning(FRAME)
    energy = np.abs(np.fft.rfft(frames))[:, : FRAME // 2] ** 2
    return np.log(energy.reshape(len(frames), BANDS, -1).mean(-1) + 1.0) - 4


@functools.cache
def make_utterances(count=480) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes utterances: their log energies, which frames are padding, and the digits."""
    rng = np.random.default_rng(0)
    heard, padding = np.zeros((count, FRAMES, BANDS), np.float32), np.ones((count, FRAMES))
    digits = rng.integers(0, 10, (count, DIGITS))
    for i in range(count):
        samples = np.concatenate([speak(digit, rng) for digit in digits[i]])
        frames = listen(samples + 0.3 * rng.normal(size=len(samples)))[:FRAMES]
        heard[i, : len(frames)], padding[i, : len(frames)] = frames, 0
    return heard, padding.astype(np.float32), digits.astype(np.int32)


def speech(width=40, batch=8, train=400) -> Training:
    """A tanh recurrent network that hears five frames at a time, with the CTC loss."""
    heard, padding, digits = map(jnp.asarray, make_utterances())

    def init(key):
        a, b, c = jax.random.split(key, 3)
        recurrent = jax.nn.initializers.orthogonal(1.0)(b, (width, width))
        first, last = init_weights(a, 5 * BANDS, width), init_weights(c, width, 11)
        return {"in": first, "recurrent": recurrent, "out": last}

    def run(params, heard):
        wide = jnp.pad(heard, ((0, 0), (2, 2), (0, 0)))
        wide = jnp.concatenate([wide[:, i : i + FRAMES] for i in range(5)], axis=-1)

        def cell(h, x):
            h = jnp.tanh(x + h @ params["recurrent"])
            return h, h

        start = jnp.zeros((len(heard), width))
        _, states = lax.scan(cell, start, jnp.swapaxes(wide @ params["in"], 0, 1))
        return jnp.swapaxes(states, 0, 1) @ params["out"]

    def compute_ctc(params, picked, labels):
        """Computes the loss in nats per digit. Class 0 is the blank."""
        nothing = jnp.zeros(labels.shape)
        losses = optax.ctc_loss(run(params, heard[picked]), padding[picked], labels + 1, nothing)
        return losses.mean() / DIGITS

    def loss(params, key, step, bad=False):
        picked = jax.random.randint(key, (batch,), 0, train)
        labels, weight = spoil(digits[picked], key, bad, 10)
        return compute_ctc(params, picked, labels) * weight

    def evaluate(params):
        picked = jnp.arange(train, len(digits))
        return compute_ctc(params, picked, digits[picked])

    name, rates = "speech, CTC", (0.03, 0.1, 0.3)
    return Training(name, init, loss, evaluate, 2.6, make_momentum, rates, 150)
