"""A model given away in one file: what loads it, what it says, and that a changed one is refused."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import pixelrnn
from cli import export
from models import exported
from models.base import ImageModel
from models.checkpoint import load, read
from tests.cases import build, every_kind, given, images
from tests.commands import SHORT, refused

SMALL = pixelrnn.PixelCNN(1, 4, 3, 4, hidden=4, layers=1)


@pytest.fixture
def file(tmp_path) -> Path:
    """A model that was saved from Python."""
    SMALL.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved/model.safetensors"


def test_what_a_run_trained_is_the_same_wherever_its_export_is_loaded(call, tmp_path, monkeypatch, capsys):
    own = *SHORT, "model=pixel_cnn", f"dataset.root={tmp_path}", "evaluate_images=40"
    assert call("train", *own, "hydra.run.dir=first")[0] == 0
    assert call("train", *own, f"init_from={tmp_path / 'first'}", "hydra.run.dir=run")[0] == 0
    assert call("evaluate", "checkpoint=run", "out=before.json")[0] == 0
    assert export.main(["run", "out=given.safetensors"]) == 0
    said = capsys.readouterr().out
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.move("given.safetensors", fresh)
    monkeypatch.chdir(fresh)
    assert call("evaluate", "checkpoint=given.safetensors", "out=after.json")[0] == 0
    assert call("sample", "checkpoint=given.safetensors", "n=4", "npy=a.npy")[0] == 0
    assert call("sample", "checkpoint=../run/best.pt", "n=4", "npy=b.npy")[0] == 0
    before, after = (json.loads(path.read_text()) for path in (tmp_path / "before.json", Path("after.json")))
    assert before["nats"] == after["nats"] and Path("a.npy").read_bytes() == Path("b.npy").read_bytes()

    given, here = read("given.safetensors"), pixelrnn.dataset({"name": "digits"}).test.batch(slice(0, 9))[0].long()
    nats = load("../run/best.pt").log_prob(here)
    for model in (load("given.safetensors"), pixelrnn.ImageModel.from_pretrained("given.safetensors")):
        assert torch.equal(model.log_prob(here), nats) and not model.training
    assert given["config"]["dataset"] == {"name": "digits", "root": None} and given["config"]["init_from"] is None
    assert given["step"] == read("../run/best.pt")["step"] and f"{sum(p.numel() for p in model.parameters()):,}" in said
    with safetensors.safe_open("given.safetensors", "pt") as file:
        assert str(tmp_path) not in str(file.metadata())  # nothing of this machine
    refused(call("sample", "checkpoint=given.safetensors", "label=1"), ["label", "without classes"])


def test_half_precision_is_half_the_size_and_nearly_the_same_model(call, tmp_path):
    own = *SHORT, "model=pixel_cnn", f"dataset.root={tmp_path}", "evaluate_images=40", "hydra.run.dir=run"
    assert call("train", *own)[0] == 0
    assert export.main(["run", "out=whole.safetensors"]) == export.main(["run", "out=half.safetensors", "--half"]) == 0
    whole, half = load("whole.safetensors"), load("half.safetensors")
    here = pixelrnn.dataset({"name": "digits"}).test.batch(slice(0, 9))[0].long()
    for (name, weight), rounded in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(weight.half().float(), rounded) and rounded.dtype == torch.float32, name
    assert not torch.equal(whole.log_prob(here), half.log_prob(here))
    torch.testing.assert_close(whole.log_prob(here), half.log_prob(here), rtol=1e-3, atol=0)
    headers = sum(len(str(texts(Path(f"{name}.safetensors"))[0])) for name in ("whole", "half"))
    sizes = [Path(f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.5 * sizes[0] + headers
    status, _, said = call("evaluate", "checkpoint=half.safetensors")
    assert status == 0, said
    with pytest.raises(ValueError, match=r"--half: expected weights up to 65,504, found 100,000 in w$"):
        export.halved("w", torch.tensor([1.0, -1e5]))


@every_kind
def test_a_model_is_saved_and_rebuilt_from_python(case, tmp_path):
    model, folder = build(case), tmp_path / "a/b"
    model.save_pretrained(folder)
    again, x = type(model).from_pretrained(folder), images(model, 2)
    assert again.config == model.config == json.loads((folder / "config.json").read_text())
    assert torch.equal(again.log_prob(x, **given(model, 2)), model.log_prob(x, **given(model, 2)))
    assert torch.equal(
        load(folder / "model.safetensors").log_prob(x, **given(model, 2)), again(x, **given(model, 2)).neg()
    )


@pytest.mark.parametrize("part", ["header", "weights", "end"])
def test_a_changed_file_is_refused(part, file):
    content = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    at = {"header": content.index(b"hidden") + 10, "weights": size + 5, "end": len(content) - 1}[part]
    for bit in range(8):
        changed = content.copy()
        changed[at] ^= 1 << bit
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"model.safetensors: expected an exported model, found "):
            read(file)
    file.write_bytes(content)
    load(file)


def texts(file: Path) -> tuple[dict[str, str], dict]:
    with safetensors.safe_open(file, "pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("format", '"other"', "another format"),
        ("model", "[1]", "expected model to be a config"),
        ("model", "[" * 500 + "]" * 500, "too deep"),
        ("model", '{"_target_": "os.system"}', "expected models.DiagBiLSTM"),
        ("model", '{"_target_": "models.PixelCNN", "hidden": 100000}', "more than its weights hold"),
        ("run", '{"config": {}, "step": 1, "best_val": {}}', "expected config to be a run's config, or none"),
        ("run", "{}", "'config'"),
    ],
)
def test_what_a_header_with_a_right_checksum_claims_is_checked(name, text, words, file):
    said, weights = texts(file)
    said |= {name: text}
    del said["sha256"]
    said["sha256"] = exported.checksum(said, weights)
    file.write_bytes(safetensors.torch.save(weights, said))
    with pytest.raises(ValueError, match=f"^{file}: expected ") as error:
        load(file)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    for content in (b"", b"PK\3\4", b"\xff" * 100, (1 << 40).to_bytes(8, "little"), safetensors.torch.save({})):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=r"other.safetensors: expected an exported model, found "):
            load(other)


def test_without_a_run_there_is_no_data_set_to_evaluate_on(call, file):
    refused(call("evaluate", f"checkpoint={file}"), ["model.safetensors", "exported from a run"])
    assert call("sample", f"checkpoint={file.parent}", "n=2")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out=a.safetensors"], "nowhere: expected a checkpoint, found none"),
        ([".", "out=a.safetensors"], "expected best.pt"),
        (["saved", "out=a.pt"], "expected out=NAME.safetensors"),
        (["saved", "out=nowhere/a.safetensors"], "expected a folder nowhere"),
        (["saved", "out=a.safetensors"], "a run, or a checkpoint of one"),
    ],
)
def test_mistakes(arguments, words, file, monkeypatch, capsys):
    monkeypatch.chdir(file.parent.parent)
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not Path("a.safetensors").exists()


def test_a_class_of_ones_own_is_not_saved(tmp_path):
    class Own(pixelrnn.PixelCNN):
        pass

    with pytest.raises(ValueError, match=r"expected DiagBiLSTM, .*, found Own"):
        Own(1, 4, 3, 4, 4, 1).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_another_class_is_refused(file):
    with pytest.raises(ValueError, match="expected a RowLSTM, found a PixelCNN"):
        pixelrnn.RowLSTM.from_pretrained(file.parent)


def test_the_hub(tmp_path, monkeypatch):
    """A model is published as files that `from_pretrained` takes; the hub itself is a folder here."""
    hub = pytest.importorskip("huggingface_hub", reason="pip install -e '.[hub]'")

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, exist_ok, private):
            assert exist_ok and private
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, revision: str(tmp_path / name / file))
    monkeypatch.chdir(tmp_path)
    Path("card.md").write_text("# A model")
    address = SMALL.push_to_hub("me/digits", card="card.md", token="secret", private=True)
    assert address == "https://hub/me/digits" and Path("me/digits/README.md").read_text() == "# A model"
    Path("me").rename("elsewhere")
    with pytest.raises(FileNotFoundError):
        ImageModel.from_pretrained("me/digits", revision="main")
    Path("elsewhere").rename("me")
    monkeypatch.chdir("me")  # where there is no folder of that name
    assert torch.equal(ImageModel.from_pretrained("me/digits", revision="main").stem.weight, SMALL.stem.weight)
