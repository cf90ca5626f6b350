"""Which numbers share one norm: of the tree, a leaf, a group of leaves, a layer, or a unit."""

from optaxclip.scopes.leaves import groups, leaf, module_of, tree
from optaxclip.scopes.stacked import stacked
from optaxclip.scopes.units import element, units

__all__ = ["element", "groups", "leaf", "module_of", "stacked", "tree", "units"]
