"""First steps with wancli in Python, cell by cell: with the demo model, some seconds on a CPU.

Run it as a script, or open it as a notebook in an editor that knows `# %%`.
"""

# %% A video is an array of frames, and the record of how it was made.
import numpy as np

import wancli

PROMPT = "a red circle moving right on a black background"

video = wancli.generate(PROMPT, model="demo", seed=1, steps=4, size=(48, 48), num_frames=9)
print(video.frames.shape, video.frames.dtype, f"seed {video.seed}")  # (9, 48, 48, 3) uint8 seed 1
print(f"denoised in {video.record['timings']['denoise_s']:.2f} s")

# %% Before something large: does it fit, and what would make it fit?
print(wancli.plan(model="wan2.1-t2v-14b", size="832x480", gpu="24GB"))

# %% A loaded model keeps its weights. Here a grid of seeds by guidance scales.
model = wancli.load("demo", steps=4, size=(48, 48), num_frames=9)
rows = [
    np.concatenate([model.generate(PROMPT, seed=s, guidance_scale=g).frames for s in (1, 2)], 2)
    for g in (1.0, 5.0)
]
print(np.concatenate(rows, 1).shape)  # (9, 96, 96, 3)


# %% Progress is a callback.
def show(event: object) -> None:
    """Print each denoising step."""
    if isinstance(event, wancli.Step):
        print(f"step {event.index + 1} of {event.total}, sigma {event.sigma:.3f}")


model.generate(PROMPT, seed=1, steps=2, progress=show)

# %% A rollout yields its chunks as they are made; stop whenever you like.
for chunk in model.rollout(PROMPT, chunks=100, seed=1):
    print(f"chunk {chunk.index}: {len(chunk.frames)} frames, mean {chunk.frames.mean():.1f}")
    if chunk.index == 2:
        break

# %% With `output` there is an MP4 as well, with its record inside: `wancli show first.mp4`.
print(model.generate(PROMPT, seed=1, output="first.mp4", overwrite=True).path)

# %% What cannot work is refused before anything runs, with a hint.
try:
    model.generate(PROMPT, size=(50, 50))
except wancli.PlanError as error:
    print(f"{error} Hint: {error.hint}")

# %% Give the memory back; `with wancli.load(...) as model:` does it by itself.
model.close()
