"""Parameters and FLOPs of a Wan transformer and of its encoders, in closed form.

FLOPs are two for every multiplication and addition, as torch.utils.flop_counter counts them, of
matrix products, attention and convolutions; what is done element by element is not counted.
"""

from dataclasses import astuple, dataclass
from itertools import pairwise

from wancli.catalog.wan import FaceEncoder, ImageEncoder, TextEncoder, Transformer


@dataclass(frozen=True)
class Flops:
    """FLOPs, by what computes them: the rates differ."""

    matmul: int = 0
    attention: int = 0
    convolution: int = 0
    small_convolution: int = 0  # as torch tells them apart: see vae_cost.py

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> "Flops":
        return Flops(*(times * flops for flops in astuple(self)))

    @property
    def flops(self) -> int:
        """All together."""
        return self.matmul + self.attention + self.convolution + self.small_convolution


NO_FLOPS = Flops()


@dataclass(frozen=True)
class Forward:
    """What one forward is given, in tokens."""

    tokens: int
    keys: int  # that self-attention sees, its own tokens included
    text: int
    image: int = 0
    known: bool = False  # the keys and values of text, image and face were computed before
    timesteps: int = 1  # rows of the time embedder; TI2V-5B has one for each token
    frames: int = 1  # latent frames, which Wan-Animate's faces go with


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def block_parameters(t: Transformer) -> int:
    """Parameters of one block: two attentions, the feed-forward, a norm, and a table."""
    d = t.dim
    attention = 4 * linear(d, d) + 2 * d
    added = 2 * linear(d, d) + d if t.added_kv else 0
    feed_forward = linear(d, t.ffn) + linear(t.ffn, d)
    return 2 * attention + added + feed_forward + 2 * d + 6 * d


def transformer_parameters(t: Transformer) -> int:
    """Parameters of the transformer, all."""
    d = t.dim
    time = linear(t.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    text = linear(t.text_dim, d) + linear(d, d)
    ends = linear(t.patch * t.in_channels, d) + linear(d, t.patch * t.out_channels) + 2 * d
    image = 0
    if t.image_dim:
        projections = linear(t.image_dim, t.image_dim) + linear(t.image_dim, d)
        image = 2 * t.image_dim + projections + 2 * d + t.image_positions * t.image_dim
    vace = 0
    if t.vace_blocks:
        vace = t.vace_blocks * (block_parameters(t) + linear(d, d)) + linear(d, d)
        vace += linear(t.patch * t.vace_channels, d)
    face = face_parameters(t, t.face) if t.face else 0
    return t.layers * block_parameters(t) + time + text + ends + image + vace + face


def wide_parameters(t: Transformer) -> int:
    """Those that diffusers keeps in float32, whatever the dtype: time, tables, norms."""
    d = t.dim
    blocks = t.layers + t.vace_blocks
    image = 2 * t.image_dim + 2 * d if t.image_dim else 0
    motion = t.face.out_dim * t.face.motion_dim if t.face else 0
    return linear(t.freq_dim, d) + linear(d, d) + blocks * 8 * d + 2 * d + image + motion


def quantized_bytes(t: Transformer, *, element_bytes: int) -> tuple[int, int]:
    """What 8 bits a weight spare, of one block and of all, less a float32 scale for every row.

    Of the linear layers in the blocks; VACE's blocks have one more each, and the first has two.
    """
    d, pairs = t.dim, 10 if t.added_kv else 8
    weights, rows = pairs * d * d + 2 * d * t.ffn, pairs * d + t.ffn + d
    block = weights * (element_bytes - 1) - 4 * rows
    hints = (t.vace_blocks + 1) * (d * d * (element_bytes - 1) - 4 * d) if t.vace_blocks else 0
    return block, (t.layers + t.vace_blocks) * block + hints


def face_parameters(t: Transformer, face: FaceEncoder) -> int:
    """Wan-Animate's pose and face branches."""
    d, hidden = t.dim, face.hidden_dim
    adapter = 4 * linear(d, d) + 2 * t.head_dim
    encoder = linear(3 * face.out_dim, hidden * face.heads) + 2 * linear(3 * hidden, hidden)
    encoder += linear(hidden, d) + d
    channels = face.channels
    motion = linear(3, channels[0]) + 16 * channels[-1] * face.style_dim
    for inp, out in pairwise(channels):
        motion += linear(9 * inp, inp) + linear(9 * inp, out) + inp * out
    motion += (face.linears - 1) * linear(face.style_dim, face.style_dim)
    motion += linear(face.style_dim, face.motion_dim) + face.out_dim * face.motion_dim
    pose = linear(t.patch * t.out_channels, d)
    return pose + t.layers // face.every * adapter + encoder + motion


def forward_work(t: Transformer, given: Forward) -> Flops:
    """One forward of one video."""
    d, s, told = t.dim, given.tokens, given.text + given.image
    blocks = t.layers + t.vace_blocks
    matmul = blocks * (12 * s * d * d + 4 * s * d * t.ffn)
    attention = blocks * 4 * s * (given.keys + told) * d
    matmul += 2 * given.timesteps * (t.freq_dim * d + 7 * d * d)
    matmul += 2 * s * t.patch * d * (t.in_channels + t.out_channels)
    if t.vace_blocks:
        matmul += 2 * s * d * ((t.vace_blocks + 1) * d + t.patch * t.vace_channels)
    if not given.known:
        matmul += blocks * 4 * told * d * d + 2 * given.text * d * (t.text_dim + d)
        matmul += 2 * given.image * t.image_dim * (t.image_dim + d)
    work = Flops(matmul, attention)
    return work + _face_work(t, t.face, given) if t.face else work


def _face_work(t: Transformer, face: FaceEncoder, given: Forward) -> Flops:
    d, s, adapters = t.dim, given.tokens, t.layers // face.every
    pose = 2 * (s - s // given.frames) * t.patch * t.out_channels * d
    work = Flops(pose + adapters * 4 * s * d * d, adapters * 4 * s * face.tokens * d)
    if given.known:
        return work
    keys = adapters * 4 * given.frames * face.tokens * d * d
    return work + Flops(keys) + _motion_work(t, face, 4 * (given.frames - 1) - 3)


def _motion_work(t: Transformer, face: FaceEncoder, frames: int) -> Flops:
    """The faces of `frames` video frames, to motion tokens."""
    channels, size = face.channels, face.size
    cells = 3 * channels[0] * size**2
    for inp, out in pairwise(channels):
        cells += 9 * inp * inp * size**2  # then two paths that blur (16 taps) and halve
        cells += 16 * inp * ((size + 1) ** 2 + (size - 1) ** 2)
        cells += 10 * inp * out * (size // 2) ** 2
        size //= 2
    cells += 16 * channels[-1] * face.style_dim
    style, motion, hidden = face.style_dim, face.motion_dim, face.hidden_dim
    products = (face.linears - 1) * style**2 + style * motion + motion**2 * face.out_dim
    half = (frames - 1) // 2 + 1
    quarter = (half - 1) // 2 + 1
    time = 3 * face.heads * hidden * (frames * face.out_dim + (half + quarter) * hidden)
    products = frames * products + face.heads * quarter * hidden * t.dim
    return Flops(matmul=2 * products, convolution=2 * (frames * cells + time))


def moved_bytes(t: Transformer, tokens: int, *, element_bytes: int) -> int:
    """About what one forward reads and writes element by element: norms, gates, rotation, GELU.

    Counted on the meta device for 1.3B, 14B and the demo, which agree within 2 %. Of narrow numbers
    it is more, because they are widened and narrowed again.
    """
    each = 305 if element_bytes == 4 else 367
    return (t.layers + t.vace_blocks) * tokens * (each * t.dim + 2 * element_bytes * t.ffn)


def text_parameters(e: TextEncoder) -> int:
    """Parameters of the text encoder."""
    inner = e.heads * e.head_dim
    layer = 4 * e.dim * inner + 3 * e.dim * e.ffn + 2 * e.dim + e.buckets * e.heads
    return e.vocabulary * e.dim + e.layers * layer + e.dim


def text_work(e: TextEncoder, tokens: int) -> Flops:
    """One prompt, padded to `tokens`."""
    inner = e.heads * e.head_dim
    matmul = 2 * tokens * (4 * e.dim * inner + 3 * e.dim * e.ffn)
    return Flops(e.layers * matmul, e.layers * 4 * tokens * tokens * inner)


def image_parameters(e: ImageEncoder) -> int:
    """Parameters of the image encoder."""
    layer = 4 * linear(e.dim, e.dim) + linear(e.dim, e.ffn) + linear(e.ffn, e.dim) + 4 * e.dim
    return 3 * e.patch**2 * e.dim + (1 + e.tokens) * e.dim + e.layers * layer + 4 * e.dim


def image_work(e: ImageEncoder, *, layers: int | None = None) -> Flops:
    """One image."""
    matmul = 2 * e.tokens * e.dim * (4 * e.dim + 2 * e.ffn)
    attention = 4 * e.tokens**2 * e.dim
    count = e.layers if layers is None else layers
    patches = 2 * (e.tokens - 1) * 3 * e.patch**2 * e.dim
    return Flops(count * matmul + patches, count * attention)


def activation_bytes(
    t: Transformer, tokens: int, *, element_bytes: int, per_token_time: bool = False
) -> int:
    """What one forward holds at most, beside weights and keys and values.

    In the feed-forward four tensors of [tokens, dim] and two of [tokens, ffn], or, of narrow
    numbers, in a norm one and five in float32; the rotary tables; VACE's hints. Attention is taken
    to hold no scores, as every fused kernel does.
    """
    feed_forward = element_bytes * (4 * t.dim + 2 * t.ffn)
    norm = (element_bytes + 5 * 4) * t.dim if element_bytes < 4 else 0
    rotary = 2 * 4 * t.head_dim
    vace = element_bytes * (t.vace_blocks + 1) * t.dim if t.vace_blocks else 0
    time = (7 * element_bytes + 6 * 4) * t.dim if per_token_time else 0
    return tokens * (max(feed_forward, norm) + rotary + vace + time)
