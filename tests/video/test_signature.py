"""A signature that shows a picture to be wancli's own, and unchanged."""

import io
from pathlib import Path

import pytest
from PIL import Image

from wancli.video.signature import is_signed, sign


def picture(kind: str, frames: int = 2) -> bytes:
    images = [Image.new("RGB", (16, 8), (40 * n, 9, 9)) for n in range(frames)]
    content = io.BytesIO()
    more = {} if kind == "PNG" else {"save_all": True, "append_images": images[1:]}
    images[0].save(content, kind, **more)
    return content.getvalue()


@pytest.mark.parametrize(("kind", "frames"), [("PNG", 1), ("GIF", 2), ("WEBP", 1), ("WEBP", 2)])
def test_a_signed_picture_is_valid_and_recognized_by_the_names_of_its_videos(
    tmp_path: Path, kind: str, frames: int
):
    content, videos = picture(kind, frames), [Path("a.mp4"), Path("b.mp4")]
    path = tmp_path / "picture"
    path.write_bytes(sign(content, videos))
    with Image.open(path) as signed:
        signed.verify()  # also the CRC of every chunk of a PNG
    with Image.open(path) as signed, Image.open(io.BytesIO(content)) as plain:
        assert signed.format == kind
        assert getattr(signed, "n_frames", 1) == getattr(plain, "n_frames", 1)
        assert signed.convert("RGB").tobytes() == plain.convert("RGB").tobytes()
    assert is_signed(path, [Path("elsewhere/a.mp4"), Path("b.mp4")])
    assert not is_signed(path, videos[:1])
    assert not is_signed(path, videos[::-1])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_a_modified_picture_is_not_recognized(tmp_path: Path, kind: str):
    content, videos = picture(kind), [Path("a.mp4")]
    signed, path = sign(content, videos), tmp_path / "picture"
    middle = len(content) // 2
    changed = signed[:middle] + bytes([signed[middle] ^ 1]) + signed[middle + 1 :]
    for other in (content, changed, signed[:-1], signed + b"\0", signed[:20], b"", b"mine"):
        path.write_bytes(other)
        assert not is_signed(path, videos)
    assert not is_signed(tmp_path, videos)
    assert not is_signed(tmp_path / "none", videos)
