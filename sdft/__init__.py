"""Self-Distillation Fine-Tuning on Lightning.

from sdft import ContinualDataModule, Example, SDFTModule
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft.data import ContinualDataModule
    from sdft.examples import Example
    from sdft.module import SDFTModule
    from sdft.student import StudentModule
    from sdft.tasks import DatasetTask, JSONLTask, PythonTask, Task

__version__ = "0.1.0"

__all__ = [
    "ContinualDataModule",
    "DatasetTask",
    "Example",
    "JSONLTask",
    "PythonTask",
    "SDFTModule",
    "StudentModule",
    "Task",
]

_HOMES = {
    "ContinualDataModule": "sdft.data",
    "DatasetTask": "sdft.tasks",
    "Example": "sdft.examples",
    "JSONLTask": "sdft.tasks",
    "PythonTask": "sdft.tasks",
    "SDFTModule": "sdft.module",
    "StudentModule": "sdft.student",
    "Task": "sdft.tasks",
}

_root = _Path(__file__).resolve().parent.parent
# In a checkout the callbacks stand at the top, beside this package; installed, they are a real
# subpackage. Either way they are imported as `sdft.callbacks`.
if (_root / "pyproject.toml").is_file() and (_root / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import sdft` alone stays fast."""
    if name in _HOMES:
        return getattr(_import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdft' has no attribute {name!r}")
