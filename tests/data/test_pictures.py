"""Pictures of every kind become the bytes that torchvision gives, or are refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from pydistill.data.pictures import read_picture
from tests.data.pictures import picture
from tests.peers import peer


def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(20, 14), (14, 20), (9, 9), (8, 31), (8, 8), (333, 250), (3, 2)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resized_and_cropped_as_torchvision_does(shape, kind):
    peer("torchvision")
    from torchvision.transforms import v2

    data = encoded(picture(1, *shape), kind)
    transform = v2.Compose([v2.Resize(8), v2.CenterCrop(8), v2.ToImage()])
    expected = transform(Image.open(io.BytesIO(data)).convert("RGB")).numpy()
    found = read_picture(data, 8)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_its_exif_data_say(orientation):
    upright = np.asarray(picture(2, 8, 8))
    stored = {  # how a camera held in that orientation writes the picture
        **{1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]},
        **{5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1)},
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        found = read_picture(encoded(image, kind, exif=exif), 8)
        np.testing.assert_array_equal(found.transpose(1, 2, 0), upright)


def test_damaged_exif_data_do_no_harm():
    image = picture(3, 8, 8)
    data = encoded(image, exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(read_picture(data, 8), read_picture(encoded(image), 8))


def test_grey_palettes_single_bits_and_16_bits():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = Image.fromarray(ramp)
    expected = np.broadcast_to(ramp, (3, 8, 8))
    np.testing.assert_array_equal(read_picture(encoded(grey), 8), expected)
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(read_picture(encoded(wide, kind), 8), expected)
    pgm = b"P5 8 8 65535\n" + (ramp.astype(">u2") * 257).tobytes()
    np.testing.assert_array_equal(read_picture(pgm, 8), expected)
    bits = ramp > 100
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(bits)), 8)[0], bits * np.uint8(255))
    colours = picture(4, 8, 8).quantize(16)
    np.testing.assert_array_equal(
        read_picture(encoded(colours), 8).transpose(1, 2, 0), np.asarray(colours.convert("RGB"))
    )


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_picture(data, 8)[:, 0, 0].tolist() == [255, 0, 0]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = read_picture(encoded(image, "JPEG"), 8)[:, 4, 4]
    assert red[0] > 250
    assert red[1:].max() < 5


def test_transparent_pixels_lie_over_white():
    colour = np.zeros((8, 8, 4), np.uint8)
    colour[..., 0] = 200
    colour[:, :2, 3], colour[:, 2:4, 3] = 255, 128
    found = read_picture(encoded(Image.fromarray(colour)), 8)[:, 0]
    assert found[:, 0].tolist() == [200, 0, 0]
    np.testing.assert_allclose(found[:, 2].astype(int), [227, 127, 127], atol=1)
    assert found[:, 7].tolist() == [255, 255, 255]
    grey = Image.fromarray(np.zeros((8, 8), np.uint8))
    assert read_picture(encoded(grey.convert("LA")), 8).max() == 0
    palette = grey.convert("P")  # all of the colour that is transparent
    for kind in ("PNG", "GIF"):
        assert read_picture(encoded(palette, kind, transparency=palette.getpixel((0, 0))), 8).min() == 255


def test_what_is_no_whole_picture_is_refused_by_name(tmp_path):
    whole = encoded(picture(5, 50, 40), "JPEG")
    floats = encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    deep = encoded(Image.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF")
    for content in (b"", b"no picture", whole[: len(whole) // 2], encoded(picture(5))[:-200], floats, deep):
        (tmp_path / "some.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"some\.jpg: expected a whole picture; it is truncated"):
            read_picture(tmp_path / "some.jpg", 8)
        with pytest.raises(ValueError, match=r"a\.tar, 7\.jpg: expected a whole picture"):
            read_picture(content, 8, "a.tar, 7.jpg")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        read_picture(tmp_path / "none.jpg", 8)
