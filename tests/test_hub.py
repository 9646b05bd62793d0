"""minisd.sources: data sets of the Hub, with and without a network."""

import io
import socket

import datasets
import huggingface_hub
import PIL.Image
import pytest

from minisd.data import load_images, to_tensor


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test starts with an empty cache, and none reaches the network."""
    monkeypatch.setenv("MINISD_CACHE", str(tmp_path / "cache"))

    def refuse(*args, **options):
        raise AssertionError("a test went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def colour_of(dataset, row=0):
    """The mean colour of a picture, 0 to 255."""
    return ((to_tensor(dataset)[row].mean((1, 2)) + 1) * 127.5).round().int().tolist()


@pytest.fixture
def hub(monkeypatch):
    """A Hub that answers for "somebody/flowers" and counts how often it is asked."""
    calls = []
    picture = io.BytesIO()
    PIL.Image.new("RGB", (20, 16), (10, 200, 30)).save(picture, "PNG")
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "photo": datasets.Image(),
            "sentences": [datasets.Value("string")],
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["rose", "daisy"]),
        }
    )
    pictures = [{"bytes": picture.getvalue(), "path": None}] * 4 + [{"bytes": b"broken", "path": None}, None]
    rows = {
        "id": range(6),
        "photo": pictures,
        "sentences": [["one", "two"]] * 6,
        "caption": [f"flower {i}" for i in range(6)],
        "kind": [1] * 6,
    }

    def load_dataset(source, config=None, split=None):
        calls.append((source, config, split))
        if split not in ("train", "validation"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'validation'].")
        return datasets.Dataset.from_dict({name: list(values) for name, values in rows.items()}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, source, timeout: None)
    return calls


def test_hub(hub):
    with pytest.warns(UserWarning, match=r"Skipped 2 of 6 pictures in 'somebody/flowers': row 4 \(unreadable\), row 5"):
        dataset = load_images("somebody/flowers", size=8)
    assert hub == [("somebody/flowers", None, "train")]
    assert dataset["caption"][:] == [f"flower {i}" for i in range(4)]
    assert dataset.features["label"].names == ["rose", "daisy"] and dataset["label"][:] == [1] * 4
    assert colour_of(dataset) == [10, 200, 30]
    with pytest.warns(UserWarning, match="Skipped 2"):
        load_images("somebody/flowers", size=8)
    assert len(hub) == 1  # the second time from the cache, with no question to the Hub


@pytest.mark.filterwarnings("ignore:Skipped")
def test_hub_columns_splits_and_configurations(hub):
    dataset = load_images("somebody/flowers", size=8, split="valid", caption_column="sentences", image_column="photo", config="small", n=5)
    assert hub == [("somebody/flowers", "small", "valid"), ("somebody/flowers", "small", "validation")]
    assert set(dataset["caption"]) == {"one"}
    with pytest.raises(ValueError, match="no column of pictures called 'caption'; its columns are id, photo"):
        load_images("somebody/flowers", image_column="caption")
    with pytest.raises(ValueError, match="no column 'txt' for the captions"):
        load_images("somebody/flowers", caption_column="txt")
    with pytest.raises(ValueError, match="'somebody/flowers' has no split 'novel'.*'train', 'validation'"):
        load_images("somebody/flowers", split="novel")


def nobody_answers(*arguments, **options):
    raise socket.gaierror(-2, "Name or service not known")


def test_hub_without_network(hub, monkeypatch):
    """The real client, and a computer that finds no address."""
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nobody_answers)
    with pytest.raises(ConnectionError, match="Hub cannot be reached.*load_images.'postcards'.*load_images.FOLDER.") as caught:
        load_images("somebody/flowers")
    assert "\n" not in str(caught.value)


def test_hub_in_offline_mode(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Hub cannot be reached"):
        load_images("somebody/flowers")


def test_hub_lost_in_the_middle(hub, monkeypatch):
    def lost(*arguments, **options):
        raise ConnectionError("Couldn't reach 'somebody/flowers' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", lost)
    with pytest.raises(ConnectionError, match="Hub cannot be reached"):
        load_images("somebody/flowers")


def test_hub_does_not_know_the_name(hub, monkeypatch):
    def unknown(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'somebody/weeds' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(FileNotFoundError, match="no folder 'somebody/weeds', and no data set of that name on the Hub"):
        load_images("somebody/weeds")


def test_other_errors_of_the_hub_stay_as_they_are(hub, monkeypatch):
    def wrong(*arguments, **options):
        raise ValueError("Config name is missing. Please pick one among ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", wrong)
    with pytest.raises(ValueError, match="Config name is missing"):
        load_images("somebody/flowers")
