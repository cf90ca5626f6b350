"""Shows why clipping works: a loss with a cliff, and descent on it with and without a clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.clips.norm import clip_by_global_norm
from optaxclip.plots.axes import DARK, axes_or_new, draw_legend_above

Loss = Callable[[jax.Array], jax.Array]
_ARROWS = 16  # along each side


def unit_loss(point: jax.Array, steps: int = 50) -> jax.Array:
    """The loss of a recurrent net of one unit, xₜ = w σ(xₜ₋₁) + b, whose target is σ(x) = 0.7.

    Args:
      point: (2,), w and b.
      steps: the steps of the net, from x₀ = 0.5.
    """
    w, b = point
    # A loop, not 50 copies, because it is compiled four times: surface, slopes and two paths.
    last = lax.fori_loop(
        0, steps, lambda _, x: w * jax.nn.sigmoid(x) + b, jnp.asarray(0.5, point.dtype)
    )
    return jnp.square(jax.nn.sigmoid(last) - 0.7)


def descend(
    loss: Loss, tx: optax.GradientTransformation, start: tuple[float, float], steps: int
) -> np.ndarray:
    """Returns the points that an optimizer visits, (steps + 1, 2)."""
    points = [jnp.asarray(start, float)]
    state = tx.init(points[0])

    @jax.jit
    def step(point, state):
        updates, state = tx.update(jax.grad(loss)(point), state, point)
        return optax.apply_updates(point, updates), state

    for _ in range(steps):
        point, state = step(points[-1], state)
        points.append(point)
    return np.asarray(jax.device_get(points))


def plot_cliff(
    ax: Any = None,
    *,
    loss: Loss = unit_loss,
    clip: optax.GradientTransformation | None = None,
    rate: float = 0.6,
    start: tuple[float, float] = (5.2, -2.3),
    steps: int = 45,
    window: tuple[float, float, float, float] = (4.2, 5.6, -2.75, -1.65),
    resolution: int = 120,
) -> Any:
    """Draws a loss of two numbers, and gradient descent on it with and without a clip.

    The default is the experiment of Pascanu et al.: a recurrent net of one unit over 50 steps. Its
    loss has a wall with a valley at its foot. Without a clip, a step that touches the wall is
    thrown far out of the plot.

    Args:
      ax: where to draw; None: a new figure.
      loss: a function (2,) -> loss.
      clip: any clip; None: `clip_by_global_norm(0.1)`.
      rate, start, steps: the learning rate, first point and length of the descent.
      window: the part to show, (left, right, bottom, top).
      resolution: the points per side of the surface.

    Returns:
      The axes, whose first two lines are the paths without and with the clip.

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013

    >>> import optaxclip
    >>> ax = optaxclip.plots.plot_cliff(steps=20, resolution=10)
    >>> [line.get_label() for line in ax.lines[:2]]
    ['gradient descent', 'the same, clipped']
    """
    ax = axes_or_new(ax, 7.0, 4.6)
    _draw_surface(ax, loss, window, resolution)
    _draw_arrows(ax, loss, window)
    sgd, clip = optax.sgd(rate), clip_by_global_norm(0.1) if clip is None else clip
    paths = descend(loss, sgd, start, steps), descend(loss, optax.chain(clip, sgd), start, steps)
    styles = (
        {"label": "gradient descent", "color": "0.35", "marker": "o", "linestyle": "--"},
        {"label": "the same, clipped", "color": DARK, "marker": "s", "linestyle": "-"},
    )
    common = {"markersize": 3.5, "markerfacecolor": "white", "linewidth": 1.1, "zorder": 3}
    for path, style in zip(paths, styles, strict=True):
        ax.plot(*path.T, **style, **common)
    ax.plot(*start, "*", color=DARK, markersize=14, label="start", linestyle="", zorder=4)
    _mark_exit(ax, paths[0], window)
    ax.set(xlim=window[:2], ylim=window[2:], xlabel="w", ylabel="b")
    # The surface is light in every style, so its marks are dark and need a light legend.
    draw_legend_above(ax, facecolor="white", labelcolor=DARK)
    return ax


def _make_grid(
    window: tuple[float, float, float, float], count: int
) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    x, y = np.meshgrid(np.linspace(*window[:2], count), np.linspace(*window[2:], count))
    return x, y, jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=1), float)


def _draw_surface(
    ax: Any, loss: Loss, window: tuple[float, float, float, float], count: int
) -> None:
    """Draws shades of the loss, light for low, with contour lines."""
    x, y, points = _make_grid(window, count)
    heights = np.asarray(jax.jit(jax.vmap(loss))(points)).reshape(x.shape)
    low, high = np.nanmin(heights), np.nanmax(heights)
    # Levels are close together in the valley, which the wall would flatten.
    levels = low + (high - low) * np.linspace(0, 1, 16) ** 2
    filled = ax.contourf(x, y, heights, levels=levels, cmap="Greys", vmax=low + 1.6 * (high - low))
    ax.contour(x, y, heights, levels=levels, colors="0.6", linewidths=0.4)
    ax.figure.colorbar(filled, ax=ax, label="loss", format="%.2f")


def _draw_arrows(ax: Any, loss: Loss, window: tuple[float, float, float, float]) -> None:
    """Draws arrows downhill, whose length grows with the logarithm of the gradient's length."""
    x, y, points = _make_grid(window, _ARROWS + 2)
    slopes = -np.asarray(jax.jit(jax.vmap(jax.grad(loss)))(points))
    length = np.linalg.norm(slopes, axis=1, keepdims=True)
    length = np.where(length > 0, length, 1.0)
    # Slopes at the wall are thousands of times those in the valley: true lengths would hide them.
    arrows = slopes / length * np.clip(np.log10(length) + 3.0, 0.3, 4.0)
    # Arrows at the edge would extend beyond it.
    inside = np.zeros(x.shape, bool)
    inside[1:-1, 1:-1] = True
    keep = inside.ravel()
    style = {"color": "0.45", "width": 0.0022, "scale": 60, "zorder": 2}
    ax.quiver(x.ravel()[keep], y.ravel()[keep], *arrows[keep].T, **style)


def _mark_exit(ax: Any, path: np.ndarray, window: tuple[float, float, float, float]) -> None:
    """Labels a path that leaves the plot with its end."""
    left, right, low, high = window
    inside = (
        (path[:, 0] >= left) & (path[:, 0] <= right) & (path[:, 1] >= low) & (path[:, 1] <= high)
    )
    if not inside.all() and inside[0]:
        end = f"({path[-1, 0]:.3g}, {path[-1, 1]:.3g})"
        text = f"thrown out at step {np.argmin(inside)}, ends at {end}"
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.6", "alpha": 0.9}
        style = {"ha": "right", "va": "top", "fontsize": 8, "color": DARK, "zorder": 5}
        ax.text(0.97, 0.95, text, transform=ax.transAxes, bbox=box, **style)
