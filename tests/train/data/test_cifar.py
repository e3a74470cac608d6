import pickle

import numpy as np
import pytest
from torchvision import datasets

from mio_export.errors import GateError, MioError
from mio_export.train.data import open_data


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize(("kind", "peer"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_images_labels_and_names_are_torchvisions(fake_set, kind, peer, monkeypatch):
    root = fake_set(kind)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # knows the real set's hashes
    data = open_data(root)
    for part, is_train in ((data.train, True), (data.test, False)):
        theirs = peer(root, train=is_train)
        np.testing.assert_array_equal(np.stack([part.read(index) for index in range(len(part))]), theirs.data)
        assert part.labels.tolist() == theirs.targets
        assert list(data.class_names) == theirs.classes


def test_batches_written_by_python_3_are_read_too(fake_set):
    path = fake_set("cifar10") / "cifar-10-batches-py" / "data_batch_2"
    before = open_data(path.parent.parent).train
    batch = pickle.loads(path.read_bytes(), encoding="latin1")
    path.write_bytes(pickle.dumps(batch, protocol=4))
    after = open_data(path.parent.parent).train
    np.testing.assert_array_equal(after.images, before.images)


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(fake_set, tmp_path):
    root = fake_set("cifar10")
    path = root / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(pickle.dumps({"data": Evil(tmp_path / "ran")}))
    with pytest.raises(GateError, match=r"data_batch_4 is refused: its pickle asks for builtins\.eval, .* arrays only"):
        open_data(root)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_batch_that_is_cut_off_is_named(fake_set, share):
    root = fake_set("cifar100")
    path = root / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        MioError, match=r"cifar-100-python/train is damaged or cut off \(.*\); fetch it again"
    ) as raised:
        open_data(root)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": np.zeros((8, 3071), np.uint8)}, "no uint8 rows of 3,072 values under 'data'"),
        ({"data": np.zeros((8, 3072))}, "no uint8 rows of 3,072 values under 'data'"),
        ({"labels": list(range(7))}, "8 images and 7 labels"),
        ({"labels": [10] * 8}, "a label outside 0 to 9"),
        ({"labels": "12345678"}, "no list of numbers under 'labels'"),
    ],
)
def test_a_batch_with_other_contents_is_named(fake_set, changes, reason):
    root = fake_set("cifar10")
    path = root / "cifar-10-batches-py" / "data_batch_1"
    batch = pickle.loads(path.read_bytes(), encoding="latin1") | changes
    path.write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(MioError, match=rf"data_batch_1 is damaged or cut off \({reason}\)"):
        open_data(root)
