"""What tests of plugins begin and end with."""

import sys

from quantlens import plugins


def forget() -> None:
    """Forget every plugin and all that was registered outside of quantlens, as in a new process."""
    for registry in plugins._registries:
        registry._things = {name: thing for name, thing in registry._things.items() if not registry.place(name)}
        registry._adopted = 0
    for name in [name for name in sys.modules if plugins._place(name) in plugins._places.values()]:
        del sys.modules[name]
    for state in (plugins._found, plugins._given, plugins._places, plugins._problems):
        state.clear()
    plugins._scanned = False
