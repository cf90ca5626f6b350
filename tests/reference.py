"""Each published method, retold in NumPy from its paper: one loop, slow and obvious.

There are two forms. Methods of norms take the norms of one block, step by step, and return its
norms after the clip. Methods of elements take the gradients of one leaf, `(steps, ...)`, and return
the clipped gradients in the same shape.
"""

import numpy as np


def autoclip(norms, percentile=10.0, window=1000):
    """Seetharaman et al. 2020: the percentile of all norms so far, this one among them."""
    out = []
    for t, n in enumerate(norms):
        bound = np.percentile(norms[max(0, t + 1 - window) : t + 1], percentile)
        out.append(min(n, bound))
    return out


def autoclip_after(norms, percentile=95.0, window=100, max_norm=1.0):
    """TRELLIS: the percentile of a full window before this norm, capped; the cap until the window
    is full.
    """
    out = []
    for t, n in enumerate(norms):
        bound = (
            max_norm
            if t < window
            else min(max_norm, np.percentile(norms[t - window : t], percentile))
        )
        out.append(min(n, bound))
    return out


def zclip(norms, z=2.5, decay=0.97, warmup_steps=25):
    """Kumar et al. 2025: a z-score over the threshold is turned into threshold² / z-score."""
    out, mean, var = [], 0.0, 0.0
    for t, n in enumerate(norms):
        if t < warmup_steps:
            out.append(n)
            mean, var = np.mean(norms[: t + 1]), np.var(norms[: t + 1])
            continue
        std = np.sqrt(var)
        score = (n - mean) / std
        clipped = mean + z**2 / score * std if score > z else n
        mean = decay * mean + (1 - decay) * clipped
        var = decay * var + (1 - decay) * (clipped - mean) ** 2
        out.append(clipped)
    return out


def clip_by_log_zscore(norms, z=2.0, decay=0.95):
    """Chorowski et al. 2014: norms over exp(mean + z deviations) of the logarithms become
    exp(mean).
    """
    out, mean, square = [], 0.0, 0.0
    for t, n in enumerate(norms):
        d = min(decay, t / (t + 1))
        mean = d * mean + (1 - d) * np.log(n)
        square = d * square + (1 - d) * np.log(n) ** 2
        std = np.sqrt(max(1e-8, square - mean**2))
        out.append(np.exp(mean) if n >= np.exp(mean + z * std) else n)
    return out


def adagc(norms, ratio=1.05, decay=0.98, warmup_steps=100, max_norm=1.0):
    """Wang et al. 2025, a tree of one leaf: the smallest norm of the warm-up, then the mean of
    clipped norms.
    """
    out, gamma = [], np.inf
    for t, n in enumerate(norms):
        if t < warmup_steps:
            clipped = min(n, max_norm)
            gamma = min(gamma, clipped)
        else:
            clipped = min(n, ratio * gamma)
            gamma = decay * gamma + (1 - decay) * clipped
        out.append(clipped)
    return out


def quantile_clip(norms, quantile=0.5, learning_rate=0.2, init=0.1):
    """Andrew et al. 2021, one client, no noise: C ← C · exp(-η · (b - γ))."""
    out, bound = [], init
    for n in norms:
        out.append(min(n, bound))
        within = 1.0 if n <= bound else 0.0
        bound *= np.exp(-learning_rate * (within - quantile))
    return out


def clip_by_median(norms, scale=2.0, window=100, every=100):
    """ScaledAdam: twice the median of the last norms, renewed every 100 steps, and, doubled, after
    10, 20 and 40.
    """
    out, bound = [], np.inf
    for t, n in enumerate(norms):
        if t > 0 and (t % every == 0 or t in (10, 20, 40)):
            bound = scale * np.median(norms[max(0, t - window) : t])
            bound *= 2.0 if t in (10, 20, 40) else 1.0
        out.append(min(n, bound))
    return out


def limit_norm_growth(norms, ratio=1.01):
    """Fira, APOLLO: at most 1.01 times the last norm after its clip."""
    out = []
    for n in norms:
        out.append(n if not out else min(n, ratio * out[-1]))
    return out


def normalize_by_moments(norms, b1=0.7, b2=0.9, eps=1e-8):
    """Stable-SPAM's AdaGN: the norm becomes m̂ / (√v̂ + ε)."""
    out, m, v = [], 0.0, 0.0
    for t, n in enumerate(norms, start=1):
        m, v = b1 * m + (1 - b1) * n, b2 * v + (1 - b2) * n**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return out


def running(norms, factor=2.0, decay=0.99):
    """A multiple of the bias-corrected mean of clipped norms."""
    out, mean = [], 0.0
    for t, n in enumerate(norms):
        out.append(n if t == 0 else min(n, factor * mean / (1 - decay**t)))
        mean = decay * mean + (1 - decay) * out[-1]
    return out


def norm_ratio(norms, ratio=2.0, decay=0.95):
    """OLMo's `max_grad_norm_ratio`: a multiple of the mean of clipped norms since the first."""
    out, mean = [], None
    for n in norms:
        mean = n if mean is None else mean
        out.append(n * min(1.0, ratio * mean / n))
        mean = decay * mean + (1 - decay) * out[-1]
    return out


def band_clip(norms, low=0.5, high=2.0, decay=0.99):
    """AGGC's idea: norms stay in a band around the bias-corrected mean of what they were made."""
    out, mean = [], 0.0
    for t, n in enumerate(norms):
        middle = mean / (1 - decay**t) if t else n
        out.append(np.clip(n, low * middle, high * middle))
        mean = decay * mean + (1 - decay) * out[-1]
    return out


def skip_spikes(norms, sigmas=6.0, window=128, warmup_steps=64):
    """OLMo's rule: which steps are skipped, from the 64th on; spikes are remembered, too."""
    out = []
    for t, n in enumerate(norms):
        past = norms[max(0, t - window) : t]
        out.append(
            len(past) + 1 >= warmup_steps and n - np.mean(past) > sigmas * np.std(past, ddof=1)
        )
    return out


def lingvo(norms, sigmas=4.0, decay=0.995, warmup_steps=60):
    """Lingvo's tracker in log space: which steps are skipped; spikes are remembered at the length
    of their cap.
    """
    out, mean, square, weight = [], 0.0, 0.0, 0.0
    for t, n in enumerate(norms):
        x, cap = np.log(n), np.inf
        if t >= warmup_steps:
            m = mean / weight
            cap = m + sigmas * np.sqrt(max(square / weight - m**2, 1e-8))
        out.append(x > cap)
        d = min(decay, t / (t + 1))  # plain means first, where Lingvo divides by the weight so far
        mean, square, weight = (
            d * a + (1 - d) * b
            for a, b in ((mean, min(x, cap)), (square, min(x, cap) ** 2), (weight, 1))
        )
    return out


def spam_clip(grads, threshold=5000.0, decay=0.999, warmup_steps=20, every=500):
    """SPAM's spike clip; v without bias correction, forgotten every 500 steps."""
    out, v = [], np.zeros_like(grads[0])
    for t, g in enumerate(grads):
        if t % every == 0:
            v = np.zeros_like(g)
        spike = (g**2 > threshold * v) & (v > 0) & (t % every >= warmup_steps)
        g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
        v = decay * v + (1 - decay) * g**2
        out.append(g)
    return np.array(out)


def adamw_clip(grads, ratio=3.0, decay=0.999, floor=1e-10, warmup_steps=0):
    """AdamWClip: elements within 3 of their root mean square, or the floor if that is larger; free
    where v = 0.
    """
    out, v = [], np.zeros_like(grads[0])
    for t, g in enumerate(grads):
        if t >= warmup_steps:
            rms = np.sqrt(v / (1 - decay ** max(t, 1)))
            bound = np.where(v > 0, np.maximum(ratio * rms, floor), np.inf)
            g = np.clip(g, -bound, bound)
        v = decay * v + (1 - decay) * g**2
        out.append(g)
    return np.array(out)


def clip_by_running_max(grads, decay=0.999):
    """Stable-SPAM's AdaClip: elements over the mean of the largest are scaled so that the largest
    becomes it.
    """
    out, mean = [], 0.0
    for t, g in enumerate(grads, start=1):
        largest = np.max(np.abs(g))
        mean = decay * mean + (1 - decay) * largest
        bound = mean / (1 - decay**t)
        out.append(np.where(np.abs(g) > bound, g / largest * bound, g))
    return np.array(out)


def scale_by_acclip(grads, b1=0.9, b2=0.99, alpha=1.0, eps=1e-5):
    """Zhang et al. 2020: momentum, clipped to the α-mean of the gradients' size."""
    out, m, size = [], np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for g in grads:
        m = b1 * m + (1 - b1) * g
        size = b2 * size + (1 - b2) * np.abs(g) ** alpha
        out.append(m * np.minimum(size ** (1 / alpha) / (np.abs(m) + eps), 1))
    return np.array(out)


def scale_by_stable_rms(grads, b1=0.9, b2=0.99, eps=1e-6):
    """StableAdamW without rate and decay: Adam's direction over max(1, RMS(g / √v̂))."""
    out, m, v = [], np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        rms = np.sqrt(np.mean(g**2 / np.maximum(v_hat, eps**2)))
        out.append(m_hat / (np.sqrt(v_hat) + eps) / max(1, rms))
    return np.array(out)


def clip_by_momentum_norm(grads, ratio=10.0, decay=0.9):
    """An early rule of OLMo, with the bias of the momentum corrected."""
    out, m = [], np.zeros_like(grads[0])
    for t, g in enumerate(grads):
        if t > 0:
            g = g * min(1, ratio * np.linalg.norm(m / (1 - decay**t)) / np.linalg.norm(g))
        m = decay * m + (1 - decay) * g
        out.append(g)
    return np.array(out)


def u_clip(grads, max_norm=1.0):
    """Elesedy and Hutter 2023: what is cut off is added to the next gradient."""
    out, carry = [], np.zeros_like(grads[0])
    for g in grads:
        total = g + carry
        u = total * min(1, max_norm / np.linalg.norm(total))
        carry = total - u
        out.append(u)
    return np.array(out)


def clip21(grads, max_norm=1.0):
    """Khirirat et al. 2023, one worker: the estimate follows the gradient by clipped steps."""
    out, v = [], np.zeros_like(grads[0])
    for g in grads:
        change = g - v
        v = v + change * min(1, max_norm / max(np.linalg.norm(change), 1e-300))
        out.append(v)
    return np.array(out)


def clippy(updates, params, relative=0.5, absolute=1e-2):
    """Tang et al. 2023: the whole leaf is scaled until no element moves more than its limit."""
    out = []
    for d in updates:
        scale = 1.0
        for delta, w in zip(d.ravel(), params.ravel(), strict=True):
            if delta != 0:
                scale = min(scale, (relative * abs(w) + absolute) / abs(delta))
        out.append(d * scale)
    return np.array(out)


def larc(grads, params, learning_rate=0.1, trust_coefficient=0.02, weight_decay=0.0, eps=1e-8):
    """NVIDIA's LARC, clipping: the layer's own rate, if it is less than the global one."""
    out, size = [], np.linalg.norm(params)
    for g in grads:
        rate = trust_coefficient * size / (np.linalg.norm(g) + weight_decay * size + eps)
        out.append((g + weight_decay * params) * min(rate / learning_rate, 1))
    return np.array(out)


def per_example_normalize(grads, gamma=0.01):
    """AUTO-S: every example at nearly length 1."""
    return sum(g / (np.linalg.norm(g) + gamma) for g in grads)


def clipped_mean(grads, max_norm=1.0):
    """The mean of what is left of each client's gradient; `grads` is (steps, clients, numbers)."""
    return np.array([np.mean([shorten(g, max_norm) for g in row], axis=0) for row in grads])


def centered_clip(grads, max_norm=1.0, momentum=0.9, iterations=1):
    """Karimireddy et al. 2021, algorithms 1 and 2, from m = v = 0."""
    out, m, v = [], np.zeros_like(grads[0]), np.zeros_like(grads[0, 0])
    for row in grads:
        m = np.array([momentum * a + (1 - momentum) * g for a, g in zip(m, row, strict=True)])
        for _ in range(iterations):
            v = v + np.mean([shorten(a - v, max_norm) for a in m], axis=0)
        out.append(v)
    return np.array(out)


def clip21_sgd2m(grads, max_norm=1.0, momentum=0.9, rate=1.0):
    """Islamov et al. 2025, without noise; their β is 1 - momentum, their β̂ is the rate."""
    out, server = [], np.zeros_like(grads[0, 0])
    v, shift = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for row in grads:
        v = momentum * v + (1 - momentum) * row
        sent = np.array([shorten(a - b, max_norm) for a, b in zip(v, shift, strict=True)])
        shift = shift + rate * sent
        server = server + rate / len(row) * sent.sum(axis=0)
        out.append(server)
    return np.array(out)


def shorten(x, max_norm):
    """A vector, no longer than the bound."""
    return x * min(1, max_norm / max(np.linalg.norm(x), 1e-300))
