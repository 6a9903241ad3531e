"""``AttrDict`` from the `attrdict` package, on any Python.

attrdict 2.0.1 (its last release) imports the abstract base classes from `collections`, from where Python 3.10 removed
them. This module puts them back while attrdict is imported, and removes them again: nothing global stays changed.
"""

import collections
import collections.abc

_LENT_NAMES = [name for name in ("Mapping", "MutableMapping", "Sequence") if not hasattr(collections, name)]

try:
    for _name in _LENT_NAMES:
        setattr(collections, _name, getattr(collections.abc, _name))
    from attrdict import AttrDict
finally:
    for _name in _LENT_NAMES:
        delattr(collections, _name)

__all__ = ["AttrDict"]
