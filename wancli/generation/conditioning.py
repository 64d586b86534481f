"""Input pictures and videos as arguments of diffusers' pipelines."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from wancli.catalog.tasks import Task
from wancli.planning.inputs import SQUARE, VIDEOS, WHOLE, InputFiles
from wancli.video.images import fit_image, open_image
from wancli.video.read import read_frames


def read_pictures(task: Task, inputs: InputFiles, *, size: tuple[int, int]) -> Mapping[str, Any]:
    """Read pictures, and videos as lists of pictures, by the pipeline's argument names.

    Those of the video itself are scaled and cropped to its (width, height). Raises InputError.
    """
    arguments: dict[str, Any] = {}
    for name, paths in inputs.named().items():
        if name in VIDEOS:
            pictures = [Image.fromarray(frame) for frame in read_frames(paths[0])]
        else:
            pictures = [open_image(path) for path in paths]
        fitted = [_fitted(name, picture, size) for picture in pictures]
        several = name in VIDEOS or task.inputs[name] == "reference_images"
        arguments[task.inputs[name]] = fitted if several else fitted[0]
    if "background_video" in arguments:
        arguments["mode"] = "replace"
    return arguments


def _fitted(name: str, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if name in WHOLE:
        return picture
    return fit_image(picture, (min(picture.size),) * 2 if name in SQUARE else size)
