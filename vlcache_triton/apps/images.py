"""A picture as a model is shown it: one way to read it for the commands, the evaluation, lmms-eval.

Vision models' processors take RGB of 8 bits. Pillow's own `convert("RGB")` clips 16-bit grey to
white, and what is transparent becomes whatever colour lies beneath, mostly black.
"""

from __future__ import annotations

from os import PathLike
from typing import cast

from PIL import Image, ImageOps


def read_image(source: str | PathLike[str] | Image.Image) -> Image.Image:
    """The picture in RGB of 8 bits, upright as its EXIF orientation says, on white paper.

    16-bit grey is scaled, alpha and transparent colours are composited on white, and of a file
    with several frames or pages the first is taken.

    Args:
        source: a file, or a picture that Pillow has opened already, which stays as it is.

    Raises:
        ValueError: for a file that is missing, cut off or no image, a decompression bomb, or pixels
            whose white is unknown (32 bits), naming the file.
    """
    # Pillow's decoders raise nearly anything on broken files; it is the file's fault all the same.
    try:
        if isinstance(source, Image.Image):
            return _rgb(source)
        with Image.open(source) as image:
            return _rgb(image)
    except Exception as error:
        raise ValueError(f"image: cannot read {_name(source)!r}: {_reason(error)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        upright = _scaled(upright)
    if _is_transparent(upright):
        layer = upright.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return upright.convert("RGB")


def _scaled(grey: Image.Image) -> Image.Image:
    """Grey of 16 bits in 8. Pillow also opens it as 32 bits, by the format and its own version.

    Where no value is above 255, they are 8 bits in a wider type: a page that dark does not exist.
    """
    wide = grey.convert("I") if grey.mode.startswith("I") else grey
    low, high = cast(tuple[float, float], wide.getextrema())
    if wide.mode != "I" or low < 0 or high > 65535:
        raise ValueError(
            f"got grey of 32 bits from {low:g} to {high:g}, whose white is unknown; expected 8 or"
            " 16 bits"
        )
    if high <= 255:
        return wide.convert("L")
    return wide.point(lambda value: value * (1 / 257) + 0.5, "L")  # rounded


def _is_transparent(image: Image.Image) -> bool:
    # Image.has_transparency_data, which came with Pillow 10.1.
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.palette is not None and image.palette.mode.endswith("A")


def _name(source: str | PathLike[str] | Image.Image) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or type(source).__name__
    return str(source)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image, or of a format that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
