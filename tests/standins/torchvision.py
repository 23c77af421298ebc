"""What vLLM's and Transformers' image processors need of torchvision, which CPU builds go without.

The published builds of torchvision are for CUDA and cannot be imported beside a CPU build of torch.
Images are made tensors, resized and normalised by torch; all else can be imported and not called.
`tests.conftest` puts the folder on the path of this process and its children where there is no
torchvision.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

__version__ = "0.28.0"
__path__: list[str] = []  # Makes submodules importable.


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(image: Any) -> Tensor:
    array = numpy.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def resize(
    image: Tensor,
    size: list[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool = True,
) -> Tensor:
    if list(image.shape[-2:]) == list(size):
        return image
    resized = torch.nn.functional.interpolate(
        image.float(), list(size), mode=interpolation.value, antialias=antialias
    )
    whole = image.dtype == torch.uint8
    return resized.round().clamp(0, 255).to(torch.uint8) if whole else resized


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    mean, std = (torch.as_tensor(value, dtype=image.dtype) for value in (mean, std))
    return (image - mean[:, None, None]) / std[:, None, None]


def _left_out(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def function(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the tests go without torchvision's {name}")

    return function


def _submodule(name: str, **names: Any) -> ModuleType:
    module = ModuleType(f"{__name__}.{name}")
    vars(module).update(names, __path__=[], __getattr__=_left_out)
    sys.modules[module.__name__] = module
    return module


_names = {
    function.__name__: function
    for function in (InterpolationMode, pil_to_tensor, resize, normalize)
}
functional = _submodule("transforms.functional", **_names)
io = _submodule("io", ImageReadMode=None, decode_image=None)
_v2_functional = _submodule("transforms.v2.functional", **_names)
_v2 = _submodule("transforms.v2", functional=_v2_functional)
transforms = _submodule(
    "transforms", functional=functional, v2=_v2, InterpolationMode=InterpolationMode
)
