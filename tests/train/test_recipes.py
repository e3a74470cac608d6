import pytest

from mio_export.errors import UsageError
from mio_export.train import plan_training, recipe_names, resolve_recipe, train
from mio_export.train.loader import EpochBatches

KINDS = {
    "cifar100": "cifar100",
    "cifar10": "cifar10",
    "stl10": "stl10",
    "tiny-imagenet": "tiny-imagenet",
    "fashion-mnist": "fashion-mnist",
    "imagenet": "imagefolder",
    "folder": "folder",
}
FAST = [name for name in recipe_names() if "imagenet" not in name or "tiny" in name]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in recipe_names() if name not in FAST]


def data_of(name, fake_set):
    """A tiny set in the format that a recipe is for."""
    return fake_set(next(kind for part, kind in KINDS.items() if part in name))


@pytest.mark.parametrize("name", [*FAST, *LARGE])
def test_every_recipe_can_be_planned_and_takes_two_steps_on_its_own_format(name, fake_set, tmp_path, monkeypatch):
    data = data_of(name, fake_set)
    planned = plan_training(resolve_recipe(name, {}), data)
    assert planned.num_steps == planned.steps_per_epoch * planned.recipe.epochs
    num_images = planned.num_images
    batch_size = 4 if planned.recipe.backbone.startswith("resnet50") else num_images // 2
    settings = [f"batch_size={batch_size}", "schedule_epochs=1", "precision=fp32", "warmup_share=0"]
    recipe = resolve_recipe(name, {"epochs": 1}, settings)
    monkeypatch.setattr(EpochBatches, "__len__", lambda self: 2)
    monkeypatch.setattr("mio_export.train.training.NUM_CLEAN", 4)  # a ResNet-50 takes its time
    result = train(recipe, data, tmp_path / "run")
    assert result.metrics["step"] == 2
    assert result.encoder.preprocess.image_size == planned.recipe.image_size


def test_the_wide_form_doubles_every_channel():
    narrow, wide = (resolve_recipe(name, {}) for name in ("minc-imagenet", "minc-imagenet-2x"))
    differing = {k for k, v in narrow.to_dict().items() if v != wide.to_dict()[k]}
    assert differing == {"backbone"}
    sizes = [plan_training(recipe, None) for recipe in (narrow, wide)]
    assert [plan.embedding_dim for plan in sizes] == [2048, 4096]
    assert sizes[0].num_encoder_parameters == 23_508_032  # ResNet-50 without its classifier
    assert sizes[1].num_encoder_parameters == pytest.approx(4 * sizes[0].num_encoder_parameters, rel=0.01)


def test_a_file_of_ones_own_may_extend_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: resnet18-cifar10\nloss: {temperature: 0.3}\n")
    recipe = resolve_recipe(str(path), {"seed": 4}, ["epochs=7"])
    assert (recipe.backbone, recipe.loss, recipe.seed, recipe.epochs) == ("resnet18", {"temperature": 0.3}, 4, 7)
    (tmp_path / "next.yaml").write_text("extends: mine.yaml\noptimizer: lars\n")
    assert resolve_recipe(str(tmp_path / "next.yaml"), {}).optimizer == "lars"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: [", "is not YAML"),
        ("- mio", "must hold settings"),
        ("", "must hold settings"),
        ("extends: mine.yaml", "in a circle"),
        ("extends: resnet18-cifar11", r"no recipe 'resnet18-cifar11'; did you mean resnet18-cifar10\?"),
        ("learning_rat: 1", r"unknown setting 'learning_rat'; did you mean learning_rate\?"),
        ("optimizer: adam", "optimizer"),
        ("{optimizer: lars, weight_decay: 0}", "lars needs weight_decay above 0"),
        ("{accumulate: 2}", "accumulate would change the loss of mio, which compares all images of a batch"),
        ("{accumulate: 2, objective: minc}", "second moment"),
        ("{schedule_epochs: 2, epochs: 3}", r"schedule_epochs must be at least epochs \(3\), got 2"),
        ("{stored_size: 20, image_size: 32}", r"stored_size must be at least image_size \(32\), got 20"),
    ],
)
def test_a_bad_recipe_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        resolve_recipe(str(tmp_path / "mine.yaml"), {})
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"mine\.yaml cannot be read: No such file"):
        resolve_recipe(str(tmp_path / "mine.yaml"), {})


def test_a_plan_without_data_needs_a_size():
    with pytest.raises(UsageError, match="takes image_size and channels from the images; name them: --data DIR"):
        plan_training(resolve_recipe("folder", {}), None)


def test_a_dry_run_prints_all_and_writes_nothing(mio, fake_set, tmp_path, monkeypatch):
    data, here = fake_set("cifar10"), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = mio("train", "mio-cifar10", "--data", data, "--dry-run", "--set", "batch_size=20")
    assert result.code == 0, result.err
    for expected in ("optimizer", '"lars"', "views.preset", "23,500,352 parameters", "images, 2 batches", "500 steps"):
        assert expected in result.out, result.out
    assert list(here.iterdir()) == []
