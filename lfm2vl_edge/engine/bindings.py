"""The only file that imports llama_cpp: its bindings, without its high-level half, which nothing here needs.

That half imports chat formats, databases, multiprocessing and more, a seventh of the time to import everything that
answers. It is still there for whoever asks llama_cpp for something of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, Final

from lfm2vl_edge.engine.spinning import spin_less_where_crowded

_PACKAGE: Final = "llama_cpp"


class _Postponed(ModuleType):
    """A package whose own code runs when something is asked of it that its imported modules do not have."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        if self.__spec__ is not None and self.__spec__.loader is not None:
            self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def bindings(name: str) -> Any:
    """Return a module of llama_cpp, by its name there.

    Raises:
        ImportError: llama_cpp is not installed.
    """
    spin_less_where_crowded()
    spec = find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if spec is None:
        return import_module(f"{_PACKAGE}.{name}")
    sys.modules[_PACKAGE] = package = module_from_spec(spec)
    package.__class__ = _Postponed
    try:
        return import_module(f"{_PACKAGE}.{name}")
    except BaseException:
        del sys.modules[_PACKAGE]  # the next one to import it shall see what is wrong with it
        raise
