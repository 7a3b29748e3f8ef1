"""Write the checkpoints of this folder: run at commit 56268ad, from its root: `python make.py tests/checkpoints`

One a model, head and condition, each after four steps of training on images of noise (8×8, three colours, five
levels), and what that commit said of them: nats of six images, and four images drawn.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, "")
from models.checkpoint import load
from models.sampling import sample

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
generator = np.random.default_rng(0)
np.save(out / "images.npy", generator.integers(0, 5, (40, 8, 8, 3), dtype=np.uint8))
np.save(out / "labels.npy", np.arange(40) % 3)
images = torch.from_numpy(generator.integers(0, 5, (6, 3, 8, 8), dtype=np.uint8))
expected = {"images": images}
for model in ("pixel_cnn", "gated_pixel_cnn", "row_lstm", "diag_bilstm", "multi_scale"):
    for head in ("softmax", "logistic_mixture"):
        for classes in (0, 3):
            name = f"{model}-{head}" + ("-classes" if classes else "")
            run = out / "run" / name
            subprocess.run(
                [
                    sys.executable,
                    "train.py",
                    f"model={model}",
                    "model.hidden=6",
                    "model.layers=2",
                    f"model.head={head}",
                    "model.head_features=8",
                    "model.mixtures=3",
                    f"model.classes={classes}",
                    "model.skip=true",
                    *(["model.base=row_lstm", "model.conditional=gated_pixel_cnn"] if model == "multi_scale" else []),
                    "dataset=npy",
                    f"dataset.path={out / 'images.npy'}",
                    "dataset.levels=5",
                    f"dataset.root={out / 'root'}",
                    f"dataset.labels={out / 'labels.npy'}",
                    "device=cpu",
                    "steps=4",
                    "warmup=1",
                    "batch_size=8",
                    "optimizer=rmsprop",
                    "optimizer.lr=0.01",
                    "ema=0.5",
                    "sample_every=0",
                    "evaluate_every=4",
                    "save_every=4",
                    f"hydra.run.dir={run}",
                ],
                check=True,
            )
            (run / "last.pt").rename(out / f"{name}.pt")
            net = load(out / f"{name}.pt").eval()
            label = torch.arange(6) % 3 if classes else None
            with torch.no_grad():
                nats = -net.log_prob(images.long(), label)
            pixels = sample(net, 4, seed=1, label=None if label is None else label[:4])
            expected[name] = {"nats": nats, "pixels": pixels}
torch.save(expected, out / "expected.pt")
