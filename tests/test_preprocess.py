import io
import re
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile, WebPImagePlugin
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from mio_export.bundle import EncoderSpec, space_fingerprint
from mio_export.errors import UsageError
from mio_export.preprocess import DecodeError, Preprocess, preprocess_from_dict


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exact(size, **options):
    """A contract that neither resizes nor crops a square image of this size."""
    return Preprocess(image_size=size, **options)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("box", [(0, 0, 640, 427), (0, 0, 300, 427), (100, 0, 130, 427), (0, 0, 640, 45)])
@pytest.mark.parametrize(("image_size", "resize_size"), [(224, 256), (64, 64), (28, 33)])
def test_equals_torchvisions_resize_and_center_crop(interpolation, box, image_size, resize_size):
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")).crop(box)
    transform = v2.Compose([v2.Resize(resize_size, InterpolationMode(interpolation)), v2.CenterCrop(image_size)])
    preprocess = Preprocess(image_size=image_size, resize_size=resize_size, interpolation=interpolation)
    difference = np.asarray(transform(image)).astype(int) - preprocess.decode(encoded(image)).astype(int)
    assert not difference.any()


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (1, 1), (3, 5_000)])
def test_extreme_shapes_cost_no_more_than_square_ones(size):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    start = time.perf_counter()
    pixels = Preprocess(image_size=224).decode(encoded(image))
    seconds = time.perf_counter() - start
    square = encoded(Image.linear_gradient("L").resize((1000, 1000)).convert("RGB"))
    start = time.perf_counter()
    Preprocess(image_size=224).decode(square)
    assert pixels.shape == (224, 224, 3)
    assert seconds < 10 * (time.perf_counter() - start) + 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(photo_crops, orientation):
    upright = photo_crops[0]
    operations = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(operations[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = exact(160).decode(encoded(stored, exif=exif))
    np.testing.assert_array_equal(pixels, np.asarray(upright))


def test_a_strip_is_cropped_as_if_it_had_been_resized_whole():
    for size in ((3_001, 100), (100, 2_000), (1_999, 20)):
        image = Image.effect_noise(size, 60).convert("RGB")
        transform = v2.Compose([v2.Resize(40), v2.CenterCrop(32)])
        pixels = Preprocess(image_size=32, resize_size=40).decode(encoded(image))
        assert np.abs(np.asarray(transform(image)).astype(int) - pixels.astype(int)).max() <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_leaves_the_image_as_it_lies(photo_crops):
    data = encoded(photo_crops[0], exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(exact(160).decode(data), np.asarray(photo_crops[0]))


def test_transparency_lies_over_the_background(photo_crops):
    image = photo_crops[0].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    for background in (255, 0):
        composed = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        composed.alpha_composite(image)
        expected = exact(160).decode(encoded(composed.convert("RGB")))
        np.testing.assert_array_equal(exact(160, background=background).decode(encoded(image)), expected)


def test_a_palette_with_a_transparent_entry_lies_over_the_background():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(0, (0, 0, 4, 8))
    pixels = exact(8).decode(encoded(image, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [0, 200, 0]


def test_16_bit_grey_keeps_its_levels():
    ramp = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    pixels = exact(256, channels=1, mean=(0.5,), std=(0.5,)).decode(encoded(Image.fromarray(ramp)))
    assert len(np.unique(pixels)) == 256
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


def test_cmyk_becomes_rgb():
    pixels = exact(8).decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert pixels[4, 4, 0] > 200
    assert pixels[4, 4, 1:].max() < 60


def test_one_channel_is_luma_and_grey_becomes_three_equal_channels(photo_crops):
    grey = exact(160, channels=1, mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(grey.decode(encoded(photo_crops[0]))[..., 0], np.asarray(photo_crops[0].convert("L")))
    pixels = exact(160).decode(encoded(photo_crops[0].convert("L")))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert exact(8).decode(data)[0, 0].tolist() == [250, 0, 0]


def test_heic_is_read_with_its_extra(photo_crops):
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    from_pillow(photo_crops[0]).save(buffer, quality=100)
    difference = exact(160).decode(buffer.getvalue()).astype(int) - np.asarray(photo_crops[0]).astype(int)
    assert np.abs(difference).mean() < 3


def bomb():
    """A PNG header that promises 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not an image that Pillow can read"),
        (bomb(), "decompression bomb"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "32-bit float pixels have no declared range"),
        (encoded(Image.new("I", (8, 8), 1 << 20), "TIFF"), "32-bit integer pixels beyond 0..65535"),
    ],
    ids=["empty", "text", "bomb", "float", "wide integer"],
)
def test_what_is_not_allowed_has_a_reason_in_one_line(data, reason):
    with pytest.raises(DecodeError, match=re.escape(reason)) as caught:
        exact(8).decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error(photo_crops, format, share):
    data = encoded(photo_crops[0], format)
    with pytest.raises(DecodeError):
        exact(160).decode(data[: int(share * len(data))])


def test_damage_behind_the_last_row_of_a_png_does_not_matter(photo_crops):
    data = encoded(photo_crops[0])
    odd = data[:-12] + struct.pack(">I", 100) + b"tEXtcut off"
    np.testing.assert_array_equal(exact(160).decode(odd), exact(160).decode(data))


def test_a_contracts_own_pixel_limit_holds(photo_crops):
    with pytest.raises(DecodeError, match="160x160 is more than 100 pixels"):
        exact(32, max_pixels=100).decode(encoded(photo_crops[0]))


def test_every_field_is_part_of_the_space():
    base = Preprocess(image_size=32)
    others = [
        Preprocess(image_size=33),
        Preprocess(image_size=32, resize_size=36),
        Preprocess(image_size=32, interpolation="bicubic"),
        Preprocess(image_size=32, channels=1, mean=(0.5,), std=(0.5,)),
        Preprocess(image_size=32, mean=(0.5, 0.5, 0.5)),
        Preprocess(image_size=32, std=(0.5, 0.5, 0.5)),
        Preprocess(image_size=32, background=0),
        Preprocess(image_size=32, max_pixels=1000),
    ]
    encoder = EncoderSpec(backbone="small", stem="small", embedding_dim=4)

    def space(preprocess, weights="0", spec=encoder):
        return space_fingerprint(weights_sha256=weights, encoder=spec, preprocess=preprocess)

    spaces = [space(preprocess) for preprocess in (base, *others)]
    spaces += [space(base, weights="1"), space(base, spec=replace(encoder, normalize=True))]
    assert len(set(spaces)) == 11
    assert space(Preprocess(image_size=32, resize_size=32)) == space(base)


def test_survives_the_way_through_json():
    preprocess = Preprocess(image_size=32, resize_size=36, interpolation="bicubic")
    assert preprocess_from_dict(preprocess.to_dict()) == preprocess


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size must be 1 or more, got 0"),
        ({"image_size": 32, "resize_size": 16}, "resize_size 16 is below image_size 32"),
        ({"image_size": 32, "interpolation": "cubic"}, "interpolation"),
        ({"image_size": 32, "mean": (0.5,)}, "mean needs 3 values"),
        ({"image_size": 32, "std": (0, 1, 1)}, "std must be above 0"),
        ({"image_size": 32, "antialias": True}, "antialias"),
        ({}, "image_size"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        preprocess_from_dict(values)


def test_a_png_with_a_flipped_bit_is_never_taken_for_another_image():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    contract = Preprocess(image_size=12)
    start, end = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    for place in range(start, end):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        with pytest.raises(DecodeError):
            contract.decode(bytes(damaged))
    without_end = whole[: whole.index(b"IEND") - 4]
    assert np.array_equal(contract.decode(without_end), contract.decode(whole))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, rows, *chunks):
    """A PNG of 8 x 8 pixels from the bytes of its rows, with more chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def with_chunks(data, *chunks):
    """A PNG with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def exif_block(*entries, orientation=6):
    """An EXIF block with an orientation, and entries of tag, type, count and four bytes."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *entries])
    directory = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(68)


ODD_EXIF = {
    "short below zero": (0x0100, 8, 1, struct.pack("<hh", -5, 0)),
    "long below zero": (0x0100, 9, 1, struct.pack("<i", -1)),
    "not a number": (0x011A, 11, 1, struct.pack("<f", float("nan"))),
    "float for a short": (0x0101, 11, 1, struct.pack("<f", 1.5)),
    "signed bytes": (0x0102, 6, 4, struct.pack("<4b", -1, -2, -3, -4)),
    "text that is not UTF-8": (0x010E, 2, 4, b"\xff\xfe\x80\0"),
    "cut off behind it": (0x8769, 4, 1, struct.pack("<I", 2**31)),
    "a fraction of nothing": (0x011B, 5, 1, struct.pack("<I", 34)),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("entry", ODD_EXIF.values(), ids=ODD_EXIF)
def test_a_photo_is_upright_whatever_else_its_exif_block_holds(photo_crops, format, entry):
    plain = exact(160).decode(encoded(photo_crops[0], format, exif=exif_block()))
    upright = np.asarray(photo_crops[0].transpose(Image.Transpose.ROTATE_270))
    assert np.abs(plain.astype(int) - upright).mean() < 12
    np.testing.assert_array_equal(exact(160).decode(encoded(photo_crops[0], format, exif=exif_block(entry))), plain)


@pytest.mark.parametrize(
    ("entry", "orientation"),
    [
        ((0x0112, 2, 4, b"6\0\0\0"), 6),
        ((0x0112, 1, 1, b"\x06\0\0\0"), 6),
        ((0x0112, 3, 1, b"\x09\0\0\0"), 6),
        ((0x0112, 11, 1, struct.pack("<f", float("nan"))), 9),
    ],
)
def test_an_odd_orientation_leaves_the_image_as_it_lies(photo_crops, entry, orientation):
    block = exif_block(orientation=orientation)
    block = block[: 6 + 10] + struct.pack("<HHI", *entry[:3]) + entry[3] + block[6 + 22 :]
    pixels = exact(160).decode(encoded(photo_crops[0], "PNG", exif=block))
    np.testing.assert_array_equal(pixels, np.asarray(photo_crops[0]))


def test_a_jpeg_whose_resolution_is_no_fraction_is_upright_too(photo_crops):
    """Pillow fails on it while it opens the file."""
    odd = exif_block((0x011A, 7, 1, b"\x05\0\0\0"), (0x0128, 3, 1, struct.pack("<HH", 2, 0)))
    data = encoded(photo_crops[0], "JPEG", exif=odd)
    data = data[:2] + data[2 + 2 + int.from_bytes(data[4:6], "big") :]  # its JFIF header, which has a resolution
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(data))
    plain = encoded(photo_crops[0], "JPEG", exif=exif_block())
    np.testing.assert_array_equal(exact(160).decode(data), exact(160).decode(plain))


def test_an_exif_block_whose_values_all_claim_the_whole_of_it_costs_nothing(photo_crops):
    size = 4_000_000
    entries = b"".join(struct.pack("<HHII", tag, 7, size, 0) for tag in range(0x0113, 0x0113 + 20_000))
    block = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 20_001, 0x0112, 3, 1, 6) + entries + bytes(size)
    start = time.perf_counter()
    pixels = exact(160).decode(with_chunks(encoded(photo_crops[0], "PNG"), chunk(b"eXIf", block)))
    assert time.perf_counter() - start < 2  # Pillow before 13 would hold 80 GB
    np.testing.assert_array_equal(pixels, np.asarray(photo_crops[0].transpose(Image.Transpose.ROTATE_270)))


XMP = b'<x:xmpmeta tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP + b" " * 3_000_000)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n94\n" + exif_block().hex().encode())),
    ],
    ids=["XMP", "XMP of 3 MB, compressed", "EXIF as text"],
)
def test_a_png_whose_text_says_that_it_is_rotated_is_turned_upright(photo_crops, text):
    pixels = exact(160).decode(with_chunks(encoded(photo_crops[0], "PNG"), text))
    np.testing.assert_array_equal(pixels, np.asarray(photo_crops[0].transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1 << 28)))],
        [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 1_200_000))],
        [chunk(b"tEXt", b"a\0" + b"x" * 1_000_000)] * 70,
        [chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000)))],
        [chunk(b"tEXt", b"transparency\0soft")],
        [chunk(b"tEXt", b"interlace\0no")],
    ],
    ids=["bomb", "1.2 MB compressed", "70 MB", "profile", "named as a field", "named as another"],
)
def test_texts_and_profiles_of_a_png_change_nothing(photo_crops, chunks):
    data = encoded(photo_crops[0], "PNG")
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.testing.assert_array_equal(exact(160).decode(with_chunks(data, *chunks)), exact(160).decode(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # of a bomb: 256 MB a copy


@pytest.mark.parametrize(("depth", "factor"), [(1, 255), (2, 85), (4, 17), (8, 1)])
def test_the_transparent_level_of_a_grey_png_counts_in_its_own_bits(depth, factor):
    level = 1
    row = {1: b"\x55", 2: b"\x12" * 2, 4: b"\x12" * 4, 8: b"\x01\x02" * 4}[depth]
    pixels = exact(8).decode(png(depth, 0, [row] * 8, chunk(b"tRNS", struct.pack(">H", level))))
    plain = exact(8).decode(png(depth, 0, [row] * 8))
    expected = np.where(plain == level * factor, 255, plain)
    np.testing.assert_array_equal(pixels, expected)
    assert (plain == level * factor).any()
    assert not (plain == level * factor).all()


def test_transparency_of_16_bits_is_that_of_16_bits():
    grey = struct.pack(">8H", *[1000, 1001] * 4)
    pixels = exact(8, background=9).decode(png(16, 0, [grey] * 8, chunk(b"tRNS", struct.pack(">H", 1000))))
    assert pixels[0, :2, 0].tolist() == [9, 4]
    colour = struct.pack(">24H", *[1000, 2000, 3000, 1000, 2000, 3001] * 4)
    data = png(16, 2, [colour] * 8, chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)))
    assert exact(8).decode(data)[3, :2].tolist() == [[255, 255, 255], [3, 7, 11]]
    false = struct.pack(">24H", *[232 << 8, 208 << 8, 184 << 8] * 8)  # the lower 8 bits of the transparent colour
    data = png(16, 2, [false] * 8, chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)))
    assert exact(8).decode(data)[0, 0].tolist() == [232, 208, 184]


def test_16_bit_colour_keeps_its_higher_8_bits():
    colour = struct.pack(">24H", *[255, 256, 65535] * 8)
    assert exact(8).decode(png(16, 2, [colour] * 8))[0, 0].tolist() == [0, 1, 255]


def large_png(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    row = b"\0" + bytes(4 * side)
    packer = zlib.compressobj(1)
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def contained(kind, side):
    """A file that says that it is small, and holds a picture that is not."""
    if kind == "webp":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
        data[21:25] = struct.pack("<I", side - 1 | (side - 1) << 14)
        return bytes(data)
    inner = large_png(side)
    if kind == "icns":
        return b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic07" + struct.pack(">I", 8 + len(inner)) + inner
    if kind == "ico of a bitmap":
        inner = struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(1000)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


@pytest.mark.parametrize("kind", ["ico", "ico of a bitmap", "icns", "webp"])
def test_pixels_are_counted_before_they_take_memory(kind, monkeypatch):
    data, contract = contained(kind, 5_000), exact(32, max_pixels=20_000_000)
    taken = []
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda image: taken.append(image.size))
    monkeypatch.setattr(Image, "frombuffer", lambda *arguments: taken.append(arguments))
    monkeypatch.setattr(WebPImagePlugin._webp, "WebPAnimDecoder", taken.append)
    with pytest.raises(DecodeError, match="5000x5000 is more than 20,000,000 pixels"):
        contract.decode(data)
    assert taken == []


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_icons_are_decoded(photo_crops, kind):
    image = photo_crops[0].resize((128, 128))
    pixels = exact(128).decode(encoded(image, kind, sizes=[(128, 128)]))
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 2  # an .icns has it larger


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{ } loop\nshowpage\n%%EOF\n",
        b"\x89HDF\r\n\x1a\n" + bytes(100),
        b"GRIB\0\0\0\1" + bytes(100),
        b"BUFR" + bytes(100),
    ],
    ids=["PostScript", "HDF5", "GRIB", "BUFR"],
)
def test_what_another_program_would_have_to_read_is_no_image(data):
    with pytest.raises(DecodeError, match="not an image that Pillow can read"):
        exact(8).decode(data)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError("out of memory error when reading image file"), OSError(12, "no memory")]
)
def test_lack_of_memory_is_not_the_files_fault(photo_crops, monkeypatch, error):
    def scarce(*arguments):
        raise error

    monkeypatch.setattr("mio_export.preprocess._resized_crop", scarce)
    with pytest.raises(MemoryError):
        exact(160).decode(encoded(photo_crops[0]))


@pytest.mark.parametrize(
    ("size", "format", "expected"),
    [((64, 64), "JPEG", False), ((128, 200), "JPEG", True), ((127, 500), "JPEG", False), ((400, 400), "PNG", False)],
)
def test_only_large_jpegs_can_be_scaled(photo_crops, size, format, expected):
    data = encoded(photo_crops[0].resize(size), format)
    assert exact(32).can_scale(data) is expected
    assert exact(32).can_scale(data[:40]) is False
