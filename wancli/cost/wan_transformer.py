"""Parameters and FLOPs of a Wan transformer and its encoders, in closed form.

A multiply-add is two FLOPs, as in torch.utils.flop_counter. Matrix products, attention and
convolutions count; elementwise operations do not.
"""

from dataclasses import dataclass
from itertools import pairwise
from operator import add

from wancli.catalog.wan import FaceEncoder, ImageEncoder, TextEncoder, Transformer


@dataclass(frozen=True)
class Flops:
    """FLOPs by kind of operation, because throughput differs."""

    matmul: int = 0
    attention: int = 0
    convolution: int = 0
    small_convolution: int = 0  # see MKLDNN_MIN_INPUT in wan_vae.py

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*map(add, self.counts, other.counts))

    def __mul__(self, times: int) -> "Flops":
        return Flops(*(times * flops for flops in self.counts))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """By kind; dataclasses.astuple takes ten times as long, and a plan adds thousands."""
        return self.matmul, self.attention, self.convolution, self.small_convolution

    @property
    def flops(self) -> int:
        """Sum over all kinds."""
        return sum(self.counts)


NO_FLOPS = Flops()


@dataclass(frozen=True)
class Forward:
    """Inputs of one forward, in tokens."""

    tokens: int
    keys: int  # attended to by self-attention, including the tokens themselves
    text: int
    image: int = 0
    reuses_prompt_kv: bool = False  # K/V of text, image and face are cached
    timesteps: int = 1  # rows of the time embedder; one per token in TI2V-5B
    frames: int = 1  # latent frames, for Wan-Animate's face tokens


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def block_parameters(t: Transformer) -> int:
    """Parameters of one block: two attentions, feed-forward, norm and modulation table."""
    d = t.dim
    attention = 4 * linear(d, d) + 2 * d
    added = 2 * linear(d, d) + d if t.added_kv else 0
    feed_forward = linear(d, t.ffn) + linear(t.ffn, d)
    return 2 * attention + added + feed_forward + 2 * d + 6 * d


def transformer_parameters(t: Transformer) -> int:
    """All parameters of the transformer."""
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
    """Parameters that diffusers keeps in float32: time embedder, modulation tables, norms."""
    d = t.dim
    blocks = t.layers + t.vace_blocks
    image = 2 * t.image_dim + 2 * d if t.image_dim else 0
    motion = t.face.out_dim * t.face.motion_dim if t.face else 0
    return linear(t.freq_dim, d) + linear(d, d) + blocks * 8 * d + 2 * d + image + motion


def quantized_bytes(
    t: Transformer, *, element_bytes: int, dynamic: bool = False
) -> tuple[int, int]:
    """Bytes saved by 8-bit weights in (one block, all blocks), net of a float32 scale per row.

    Only linear layers in blocks are quantized; a VACE block has one more, the first VACE block two.
    `dynamic` leaves out those, and the projections of the prompt.
    """
    d, pairs = t.dim, 10 if t.added_kv else 8
    if dynamic:
        pairs = 6
    weights, rows = pairs * d * d + 2 * d * t.ffn, pairs * d + t.ffn + d
    block = weights * (element_bytes - 1) - 4 * rows
    layers = t.vace_blocks + 1 if t.vace_blocks and not dynamic else 0
    hints = layers * (d * d * (element_bytes - 1) - 4 * d)
    return block, (t.layers + t.vace_blocks) * block + hints


def face_parameters(t: Transformer, face: FaceEncoder) -> int:
    """Parameters of Wan-Animate's pose and face branches."""
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


def forward_flops(t: Transformer, forward: Forward) -> Flops:
    """FLOPs of one forward at batch size 1."""
    d, s, prompt = t.dim, forward.tokens, forward.text + forward.image
    blocks = t.layers + t.vace_blocks
    matmul = blocks * (12 * s * d * d + 4 * s * d * t.ffn)
    attention = blocks * 4 * s * (forward.keys + prompt) * d
    matmul += 2 * forward.timesteps * (t.freq_dim * d + 7 * d * d)
    matmul += 2 * s * t.patch * d * (t.in_channels + t.out_channels)
    if t.vace_blocks:
        matmul += 2 * s * d * ((t.vace_blocks + 1) * d + t.patch * t.vace_channels)
    if not forward.reuses_prompt_kv:
        matmul += blocks * 4 * prompt * d * d + 2 * forward.text * d * (t.text_dim + d)
        matmul += 2 * forward.image * t.image_dim * (t.image_dim + d)
    work = Flops(matmul, attention)
    return work + _face_work(t, t.face, forward) if t.face else work


def _face_work(t: Transformer, face: FaceEncoder, forward: Forward) -> Flops:
    d, s, adapters = t.dim, forward.tokens, t.layers // face.every
    pose = 2 * (s - s // forward.frames) * t.patch * t.out_channels * d
    work = Flops(pose + adapters * 4 * s * d * d, adapters * 4 * s * face.tokens * d)
    if forward.reuses_prompt_kv:
        return work
    keys = adapters * 4 * forward.frames * face.tokens * d * d
    return work + Flops(keys) + _motion_work(t, face, 4 * (forward.frames - 1) - 3)


def _motion_work(t: Transformer, face: FaceEncoder, frames: int) -> Flops:
    """FLOPs of encoding the faces of `frames` video frames to motion tokens."""
    channels, size = face.channels, face.size
    cells = 3 * channels[0] * size**2
    for inp, out in pairwise(channels):
        cells += 9 * inp * inp * size**2  # then two paths that blur (16 taps) and downsample
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


def memory_traffic(t: Transformer, tokens: int, *, element_bytes: int) -> int:
    """Approximate bytes of elementwise memory traffic in one forward: norms, gates, RoPE, GELU.

    Counted on the meta device for 1.3B, 14B and the demo, which agree within 2 %. 16-bit dtypes
    cost more per element because they are upcast and downcast.
    """
    each = 305 if element_bytes == 4 else 367
    return (t.layers + t.vace_blocks) * tokens * (each * t.dim + 2 * element_bytes * t.ffn)


def text_parameters(e: TextEncoder) -> int:
    """Parameters of the text encoder."""
    inner = e.heads * e.head_dim
    layer = 4 * e.dim * inner + 3 * e.dim * e.ffn + 2 * e.dim + e.buckets * e.heads
    return e.vocabulary * e.dim + e.layers * layer + e.dim


def text_flops(e: TextEncoder, tokens: int) -> Flops:
    """FLOPs of one prompt, padded to `tokens`."""
    inner = e.heads * e.head_dim
    matmul = 2 * tokens * (4 * e.dim * inner + 3 * e.dim * e.ffn)
    return Flops(e.layers * matmul, e.layers * 4 * tokens * tokens * inner)


def image_parameters(e: ImageEncoder) -> int:
    """Parameters of the image encoder."""
    layer = 4 * linear(e.dim, e.dim) + linear(e.dim, e.ffn) + linear(e.ffn, e.dim) + 4 * e.dim
    return 3 * e.patch**2 * e.dim + (1 + e.tokens) * e.dim + e.layers * layer + 4 * e.dim


def image_flops(e: ImageEncoder) -> Flops:
    """FLOPs of one image."""
    matmul = 2 * e.tokens * e.dim * (4 * e.dim + 2 * e.ffn)
    attention = 4 * e.tokens**2 * e.dim
    patches = 2 * (e.tokens - 1) * 3 * e.patch**2 * e.dim
    return Flops(e.layers * matmul + patches, e.layers * attention)


def activation_bytes(
    t: Transformer, tokens: int, *, element_bytes: int, per_token_time: bool = False
) -> int:
    """Peak activation bytes of one forward, excluding weights and cached K/V.

    The peak is the feed-forward (four [tokens, dim] and two [tokens, ffn] tensors) or, in 16 bits,
    a norm (one [tokens, dim] and five in float32); plus rotary tables and VACE's hints. Attention
    is assumed to be a fused kernel that never materializes its scores.
    """
    feed_forward = element_bytes * (4 * t.dim + 2 * t.ffn)
    norm = (element_bytes + 5 * 4) * t.dim if element_bytes < 4 else 0
    rotary = 2 * 4 * t.head_dim
    vace = element_bytes * (t.vace_blocks + 1) * t.dim if t.vace_blocks else 0
    time = (7 * element_bytes + 6 * 4) * t.dim if per_token_time else 0
    return tokens * (max(feed_forward, norm) + rotary + vace + time)
