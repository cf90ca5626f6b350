"""Everything that depends on compilers.

The mathematics of a clip is one sum of squares and one multiply per leaf. How these are written
decides whether XLA reads the gradients once or four times, launches 40 kernels or 800, and whether
a GPU waits for its host. This package holds those forms behind these functions:

    measure(norm, arrays, layout)          the norms of all blocks, in one read
    count_reaching(arrays, layout, sizes)  how many elements of each block are how large
    scale(arrays, factors, layout, ...)    each leaf times the factor of its block
    find_span(arrays, paths, axis_names)   over which devices each leaf is spread
    weigh_factors(factors, scaled, ...)    what a weighted sum over examples reads
    keep_apart(function, *operands)        a function of examples, none of which spoils another

Nothing here asks the host which devices it has, because a program may be compiled for others. Forms
that differ by platform are chosen by `lax.platform_dependent`, and none needs to know whether
leaves are sharded. docs/performance.md has the numbers; `tests/benchmarks/accelerators.py`
reproduces them.
"""

from optaxclip.xla.counts import count_reaching
from optaxclip.xla.examples import (
    align,
    drop_unweighted,
    in_unit,
    keep_apart,
    measure_small,
    weigh_factors,
)
from optaxclip.xla.layout import Layout, lay_out
from optaxclip.xla.lengths import counts_of, join_lengths, measure
from optaxclip.xla.mesh import (
    NOWHERE,
    Span,
    apart,
    check_axes,
    count_devices,
    find_span,
    hold_everywhere,
    hold_somewhere,
    is_names,
    pool_shown,
)
from optaxclip.xla.placing import (
    call_in_auto_axes,
    fill_like,
    here,
    is_shared,
    lie_alike,
    like,
    vary,
    vary_as,
)
from optaxclip.xla.scaling import as_dtype_of, scale, spread
from optaxclip.xla.units import place_units
from optaxclip.xla.widths import accumulator, largest, poison, root, smallest, times, widen

__all__ = [
    "NOWHERE",
    "Layout",
    "Span",
    "accumulator",
    "align",
    "apart",
    "as_dtype_of",
    "call_in_auto_axes",
    "check_axes",
    "count_devices",
    "count_reaching",
    "counts_of",
    "drop_unweighted",
    "fill_like",
    "find_span",
    "here",
    "in_unit",
    "is_names",
    "is_shared",
    "hold_everywhere",
    "hold_somewhere",
    "join_lengths",
    "keep_apart",
    "largest",
    "lay_out",
    "lie_alike",
    "like",
    "measure",
    "measure_small",
    "place_units",
    "poison",
    "pool_shown",
    "root",
    "scale",
    "smallest",
    "spread",
    "times",
    "vary",
    "vary_as",
    "weigh_factors",
    "widen",
]
