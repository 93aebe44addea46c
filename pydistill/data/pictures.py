"""One picture file, decoded by Pillow to bytes of one size.

Pillow alone decodes, so that a set has the same pixels wherever it is read. JPEGs are not decoded at a reduced size
(Pillow's ``draft``), which is faster and gives other pixels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from pydistill._atomic import PathLike

__all__ = ["EXTENSIONS", "read_picture"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {  # by orientation: the names of Pillow's transpositions
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"},
    **{6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}


def read_picture(picture: PathLike | bytes, size: int, name: str | None = None) -> np.ndarray:
    """A picture's central square, uint8 ``[3, size, size]``.

    The pixels are those of ``CenterCrop(size)(Resize(size)(Image.open(picture).convert("RGB")))`` of torchvision:
    the shorter side becomes ``size`` by Pillow's bilinear filter with antialiasing. Further, the picture is turned as
    its EXIF data say, transparent pixels lie over white, 16 bits of grey become 8 and of an animation the first frame
    is read.

    Args:
        picture: the file, or its content.
        size: height and width in pixels.
        name: what messages call the picture; by default the path.

    Raises:
        ValueError: the file is truncated, damaged or no picture; it is named.
        OSError: the file is not there or cannot be read.
        RuntimeError: Pillow is not installed.
    """
    Image = _pillow()
    name = name or ("the picture" if isinstance(picture, bytes) else str(picture))
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            image.load()
            return np.asarray(_square(_rgb(_upright(image)), size)).transpose(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises almost anything for a foreign or damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name}: expected a whole picture; it is truncated, damaged or foreign ({error})") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError("pictures need pillow, which is not installed: pip install 'pydistill[cli]'") from error
    return Image


def _upright(image: Any) -> Any:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data, of which a picture needs none
        return image
    return image.transpose(getattr(_pillow().Transpose, _TURNS[orientation])) if orientation in _TURNS else image


def _rgb(image: Any) -> Any:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] == "I":
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"expected up to 16 bits of grey, got values of {wide.min()} to {wide.max()}")
        return _pillow().fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("expected pixels of up to 16 bits, got floating-point numbers")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return _pillow().alpha_composite(_pillow().new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square(image: Any, size: int) -> Any:
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    scaled = (size, longer) if width <= height else (longer, size)
    if image.size != scaled:
        image = image.resize(scaled, _pillow().Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    return image if scaled == (size, size) else image.crop((left, top, left + size, top + size))
