"""A quantized model as a file that runtimes run. The package itself can be called: ``quantlens.export(qmodel, path)``
is :func:`quantlens.export.export.export`."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``quantlens.export`` is this package once one of its files is imported, and the public function all the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from quantlens.export.export import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
