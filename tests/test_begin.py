"""A training that begins with trained weights, of a model that may have had fewer layers."""

import pytest
import torch

from models.begin import begin_with
from models.training_step import TrainingStep
from tests.cases import ARCHITECTURES, CASES, build, given, images

SIZES = {"channels": 1, "levels": 4, "height": 4, "width": 4, "hidden": 8}


def nats(model, x, condition) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x, **condition)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("case", [*ARCHITECTURES, "multi_scale-given", "video-given"])
def test_a_model_with_more_layers_begins_as_the_same_function(case, layers, skip):
    trained, model = (build(CASES[case], **SIZES, skip=skip, layers=n) for n in (2, layers))
    x, condition = images(trained, 5), given(trained, 5)
    begin_with(model, trained)
    expected = nats(trained, x, condition)
    torch.testing.assert_close(nats(model, x, condition), expected)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    step = TrainingStep(model.train(), torch.optim.SGD(model.parameters()))
    inputs = x, condition.get("label"), *([condition["cond"]] if "cond" in condition else [])
    for _ in range(2):  # the further layers' first weights have a gradient only after what is behind them has moved
        step(*inputs, lr=0.1)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if ".up." in name or ".to_head." in name} <= moved
    assert len(moved) > 0.8 * len(before)


@pytest.mark.parametrize(
    "mine, theirs",
    [
        ({"hidden": 12}, {}),
        ({"layers": 2}, {"layers": 3}),
        ({"layers": 3, "residual": False}, {"layers": 2, "residual": False}),
        ({"skip": True}, {}),
        ({"levels": 5}, {}),
        ({"channels": 2}, {}),
    ],
)
def test_other_weights_are_refused(mine, theirs):
    for case in ARCHITECTURES:
        trained, model = (build(CASES[case], **{**SIZES, **sizes}) for sizes in (theirs, mine))
        with pytest.raises(ValueError, match="state_dict"):
            begin_with(model, trained)


def test_images_of_another_size():
    trained, model = (build(CASES["row_lstm"], **{**SIZES, "width": width}) for width in (4, 9))
    begin_with(model, trained)
    for mine, expected in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, expected)
