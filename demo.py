"""A page to play with: `pip install -e '.[demo]' && python demo.py`, then http://127.0.0.1:7860 in a browser."""

import os
import tempfile
from functools import partial
from pathlib import Path

from checks import check
from cli import command
from cli import demo as computed
from cli.runs import PRETRAINED, find_model

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks nothing of the internet
HERE = "127.0.0.1"  # other machines do not see it
FIRST = "binary_mnist-diag_bilstm"
INK = 9  # half of the brush's width, of 280 pixels


def shelf(checkpoint: str | None) -> dict[str, Path]:
    """The models that the page offers, by name: the one that is asked for, then those that come with the project."""
    found = {path.stem: path for path in sorted(PRETRAINED.glob("*.safetensors"))}
    found = {FIRST: found.pop(FIRST), **found} if FIRST in found else found
    if checkpoint is not None:
        path = find_model(checkpoint)
        found = {path.stem if path.suffix == ".safetensors" else str(path): path, **found}
    return computed.fitting(found)


def build(models: dict[str, Path]):
    """The page. `models` are what it offers, the first one at first."""
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("expected gradio, found none: pip install -e '.[demo]'") from None

    def model_of(name: str):
        return computed.model_of(models[name])

    def label_of(text: str) -> int | None:
        return int(text) if text.isdecimal() else None

    @partial(computed.said, error=gr.Error)
    def complete(name, sketch, keep, temperature, guidance, label, seed):
        return computed.complete(
            model_of(name), sketch["composite"], keep, temperature, guidance, label_of(label), int(seed)
        )

    @partial(computed.said, error=gr.Error)
    def score(name, path, label):
        return computed.score(model_of(name), path, label_of(label))

    @partial(computed.said, error=gr.Error)
    def compress(name, path, label):
        content, shown, text = computed.compressed(model_of(name), path, label_of(label))
        file = Path(tempfile.mkdtemp()) / "image.prnn"
        file.write_bytes(content)
        return shown, str(file), text

    def choices(name: str):
        """The keys of the model: which classes there are, and whether it can be guided."""
        model = model_of(name)
        classes = ["any", *map(str, range(model.classes))]
        of_class = gr.update(choices=classes, value="any", visible=bool(model.classes))
        return of_class, gr.update(visible=bool(model.label_dropout), value=1.0)

    def asks_for_a_picture(where: str, what: str):
        """A place for a file and the button under it, in a column."""
        with gr.Column():
            file = gr.File(file_types=["image"], type="filepath", label="a picture of yours", elem_id=where)
            return file, gr.Button(what, variant="primary", elem_id=what.lower())

    first, picture = next(iter(models)), {"format": "png", "buttons": ["download", "fullscreen"]}
    with gr.Blocks(title="PixelRNN") as page:
        gr.Markdown("# PixelRNN\nModels that know the probability of an image, pixel by pixel.")
        with gr.Row():
            name = gr.Dropdown([*models], value=first, label="model", elem_id="model")
            label = gr.Dropdown(["any"], value="any", label="class", elem_id="class", visible=False)
        with gr.Tab("Draw"), gr.Row():
            with gr.Column():
                brush = gr.Brush(default_size=INK, colors=["#000000"], color_mode="fixed")
                sketch = gr.Sketchpad(
                    canvas_size=(280, 280),
                    brush=brush,
                    height=420,
                    type="numpy",
                    label="take the brush and draw the upper half of a digit",
                )
                keep = gr.Slider(0, 1, 0.5, label="rows that are known, from the top", elem_id="keep")
                temperature = gr.Slider(0, 1.5, 1, label="temperature", elem_id="temperature")
                guidance = gr.Slider(0, 4, 1, label="guidance", elem_id="guidance", visible=False)
                seed = gr.Number(0, label="seed", precision=0, elem_id="seed")
                button = gr.Button("Complete", variant="primary", elem_id="complete")
            with gr.Column():
                drawn = gr.Image(label="completions", elem_id="drawn", **picture)
                bits = gr.Image(label="bits of each pixel", elem_id="bits", **picture)
                about = gr.Markdown(elem_id="about")
        with gr.Tab("Score"), gr.Row():
            scored, score_button = asks_for_a_picture("scored", "Score")
            with gr.Column():
                seen = gr.Image(label="as the model sees it", elem_id="seen", **picture)
                where = gr.Image(label="bits of each pixel", elem_id="where", **picture)
                score_text = gr.Markdown(elem_id="score_text")
        with gr.Tab("Compress"), gr.Row():
            given, compress_button = asks_for_a_picture("given", "Compress")
            with gr.Column():
                back = gr.Image(label="decoded again", elem_id="back", **picture)
                file = gr.File(label="the file", elem_id="file")
                compress_text = gr.Markdown(elem_id="compress_text")
        keys = [name, sketch, keep, temperature, guidance, label, seed]
        gr.on([button.click, temperature.release, keep.release, guidance.release], complete, keys, [drawn, bits, about])
        gr.on([page.load, name.change], choices, [name], [label, guidance])
        score_button.click(score, [name, scored, label], [seen, where, score_text])
        compress_button.click(compress, [name, given, label], [back, file, compress_text])
    return page


def main(cfg) -> None:
    check("port", cfg.port, int, 1, 65535)
    page = build(shelf(cfg.checkpoint))
    size = f"{computed.LARGEST >> 20}mb"
    page.launch(server_name=HERE, server_port=cfg.port, inbrowser=cfg.open, max_file_size=size, ssr_mode=False)


if __name__ == "__main__":
    command.run("demo", main)
