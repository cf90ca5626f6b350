"""Which numbers share one norm: of the tree, a leaf, a group of leaves, a layer, or a unit.

A scope is passed as `scope=`. Three of them take no argument, and are passed as they are:

    scope     blocks                       norms, bounds and factors
    tree      one: all leaves together     a scalar
    leaf      one per leaf                 a vector, one entry per leaf, in the order of the tree
    element   one per number               arrays with the shapes of the leaves

`element` costs memory: the record of a clip takes 24 bytes per number, and the statistics of most
thresholds 12 to 16 more. AdamW takes 8.

The others are made by a call:

    groups(label)            one block per group of leaves
    stacked(where, scope)    one per layer of each leaf that stacks layers
    units(axes)              one per unit: a slice of a leaf along `axes`
"""

from optaxclip.scopes.leaves import groups, leaf, module_of, tree
from optaxclip.scopes.stacked import stacked
from optaxclip.scopes.units import element, units

__all__ = ["element", "groups", "leaf", "module_of", "stacked", "tree", "units"]
