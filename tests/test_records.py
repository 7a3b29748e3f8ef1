"""What is written of runs for people: curves, the table of a sweep, a run's report and model card."""

import base64
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import data
from bench import compare
from cli import report
from cli.plot import curves, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.6, 3.9, [2, 2.5, 3, 3.5]),
        (-3, 4, [-2, 0, 2, 4]),
        (0, 50_000, [0, 10_000, 20_000, 30_000, 40_000, 50_000]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_numbers_in_between(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_curves_are_svg_with_a_line_and_a_name_each():
    series = {"a & <b>": [(0, 1.0), (10, 3.0), (20, math.nan)], "one": [(5, 2.0)], "none": []}
    svg = ElementTree.fromstring(curves(series, "step", "bits/dim"))
    lines = [line.get("points").split() for line in svg.iter(f"{SVG}polyline")]
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert list(map(len, lines)) == [2, 1] and "a & <b>" in texts and "none" not in texts and "bits/dim" in texts
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in lines[0])
    assert x0 < x1 and y0 > y1  # up is more
    assert len(list(svg.iter(f"{SVG}circle"))) == 1


def test_no_curves_say_so():
    assert "no numbers yet" in curves({"a": []}, "step", "nats")


def ended(folder: Path, overrides: list[str], val: float) -> None:
    folder.mkdir(parents=True)
    said = {"overrides": overrides, "command": " ".join(["python train.py", *overrides]), "date": "2025"}
    said |= {"parameters": 1234, "train_seconds": 10 * val}
    for split, value in (("val", val), ("test", val + 0.1)):
        said |= {f"{split}_bits_per_dim": value, f"{split}_bits_per_dim_standard_error": 0.01}
    (folder / "summary.json").write_text(json.dumps(said))
    lines = [{"step": step, "val_bits_per_dim": val + 1 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "val')


@pytest.fixture
def sweep(tmp_path):
    for k, (depth, seed, val) in enumerate([(1, 0, 2.0), (1, 1, 2.2), (2, 0, 1.5), (2, 1, 1.7)]):
        ended(tmp_path / f"{k}-layers={depth}", ["steps=9", f"model.layers={depth}", f"seed={seed}"], val)
    failed = {"overrides": ["steps=9", "model.layers=2", "seed=2"], "error": "no | memory"}
    (tmp_path / "10-failed").mkdir()
    (tmp_path / "10-failed/failed.json").write_text(json.dumps(failed))
    begun = tmp_path / "9-begun"
    (begun / ".hydra").mkdir(parents=True)
    (begun / ".hydra/overrides.yaml").write_text("- steps=9\n- model.layers=3\n- seed=0\n")
    (begun / "metrics.jsonl").write_text("")
    return tmp_path


def lines_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_a_sweep_is_a_line_for_all_seeds_the_best_first(sweep, capsys):
    assert compare.main([str(sweep)]) == 0
    header, _, *rows = lines_of((sweep / "compare.md").read_text())
    assert header == ["model.layers", "runs", "parameters", "val bits/dim", "test bits/dim", "seconds", "said"]
    error = f"{np.std([1.5, 1.7], ddof=1) / 2**0.5:.4f}"
    assert rows[0] == ["2", "2", "1,234", f"1.6000 ± {error}", f"1.7000 ± {error}", "16", ""]
    assert rows[1][:2] == ["1", "2"] and rows[1][3].startswith("2.1000")
    assert sorted(rows[2:]) == [
        ["2", "", "", "", "", "", "seed=2: no \\| memory"],
        ["3", "0", "", "", "", "", "1 not ended"],
    ]
    lines = list(ElementTree.parse(sweep / "compare.svg").getroot().iter(f"{SVG}polyline"))
    assert len(lines) == 2 and "compare.svg" in capsys.readouterr().out  # a curve for all seeds


def test_a_curve_is_the_mean_over_seeds_where_all_have_a_value():
    runs = [compare.Run(Path(), {}, None, None, points, {}) for points in ([(1, 2.0), (2, 1.0)], [(1, 4.0)], [])]
    assert compare.mean_curve(runs) == [(1, 3.0)] and compare.mean_curve(runs[2:]) == []


def test_what_is_kept_of_a_sweep_says_how_it_was_made(sweep, tmp_path):
    (sweep / "multirun.yaml").write_text("hydra:\n  overrides:\n    task: [steps=9, 'model.layers=1,2', 'seed=0,1']\n")
    path = sweep / "3-layers=2/summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "a CPU", "date": "2026"}))
    assert compare.main([str(sweep), "--out", str(tmp_path / "kept")]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["command"] == "python train.py -m steps=9 model.layers=1,2 seed=0,1" and kept["device"] == "a CPU"
    assert kept["rows"][0]["model.layers"] == "2" and (tmp_path / "kept.svg").read_text().startswith("<svg")


def test_what_a_run_was_not_given_is_what_its_config_has(tmp_path):
    for k, (given, clip) in enumerate([(["clip=0.1", "seed=0"], 0.1), (["seed=0"], 1.0), (["clip=0.1"], 0.1)]):
        ended(tmp_path / f"{k}", ["optimizer.lr=0.1", *given], 2.0 + k * k)
        (tmp_path / f"{k}/.hydra").mkdir()
        (tmp_path / f"{k}/.hydra/config.yaml").write_text(f"clip: {clip}\nseed: 0\nmodel: {{layers: 2}}\n")
    assert compare.main([str(tmp_path)]) == 0
    header, _, *rows = lines_of((tmp_path / "compare.md").read_text())
    assert header[:2] == ["clip", "runs"] and [row[:2] for row in rows] == [["1.0", "1"], ["0.1", "2"]]
    (run, *_) = compare.runs_below(tmp_path)
    assert [run.value(key) for key in ("model.layers", "model", "steps", "optimizer.lr")] == ["2", "", "", "0.1"]


def test_what_is_kept_of_runs_that_were_no_sweep_has_the_command_of_each(tmp_path):
    overrides = (["experiment=mnist_pixel_cnn", "steps=9"], ["experiment=mnist_row_lstm"])
    for k, arguments in enumerate(overrides):
        ended(tmp_path / f"runs/{k}", arguments, 2.0)
    (tmp_path / "runs/0/summary.json").unlink()
    (tmp_path / "runs/0/.hydra").mkdir()  # it was stopped
    (tmp_path / "runs/0/.hydra/overrides.yaml").write_text("".join(f"- {argument}\n" for argument in overrides[0]))
    assert compare.main([str(tmp_path / "runs"), "--out", str(tmp_path / "kept")]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["command"].splitlines() == [" ".join(["python train.py", *arguments]) for arguments in overrides]


def test_each_run_by_itself_has_the_error_over_its_images(sweep):
    compare.main([str(sweep), "--each"])
    header, _, *rows = lines_of((sweep / "compare.md").read_text())
    assert header[:2] == ["model.layers", "seed"] and len(rows) == 6
    assert rows[0][:2] == ["2", "0"] and rows[0][4] == "1.5000 ± 0.0100"
    assert len(list(ElementTree.parse(sweep / "compare.svg").getroot().iter(f"{SVG}polyline"))) == 4


def test_a_folder_without_runs_is_a_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path)])
    assert stopped.value.code == 2 and "found no run below it" in capsys.readouterr().err


def test_a_report_is_one_file_with_curves_pictures_and_numbers(call):
    short = ["model.hidden=4", "model.layers=1", "model.head_features=8", "steps=4", "evaluate_images=20"]
    status, out, err = call("train", *short, "evaluate_every=2", "sample_every=2", "samples=4", "hydra.run.dir=run")
    assert status == 0, err
    assert "report.html" in out
    text, card = Path("run/report.html").read_text(), Path("run/model_card.md").read_text()
    assert (
        text.count("<figure>") == 4
        and text.count("step 4<") == 2
        and "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    )
    picture = text.split("base64,")[1].split('"')[0]
    assert base64.b64decode(picture) == Path("run/samples/step_000002.png").read_bytes()
    assert "<h2>Samples" in text and "<h2>Completions" in text
    said = json.loads(Path("run/summary.json").read_text())
    number = f"{said['test_bits_per_dim']:.4f} ± {said['test_bits_per_dim_standard_error']:.4f}"
    for written in (text, card):
        assert number in written and said["command"] in written and "ema: 0.999" in written
    assert card.startswith("---\nlibrary_name: pixelrnn\n") and "averaged ones" in card
    config = Path("run/.hydra/config.yaml")
    config.write_text(config.read_text().replace("ema: 0.999", "ema: 0.0"))
    assert "not averaged" in report.model_card(report.Run(Path("run")))
    assert said["overrides"] == [*short, "evaluate_every=2", "sample_every=2", "samples=4"]


def test_completions_keep_the_upper_half_of_validation_images(call):
    short = ["model=pixel_cnn", "model.hidden=4", "model.layers=1", "model.head_features=8", "evaluate_images=20"]
    status, _, err = call("train", *short, "steps=1", "sample_every=1", "samples=4", "completed=3", "hydra.run.dir=run")
    assert status == 0, err
    with Image.open("run/completions/step_000001.png") as shown:
        assert shown.size == (8 * 58, 3 * 58)
        images = np.asarray(shown).reshape(3, 58, 8, 58)[:, 1:-1:7, :, 1:-1:7].swapaxes(1, 2)  # (row column h w)
    x, _ = data.build({"name": "digits"}).val.batch(slice(3))
    assert np.array_equal(images[:, 0], np.round(x[:, 0].numpy() * (255 / 16)))
    assert (images[:, 1:, :4] == images[:, :1, :4]).all()
    assert (images[:, 1, 4:] == images[0, 1, 4, 0]).all()  # grey
    assert len(np.unique(images[:, 2:, 4:].reshape(18, -1), axis=0)) == 18  # drawn, each by itself


def test_no_pictures_of_completions_on_request(call):
    short = ["model=pixel_cnn", "model.hidden=4", "model.layers=1", "model.head_features=8", "evaluate_images=20"]
    status, _, err = call("train", *short, "steps=1", "sample_every=1", "samples=4", "completed=0", "hydra.run.dir=run")
    assert status == 0, err
    assert Path("run/samples").is_dir() and not Path("run/completions").exists()
    assert "<h2>Completions" not in Path("run/report.html").read_text()


def test_a_run_that_has_not_ended_has_a_report(tmp_path, capsys):
    lines = [{"step": 5, "train_bits_per_dim": 2.5}, {"step": 6, "val_bits_per_dim": 2.25}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "has not ended" in text and "2.25" in text and not (tmp_path / "model_card.md").exists()
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nowhere")])
