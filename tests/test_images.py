"""A picture is read as a viewer shows it, and a bad file is one line that names it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlcache_triton.apps.images import read_image

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
ORIENTATION = 0x0112


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def corners(image):
    """Left above and right below."""
    assert image.mode == "RGB"
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


def halves(mode, left, right):
    """A picture 8 wide and 4 high."""
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    """Pillow opens these as I;16 and, some formats and versions, as 32 bits; it clips both."""
    ramp = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    got = pixels(read_image(saved(ramp, tmp_path / name)))
    expected = np.rint(np.arange(65536) / 257).reshape(256, 256)
    assert abs(got - expected[..., None]).max() <= 1
    assert (got[0, 0] == 0).all() and (got[-1, -1] == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_16_bit_grey_that_is_open_already(mode):
    assert corners(read_image(halves(mode, 0, 65535))) == (BLACK, WHITE)


@pytest.mark.parametrize(("dtype", "mode"), [("uint16", "I;16"), ("int32", "I")])
def test_8_bits_in_a_wider_type_stay_as_they_are(dtype, mode):
    image = Image.fromarray(np.arange(256, dtype=dtype).reshape(16, 16))
    assert image.mode == mode
    assert np.array_equal(pixels(read_image(image))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(("mode", "value"), [("I", 65536), ("I", -1), ("F", 0.5)])
def test_32_bits_are_refused(tmp_path, mode, value):
    path = saved(Image.new(mode, (8, 4), value), tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match="got grey of 32 bits"):
        read_image(path)


def palette_with_alpha():
    image = halves("P", 0, 1)
    image.putpalette([*BLACK, *RED])
    return image


def two_greys():
    return halves("L", 0, 90)


TRANSPARENT = {
    "RGBA": (halves("RGBA", (0, 0, 0, 0), (*RED, 255)), {}, RED),
    "LA": (halves("LA", (0, 0), (90, 255)), {}, (90, 90, 90)),
    "a colour of the palette": (palette_with_alpha(), {"transparency": 0}, RED),
    "alphas of the palette": (palette_with_alpha(), {"transparency": bytes([0, 255])}, RED),
    "a colour": (halves("RGB", BLACK, RED), {"transparency": BLACK}, RED),
    "a grey": (two_greys(), {"transparency": 0}, (90, 90, 90)),
    "of one bit": (halves("1", 0, 1), {"transparency": 0}, WHITE),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(tmp_path, kind):
    image, options, right = TRANSPARENT[kind]
    path = saved(image, tmp_path / "page.png", **options)
    assert corners(read_image(path)) == (WHITE, right)
    with Image.open(path) as opened:
        assert corners(read_image(opened)) == (WHITE, right)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA"])
def test_transparent_pictures_that_are_open_already(mode):
    base = {"R": "RGBA", "L": "LA", "P": "LA"}[mode[0]]
    clear, solid = ((0,) * len(base), (*(90,) * (len(base) - 1), 255))
    image = halves(base, clear, solid)
    image = image.convert("RGBA").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    left, right = corners(read_image(image))
    assert left == WHITE and right == pytest.approx((90, 90, 90), abs=3)


def test_half_transparent_is_half_way_to_white():
    assert corners(read_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))[0] == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_upright(tmp_path, orientation):
    """A red and a blue corner, stored as a camera held in each way stores them."""
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste(RED, (0, 0, 16, 8))
    upright.paste(BLUE, (16, 8, 32, 16))
    turn = Image.Transpose
    stored = {
        1: (),
        2: (turn.FLIP_LEFT_RIGHT,),
        3: (turn.ROTATE_180,),
        4: (turn.FLIP_TOP_BOTTOM,),
        5: (turn.TRANSPOSE,),
        6: (turn.ROTATE_90,),
        7: (turn.TRANSVERSE,),
        8: (turn.ROTATE_270,),
    }[orientation]
    image = upright
    for way in stored:
        image = image.transpose(way)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(image, tmp_path / "photo.png", exif=exif)
    assert np.array_equal(pixels(read_image(path)), pixels(upright))
    with Image.open(path) as opened:
        assert np.array_equal(pixels(read_image(opened)), pixels(upright))


def test_cmyk(tmp_path):
    path = saved(halves("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), tmp_path / "print.tiff")
    assert corners(read_image(path)) == (WHITE, BLACK)
    jpeg = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "print.jpg")
    assert corners(read_image(jpeg))[0] == pytest.approx(RED, abs=3)


def test_one_bit(tmp_path):
    assert corners(read_image(saved(halves("1", 1, 0), tmp_path / "fax.tiff"))) == (WHITE, BLACK)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 4), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert corners(read_image(path)) == (RED, RED)


def test_a_frame_that_is_open_already_is_taken_and_stays(tmp_path):
    frames = [Image.new("RGB", (8, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(1)
        assert corners(read_image(film)) == (BLUE, BLUE)
        assert film.tell() == 1


def test_a_plain_picture_is_the_same_and_not_altered():
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    before = image.tobytes()
    got = read_image(image)
    assert got is not image and got.tobytes() == before == image.tobytes()


def bomb(path):
    """A PNG of a few bytes that says it is 30000 x 30000."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def cut(path):
    Image.effect_noise((64, 64), 50).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:400])


BAD = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "text": (lambda path: path.write_text("not an image"), "it is no image"),
    "empty": (lambda path: path.write_bytes(b""), "it is no image"),
    "cut off": (cut, "truncated"),
    "bomb": (bomb, "exceeds limit of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, kind):
    make, reason = BAD[kind]
    path = tmp_path / "page.png"
    make(path)
    with pytest.raises(ValueError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f"image: cannot read {str(path)!r}: ")
    assert reason in message and len(message.splitlines()) == 1


def test_a_picture_that_is_open_already_and_cut_off(tmp_path):
    cut(tmp_path / "page.png")
    refused = pytest.raises(ValueError, match=r"image: cannot read '.*page\.png': .*truncated")
    with Image.open(tmp_path / "page.png") as opened, refused:
        read_image(opened)
